"""What dropped channels contributed is kept: exactly where it can be, and better than nothing."""

import copy

import pytest
import torch
from test_rewrite import BLOCKS, assert_same_outputs, image, lively, outputs, random_masks, spec_of

from utils.pruning import compensate as module
from utils.pruning.activations import expected_inputs, measure_inputs
from utils.pruning.channel_groups import SHORTCUT_RULES, conv_block, find_channel_groups
from utils.pruning.compensate import COMPENSATIONS, compensate
from utils.pruning.rewrite import prune_model

POINT = [-1, 1, "Conv", [16, 1, 1]]
# As BLOCKS, but what can be pruned is read by 1x1 convolutions alone.
POINTWISE = {
    "plain convolutions": ([POINT, POINT], [1]),
    "shortcuts": ([[-1, 1, "C3", [32]], POINT], [1]),
    "three shortcuts": ([[-1, 3, "C3", [16]], POINT], [1]),
    "SPPF": ([[-1, 1, "SPPF", [32, 5]], POINT], [1]),
    "SPP": ([[-1, 1, "SPP", [32, [3, 5]]], POINT], [1]),
    "upsample and concat": ([POINT, [-1, 1, "Conv", [24, 1, 2]], [-1, 1, "nn.Upsample",
                             ["None", 2, "nearest"]], [[-1, 0], 1, "Concat", [1]], POINT], [4]),
    "bilinear upsample": ([POINT, [-1, 1, "nn.Upsample", ["None", 2, "bilinear"]], POINT], [2]),
    "max-pool": ([POINT, [-1, 1, "nn.MaxPool2d", [3, 2, 1]], POINT], [2]),
    "bottleneck across a concat": ([POINT, [0, 1, "Conv", [8, 1, 1]], [[0, 1], 1, "Concat", [1]],
                                    [-1, 2, "Bottleneck", [24]], POINT], [4]),
    "tensor held twice": ([POINT, [-1, 1, "Conv", [8, 1, 1]], [[1, 1], 1, "Concat", [1]],
                           [-1, 1, "Bottleneck", [16]], POINT], [4]),
    "head of two levels": ([POINT, [-1, 1, "Conv", [24, 1, 2]]], [0, 1]),
}  # fmt: skip


def pointwise_groups(model, found):
    """Prunable groups that only 1x1 convolutions read."""
    wide = {
        segment.group
        for path, layout in found.inputs.items()
        for segment in layout
        if module.consumer(model, path)[0].kernel_size != (1, 1)
    }
    return set(found.prunable) - wide


@torch.no_grad()
def silence_gammas(model, found, masks):
    """A copy with gamma = 0, and beta as it is, on what goes."""
    silent = copy.deepcopy(model)
    for path, layout in found.outputs.items():
        gamma, first_channel = conv_block(silent, path).bn.weight, 0
        for segment in layout:
            part = gamma[first_channel : first_channel + segment.size]
            if segment.group in masks:
                part[~masks[segment.group]] = 0
            first_channel += segment.size
    return silent


@pytest.mark.parametrize("rule", SHORTCUT_RULES)
@pytest.mark.parametrize(("rows", "sources"), POINTWISE.values(), ids=POINTWISE)
def test_constants_are_exact_where_1x1_convolutions_read_them(rows, sources, rule):
    model = lively(spec_of(rows, sources))
    found = find_channel_groups(model, rule)
    chosen = pointwise_groups(model, found)
    masks = {name: mask for name, mask in random_masks(found).items() if name in chosen}
    if not masks:
        assert rule == "keep"  # everything that only 1x1 read lies at a shortcut
        return
    silent = silence_gammas(model, found, masks)
    slim = prune_model(compensate(silent, found, masks, "constant"), found, masks)
    assert_same_outputs(slim, silent, image())
    # and it is the compensation that does it
    plain = prune_model(compensate(silent, found, masks, "none"), found, masks)
    pairs = zip(outputs(plain, image()), outputs(silent, image()), strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) > 1e-3


@pytest.mark.parametrize("rule", SHORTCUT_RULES)
@pytest.mark.parametrize("kind", ["mean", "linear"])
def test_silent_channels_are_predicted_exactly(rule, kind, monkeypatch):
    """With gamma = 0 the measured and the expected mean are the constant itself."""
    monkeypatch.setattr(module, "RIDGE", 0.0)
    model = lively(spec_of(*POINTWISE["shortcuts"]))
    found = find_channel_groups(model, rule)
    chosen = pointwise_groups(model, found)
    masks = {name: mask for name, mask in random_masks(found).items() if name in chosen}
    silent = silence_gammas(model, found, masks)
    statistics = measure_inputs(silent, found, [image()])
    slim = prune_model(compensate(silent, found, masks, kind, statistics), found, masks)
    for ours, expected in zip(outputs(slim, image()), outputs(silent, image()), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)  # float32 statistics
    if kind == "mean":
        slim = prune_model(compensate(silent, found, masks, kind), found, masks)
        assert_same_outputs(slim, silent, image())


def test_padded_3x3_is_exact_except_at_the_border():
    model = lively(spec_of([POINT, [-1, 1, "Conv", [16, 3, 1]]], [1]))
    found = find_channel_groups(model, "keep")
    masks = {"0": torch.arange(16) < 9}
    silent = silence_gammas(model, found, masks)
    slim = prune_model(compensate(silent, found, masks, "constant"), found, masks)
    with torch.no_grad():
        (ours,), (expected,) = (net(image(16))[1] for net in (slim, silent))  # [B, A, H, W, 5 + K]
    difference = (ours - expected).abs().amax((0, 1, 4))
    assert difference[1:-1, 1:-1].max() < 1e-9
    assert difference[0].max() > 1e-6


@torch.no_grad()
def test_linear_finds_a_channel_that_repeats_others(monkeypatch):
    """A dropped channel that is a kept one times a factor is replaced exactly, 3x3 or not."""
    monkeypatch.setattr(module, "RIDGE", 1e-9)
    model = lively(spec_of([[*POINT[:3], [16, 1, 1]], [-1, 1, "Conv", [16, 3, 1]]], [1]))
    block = conv_block(model, "0")
    for tensor in (block.conv.weight, block.bn.weight, block.bn.bias, block.bn.running_mean,
                   block.bn.running_var):  # fmt: skip
        tensor[7] = tensor[2]
    found = find_channel_groups(model, "keep")
    masks = {"0": torch.arange(16) != 7}
    statistics = measure_inputs(model, found, [image()])
    errors = {}
    for kind in COMPENSATIONS:
        slim = prune_model(compensate(model, found, masks, kind, statistics), found, masks)
        pairs = zip(outputs(slim, image()), outputs(model, image()), strict=True)
        errors[kind] = max(float((a - b).abs().max()) for a, b in pairs)
    assert errors["linear"] < 1e-3 < 0.02 < min(errors[k] for k in ("none", "constant", "mean"))


@torch.no_grad()
def test_each_step_predicts_the_next_layer_better():
    """On the images measured, the input of the convolution behind the cut: none > mean > linear."""
    model = lively(spec_of([POINT, POINT], [1]))
    found = find_channel_groups(model, "keep")
    masks = {"0": torch.arange(16) < 8}
    statistics = measure_inputs(model, found, [image()])
    expected = model.model[1].bn(model.model[1].conv(model.model[0](image())))
    errors = []
    for kind in ("none", "mean", "linear"):
        slim = prune_model(compensate(model, found, masks, kind, statistics), found, masks)
        ours = slim.model[1].bn(slim.model[1].conv(slim.model[0](image())))
        errors.append(float((ours - expected).square().mean()))
    assert errors[0] > 1.05 * errors[1] > 1.05 * 1.05 * errors[2]


@pytest.mark.parametrize("kind", COMPENSATIONS)
@pytest.mark.parametrize(("rows", "sources"), BLOCKS.values(), ids=BLOCKS)
def test_every_block_takes_every_kind(rows, sources, kind):
    """The network itself stays as it is, and what comes out is finite."""
    model = lively(spec_of(rows, sources))
    before = copy.deepcopy(model.state_dict())
    found = find_channel_groups(model, "group")
    masks = random_masks(found)
    statistics = measure_inputs(model, found, [image()])
    slim = prune_model(compensate(model, found, masks, kind, statistics), found, masks)
    assert all(part.isfinite().all() for part in outputs(slim, image()))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    if kind == "none":
        assert_same_outputs(slim, prune_model(model, found, masks), image())


@pytest.mark.parametrize(
    ("kind", "message"),
    [("median", "expected one of none, constant, mean, linear"), ("linear", "needs images")],
)
def test_what_cannot_be_done_is_said(kind, message):
    model = lively(spec_of([POINT, POINT], [1]))
    found = find_channel_groups(model, "keep")
    with pytest.raises(ValueError, match=message):
        compensate(model, found, {"0": torch.arange(16) < 8}, kind, expected_inputs(model, found))
