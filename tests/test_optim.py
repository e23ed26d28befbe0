"""Parameter groups, schedule, weight average."""

import copy
import math

import pytest
import torch
from torch import nn

from models import Model, ModelSpec
from utils.optim import (
    ModelEma,
    Schedule,
    build_optimizer,
    freeze,
    frozen_rows,
    group_parameters,
    num_warmup_steps,
    set_step,
)


@pytest.fixture
def model(tiny_spec):
    return Model(ModelSpec.from_dict(tiny_spec))


def test_groups_hold_every_parameter_once_and_by_type(model):
    groups = group_parameters(model)
    grouped = [id(p) for parameters in groups.values() for p in parameters]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {id(p) for p in groups["weights"]} == {id(m.weight) for m in convs}
    assert {id(p) for p in groups["norms"]} == {id(m.weight) for m in norms}
    assert len(groups["biases"]) == len(norms) + sum(m.bias is not None for m in convs)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_decay_leaves_gamma_and_beta_alone(model, name):
    """Gradients are zero, so that only decay can move anything."""
    optimizer = build_optimizer(model, name, lr=0.1, momentum=0.9, weight_decay=0.1)
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for module, old in zip(model.modules(), before.modules(), strict=True):
        if isinstance(module, nn.BatchNorm2d):
            assert torch.equal(module.weight, old.weight)
            assert torch.equal(module.bias, old.bias)
        if isinstance(module, nn.Conv2d):
            assert not torch.equal(module.weight, old.weight)


def test_schedule_by_hand():
    schedule = Schedule(
        lr0=0.1, lrf=0.1, epochs=10, momentum=0.9, warmup_steps=4, warmup_momentum=0.5
    )
    start, middle, after = schedule.at(0, 0), schedule.at(2, 0), schedule.at(4, 0)
    assert (start.lr, start.bias_lr, start.momentum) == (0, 0.1, 0.5)
    assert middle == pytest.approx((0.05, 0.1, 0.7))
    assert after == pytest.approx((0.1, 0.1, 0.9))
    assert schedule.at(99, 5).lr == pytest.approx(0.055)
    assert schedule.decay(10) == pytest.approx(0.1)
    cosine = Schedule(lr0=1, lrf=0.2, epochs=10, momentum=0.9, cosine=True)
    assert [cosine.decay(e) for e in (0, 5, 10)] == pytest.approx([1, 0.6, 0.2])


def test_accumulation_reaches_the_nominal_batch_after_warmup():
    schedule = Schedule(lr0=1, lrf=1, epochs=1, momentum=0, warmup_steps=6)
    assert [schedule.accumulation(step, 16) for step in (0, 2, 4, 6, 99)] == [1, 2, 3, 4, 4]
    assert schedule.accumulation(99, 200) == 1


@pytest.mark.parametrize(
    ("warmup_epochs", "steps", "epochs", "expected"),
    [(3, 13, 100, 39), (3, 13, 4, 26), (0.5, 13, 100, 6), (0, 13, 100, 0), (3, 1, 1, 0)],
)
def test_a_short_epoch_can_leave_the_warmup(warmup_epochs, steps, epochs, expected):
    assert num_warmup_steps(warmup_epochs, steps, epochs) == expected


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_settings_reach_the_groups(model, name):
    optimizer = build_optimizer(model, name, 0.1, 0.9, 0.0)
    set_step(optimizer, Schedule(0.1, 0.1, 10, 0.9, warmup_steps=4).at(0, 0))
    rates = {group["kind"]: group["lr"] for group in optimizer.param_groups}
    assert rates == {"weights": 0, "norms": 0, "biases": 0.1}
    group = optimizer.param_groups[0]
    assert (group["momentum"] if name == "SGD" else group["betas"][0]) == 0.8


def test_average_equals_a_slow_loop(model):
    ema = ModelEma(model, decay=0.9, tau=5)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for update in range(1, 4):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        model.model[0].bn.running_mean += 2
        model.model[0].bn.num_batches_tracked += 1
        ema.update(model)
        decay = 0.9 * (1 - math.exp(-update / 5))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value.clone()
    for name, value in ema.model.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_freeze(model):
    assert frozen_rows([3], 15) == {0, 1, 2}
    assert frozen_rows([0], 15) == set()
    assert frozen_rows([4, 6], 15) == {4, 6}
    for wrong in ([0, 15], [15], [99], [-1], [-1, 3], list(range(15))):
        with pytest.raises(ValueError, match="expected a count below 15"):
            frozen_rows(wrong, 15)
    norms = freeze(model.model, {0, 2})
    assert len(norms) == 1 + 5
    trained = sum(p.requires_grad for p in model.parameters())
    optimizer = build_optimizer(model, "SGD", 0.1, 0.9, 0.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == trained
    assert not any(p.requires_grad for p in model.model[2].parameters())


def test_average_follows_weights_that_are_laid_out_anew():
    model = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))
    ema = ModelEma(model, decay=0.5, tau=1e-9)
    ema.update(model)
    for is_copied in (False, True):
        ema = copy.deepcopy(ema) if is_copied else ema
        model.to(memory_format=torch.channels_last)
        ema.model.to(memory_format=torch.channels_last)
        with torch.no_grad():
            model[0].weight.add_(1)
        before = ema.model[0].weight.clone()
        ema.update(model)
        expected = (before + model[0].weight) / 2
        torch.testing.assert_close(ema.model[0].weight, expected.detach())
