import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from models import Model, ModelSpec
from utils import profile
from utils.profile import (
    compare_latency,
    count_gflops,
    count_parameters,
    summarise_rounds,
)

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
    (latency,) = compare_latency([tiny_model], imgsz, CPU, seconds=0)
    assert latency.milliseconds > 0
    assert latency[1:] == (1, 1, 1)
    assert tiny_model.training
    assert list(tiny_model.state_dict()) == names  # not folded


@pytest.fixture
def clock(monkeypatch):
    """A clock that only passes show: no test here depends on how busy the machine is."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(profile.time, "perf_counter", lambda: now.seconds)
    return now


def let_take(model, clock, seconds):
    """Let every forward pass of the model, and of its copies, take so long."""

    def work(*_):
        clock.seconds += seconds

    model.register_forward_hook(work)


def test_latencies_are_compared_in_turns(tiny_model, clock):
    small, large = copy.deepcopy(tiny_model), copy.deepcopy(tiny_model)
    let_take(large, clock, 0.050)
    let_take(small, clock, 0.020)
    slow, fast = compare_latency([large, small], 64, CPU, seconds=0)
    assert slow == pytest.approx((50, 1, 1, 1))
    assert fast == pytest.approx((20, 2.5, 2.5, 2.5))


def test_time_is_the_limit_and_five_rounds_the_least(tiny_model, clock):
    let_take(tiny_model, clock, 0.125)
    compare_latency([tiny_model], 64, CPU, seconds=0)
    assert clock.seconds == (2 + 5) * 0.125  # two to warm up
    compare_latency([tiny_model], 64, CPU, seconds=1.0)
    assert clock.seconds == (2 + 5 + 2 + 8) * 0.125


def noisy_rounds(speed_up, seed, num_rounds=200):
    """Two networks on a busy machine: half of the passes are slowed down, by up to five times."""
    rng = np.random.default_rng(seed)
    times = np.array([10.0, 10.0 / speed_up]) * rng.normal(1, 0.01, (num_rounds, 2))
    return times * np.where(
        rng.random((num_rounds, 2)) < 0.5, rng.uniform(1, 5, (num_rounds, 2)), 1
    )


@pytest.mark.parametrize("speed_up", [0.8, 1.3])
def test_a_difference_is_found_in_noise(speed_up):
    for seed in range(20):
        dense, slim = summarise_rounds(noisy_rounds(speed_up, seed))
        assert dense[1:] == (1, 1, 1)
        assert slim.speed_up == pytest.approx(speed_up, rel=0.02)
        assert slim.speed_up_low <= slim.speed_up <= slim.speed_up_high
        assert (slim.speed_up_low > 1) == (speed_up > 1)
        assert slim.milliseconds == pytest.approx(10 / speed_up, rel=0.05)


def test_no_difference_is_found_where_there_is_none():
    claims = [summarise_rounds(noisy_rounds(1.0, seed))[1].speed_up_low > 1 for seed in range(100)]
    assert sum(claims) <= 5


def test_one_round_has_no_spread():
    assert summarise_rounds(np.array([[4.0, 2.0]]))[1] == (2, 2, 2, 2)


def test_no_models():
    assert compare_latency([], 64, CPU) == []


@pytest.mark.gpu
def test_latency_on_gpu(tiny_model):
    cuda = torch.device("cuda")
    (latency,) = compare_latency([tiny_model], 64, cuda, 2, torch.float16, seconds=0.1)
    assert latency.milliseconds > 0
    assert next(tiny_model.parameters()).device.type == "cpu"
