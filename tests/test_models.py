"""Networks: the published architectures, explicit widths, and messages about wrong rows."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from models import Model, ModelSpec
from utils.config import load_yaml

MODELS = Path(__file__).resolve().parents[1] / "models"
SIZES = [f"yolov5{size}{p6}" for p6 in ("", "6") for size in "nsmlx"]


@pytest.fixture(scope="module")
def facts(shared_dir):
    return json.loads((shared_dir / "facts/models.json").read_text())["models"]


def load_spec(name: str) -> ModelSpec:
    path = MODELS / f"{name}.yaml"
    return ModelSpec.from_dict(load_yaml(path), str(path))


@pytest.mark.parametrize("name", SIZES)
def test_yaml_and_network_equal_the_facts(facts, name):
    fact, spec = facts[name], load_spec(name)
    data = spec.to_dict()
    for key in ("depth_multiple", "width_multiple", "anchors", "backbone", "head"):
        assert data[key] == fact[key]
    with torch.device("meta"):  # shapes only: no memory, no time
        model = Model(spec)
        few = {count: Model(spec.with_num_classes(count)) for count in (20, 1)}
    assert sum(p.numel() for p in model.parameters()) == fact["parameters_nc80"]
    for count, other in few.items():
        assert sum(p.numel() for p in other.parameters()) == fact[f"parameters_nc{count}"]
    assert len(model.state_dict()) == fact["state_dict_entries"]
    assert len(model.widths()) == fact["batchnorm_layers"]
    assert sum(model.widths().values()) == fact["batchnorm_channels"]


@pytest.mark.parametrize("name", ["yolov5n", "yolov5n6"])
def test_strides_equal_the_facts(facts, name):
    assert Model(load_spec(name)).head.strides.tolist() == facts[name]["stride"]


def test_state_dict_equals_the_facts(shared_dir):
    fact = json.loads((shared_dir / "facts/yolov5n_state_dict.json").read_text())
    state = Model(load_spec("yolov5n")).state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == fact


def test_strides_found_from_rows_are_those_of_a_forward_pass(tiny_spec):
    model = Model(ModelSpec.from_dict(tiny_spec)).train()
    logits = model(torch.zeros(2, 3, 96, 64))
    assert [96 / level.shape[2] for level in logits] == model.head.strides.tolist()
    assert [64 / level.shape[3] for level in logits] == model.head.strides.tolist()


def test_batch_norm_settings(tiny_spec):
    model = Model(ModelSpec.from_dict(tiny_spec))
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.03)}


def test_fused_network_gives_the_same_output(tiny_spec):
    torch.manual_seed(0)
    model = Model(ModelSpec.from_dict(tiny_spec)).double()
    images = torch.rand(2, 3, 64, 96, dtype=torch.float64)
    model.train()(images)  # statistics that are not 0 and 1
    expected = model.eval()(images)[0]
    assert torch.allclose(model.fuse()(images)[0], expected, atol=1e-9)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())


def test_decoding_follows_the_shape_of_each_input(tiny_spec):
    """No grid of an earlier shape is kept."""
    model = Model(ModelSpec.from_dict(tiny_spec)).eval()
    images = torch.rand(1, 3, 64, 96)
    first = model(images)[0]
    model(torch.rand(1, 3, 96, 32))
    assert torch.equal(model(images)[0], first)


def test_decoding_by_hand(tiny_spec):
    """Zero logits: the box centre is the cell's centre, the size the anchor's."""
    model = Model(ModelSpec.from_dict(tiny_spec)).eval()
    logits = [torch.zeros(1, 3, 2, 3, 8), torch.zeros(1, 3, 1, 2, 8)]
    boxes = model.head.decode(logits)[0]
    assert boxes.shape == (3 * 2 * 3 + 3 * 1 * 2, 8)
    assert boxes[4, :4].tolist() == [12, 12, 10, 13]  # level 0, anchor 0, row 1, column 1
    assert boxes[18 + 3, :4].tolist() == [24, 8, 62, 45]  # level 1, anchor 1, row 0, column 1
    assert boxes[:, 4:].unique().tolist() == [0.5]


@pytest.mark.parametrize("name", ["yolov5n", "yolov5n6"])
def test_spec_round_trip_with_widths(name):
    model = Model(load_spec(name))
    widths = {path: max(width - 3, 1) for path, width in model.widths().items()}
    slim = Model(model.spec.with_widths(widths))
    text = yaml.safe_dump(slim.spec.to_dict())
    again = Model(ModelSpec.from_dict(yaml.safe_load(text)))
    assert again.widths() == widths
    assert again.spec.to_dict() == slim.spec.to_dict()
    side = model.max_stride
    assert again.eval()(torch.zeros(1, 3, side, side))[0].isfinite().all()


def test_anchor_count_instead_of_anchors(tiny_spec):
    model = Model(ModelSpec.from_dict({**tiny_spec, "anchors": 4}))
    assert model.head.anchors.shape == (2, 4, 2)
    assert Model(model.spec).head.anchors.equal(model.head.anchors)


def test_further_modules(tiny_spec):
    tiny_spec["activation"] = "nn.ReLU()"
    tiny_spec["backbone"][2] = [-1, 2, "Bottleneck", [16]]
    tiny_spec["backbone"][3] = [-1, 1, "nn.MaxPool2d", [2, 2]]
    tiny_spec["backbone"][6] = [-1, 1, "SPP", [32, [5, 9]]]
    model = Model(ModelSpec.from_dict(tiny_spec))
    assert "2.1.cv2" in model.widths()
    assert model.model[2][0].add
    assert isinstance(model.model[0].act, torch.nn.ReLU)
    assert model.eval()(torch.zeros(1, 3, 32, 32))[0].isfinite().all()


def edit(spec: dict, part: str, row: int, value: list) -> dict:
    rows = [list(r) for r in spec[part]]
    rows[row] = value
    return {**spec, part: rows}


WRONG = {
    "unknown module": (("backbone", 2, [-1, 1, "C4", [16]]), ["backbone row 2", "C4", "C3"]),
    "no eval of strings": (
        ("backbone", 2, [-1, 1, "__import__('os')", [16]]),
        ["backbone row 2", "known modules"],
    ),
    "too many arguments": (
        ("backbone", 1, [-1, 1, "Conv", [16, 3, 2, 1, 1]]),
        ["backbone row 1", "kernel"],
    ),
    "argument is text": (
        ("backbone", 1, [-1, 1, "Conv", ["16*2", 3, 2]]),
        ["backbone row 1", "'16*2'"],
    ),
    "source in the future": (("head", 0, [9, 1, "Conv", [16, 1, 1]]), ["head row 0", "earlier"]),
    "different strides": (("head", 2, [[-1, 2], 1, "Concat", [1]]), ["head row 2", "strides"]),
    "two inputs for Conv": (("head", 0, [[-1, 4], 1, "Conv", [16]]), ["head row 0", "one input"]),
    "row too short": (("head", 0, [-1, "Conv", [16]]), ["head row 0", "[from, number"]),
    "levels without anchors": (
        ("head", 7, [[10], 1, "Detect", ["nc", "anchors"]]),
        ["head row 7", "anchors for 2"],
    ),
    "even pooling kernel": (("backbone", 6, [-1, 1, "SPPF", [32, 4]]), ["row 6", "odd"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_rows_are_named(tiny_spec, case):
    change, words = WRONG[case]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the words are checked below)
        Model(ModelSpec.from_dict(edit(tiny_spec, *change), "my.yaml"))
    for word in ["my.yaml", *words]:
        assert word in str(caught.value)


ABSURD = {
    "depth": ({"depth_multiple": 10**9}, "depth_multiple is 1000000000"),
    "infinite depth": ({"depth_multiple": float("inf")}, "depth_multiple is inf"),
    "repeats": ({"depth_multiple": 900.0}, "row 4: repeated 1800 times; at most 1000"),
    "width": ({"width_multiple": 1e9}, "width_multiple is 1000000000.0"),
    "weights": ({"width_multiple": 900.0}, "weights in"),
    "widths": ({"widths": {"1": 10**9}}, "weights in"),
    "classes": ({"nc": 10**9}, "nc is 1000000000"),
    "anchors": ({"anchors": [[1.0] * 10**6] * 2}, "500000 of them, at most 32"),
    "rows": ({"head": [[-1, 1, "Conv", [8]]] * 2000}, "1 to 1000 rows"),
    "channels": (0, [-1, 1, "Conv", [10**300]], "from 1 to 65536"),
    "kernel": (0, [-1, 1, "Conv", [8, 10**9]], "kernel is 1000000000"),
    "stride": (0, [-1, 1, "Conv", [8, 3, 10**9]], "stride is 1000000000"),
    "strides": (1, [-1, 9, "nn.MaxPool2d", [2, 2]], "one cell for 1024 pixels"),
    "padding": (0, [-1, 1, "Conv", [8, 3, 1, 10**9]], "padding is 1000000000"),
    "number": (2, [-1, 1000, "C3", [9000]], "weights in"),
    "upsampling": (1, [-1, 1, "nn.Upsample", [None, 64]], "one cell for 1/32 pixels"),
    "kernels": (6, [-1, 1, "SPP", [32, [5] * 100]], "1 to 16 odd numbers"),
    "sources": (1, [[0] * 100, 1, "Concat", [1]], "'from' is"),
    "concat": (1, [[0] * 64, 1, "Concat", [1]], "at most 65536"),
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_sizes_are_refused_before_they_take_memory(tiny_spec, case, monkeypatch):
    *change, words = ABSURD[case]
    data = tiny_spec | change[0] if len(change) == 1 else edit(tiny_spec, "backbone", *change)
    if case == "concat":
        data["backbone"][0] = [-1, 1, "Conv", [2048, 6, 2, 2]]
    made = []
    make = torch.nn.Conv2d.__init__

    def count(self, in_channels, out_channels, kernel, *args, **kwargs):
        made.append(in_channels * out_channels * kernel**2)
        make(self, in_channels, out_channels, kernel, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Conv2d, "__init__", count)
    with pytest.raises(ValueError, match=r"my\.yaml") as caught:
        Model(ModelSpec.from_dict(data, "my.yaml"))
    assert words in str(caught.value)
    assert sum(made) < 3_000_000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nc": 0}, "nc is 0"),
        ({"nc": True}, "nc is True"),
        ({"width_multiple": "wide"}, "width_multiple is 'wide'"),
        ({"widht_multiple": 1}, "did you mean width_multiple"),
        ({"anchors": [[1, 2, 3]]}, "level 0"),
        ({"anchors": [[1, 2], [1, 2, 3, 4]]}, "same number"),
        ({"widths": {"0": 0}}, "widths: 0 is 0"),
        ({"widths": {"99.cv1": 4}}, "'99.cv1'"),
        ({"widths": {"2.m.0.cv2": 5}}, "shortcut adds"),
        ({"activation": "Sine"}, "'Sine'"),
        ({"backbone": []}, "backbone"),
    ],
)
def test_wrong_keys_are_named(tiny_spec, change, words):
    with pytest.raises(ValueError, match=r"my\.yaml") as caught:
        Model(ModelSpec.from_dict({**tiny_spec, **change}, "my.yaml"))
    assert words in str(caught.value)


def test_a_head_that_leaves_out_the_coarsest_level(pytestconfig):
    """P3 and P4 alone, on a backbone that goes down to P5: inputs must suit all three."""
    data = load_yaml(pytestconfig.rootpath / "models/yolov5n.yaml")
    data["head"] = [*data["head"][:-1], [[17, 20], 1, "Detect", ["nc", "anchors"]]]
    model = Model(ModelSpec.from_dict({**data, "anchors": data["anchors"][:2]})).eval()
    assert model.head.strides.tolist() == [8, 16]
    assert model.max_stride == 32
    predictions, _ = model(torch.zeros(1, 3, model.max_stride, model.max_stride))
    assert predictions.shape == (1, 3 * (4 * 4 + 2 * 2), 85)
