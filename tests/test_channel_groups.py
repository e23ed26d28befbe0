import dataclasses

import pytest
from torch import nn

from models.spec import ModelSpec
from models.yolo import Model
from utils.config import load_yaml
from utils.pruning.channel_groups import Segment, find_channel_groups

ANCHORS = [10, 13, 16, 30, 33, 23]


def build(rows, sources=(-1,)):
    """A network of these rows with a head on `sources`; two classes."""
    head = [[list(sources), 1, "Detect", ["nc", "anchors"]]]
    return Model(
        ModelSpec.from_dict(
            {
                "nc": 2,
                "depth_multiple": 1.0,
                "width_multiple": 1.0,
                "anchors": [ANCHORS] * len(sources),
                "backbone": rows,
                "head": head,
            }
        )
    )


CONV = [-1, 1, "Conv", [16, 3, 2]]


def tied(model, rule="keep"):
    """Groups with more than one producer."""
    groups = find_channel_groups(model, rule).groups.values()
    return {group.name: group.producers for group in groups if len(group.producers) > 1}


def frozen(model):
    found = find_channel_groups(model, "keep")
    return {path for path in found.outputs if not found.is_prunable(path)}


def test_plain_convolutions_are_alone_and_the_image_is_frozen():
    found = find_channel_groups(build([CONV, CONV]))
    assert [g.producers for g in found.groups.values()] == [(), ("0",), ("1",)]
    assert [g.prunable for g in found.groups.values()] == [False, True, True]
    assert found.inputs == {
        "0": (Segment("image", 3),),
        "1": (Segment("0", 16),),
        "2.m.0": (Segment("1", 16),),
    }
    assert set(found.outputs) == {"0", "1"}, "the outputs of the head are fixed"


@pytest.mark.parametrize(
    ("shortcut", "expected_tied", "expected_frozen"),
    [
        (
            True,
            {"1.cv1": ("1.cv1", "1.m.0.cv2", "1.m.1.cv2")},
            {"1.cv1", "1.m.0.cv1", "1.m.0.cv2", "1.m.1.cv1", "1.m.1.cv2"},
        ),
        (False, {}, set()),
    ],
    ids=["shortcut", "no shortcut"],
)
def test_c3(shortcut, expected_tied, expected_frozen):
    model = build([CONV, [-1, 2, "C3", [24, shortcut]]])
    assert tied(model, "keep") == tied(model, "group") == expected_tied
    assert frozen(model) == expected_frozen
    grouped = find_channel_groups(model, "group")
    assert all(grouped.is_prunable(path) for path in grouped.outputs)
    deep = "1.cv1" if shortcut else "1.m.1.cv2"
    assert grouped.inputs["1.cv3"] == (Segment(deep, 12), Segment("1.cv2", 12))


def test_a_bottleneck_row_freezes_what_its_shortcut_adds_to():
    model = build([CONV, [-1, 1, "Bottleneck", [16]], [-1, 1, "Conv", [8]]])
    assert tied(model) == {"0": ("0", "1.cv2")}
    assert frozen(model) == {"0", "1.cv1", "1.cv2"}


def test_a_bottleneck_row_that_cannot_add_is_free():
    model = build([CONV, [-1, 1, "Bottleneck", [24]]])
    assert tied(model) == {}
    assert frozen(model) == set()


def test_a_shortcut_across_a_concat_splits_its_convolution():
    rows = [CONV, [0, 1, "Conv", [8]], [0, 1, "Conv", [16]], [[1, 2], 1, "Concat", [1]]]
    model = build([*rows, [-1, 1, "Bottleneck", [24]]])
    found = find_channel_groups(model, "group")
    assert found.outputs["4.cv2"] == (Segment("1", 8), Segment("2", 16))
    assert tied(model) == {"1": ("1", "4.cv2"), "2": ("2", "4.cv2")}
    assert frozen(model) == {"1", "2", "4.cv1", "4.cv2"}


def test_a_shortcut_over_a_tensor_that_holds_the_same_channels_twice():
    rows = [CONV, [-1, 1, "Conv", [8]], [[1, 1], 1, "Concat", [1]], [-1, 2, "Bottleneck", [16]]]
    found = find_channel_groups(build(rows), "group")
    assert found.outputs["3.1.cv2"] == (Segment("1", 8), Segment("1", 8))
    assert found.groups["1"].producers == ("1", "3.0.cv2", "3.0.cv2", "3.1.cv2", "3.1.cv2")


def test_repeated_rows_and_pooling_and_upsampling_pass_channels_on():
    rows = [
        [-1, 2, "Conv", [16, 3, 2]],
        [-1, 1, "nn.MaxPool2d", [2]],
        [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
        [-1, 1, "Conv", [8]],
    ]
    found = find_channel_groups(build(rows))
    assert found.inputs["0.1"] == (Segment("0.0", 16),)
    assert found.inputs["3"] == (Segment("0.1", 16),)


@pytest.mark.parametrize(
    ("row", "levels"),
    [(["SPPF", [32, 5]], 4), (["SPP", [32, [5, 9, 13]]], 4), (["SPP", [32, [3]]], 2)],
    ids=["SPPF", "SPP", "SPP with one pool"],
)
def test_spatial_pyramids_read_their_first_convolution_several_times(row, levels):
    found = find_channel_groups(build([CONV, [-1, 1, *row]]))
    assert found.inputs["1.cv2"] == (Segment("1.cv1", 8),) * levels
    assert all(group.prunable for name, group in found.groups.items() if name != "image")


@pytest.mark.parametrize("levels", [2, 3, 4])
def test_the_head_follows_any_number_of_levels(levels):
    model = build([CONV] * (levels + 1), sources=range(1, levels + 1))
    found = find_channel_groups(model)
    head = {path: layout for path, layout in found.inputs.items() if ".m." in path}
    expected = {f"{levels + 1}.m.{n}": (Segment(str(n + 1), 16),) for n in range(levels)}
    assert head == expected


# The share of BN channels that the classic rule freezes: all that a shortcut adds to.
@pytest.mark.parametrize(
    ("size", "share"), [("n", 0.22), ("s", 0.22), ("m", 0.30), ("l", 0.35), ("x", 0.39)]
)
def test_the_classic_rule_freezes_the_known_share(pytestconfig, size, share):
    path = pytestconfig.rootpath / "models" / f"yolov5{size}.yaml"
    spec = ModelSpec.from_dict(load_yaml(path))
    # The share depends on the depth alone; at the smallest width the test is quick.
    model = Model(dataclasses.replace(spec, width_multiple=0.25))
    widths, found = model.widths(), find_channel_groups(model)
    kept = sum(width for path, width in widths.items() if not found.is_prunable(path))
    assert kept / sum(widths.values()) == pytest.approx(share, abs=0.005)


def test_layouts_cover_every_convolution(tiny_spec):
    model = Model(ModelSpec.from_dict(tiny_spec))
    found = find_channel_groups(model)
    for path, layout in found.inputs.items():
        module = model.model.get_submodule(path)
        conv = module if isinstance(module, nn.Conv2d) else module.conv
        assert sum(segment.size for segment in layout) == conv.in_channels, path
    assert {p: sum(s.size for s in layout) for p, layout in found.outputs.items()} == model.widths()


def test_an_unknown_module_is_named_with_its_row():
    model = build([CONV, CONV])
    model.model[1] = nn.Sequential(model.model[1], nn.Dropout())
    with pytest.raises(ValueError, match=r"backbone row 1: .* Dropout \(at 1\.1\).*Conv"):
        find_channel_groups(model)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="expected one of keep, group"):
        find_channel_groups(build([CONV]), "all")
