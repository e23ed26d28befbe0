"""Do the anchors fit the boxes of a data set, and if not, which would?"""

from __future__ import annotations

import logging

import cv2
import numpy as np

LOGGER = logging.getLogger(__name__)

MIN_RECALL = 0.98  # below this share of answered boxes, anchors are fitted anew


def best_possible_recall(sizes_wh: np.ndarray, anchors: np.ndarray, threshold: float) -> float:
    """Share of the boxes `[T, 2]` that at least one of the anchors `[N, 2]` can answer for.

    An anchor answers if both sides differ by less than the factor `threshold` (`anchor_t`).
    """
    if not len(sizes_wh):
        return 1.0
    return float((_fit(sizes_wh, anchors).max(1) > 1 / threshold).mean())


def _fit(sizes_wh: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """How well each anchor fits each box, `[T, N]`: the worse side ratio, 1 is equal."""
    ratio = sizes_wh[:, None] / anchors[None]
    return np.minimum(ratio, 1 / ratio).min(-1)


def fit_anchors(
    sizes_wh: np.ndarray, shape: tuple[int, int], threshold: float, seed: int, rounds: int = 1000
) -> np.ndarray:
    """Find anchors by k-means, then improve them by random variation.

    Args:
        sizes_wh: [T, 2] box sizes in pixels of the network input, at least L * A different ones.
        shape: levels L and anchors a level A.
        threshold: `anchor_t` of the hyperparameters.
        seed: of the random generator.
        rounds: variations tried; one is kept when the mean fit of the answered boxes improves.

    Returns:
        [L, A, 2] in pixels, small to large.

    Raises:
        ValueError: fewer boxes than anchors.
    """
    count = shape[0] * shape[1]
    usable = sizes_wh[(sizes_wh >= 2).all(1)].astype(np.float32)
    if len(np.unique(usable, axis=0)) < count:
        raise ValueError(f"the boxes have fewer than {count} different sizes, too few for anchors")
    deviation = usable.std(0) + 1e-3
    cv2.setRNGSeed(seed % 2**31)
    stop = (cv2.TERM_CRITERIA_MAX_ITER + cv2.TERM_CRITERIA_EPS, 300, 1e-4)
    labels, attempts, kind = np.zeros(0), 10, cv2.KMEANS_PP_CENTERS
    _, _, centres = cv2.kmeans(usable / deviation, count, labels, stop, attempts, kind)
    anchors = centres * deviation
    rng = np.random.default_rng(seed)
    sample = usable if len(usable) <= 20000 else rng.choice(usable, 20000, replace=False)
    best = _mean_fit(sample, anchors, threshold)
    for _ in range(rounds):
        factors = 1 + rng.random() * rng.normal(0, 0.1, anchors.shape)
        varied = np.maximum(anchors * np.clip(factors, 0.3, 3), 2)
        score = _mean_fit(sample, varied, threshold)
        if score > best:
            anchors, best = varied, score
    anchors = anchors[np.argsort(anchors.prod(1))]
    return anchors.reshape(*shape, 2).round(1)


def _mean_fit(sizes_wh: np.ndarray, anchors: np.ndarray, threshold: float) -> float:
    fit = _fit(sizes_wh, anchors).max(1)
    return float((fit * (fit > 1 / threshold)).mean())


def check_anchors(
    anchors_px: np.ndarray, sizes_wh: np.ndarray, threshold: float, seed: int
) -> np.ndarray | None:
    """New anchors `[L, A, 2]` in pixels if these fit badly and better ones are found, else None."""
    recall = best_possible_recall(sizes_wh, anchors_px.reshape(-1, 2), threshold)
    if recall >= MIN_RECALL:
        LOGGER.info("anchors answer for %.1f %% of the boxes: kept", recall * 100)
        return None
    try:
        fitted = fit_anchors(sizes_wh, anchors_px.shape[:2], threshold, seed)
    except ValueError as error:
        LOGGER.warning("anchors answer for only %.1f %% of the boxes: %s", recall * 100, error)
        return None
    improved = best_possible_recall(sizes_wh, fitted.reshape(-1, 2), threshold)
    if improved <= recall:
        LOGGER.info("anchors answer for %.1f %% of the boxes; none better found", recall * 100)
        return None
    LOGGER.info(
        "anchors answered for %.1f %% of the boxes, fitted anew for %.1f %%: %s",
        recall * 100,
        improved * 100,
        fitted.reshape(len(fitted), -1).tolist(),
    )
    return fitted
