"""Targets and searches, against trying everything."""

import dataclasses
import re

import pytest
import torch
from test_rewrite import BLOCKS, lively, spec_of

from utils.profile import count_gflops, count_parameters
from utils.pruning.search import (
    build_pruner,
    count_removed,
    describe_removal,
    largest_bearable,
    ratio_for_cost,
    ratio_for_drop,
    ratio_for_latency,
    removed_share,
    why_nothing_goes,
)
from utils.pruning.targets import Target
from utils.pruning.verdict import describe_readiness, measure_readiness


def pruner_of(name="upsample and concat", **options):
    model = lively(spec_of(*BLOCKS[name])).float()
    settings = {"shortcut": "group", "importance": "error-per-cost", "compensation": "mean"}
    return build_pruner(model, 64, **{**settings, **options})


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
@pytest.mark.parametrize(
    ("cost", "count"),
    [("gflops", lambda net: count_gflops(net, 64)), ("parameters", count_parameters)],
)
def test_a_target_is_met_by_the_smallest_cut(cost, count, share):
    pruner = pruner_of()
    measure = getattr(pruner, cost)
    target = share * count(pruner.model)
    wanted = Target("", share, True) if share == 0.6 else Target("", target, False)
    ratio = ratio_for_cost(pruner, measure, wanted, "FLOPs")
    keep = pruner.select(ratio)
    assert float(f"{ratio:g}") == ratio  # prune.py prints it for --percent
    assert count(pruner.cut(keep)) == pytest.approx(measure(keep))
    assert measure(keep) <= target
    total = sum(len(mask) for mask in keep.masks.values())
    all_ratios = [pruner.select(n / total) for n in range(total)]
    enough = [count_removed(k) for k in all_ratios if measure(k) <= target]
    assert count_removed(keep) == min(enough)


@pytest.mark.parametrize(
    ("number", "rule", "said"),
    [
        (1e9, "group", r"has .* things, no more than the target of 1,000,000,000: there is nothin"),
        (10, "group", r"^10 of [\d,]+ things is out of reach: at least [\d,]+ \(.*%\) is left w"),
        (10, "group", r"What stops it: every layer keeps 2 \(--min-channels\); widths are mult"),
        (10, "keep", r"of 8 \(--round-to\); bottlenecks with a shortcut stay whole \(--shortcut g"),
        (0.5, "group", r"; a share is typed as 50%$"),
    ],
)
def test_a_target_that_is_met_already_or_never(number, rule, said):
    pruner = pruner_of("C3 with shortcuts", shortcut=rule, min_channels=2, round_to=8)
    with pytest.raises(ValueError, match=said):
        ratio_for_cost(pruner, pruner.parameters, Target("", number, False), "things")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (Target("5.5", 5.5, False), 0.5),
        (Target("50%", 0.5, True), 0.56),
        (Target("9.95", 9.95, False), 0.01),
        (Target("1.2", 1.2, False), 0.98),
        (Target("1.1", 1.1, False), 0.99),
    ],
)
def test_a_latency_is_met_by_the_smallest_cut(target, expected):
    asked = []

    def measure(percent):
        asked.append(percent)
        return 10.0, 1 + 9 * (1 - percent)

    assert ratio_for_latency(pruner_of(), measure, target) == expected
    assert expected in asked
    assert len(asked) <= 8


@pytest.mark.parametrize(
    ("number", "said"), [(11, "takes 10.00 ms, no more than"), (1, "1.00 of 10.00 ms is out of re")]
)
def test_a_latency_that_is_met_already_or_never(number, said):
    with pytest.raises(ValueError, match=said):
        ratio_for_latency(
            pruner_of(), lambda percent: (10.0, 10 - 8 * percent), Target("", number, False)
        )


def test_the_largest_cut_for_a_drop():
    def score(percent):
        return 0.7 - 0.01 * (percent > 0.2) - 0.5 * (percent > 0.6)

    assert ratio_for_drop(score, 0.01) == 0.6  # a drop of exactly that much passes
    assert ratio_for_drop(score, 0.005) == 0.2
    assert ratio_for_drop(score, 0.6) == 0.99


@pytest.mark.parametrize(
    ("score", "said"),
    [
        (lambda percent: 0.7 * (percent == 0), "every cut costs more than 0.01 of mAP@.5"),
        (lambda percent: 0.01, "mAP@.5 is 0.0100 before anything is cut"),
    ],
)
def test_no_cut_for_a_drop(score, said):
    with pytest.raises(ValueError, match=said):
        ratio_for_drop(score, 0.01)


@pytest.mark.parametrize(
    ("values", "settings", "ratio", "said"),
    [
        ([1.0] * 16, {}, 0.5, "all channels are alike; train with"),
        (
            [0.5] * 4 + [1.0] * 12,
            {},
            0.1,
            r"4 channels are alike \(0.5\) .* a --percent from 0.25 on",
        ),
        (range(16), {}, 0.01, "less than one channel"),
        (
            range(16),
            {"round_to": 8},
            0.2,
            r"multiples of 8 \(--round-to\); give a larger --percent",
        ),
    ],
)
def test_why_nothing_goes(values, settings, ratio, said):
    pruner = pruner_of(**settings)
    importance = {"a": torch.tensor([float(value) for value in values])}
    pruner = dataclasses.replace(pruner, importance=importance)
    keep = pruner.select(ratio)
    assert count_removed(keep) == 0
    assert re.search(said, why_nothing_goes(pruner, keep))
    assert describe_removal(keep) == "0 of 16 prunable channels go (0.0 %)"


def test_floors_and_rounding_hold():
    pruner = pruner_of(min_channels=3, round_to=8)
    keep = pruner.select(0.9)
    assert {int(mask.sum()) % 8 for mask in keep.masks.values()} == {0}
    assert 0 < removed_share(keep) < 0.9


@pytest.mark.parametrize(
    ("borne", "expected"), [(-1, None), (0.0, 0.0), (0.37, 0.37), (0.5, 0.5), (0.99, 0.99)]
)
def test_the_largest_bearable_share(borne, expected):
    asked = []

    def is_borne(percent):
        asked.append(percent)
        return percent <= borne

    assert largest_bearable(is_borne) == expected
    assert len(asked) <= 7
    assert expected is None or expected in asked


@pytest.mark.parametrize(
    ("cliff", "options", "said"),
    [
        (0.8, {}, "ready to prune: "),
        (0.1, {}, "not sparse-trained: train.py --bn_sparsity --sparsity_rate auto"),
        (0.1, {"bn_sparsity": True, "sparsity_rate": 1e-5, "epochs": 3}, r"rate 1e-05, 3 epochs"),
        (-1.0, {}, "too little to judge by"),
    ],
)
def test_the_verdict_follows_what_was_measured(cliff, options, said):
    pruner = pruner_of()
    total = sum(pruner.model.widths().values())
    num_prunable = sum(group.num_channels for group in pruner.channel_groups.prunable.values())
    num_scored = 0

    def score(network):
        nonlocal num_scored
        num_scored += 1
        removed = (total - sum(network.widths().values())) / num_prunable
        return 0.7 * (cliff >= 0) * (removed <= cliff)

    readiness = measure_readiness(pruner, score)
    text = describe_readiness(readiness, options)
    assert said.replace("\\", "") in text
    assert readiness.is_ready == text.startswith("ready") == (cliff == 0.8)
    assert num_scored <= 6
    if cliff >= 0:
        assert cliff - 0.06 < readiness.removed <= cliff
        network = pruner.cut(pruner.select(readiness.percent))
        saved = 1 - count_gflops(network, 64) / count_gflops(pruner.model, 64)
        assert readiness.gflops_saved == pytest.approx(saved)


def test_nothing_is_changed_by_looking():
    pruner = pruner_of()
    before = {name: tensor.clone() for name, tensor in pruner.model.state_dict().items()}
    pruner.cut(pruner.select(0.5))
    assert all(torch.equal(t, before[name]) for name, t in pruner.model.state_dict().items())
