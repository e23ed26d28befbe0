"""The formula against the truth: cut the network, then count with thop."""

import copy

import pytest
import torch

from models.spec import ModelSpec
from models.yolo import Model
from utils.config import load_yaml
from utils.profile import count_gflops, count_parameters
from utils.pruning.channel_groups import SHORTCUT_RULES, find_channel_groups
from utils.pruning.costs import NetworkCost, kept_counts
from utils.pruning.rewrite import prune_model

ANCHORS = [10, 13, 16, 30, 33, 23]
CONV = [-1, 1, "Conv", [16, 3, 2]]
BILINEAR = [-1, 1, "nn.Upsample", ["None", 2, "bilinear"]]
NEAREST = [-1, 1, "nn.Upsample", ["None", 2, "nearest"]]
CONCAT = "Concat", [1]

# name -> rows, rows that the head reads
NETWORKS = {
    "plain": ([CONV, CONV], [1]),
    "a kernel that is not square in stride": ([[-1, 1, "Conv", [8, 6, 2, 2]], CONV], [0, 1]),
    "without padding": ([[-1, 1, "Conv", [8, 8, 8, 0]]], [0]),
    "repeated": ([[-1, 3, "Conv", [16, 3, 2]], [-1, 2, "Bottleneck", [16]]], [1]),
    "SPP": ([CONV, [-1, 1, "SPP", [32, [3, 5]]], CONV], [2]),
    "max-pool": ([CONV, [-1, 1, "nn.MaxPool2d", [3, 2, 1]], CONV], [2]),
    "upsampled concat": ([CONV, CONV, [0, 1, "Conv", [8, 3, 2]], [[1, 2], 1, *CONCAT], BILINEAR,
                          CONV], [5]),
    "upsampled twice": ([CONV, CONV, CONV, NEAREST, BILINEAR, CONV], [5]),
    "upsampled shortcuts": ([CONV, CONV, [-1, 2, "Bottleneck", [16]], NEAREST, CONV], [4]),
    "upsampled, held twice": ([CONV, CONV, [[1, 1], 1, *CONCAT], [-1, 2, "Bottleneck", [32]],
                               BILINEAR, CONV], [5]),
    "upsampled image": ([NEAREST, CONV, CONV], [2]),
}  # fmt: skip


def build(rows, sources):
    return Model(
        ModelSpec.from_dict(
            {
                "nc": 2,
                "depth_multiple": 1.0,
                "width_multiple": 1.0,
                "anchors": [ANCHORS] * len(sources),
                "backbone": rows,
                "head": [[sources, 1, "Detect", ["nc", "anchors"]]],
            }
        )
    )


def load(pytestconfig, name):
    """A network of `models/`, or yolov5n without the finest level of its head."""
    if name != "two levels":
        return Model(ModelSpec.from_dict(load_yaml(pytestconfig.rootpath / "models" / name)))
    data = load_yaml(pytestconfig.rootpath / "models" / "yolov5n.yaml")
    data["head"][-1][0] = [20, 23]
    data["anchors"] = data["anchors"][1:]
    return Model(ModelSpec.from_dict(data))


def random_masks(found, seed):
    """At least one channel of every prunable group, the others with a chance of each its own."""
    generator = torch.Generator().manual_seed(seed)
    masks = {}
    for name, group in found.prunable.items():
        share = torch.rand((), generator=generator)
        masks[name] = torch.rand(group.num_channels, generator=generator) < share
        masks[name][int(torch.randint(group.num_channels, (), generator=generator))] = True
    return masks


def assert_equal_to_profile(model, rule, seed, imgsz):
    found = find_channel_groups(model, rule)
    cost = NetworkCost(model, found, imgsz)
    masks = random_masks(found, seed)
    for kept in ({}, masks):
        slim, counts = prune_model(model, found, kept), kept_counts(kept)
        assert cost.gflops(counts) == pytest.approx(count_gflops(slim, imgsz), rel=1e-9)
        assert cost.parameters(counts) == count_parameters(slim)
    assert cost.gflops(kept_counts(masks)) < cost.gflops({})
    return slim


@pytest.mark.parametrize("rule", SHORTCUT_RULES)
@pytest.mark.parametrize("name", ["yolov5n.yaml", "yolov5n6.yaml", "two levels"])
def test_whole_networks(pytestconfig, name, rule):
    model = load(pytestconfig, name)
    slim = assert_equal_to_profile(model, rule, seed=0, imgsz=640)
    assert_equal_to_profile(slim, rule, seed=1, imgsz=320)  # a second time


@pytest.mark.parametrize("rows", NETWORKS.values(), ids=NETWORKS)
def test_every_kind_of_row(rows):
    for seed in range(3):
        assert_equal_to_profile(build(*rows), "group", seed, imgsz=96)


@pytest.mark.parametrize("rule", SHORTCUT_RULES)
@pytest.mark.parametrize("activation", ["SiLU", "LeakyReLU", "Hardswish"])
def test_activations(tiny_spec, rule, activation):
    model = Model(ModelSpec.from_dict(tiny_spec | {"activation": activation}))
    assert_equal_to_profile(model, rule, seed=2, imgsz=64)


def test_a_folded_network_has_biases_and_no_batch_norm(tiny_spec):
    model = Model(ModelSpec.from_dict(tiny_spec)).fuse()
    cost = NetworkCost(model, find_channel_groups(model), 64)
    assert cost.gflops({}) == pytest.approx(count_gflops(model, 64), rel=1e-9)
    assert cost.parameters({}) == count_parameters(model)


def test_by_hand():
    """Two convolutions; the first of 8 x 8 cells, the second of 4 x 4, the head there as well."""
    model = build([[-1, 1, "Conv", [16, 3, 2]], [-1, 1, "Conv", [24, 3, 2]]], [1])
    cost = NetworkCost(model, find_channel_groups(model), 16)
    head = 3 * (5 + 2)
    for first, second in ((16, 24), (5, 24), (5, 7)):
        macs = 64 * (27 * first + 4 * first) + 16 * (9 * first * second + (4 + head) * second)
        counts = {"0": first, "1": second}
        assert cost.gflops(counts) == pytest.approx(2 * macs / 1e9)
        weights = 27 * first + 9 * first * second + head * second
        assert cost.parameters(counts) == weights + 2 * (first + second) + head
    saved = {"0": 64 * 31 + 16 * 9 * 24, "1": 16 * (9 * 16 + 4 + head)}
    assert cost.macs_per_channel() == pytest.approx(saved)


@pytest.mark.parametrize("rule", SHORTCUT_RULES)
def test_macs_per_channel_are_the_difference_one_channel_makes(tiny_spec, rule):
    model = Model(ModelSpec.from_dict(tiny_spec))
    found = find_channel_groups(model, rule)
    cost = NetworkCost(model, found, 128)
    saved = cost.macs_per_channel()
    assert list(saved) == list(found.prunable)
    for name, group in found.prunable.items():
        less = cost.gflops({name: group.num_channels - 1})
        assert saved[name] == pytest.approx((cost.gflops({}) - less) * 1e9 / 2)
        assert saved[name] > 0


def test_a_group_of_one_channel_has_a_price_too(tiny_spec):
    model = Model(ModelSpec.from_dict(tiny_spec | {"widths": {"3": 1}}))
    cost = NetworkCost(model, find_channel_groups(model), 128)
    assert cost.macs_per_channel()["3"] > 0


def test_the_network_is_left_alone(tiny_spec):
    model = Model(ModelSpec.from_dict(tiny_spec)).half().train()
    before = copy.deepcopy(model.state_dict())
    NetworkCost(model, find_channel_groups(model), 64)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"99": 1}, "99 is no prunable channel group"),
        ({"image": 3}, "image is no prunable"),
        ({"2.cv1": 4}, r"2\.cv1 is no prunable"),
        ({"0": 0}, "0: 0 channels are to be kept, expected 1 to 8"),
        ({"0": 9}, "expected 1 to 8"),
    ],
    ids=["unknown", "image", "frozen", "none", "too many"],
)
@pytest.mark.parametrize("method", ["gflops", "parameters"])
def test_wrong_counts_are_refused(tiny_spec, counts, message, method):
    model = Model(ModelSpec.from_dict(tiny_spec))
    cost = NetworkCost(model, find_channel_groups(model, "keep"), 64)
    with pytest.raises(ValueError, match=message):
        getattr(cost, method)(counts)


def test_kept_counts():
    assert kept_counts({}) == {}
    masks = {"a": torch.tensor([True, False, True]), "b": torch.ones(1, dtype=torch.bool)}
    assert kept_counts(masks) == {"a": 2, "b": 1}
