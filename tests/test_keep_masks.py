import numpy as np
import pytest
import torch

from utils.pruning.keep_masks import select_keep_masks, suggested_percent


def tensors(**values):
    return {name: torch.tensor(v, dtype=torch.float32) for name, v in values.items()}


@pytest.mark.parametrize(
    ("ratio", "expected_a", "expected_b", "threshold"),
    [
        (0.0, [1, 1, 1], [1, 1], 0.1),
        (0.2, [0, 1, 1], [1, 1], 0.2),
        (0.39, [0, 1, 1], [1, 1], 0.2),  # int(5 * 0.39) = 1
        (0.4, [0, 1, 1], [0, 1], 0.3),
        (0.6, [0, 0, 1], [0, 1], 0.4),
        (0.8, [0, 0, 1], [0, 1], 0.5),  # a would be empty: its strongest stays
    ],
)
def test_the_classic_threshold_by_hand(ratio, expected_a, expected_b, threshold):
    importance = tensors(a=[0.1, 0.3, 0.4], b=[0.2, 0.5])
    keep = select_keep_masks(importance, ratio)
    assert keep.masks["a"].int().tolist() == expected_a
    assert keep.masks["b"].int().tolist() == expected_b
    assert keep.threshold == pytest.approx(threshold)
    assert keep.floored == (("a",) if ratio == 0.8 else ())
    assert all(mask.dtype == torch.bool for mask in keep.masks.values())


def test_a_slow_loop_agrees():
    rng = np.random.default_rng(0)
    values = {name: rng.random(size) for name, size in (("a", 40), ("b", 7), ("c", 100))}
    keep = select_keep_masks({k: torch.from_numpy(v) for k, v in values.items()}, 0.63)
    ranked = sorted(v for part in values.values() for v in part)
    threshold = ranked[int(len(ranked) * 0.63)]
    for name, part in values.items():
        assert keep.masks[name].tolist() == [v >= threshold for v in part]


def test_ties_at_the_threshold_stay():
    keep = select_keep_masks(tensors(a=[1, 1, 1], b=[1, 1]), 0.9)
    assert all(mask.all() for mask in keep.masks.values())
    assert keep.floored == ()


def test_of_equal_channels_the_floor_keeps_the_first():
    keep = select_keep_masks(tensors(a=[0, 0, 0], b=[1, 1, 1, 1]), 0.5)
    assert keep.masks["a"].tolist() == [True, False, False]
    assert keep.floored == ("a",)


@pytest.mark.parametrize(("minimum", "kept"), [(1, 1), (2, 2), (3, 3), (8, 3)])
def test_the_floor_never_asks_for_more_than_there_is(minimum, kept):
    keep = select_keep_masks(tensors(a=[0.1, 0.2, 0.3], b=[5, 6, 7, 8, 9]), 0.5, minimum)
    assert int(keep.masks["a"].sum()) == kept
    assert keep.masks["a"][2]


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 50, float("nan")])
def test_a_ratio_outside_0_to_1_is_refused(ratio):
    with pytest.raises(ValueError, match="expected a share from 0 to below 1"):
        select_keep_masks(tensors(a=[1]), ratio)


@pytest.mark.parametrize(
    ("importance", "message"),
    [
        ({}, "no prunable layer"),
        (tensors(a=[1], b=[float("nan")]), "b: gamma is NaN"),
    ],
    ids=["nothing", "nan"],
)
@pytest.mark.parametrize("function", [suggested_percent, lambda i: select_keep_masks(i, 0.5)])
def test_importance_must_be_numbers(importance, message, function):
    with pytest.raises(ValueError, match=message):
        function(importance)


def test_at_least_one_channel_must_stay():
    with pytest.raises(ValueError, match="min_channels is 0"):
        select_keep_masks(tensors(a=[1]), 0.5, 0)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([0.1, 0.3], [0.2, 0.5, 0.6], 2 / 5),  # 0.3 is the smallest maximum, two are below
        ([0.1], [0.2, 0.5], 0.0),
        ([1, 1], [1, 1], 0.0),
    ],
    ids=["by hand", "the weakest layer has one channel", "all equal"],
)
def test_suggested_percent(a, b, expected):
    assert suggested_percent(tensors(a=a, b=b)) == pytest.approx(expected)


def test_the_suggestion_needs_no_floor_and_one_more_channel_does():
    generator = torch.Generator().manual_seed(1)
    importance = {f"l{n}": torch.rand(20 + n, generator=generator) for n in range(30)}
    suggested = suggested_percent(importance)
    total = sum(map(len, importance.values()))
    assert select_keep_masks(importance, suggested).floored == ()
    assert len(select_keep_masks(importance, suggested + 1.5 / total).floored) == 1
