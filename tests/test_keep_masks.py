import numpy as np
import pytest
import torch

from utils.pruning.keep_masks import largest_prune_ratio, select_keep_masks, suggested_percent


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
@pytest.mark.parametrize(
    "function", [suggested_percent, largest_prune_ratio, lambda i: select_keep_masks(i, 0.5)]
)
def test_importance_must_be_numbers(importance, message, function):
    with pytest.raises(ValueError, match=message):
        function(importance)


def test_at_least_one_channel_must_stay():
    for function in (suggested_percent, largest_prune_ratio):
        with pytest.raises(ValueError, match="min_channels is 0"):
            function(tensors(a=[1]), 0)
    with pytest.raises(ValueError, match="min_channels is 0"):
        select_keep_masks(tensors(a=[1]), 0.5, 0)


def test_nothing_can_be_rounded_to_a_multiple_of_zero():
    with pytest.raises(ValueError, match="round_to is 0"):
        select_keep_masks(tensors(a=[1]), 0.5, 1, 0)
    with pytest.raises(ValueError, match="round_to is 0"):
        largest_prune_ratio(tensors(a=[1]), 1, 0)


@pytest.mark.parametrize(
    ("minimum", "round_to", "kept", "floored", "added"),
    [
        (1, 1, 3, (), {}),
        (1, 2, 4, (), {"a": 1}),
        (1, 3, 3, (), {}),
        (1, 8, 7, (), {"a": 4}),  # there are no more
        (5, 1, 5, ("a",), {"a": 2}),
        (4, 3, 6, ("a",), {"a": 3}),  # the floor first: 4, then 6
        (9, 4, 7, ("a",), {"a": 4}),
    ],
)
def test_floor_and_rounding_by_hand(minimum, round_to, kept, floored, added):
    importance = tensors(a=[0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4], b=[2, 2, 2, 2, 2, 2, 2, 2])
    keep = select_keep_masks(importance, 4 / 15, minimum, round_to)
    order = [1, 3, 5, 6, 4, 2, 0]
    assert keep.masks["a"].nonzero().flatten().tolist() == sorted(order[:kept])
    assert keep.masks["b"].all()
    assert keep.floored == floored
    assert keep.added == added


def test_channels_of_no_importance_go_as_asked():
    """Exact zeros, as proximal training leaves them, are no tie that holds all or none back."""
    importance = tensors(a=[0, 1, 0, 0], b=[0, 0, 2, 3, 4, 5])
    for ratio, removed in ((0.0, 0), (0.1, 1), (0.3, 3), (0.5, 5), (0.6, 5), (0.75, 6)):
        keep = select_keep_masks(importance, ratio)
        assert sum(int((~mask).sum()) for mask in keep.masks.values()) == removed
    assert select_keep_masks(importance, 0.3).masks["a"].tolist() == [False, True, False, False]
    assert select_keep_masks(importance, 0.2).masks["a"].tolist() == [True, True, False, False]


def slow_selection(importance, prune_ratio, min_channels, round_to):
    """Channel by channel, in plain Python: what is kept, floored and added."""
    ranked = sorted(value for values in importance.values() for value in values)
    threshold = ranked[int(len(ranked) * prune_ratio)]
    kept, floored, added = {}, [], {}
    free = int(len(ranked) * prune_ratio) if threshold == ranked[0] == 0 else 0
    for name, values in importance.items():
        strong = {channel for channel, value in enumerate(values) if value >= threshold}
        for channel in reversed(range(len(values))):
            if free and values[channel] == 0:
                strong.remove(channel)
                free -= 1
        weak = [channel for channel in range(len(values)) if channel not in strong]
        weak.sort(key=lambda channel: (-values[channel], channel))
        chosen = set(strong)
        while weak and len(chosen) < min_channels:
            chosen.add(weak.pop(0))
        if len(chosen) > len(strong):
            floored.append(name)
        while weak and len(chosen) % round_to:
            chosen.add(weak.pop(0))
        kept[name] = sorted(chosen)
        if len(chosen) > len(strong):
            added[name] = len(chosen) - len(strong)
    return kept, tuple(floored), added


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9, -1.0], ids=str)
@pytest.mark.parametrize("num_values", [3, 10**6], ids=["many ties", "no ties"])
def test_a_slow_loop_agrees_about_floor_and_rounding(scale, num_values):
    rng = np.random.default_rng(num_values)
    for _ in range(60):
        sizes = rng.integers(1, 40, rng.integers(1, 6))
        importance = {
            f"g{n}": (rng.integers(0, num_values, size) * scale).tolist()
            for n, size in enumerate(sizes)
        }
        ratio, minimum, round_to = rng.random() ** 0.5 * 0.999, *rng.integers(1, 12, 2).tolist()
        expected = slow_selection(importance, ratio, minimum, round_to)
        scores = {name: torch.tensor(v, dtype=torch.float64) for name, v in importance.items()}
        keep = select_keep_masks(scores, ratio, minimum, round_to)
        kept = {name: mask.nonzero().flatten().tolist() for name, mask in keep.masks.items()}
        assert (kept, keep.floored, keep.added) == expected
        removed = 1 - sum(map(len, kept.values())) / sum(sizes)
        assert removed <= largest_prune_ratio(scores, minimum, round_to) + 1e-9


def test_a_larger_ratio_never_keeps_a_channel_more():
    """What a search by halving relies on."""
    generator = torch.Generator().manual_seed(2)
    importance = {f"l{n}": torch.rand(20 + 3 * n, generator=generator) for n in range(10)}
    last = select_keep_masks(importance, 0, 4, 8).masks
    for ratio in torch.linspace(0.01, 0.99, 60).tolist():
        masks = select_keep_masks(importance, ratio, 4, 8).masks
        assert not any((masks[name] & ~last[name]).any() for name in masks)
        last = masks


@pytest.mark.parametrize(
    ("minimum", "round_to", "expected"),
    [(1, 1, 8 / 10), (2, 1, 6 / 10), (3, 1, 5 / 10), (1, 4, 4 / 10), (5, 4, 0), (99, 1, 0)],
)
def test_the_largest_ratio_by_hand(minimum, round_to, expected):
    importance = tensors(a=[1, 2], b=[1, 2, 3, 4, 5, 6, 7, 8])
    assert largest_prune_ratio(importance, minimum, round_to) == pytest.approx(expected)
    keep = select_keep_masks(importance, 0.99, minimum, round_to)
    assert sum(int((~mask).sum()) for mask in keep.masks.values()) / 10 <= expected


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


@pytest.mark.parametrize("minimum", [1, 2, 5, 20, 25])
def test_the_suggestion_knows_the_floor(minimum):
    generator = torch.Generator().manual_seed(3)
    importance = {f"l{n}": 1e6 * torch.rand(20 + n, generator=generator) for n in range(10)}
    suggested = suggested_percent(importance, minimum)
    total = sum(map(len, importance.values()))
    assert select_keep_masks(importance, suggested, minimum).floored == ()
    more = select_keep_masks(importance, suggested + 1.5 / total, minimum)
    assert len(more.floored) == 1
