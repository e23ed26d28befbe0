import copy
import json
import time

import pytest
import torch
import yaml

from models import Model, ModelSpec
from utils.profile import compare_latency, count_gflops, count_parameters, measure_latency

CPU = torch.device("cpu")
NAMES = [
    pytest.param(f"yolov5{size}{suffix}", marks=[pytest.mark.slow] if size in "mlx" else [])
    for suffix in ("", "6")
    for size in "nsmlx"
]


@pytest.fixture
def tiny_model(tiny_spec):
    return Model(ModelSpec.from_dict(tiny_spec))


@pytest.mark.parametrize("name", NAMES)
def test_counts_equal_facts(name, shared_dir, request):
    facts = json.loads((shared_dir / "facts/models.json").read_text())["models"][name]
    path = request.config.rootpath / "models" / f"{name}.yaml"
    model = Model(ModelSpec.from_dict(yaml.safe_load(path.read_text()), path.name))
    assert count_parameters(model) == facts["parameters_nc80"]
    assert round(count_gflops(model, 640), 3) == facts["gflops_640_nc80"]


def test_counting_leaves_the_model_alone(tiny_model):
    tiny_model.train()
    before, modules = copy.deepcopy(tiny_model.state_dict()), len(list(tiny_model.modules()))
    count_gflops(tiny_model)
    after = tiny_model.state_dict()
    assert tiny_model.training
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(list(tiny_model.modules())) == modules
    assert not any(module._forward_hooks for module in tiny_model.modules())
    assert not any(hasattr(module, "total_ops") for module in tiny_model.modules())


def test_gflops_by_hand():
    """Two convolutions of 10 x 10 cells; thop counts four for each number through BN."""
    spec = ModelSpec.from_dict(
        {
            "nc": 1,
            "depth_multiple": 1.0,
            "width_multiple": 1.0,
            "anchors": [[8, 8, 16, 16, 24, 24]],
            "backbone": [[-1, 1, "Conv", [8, 8, 8, 0]]],
            "head": [[[0], 1, "Detect", ["nc", "anchors"]]],
        }
    )
    cells, outputs = 10 * 10, 3 * (5 + 1)
    macs = cells * (8 * 3 * 8 * 8 + 4 * 8 + outputs * 8)
    assert count_gflops(Model(spec), 80) == pytest.approx(2 * macs / 1e9)


@pytest.mark.parametrize("imgsz", [64, 70])
def test_latency_is_positive_and_the_model_stays(tiny_model, imgsz):
    names = list(tiny_model.state_dict())
    tiny_model.train()
    assert measure_latency(tiny_model, imgsz, CPU, num_rounds=2) > 0
    assert tiny_model.training
    assert list(tiny_model.state_dict()) == names  # not folded


def test_latencies_are_compared_in_turns(tiny_model):
    def work(*_):
        time.sleep(0.2)

    small, large = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    large.register_forward_hook(work)
    fast, slow = compare_latency([small, large], 64, CPU, num_rounds=3)
    assert slow > 200
    assert slow > fast


def test_no_models():
    assert compare_latency([], 64, CPU) == []


@pytest.mark.gpu
def test_latency_on_gpu(tiny_model):
    cuda = torch.device("cuda")
    assert measure_latency(tiny_model, 64, cuda, 2, torch.float16) > 0
    assert next(tiny_model.parameters()).device.type == "cpu"
