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
from utils.pruning.verdict import (
    Best,
    History,
    Readiness,
    describe_readiness,
    known_map50,
    measure_readiness,
    read_history,
)


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
    text = describe_readiness(readiness, History(options))
    assert said.replace("\\", "") in text
    assert readiness.is_ready == text.startswith("ready") == (cliff == 0.8)
    assert num_scored <= 6
    if cliff >= 0:
        assert cliff - 0.06 < readiness.removed <= cliff
        network = pruner.cut(pruner.select(readiness.percent))
        saved = 1 - count_gflops(network, 64) / count_gflops(pruner.model, 64)
        assert readiness.gflops_saved == pytest.approx(saved)


SPARSE = {"bn_sparsity": True, "sparsity_rate": "auto", "sparsity_share": 0.6, "epochs": 60}
READY = Readiness(0.65, 0.65, 0.7, 0.101, 0.105, 0.01)
NOT_READY = Readiness(0.1, 0.1, 0.1, 0.9, 0.9, 0.01)


@pytest.mark.parametrize(
    ("readiness", "history", "start", "words"),
    [
        pytest.param(
            READY,
            History(SPARSE, 0.101, Best(0.38, "of the teacher")),
            "not ready to prune: the sparse training itself has lost 28 points of mAP@.5 (0.101, "
            "against 0.380 of the teacher)",
            "a smaller --sparsity_rate (it was auto), a smaller --sparsity_share (it was 0.6), or "
            "more epochs",
            id="ruined",
        ),
        pytest.param(
            dataclasses.replace(READY, map50_before=0.04),
            History(SPARSE, 0.039, Best(0.38, "in epoch 2"), epochs_done=15),
            "not ready to prune: the sparse training itself has lost 34 points of mAP@.5 (0.039, "
            "against 0.380 in epoch 2)",
            "15 of 60 epochs are done",
            id="ruined so far",
        ),
        pytest.param(
            READY,
            History(SPARSE, 0.101, Best(0.15, "in epoch 2")),
            "ready to prune: ",
            "; at best 0.150 in epoch 2)",
            id="within five points",
        ),
        pytest.param(
            READY, History({"epochs": 3}, 0.1, Best(0.9, "in epoch 1")), "ready", "", id="dense"
        ),
        pytest.param(READY, History(SPARSE), "ready to prune: ", "", id="nothing known"),
        pytest.param(
            NOT_READY,
            History(SPARSE, is_released=True),
            "not ready to prune: only 10%",
            "more epochs would not help: give it a larger --sparsity_share (it was 0.6)",
            id="let go",
        ),
        pytest.param(
            NOT_READY, History(SPARSE), "not ready", "was too weak or too short", id="too weak"
        ),
    ],
)
def test_the_verdict_knows_the_training(readiness, history, start, words):
    text = describe_readiness(readiness, history)
    assert text.startswith(start)
    assert words in text
    assert ("at best" in text) == ("at best" in words)


@pytest.mark.parametrize(
    "content",
    [None, [], {}, {"map50": 0.5}, {"map50": "0.5", "best_map50": 0.5}],
    ids=["older version", "a list", "empty", "half", "text"],
)
def test_a_checkpoint_without_a_history_has_none(content):
    checkpoint = {"options": SPARSE} if content is None else {"options": None, "history": content}
    options = SPARSE if content is None else {}
    assert read_history(checkpoint) == History(options)


def test_a_history_comes_back_from_a_checkpoint():
    history = History(SPARSE, 0.3, Best(0.5, "in epoch 3"), is_released=True)
    for each in (history, dataclasses.replace(history, map50=None)):
        assert read_history({"options": SPARSE, "history": each.as_content()}) == each


def test_map_of_other_data_is_not_compared():
    options = {"data": "data/cells.yaml", "imgsz": 320, "single_cls": False}
    history = History(options, 0.4, Best(0.5, "in epoch 3"))
    checkpoint = {"names": ["a"], "options": options, "history": history.as_content()}
    assert known_map50(checkpoint, ("a",), options | {"data": "cells.yaml"}) == 0.5
    assert known_map50(checkpoint, ("b",), options) == 0
    for other in ({"data": "shapes.yaml"}, {"imgsz": 640}, {"single_cls": True}):
        assert known_map50(checkpoint, ("a",), options | other) == 0
    assert known_map50({}, ("a",), options) == 0  # a public file


def test_nothing_is_changed_by_looking():
    pruner = pruner_of()
    before = {name: tensor.clone() for name, tensor in pruner.model.state_dict().items()}
    pruner.cut(pruner.select(0.5))
    assert all(torch.equal(t, before[name]) for name, t in pruner.model.state_dict().items())
