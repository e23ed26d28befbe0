"""How far gamma can fall: by hand, and against real optimizers that step one gamma."""

import dataclasses
import math

import pytest
import torch

from utils.optim import Schedule
from utils.pruning import forecast
from utils.pruning.forecast import (
    Forecast,
    Piece,
    SparsityPlan,
    choose_auto_rate,
    plan_steps,
)
from utils.pruning.slimming import AutoRate, scheduled_rate

BATCH = 4


def a_schedule(**changes):
    settings = {"lr0": 0.02, "lrf": 0.1, "epochs": 6, "momentum": 0.9}
    return Schedule(**{**settings, "nominal_batch": 8, "warmup_steps": 7, **changes})


def real_steps(schedule, steps_per_epoch):
    """What the training loop does: (epoch, settings) of every optimizer step."""
    for epoch in range(schedule.epochs):
        pending = 0
        for index in range(steps_per_epoch):
            step = epoch * steps_per_epoch + index
            pending += 1
            is_last = index == steps_per_epoch - 1
            if pending >= schedule.accumulation(step, BATCH) or is_last:
                yield epoch, schedule.at(step, epoch)
                pending = 0


def a_plan(optimizer="SGD", mode="subgradient", steps_per_epoch=5, decay="linear", **changes):
    schedule = a_schedule(**changes)
    pieces = plan_steps(schedule, steps_per_epoch, BATCH)
    return SparsityPlan(pieces, schedule.epochs, optimizer, mode, decay)


def simulate(
    optimizer_class, rate, noise=0.0, width=1, steps_per_epoch=5, decay="linear", **changes
):
    """How far gamma falls under a real optimizer with nothing but the penalty and noise."""
    generator = torch.Generator().manual_seed(0)
    gamma = torch.nn.Parameter(torch.full((width,), 100.0, dtype=torch.float64))
    schedule = a_schedule(**changes)
    if optimizer_class is torch.optim.SGD:
        optimizer = optimizer_class([gamma], lr=1, momentum=schedule.momentum, nesterov=True)
    else:
        optimizer = optimizer_class([gamma], lr=1, weight_decay=0)
    for epoch, settings in real_steps(schedule, steps_per_epoch):
        (group,) = optimizer.param_groups
        group["lr"] = settings.lr
        if "betas" in group:
            group["betas"] = (settings.momentum, 0.999)
        else:
            group["momentum"] = settings.momentum
        gamma.grad = noise * torch.randn(width, generator=generator, dtype=torch.float64)
        gamma.grad += scheduled_rate(rate, epoch, schedule.epochs, decay) * gamma.detach().sign()
        optimizer.step()
    return 100 - gamma.mean().item()


SCHEDULES = {
    "with warm-up": {},
    "no warm-up": {"warmup_steps": 0},
    "all warm-up": {"warmup_steps": 1000},
    "cosine, long": {"cosine": True, "epochs": 40},
    "no accumulation": {"nominal_batch": 4},
}
FALLS = {**SCHEDULES, "held": {"decay": "hold", "epochs": 20}}


@pytest.mark.parametrize("case", SCHEDULES)
@pytest.mark.parametrize("steps_per_epoch", [1, 5])
def test_the_plan_has_the_steps_of_the_training_loop(case, steps_per_epoch):
    schedule = a_schedule(**SCHEDULES[case])
    planned = [
        (piece.epoch, piece.lr, piece.momentum)
        for piece in plan_steps(schedule, steps_per_epoch, BATCH)
        for _ in range(piece.num_steps)
    ]
    real = [(e, s.lr, s.momentum) for e, s in real_steps(schedule, steps_per_epoch)]
    assert [p[0] for p in planned] == [r[0] for r in real]
    torch.testing.assert_close(torch.tensor(planned), torch.tensor(real))


def test_a_long_warmup_is_summed_up():
    schedule = a_schedule(warmup_steps=2500, epochs=2)
    pieces = plan_steps(schedule, 2000, BATCH)
    real = list(real_steps(schedule, 2000))
    assert len(pieces) <= 2 * forecast._PIECES_PER_EPOCH
    assert sum(p.num_steps for p in pieces) == len(real)
    expected = sum(settings.lr for _, settings in real)
    assert sum(p.num_steps * p.lr for p in pieces) == pytest.approx(expected)


@pytest.mark.parametrize("case", FALLS)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_the_fall_is_that_of_the_optimizer(case, name):
    changes = FALLS[case]
    expected = simulate(getattr(torch.optim, name), 0.01, **changes)
    assert a_plan(name, **changes).fall(0.01) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("noise", [0.003, 0.01, 0.05])
def test_noise_slows_adam_down(noise):
    changes = {"epochs": 60, "warmup_steps": 20}
    real = simulate(torch.optim.AdamW, 0.01, noise, width=3000, **changes)
    plan = a_plan("AdamW", **changes)
    assert plan.fall(0.01, noise) == pytest.approx(real, rel=0.03)
    assert real < 0.98 * plan.fall(0.01)
    assert a_plan("SGD").fall(0.01, noise) == a_plan("SGD").fall(0.01)


def test_falls_by_hand():
    pieces = (Piece(0, 2, 0.1, 0.5), Piece(1, 1, 0.2, 0.5))
    plan = SparsityPlan(pieces, 2, "SGD", "subgradient")
    # Rates 1, 1, 0.55; buffers 1, 1.5, 1.3; steps lr * (rate + 0.5 * buffer).
    assert plan.fall(1.0) == pytest.approx(0.1 * 1.5 + 0.1 * 1.75 + 0.2 * 1.2)
    for name in ("SGD", "Adam", "AdamW"):
        proximal = SparsityPlan(pieces, 2, name, "proximal")
        assert proximal.fall(1.0, noise=3.0) == pytest.approx(2 * 0.1 + 0.2 * 0.55)
    adam = SparsityPlan((Piece(0, 3, 0.1, 0.5),), 1, "Adam", "subgradient")
    assert adam.fall(1.0) == pytest.approx(0.3)
    assert adam.fall(1.0, noise=math.sqrt(3)) == pytest.approx(0.15)  # 1 / sqrt(1 + 3) of it


def test_nothing_is_foretold_when_the_penalty_has_done_its_work():
    plan = a_plan("AdamW", decay="hold", epochs=20)
    assert Forecast(plan.rest(17), 0.01, 0.5, 0.1).remarks()
    assert not Forecast(plan.rest(18), 0.01, 0.5, 0.1).remarks()


def test_the_rest_of_a_run():
    plan = a_plan("AdamW", "proximal")
    assert plan.rest(0) == plan
    assert plan.rest(6).num_steps == 0
    assert plan.rest(3).fall(0.1) + sum(
        p.num_steps * p.lr * scheduled_rate(0.1, p.epoch, 6) for p in plan.pieces if p.epoch < 3
    ) == pytest.approx(plan.fall(0.1))


@pytest.mark.parametrize(
    ("name", "mode"), [("SGD", "subgradient"), ("SGD", "proximal"), ("AdamW", "proximal")]
)
def test_the_rate_that_is_enough(name, mode):
    plan = a_plan(name, mode)
    assert plan.fall(plan.rate_to_fall(0.7)) == pytest.approx(0.7)


def test_the_rate_that_is_enough_under_adam():
    plan = a_plan("AdamW")
    most = plan.fall(1.0)
    assert plan.fall(plan.rate_to_fall(most / 2, 0.01), 0.01) == pytest.approx(most / 2)
    assert plan.rate_to_fall(most * 1.1, 0.01) is None
    assert plan.rate_to_fall(most / 2, 0.0) is None  # any rate does


def test_auto_under_sgd_brings_the_median_down():
    plan = a_plan("SGD")
    auto = choose_auto_rate(plan, 0.9)
    assert plan.fall(auto.least) == pytest.approx(0.9 * forecast.AUTO_REACH)
    assert float(auto.at(torch.tensor(0.0))) == pytest.approx(auto.least)
    noise = 10 * auto.least
    assert float(auto.at(torch.tensor(noise))) == pytest.approx(auto.strength * noise)


def test_auto_in_proximal_mode():
    sgd = choose_auto_rate(a_plan("SGD", "proximal"), 0.9)
    assert sgd.noise_gain == pytest.approx(10)  # momentum 0.9 sums up ten gradients
    adam = choose_auto_rate(a_plan("Adam", "proximal", epochs=2000), 0.9)
    assert adam.at(torch.tensor(123.0)) == forecast.AUTO_STRENGTH["proximal"]
    short = choose_auto_rate(a_plan("Adam", "proximal"), 0.9)
    assert short.at(torch.tensor(123.0)) == forecast.AUTO_LIMIT["proximal"]


def test_auto_under_adam_grows_with_the_distance_up_to_a_limit():
    plan = a_plan("AdamW", epochs=60)
    usual = plan.fall(forecast.AUTO_STRENGTH["subgradient"], 1.0)
    assert choose_auto_rate(plan, usual / 2).strength == forecast.AUTO_STRENGTH["subgradient"]
    more = choose_auto_rate(plan, usual * 1.05 / forecast.AUTO_REACH)
    assert plan.fall(more.strength, 1.0) == pytest.approx(usual * 1.05)
    assert choose_auto_rate(plan, 100.0).strength == forecast.AUTO_LIMIT["subgradient"]


def test_auto_does_not_take_the_noise_of_a_teacher_for_worth():
    for plan in (a_plan("SGD"), a_plan("SGD", "proximal"), a_plan("AdamW", epochs=60)):
        for distance in (1e-6, 1e6):  # the usual strength, and the limit
            alone, taught = (choose_auto_rate(plan, distance, gain) for gain in (0.0, 1.0))
            assert taught.strength == pytest.approx(alone.strength / 2)
            assert taught.limit in (alone.limit / 2, math.inf)
    plan = a_plan("AdamW", "proximal")  # a share of the learning rate
    assert choose_auto_rate(plan, 0.9, 1.0) == choose_auto_rate(plan, 0.9)


def remarks(plan, rate, median, noise):
    return Forecast(plan, rate, median, noise).remarks()


def test_a_run_that_is_long_enough():
    plan = a_plan("SGD", epochs=100)
    (remark,) = remarks(plan, 0.05, 0.9, None)
    assert not remark.is_warning
    assert remark.text == (
        f"forecast: an unused channel can lose {plan.fall(0.05):.3g} of |gamma| in this run "
        f"({plan.num_steps} steps), the median is 0.9: it can become sparse"
    )


def test_a_run_that_is_too_short_and_what_helps():
    plan = a_plan("SGD", epochs=100)
    (remark,) = remarks(plan, 0.001, 0.9, None)
    assert remark.is_warning
    assert "can lose only 0.0" in remark.text
    assert remark.text.startswith("warning: forecast")
    advised = float(remark.text.split("--sparsity_rate ")[1].split(",")[0])
    assert 0.9 <= plan.fall(advised) < 1.0
    epochs = int(remark.text.split(" epochs")[0].split()[-1])
    assert a_plan("SGD", epochs=epochs).fall(0.001) == pytest.approx(0.9, rel=0.05)
    assert remark.text.endswith("--optimizer AdamW")
    assert dataclasses.replace(plan, optimizer="AdamW").fall(0.001) > 0.9


@pytest.mark.parametrize("rate", [1e-320, 1e-30])
def test_a_rate_of_nearly_nothing_is_not_answered_with_a_run_without_end(rate):
    remark = remarks(a_plan("SGD"), rate, 0.9, None)[0]
    assert "give it --sparsity_rate" in remark.text
    assert " epochs" not in remark.text


def test_adam_waits_for_the_gradients():
    plan = a_plan("AdamW", epochs=100)
    (remark,) = remarks(plan, 0.001, 0.9, None)
    assert "at most" in remark.text
    assert remark.text.endswith("the gradients of the first epoch will tell whether it gets there")
    (remark,) = remarks(plan.rest(1), 0.001, 0.9, 0.003)
    assert remark.is_warning
    assert "in the rest of this run" in remark.text
    assert "it cannot become sparse; give it --sparsity_rate 0.00" in remark.text


def test_no_rate_is_advised_where_none_is_enough():
    plan = a_plan("AdamW")
    remark, _ = remarks(plan, 0.001, 0.9, 0.001)
    assert remark.is_warning
    assert "--sparsity_rate" not in remark.text
    assert "a learning rate" in remark.text
    (remark,) = remarks(plan, AutoRate(1.0), 0.9, None)[1:]
    assert "--sparsity_rate" not in remark.text
    (remark,) = remarks(plan, 0.0, 0.9, 0.001)
    assert "lose only 0 of" in remark.text


@pytest.mark.parametrize(
    ("name", "mode", "rate", "words"),
    [
        (
            "SGD",
            "subgradient",
            0.031,
            "is 3.1 x the gradient noise 0.01, and none is known",
        ),
        ("AdamW", "subgradient", 0.031, "--sparsity_rate 0.0065, or auto"),
        ("SGD", "proximal", 0.31, "is 3.1 x the gradient noise 0.1"),  # momentum 0.9: ten times
        ("AdamW", "proximal", 0.5, "takes 50% of that back: channels in use can die"),
        ("Adam", "proximal", 1.0, "takes 100% of that back: every channel dies"),
    ],
)
def test_a_rate_that_kills_is_told(name, mode, rate, words):
    *_, last = remarks(a_plan(name, mode, epochs=400), rate, 0.9, 0.01)
    assert last.is_warning
    assert words in last.text


@pytest.mark.parametrize(
    ("name", "mode", "rate", "words"),
    [
        ("SGD", "subgradient", 0.029, "is 2.9 x the gradient noise 0.01: some networks bear that"),
        ("AdamW", "subgradient", 0.0066, "is 0.66 x the gradient noise 0.01: some networks"),
        ("AdamW", "subgradient", 0.0065, "it can become sparse"),
        ("SGD", "proximal", 0.29, "is 2.9 x the gradient noise 0.1: some"),
        ("AdamW", "proximal", 0.3, "it can become sparse"),
    ],
)
def test_a_rate_that_may_kill_is_no_warning(name, mode, rate, words):
    *_, last = remarks(a_plan(name, mode, epochs=400), rate, 0.9, 0.01)
    assert not last.is_warning
    assert words in last.text


def test_the_forecast_of_a_measured_run():
    """yolov5n from the public checkpoint on BCCD: AdamW, 13 batches of 16, no accumulation.

    With a rate 18 times the gradient noise all channels fall as one that nobody uses: the median of
    |gamma|, 0.896 in the checkpoint, is the forecast, epoch by epoch.
    """
    schedule = Schedule(0.002, 0.01, 100, 0.937, nominal_batch=16, warmup_steps=39)
    plan = SparsityPlan(plan_steps(schedule, 13, 16), 100, "AdamW", "subgradient")
    assert plan.num_steps == 1300
    measured = [0.8919, 0.8791, 0.8574, 0.8311, 0.8060, 0.7813, 0.7572, 0.7336]
    for epoch, median in enumerate(measured):
        so_far = tuple(piece for piece in plan.pieces if piece.epoch <= epoch)
        fall = dataclasses.replace(plan, pieces=so_far).fall(0.03, 0.0016)
        assert 0.896 - fall == pytest.approx(median, abs=0.001)
    *_, danger = remarks(plan, 0.03, 0.896, 0.0016)
    assert "channels in use fall like the others" in danger.text


def test_what_auto_says():
    plan = a_plan("AdamW", epochs=100)
    before, fall = remarks(plan, AutoRate(1.2), 0.9, None)
    assert before.text == "auto: rate 1.2 x the gradient noise"
    assert fall.text.endswith("it can become sparse")
    after, _, doubt = remarks(plan.rest(1), AutoRate(1.2), 0.9, 0.00105)
    assert after.text == "auto: rate 0.00126 = 1.2 x the gradient noise 0.00105"
    assert doubt.text.endswith("some networks bear that, others do not; the verdict will tell")
    assert not doubt.is_warning
    sgd = a_plan("SGD", epochs=100)
    auto = choose_auto_rate(sgd, 0.9)
    first, fall = remarks(sgd, auto, 0.9, None)
    assert "at most" in fall.text
    assert "the first epoch will tell" in fall.text
    first, fall, _ = remarks(sgd, auto, 0.9, auto.least)
    assert "what it takes to get an unused channel to 0" in first.text
    assert not fall.is_warning
    # a run too short: what it takes would move what is used as well
    first, fall, doubt = remarks(sgd, auto, 0.9, auto.least / 100)
    assert "the most that auto takes: 3 x the gradient noise" in first.text
    assert not doubt.is_warning
    assert fall.is_warning
    assert "it cannot become sparse; give it" in fall.text
    assert "--optimizer AdamW" in fall.text
    proximal = a_plan("AdamW", "proximal", epochs=100)
    first, fall = remarks(proximal, choose_auto_rate(proximal, 0.1), 0.1, None)
    assert first.text == "auto: rate 0.3, a share of the learning rate"
    assert not fall.is_warning


def test_nothing_is_said_of_a_run_that_is_over():
    assert remarks(a_plan().rest(6), 0.1, 0.9, 0.1) == []


def test_advice_is_rounded_up():
    assert [forecast._round_up(x) for x in (0.0123, 0.012, 7.01, 88.1)] == pytest.approx(
        [0.013, 0.012, 7.1, 89]
    )
