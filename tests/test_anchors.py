"""Anchors against boxes whose sizes are known."""

import numpy as np
import pytest

from utils.anchors import best_possible_recall, check_anchors, fit_anchors


@pytest.mark.parametrize(
    ("size", "expected"), [((10, 10), 1.0), ((39, 10), 1.0), ((41, 10), 0.0), ((10, 2), 0.0)]
)
def test_recall_by_hand(size, expected):
    assert best_possible_recall(np.array([size]), np.array([[10.0, 10.0]]), 4.0) == expected


def test_recall_of_no_boxes():
    assert best_possible_recall(np.zeros((0, 2)), np.ones((3, 2)), 4.0) == 1


def clustered_sizes():
    rng = np.random.default_rng(0)
    centres = np.array([[12, 200], [200, 12], [60, 60], [300, 300], [8, 8], [30, 90]])
    return np.concatenate([c * rng.uniform(0.9, 1.1, (50, 2)) for c in centres]), centres


def test_fitted_anchors_find_the_clusters():
    sizes, centres = clustered_sizes()
    anchors = fit_anchors(sizes, (2, 3), 4.0, seed=0)
    assert anchors.shape == (2, 3, 2)
    areas = anchors.reshape(-1, 2).prod(1)
    assert (np.diff(areas) >= 0).all()
    ratio = anchors.reshape(-1, 1, 2) / centres[None]
    assert (np.maximum(ratio, 1 / ratio).max(-1).min(0) < 1.2).all()
    assert np.array_equal(anchors, fit_anchors(sizes, (2, 3), 4.0, seed=0))


def test_check_keeps_good_anchors_and_replaces_bad_ones():
    sizes, centres = clustered_sizes()
    assert check_anchors(centres.reshape(2, 3, 2).astype(float), sizes, 4.0, 0) is None
    replaced = check_anchors(np.full((2, 3, 2), 500.0), sizes, 4.0, 0)
    assert best_possible_recall(sizes, replaced.reshape(-1, 2), 4.0) > 0.99


def test_too_few_boxes_keep_the_anchors(caplog):
    assert check_anchors(np.full((3, 3, 2), 500.0), np.array([[10.0, 10.0]]), 4.0, 0) is None
    assert "too few" in caplog.text
