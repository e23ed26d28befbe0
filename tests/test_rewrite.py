"""The pruning proof: a cut network equals the dense one with its dropped channels silenced."""

import copy

import pytest
import torch
from torch import nn

from models.spec import ModelSpec
from models.yolo import Model
from utils.checkpoint import build_checkpoint, load_detector, save_checkpoint, save_final
from utils.config import load_yaml
from utils.pruning.channel_groups import SHORTCUT_RULES, find_channel_groups
from utils.pruning.keep_masks import select_keep_masks
from utils.pruning.rewrite import CUT_TOLERANCE, check_cut, mask_model, prune_model
from utils.pruning.slimming import gamma_importance

ANCHORS = [10, 13, 16, 30, 33, 23]
CONV = [-1, 1, "Conv", [16, 3, 2]]
WIDE = [-1, 1, "Conv", [24, 3, 2]]
UPSAMPLE = [-1, 1, "nn.Upsample", ["None", 2, "nearest"]]
CONCAT = "Concat", [1]

# name -> rows, rows that the head reads
BLOCKS = {
    "plain convolutions": ([CONV, WIDE], [1]),
    "C3 with shortcuts": ([CONV, [-1, 2, "C3", [32]], CONV], [2]),
    "C3 without shortcuts": ([CONV, [-1, 2, "C3", [32, False]], CONV], [2]),
    "C3 read by a concat": ([CONV, [-1, 1, "C3", [16]], [[0, 1], 1, *CONCAT], WIDE], [3]),
    "concat read by a C3": ([CONV, [0, 1, "Conv", [24]], [[1, 0], 1, *CONCAT], [-1, 1, "C3", [16]]],
                            [3]),
    "concat of concats": ([CONV, [0, 1, "Conv", [8]], [[0, 1], 1, *CONCAT], [[2, 1], 1, *CONCAT],
                           WIDE], [4]),
    "SPPF": ([CONV, [-1, 1, "SPPF", [32, 5]]], [1]),
    "SPP": ([CONV, [-1, 1, "SPP", [32, [3, 5]]]], [1]),
    "upsample and concat": ([CONV, WIDE, UPSAMPLE, [[-1, 0], 1, *CONCAT], WIDE], [4]),
    "bilinear upsample": ([CONV, WIDE, [-1, 1, "nn.Upsample", ["None", 2, "bilinear"]], CONV], [3]),
    "bottleneck row": ([CONV, [-1, 1, "Bottleneck", [16]], WIDE], [2]),
    "bottleneck row without shortcut": ([CONV, [-1, 1, "Bottleneck", [16, False]], WIDE], [2]),
    "bottleneck across a concat": ([CONV, [0, 1, "Conv", [8]], [[0, 1], 1, *CONCAT],
                                    [-1, 2, "Bottleneck", [24]], WIDE], [4]),
    "bottleneck over a tensor held twice": ([CONV, [-1, 1, "Conv", [8]], [[1, 1], 1, *CONCAT],
                                             [-1, 1, "Bottleneck", [16]], WIDE], [4]),
    "repeated convolutions": ([[-1, 3, "Conv", [16, 3, 2]], CONV], [1]),
    "repeated bottlenecks": ([CONV, [-1, 3, "Bottleneck", [24]], WIDE], [2]),
    "max-pool": ([CONV, [-1, 1, "nn.MaxPool2d", [3, 2, 1]], WIDE], [2]),
    "head of two levels": ([CONV, WIDE, CONV], [1, 2]),
    "head of four levels": ([CONV, WIDE, CONV, WIDE, CONV], [1, 2, 3, 4]),
    "head that reads a concat": ([CONV, [0, 1, "Conv", [8]], [[0, 1], 1, *CONCAT]], [2]),
}  # fmt: skip


def spec_of(rows, sources=(-1,)):
    return ModelSpec.from_dict(
        {
            "nc": 2,
            "depth_multiple": 1.0,
            "width_multiple": 1.0,
            "anchors": [ANCHORS] * len(sources),
            "backbone": rows,
            "head": [[list(sources), 1, "Detect", ["nc", "anchors"]]],
        }
    )


@torch.no_grad()
def lively(spec, seed=0):
    """A float64 network in eval mode whose weights and statistics all matter."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(tensor, low, high):
        tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)

    model = Model(spec).double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            uniform(module.weight, -1.5, 1.5)
            uniform(module.bias, -0.5, 0.5)
            uniform(module.running_mean, -0.5, 0.5)
            uniform(module.running_var, 0.5, 2.0)
            module.num_batches_tracked.fill_(7)
        elif isinstance(module, nn.Conv2d):
            bound = (6 / module.weight[0].numel()) ** 0.5  # keeps the signal's strength
            uniform(module.weight, -bound, bound)
            if module.bias is not None:
                uniform(module.bias, -1, 1)
    return model


def random_masks(found, seed=0, share=0.5):
    """At least one channel of every prunable group, the others with this chance."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, group in found.prunable.items():
        masks[name] = torch.rand(group.num_channels, generator=generator) < share
        masks[name][int(torch.randint(group.num_channels, (), generator=generator))] = True
    return masks


def image(side=64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(2, 3, side, side, generator=generator, dtype=torch.float64)


@torch.no_grad()
def outputs(model, x):
    predictions, logits = model(x)
    return [predictions, *logits]


def assert_same_outputs(a, b, x):
    for ours, expected in zip(outputs(a, x), outputs(b, x), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)


def assert_proof(model, rule, masks=None, seed=0):
    """Cut, compare with the masked network, and return the slim one."""
    before = copy.deepcopy(model.state_dict())
    found = find_channel_groups(model, rule)
    masks = random_masks(found, seed) if masks is None else masks
    slim, masked = prune_model(model, found, masks), mask_model(model, found, masks)
    x = image()
    assert_same_outputs(slim, masked, x)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} of the old network has changed"
    spread = [logits.std() for logits in outputs(masked, x)[1:]]
    assert min(spread) > 1e-3, "a network without a signal proves nothing"
    return slim


@pytest.mark.parametrize("rule", SHORTCUT_RULES)
@pytest.mark.parametrize(("rows", "sources"), BLOCKS.values(), ids=BLOCKS)
def test_proof_per_block(rows, sources, rule):
    model = lively(spec_of(rows, sources))
    slim = assert_proof(model, rule)
    assert sum(slim.widths().values()) < sum(model.widths().values())


@pytest.mark.parametrize("rule", SHORTCUT_RULES)
@pytest.mark.parametrize("size", ["n", "s", "m", "n6"])
def test_proof_per_network(pytestconfig, size, rule):
    data = load_yaml(pytestconfig.rootpath / "models" / f"yolov5{size}.yaml")
    slim = assert_proof(lively(ModelSpec.from_dict(data)), rule)
    assert Model(slim.spec).widths() == slim.widths()


@pytest.mark.parametrize("rule", SHORTCUT_RULES)
@pytest.mark.parametrize("name", ["C3 with shortcuts", "SPPF", "upsample and concat",
                                  "bottleneck across a concat", "head of two levels"])  # fmt: skip
def test_one_surviving_channel(name, rule):
    """One index must not collapse to 0-d, where a cut raises or takes the wrong axis."""
    model = lively(spec_of(*BLOCKS[name]))
    found = find_channel_groups(model, rule)
    masks = random_masks(found, share=0)
    assert all(int(mask.sum()) == 1 for mask in masks.values())
    slim = assert_proof(model, rule, masks)
    for path, layout in found.outputs.items():
        if found.is_prunable(path):
            assert slim.widths()[path] == len(layout)


def test_a_layer_without_a_strong_channel_keeps_its_strongest(tiny_spec):
    """From the threshold to the cut: no layer ends without a channel, and none stops the run."""
    model = lively(ModelSpec.from_dict(tiny_spec))
    with torch.no_grad():
        model.model.get_submodule("6.cv1").bn.weight.mul_(1e-6)
    found = find_channel_groups(model)
    keep = select_keep_masks(gamma_importance(model, found), 0.3)
    assert keep.floored == ("6.cv1",)
    with torch.no_grad():  # a signal to compare: the layer's own scale does not matter here
        model.model.get_submodule("6.cv1").bn.weight.mul_(1e6)
    assert assert_proof(model, "keep", keep.masks).widths()["6.cv1"] == 1


@pytest.mark.parametrize("rule", SHORTCUT_RULES)
def test_pruning_a_pruned_network(tiny_spec, rule):
    """Shortcuts and ties are still seen the second time."""
    slim = assert_proof(lively(ModelSpec.from_dict(tiny_spec)), rule)
    again = assert_proof(slim, rule, seed=1)
    assert sum(again.widths().values()) < sum(slim.widths().values())
    assert [m.add for m in again.modules() if hasattr(m, "add")] == [True, True, True, False, False]
    before, after = (find_channel_groups(m, rule) for m in (slim, again))
    assert {n: g.producers for n, g in before.groups.items()} == {
        n: g.producers for n, g in after.groups.items()
    }


def test_keeping_everything_is_a_copy(tiny_spec):
    model = lively(ModelSpec.from_dict(tiny_spec))
    same = prune_model(model, find_channel_groups(model), {})
    state = model.state_dict()
    assert list(same.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in same.state_dict().items())
    assert same.widths() == model.widths()
    assert not same.training


def test_batch_norm_settings_and_counters_survive(tiny_spec):
    """eps and momentum are not PyTorch's defaults; a rebuilt network must not fall back to them."""
    model = lively(ModelSpec.from_dict(tiny_spec))
    model.model[3].bn.eps, model.model[3].bn.momentum = 1e-5, 0.1
    slim = assert_proof(model, "keep")
    pairs = [
        (bn, slim.get_submodule(name))
        for name, bn in model.named_modules()
        if isinstance(bn, nn.BatchNorm2d)
    ]
    assert len(pairs) == len(model.widths())
    for old, new in pairs:
        assert (new.eps, new.momentum) == (old.eps, old.momentum)
        assert int(new.num_batches_tracked) == 7
    assert slim.model[0].bn.eps == 1e-3
    assert slim.model[0].bn.momentum == 0.03


def test_save_and_load_give_the_same_network(tiny_spec, tmp_path):
    """Through our checkpoint, in full and in half precision."""
    slim = assert_proof(lively(ModelSpec.from_dict(tiny_spec)).float().double(), "keep").float()
    content = build_checkpoint(slim, ("a", "b", "c"))
    save_checkpoint(tmp_path / "full.pt", content)
    loaded = load_detector(tmp_path / "full.pt").model
    assert loaded.widths() == slim.widths()
    x = image().float()
    for ours, expected in zip(outputs(loaded, x), outputs(slim, x), strict=True):
        assert torch.equal(ours, expected)
    save_final(tmp_path / "half.pt", content, slim.state_dict())
    half = load_detector(tmp_path / "half.pt").model
    for name, tensor in half.state_dict().items():
        expected = slim.state_dict()[name]
        if name.endswith("anchors"):
            torch.testing.assert_close(tensor, expected)
        else:
            assert torch.equal(tensor, expected.half().to(expected.dtype)), name


def test_the_slim_network_trains(tiny_spec):
    slim = assert_proof(lively(ModelSpec.from_dict(tiny_spec)), "keep").float().train()
    logits = slim(image().float())
    sum(level.square().mean() for level in logits).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in slim.parameters())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mode_and_precision_stay(tiny_spec, training, dtype):
    model = Model(ModelSpec.from_dict(tiny_spec)).to(dtype).train(training)
    found = find_channel_groups(model)
    slim = prune_model(model, found, random_masks(found))
    assert slim.training == training
    assert {p.dtype for p in slim.parameters()} == {dtype}


def test_masks_can_be_given_for_some_groups_only(tiny_spec):
    model = lively(ModelSpec.from_dict(tiny_spec))
    mask = torch.arange(8) < 3
    slim = assert_proof(model, "keep", {"0": mask})
    changed = {path for path, width in slim.widths().items() if width != model.widths()[path]}
    assert changed == {"0"}


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"0": torch.zeros(8, dtype=torch.bool)}, "0: no channel is kept"),
        ({"0": torch.ones(7, dtype=torch.bool)}, r"expected torch\.bool \[8\]"),
        ({"0": torch.ones(8)}, "float32"),
        ({"2.cv1": torch.ones(8, dtype=torch.bool)}, "no prunable channel group"),
        ({"99": torch.ones(8, dtype=torch.bool)}, "no prunable channel group"),
        ({"image": torch.ones(3, dtype=torch.bool)}, "no prunable channel group"),
    ],
    ids=["empty", "size", "float", "frozen", "unknown", "image"],
)
@pytest.mark.parametrize("function", [prune_model, mask_model])
def test_wrong_masks_are_refused(tiny_spec, masks, message, function):
    model = Model(ModelSpec.from_dict(tiny_spec))
    with pytest.raises(ValueError, match=message):
        function(model, find_channel_groups(model), masks)


def swap_inputs(model):
    weight = model.model.get_submodule("2.cv1").conv.weight
    weight.copy_(weight.roll(1, 1))


def change_mean(model):
    model.model[3].bn.running_mean[0] += 0.01


def lose_a_shortcut(model):
    model.model[4].m[1].add = False


def spoil(model):
    model.model[1].bn.weight[0] = float("nan")


class TestCheckCut:
    @pytest.fixture
    def pair(self, tiny_spec):
        model = lively(ModelSpec.from_dict(tiny_spec))
        found = find_channel_groups(model)
        masks = random_masks(found)
        return prune_model(model, found, masks), mask_model(model, found, masks)

    def test_passes_a_right_cut_also_of_float32_networks(self, pair):
        slim, masked = (model.float() for model in pair)
        assert check_cut(slim, masked, image().float()) < CUT_TOLERANCE / 100
        assert slim.model[0].conv.weight.dtype == torch.float32, "the arguments stay as they are"

    @pytest.mark.parametrize("damage", [swap_inputs, change_mean, lose_a_shortcut])
    def test_finds_a_wrong_cut(self, pair, damage):
        slim, masked = pair
        with torch.no_grad():
            damage(slim)
        assert check_cut(slim, masked, image()) > CUT_TOLERANCE * 1e3

    def test_finds_a_wrong_cut_in_a_fresh_network_whose_signal_is_weak(self, pytestconfig):
        data = load_yaml(pytestconfig.rootpath / "models/yolov5n.yaml")
        model = Model(ModelSpec.from_dict(data))
        found = find_channel_groups(model)
        masks = random_masks(found)
        slim, masked = prune_model(model, found, masks), mask_model(model, found, masks)
        assert check_cut(slim, masked, image()) < CUT_TOLERANCE / 100
        with torch.no_grad():
            swap_inputs(slim)
        assert check_cut(slim, masked, image()) > CUT_TOLERANCE * 1e3

    def test_does_not_pass_nan(self, pair):
        slim, masked = pair
        with torch.no_grad():
            spoil(slim)
        assert not check_cut(slim, masked, image()) <= CUT_TOLERANCE


@pytest.mark.gpu
def test_proof_on_cuda(tiny_spec):
    model = lively(ModelSpec.from_dict(tiny_spec)).cuda()
    found = find_channel_groups(model)
    masks = random_masks(found)
    slim, masked = prune_model(model, found, masks), mask_model(model, found, masks)
    assert {p.device.type for p in slim.parameters()} == {"cuda"}
    assert check_cut(slim, masked, image()) < CUT_TOLERANCE
