"""Detection metrics in NumPy: matching, precision and recall, average precision, confusion.

IoU thresholds run from 0.50 to 0.95 in steps of 0.05; index 0 is the one of mAP@.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from utils.boxes import box_iou

IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)
_NUM_CURVE_POINTS = 1000
_NUM_AP_POINTS = 101  # recall 0, 0.01 ... 1 as in COCO
_EPS = 1e-16


def match_detections(
    detections: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    iou_thresholds: np.ndarray = IOU_THRESHOLDS,
) -> list[np.ndarray]:
    """Decide which detections of a batch of images are correct, per IoU threshold.

    As COCO does: the most confident detection of an image chooses first, and takes the label of its
    class with the highest IoU among those nobody has taken yet. Thresholds are independent of each
    other.

    Args:
        detections: per image [M, 6] xyxy, confidence, class; in any order.
        labels: per image [T, 5] class, xyxy in the same pixels.
        iou_thresholds: [I], a pair needs at least this IoU; above 0.

    Returns:
        Per image bool [M, I].
    """
    num_thresholds, sizes = len(iou_thresholds), [len(rows) for rows in detections]
    detection, label, iou = _pairs_by_choice(detections, labels, iou_thresholds.min())
    # Each threshold has detections and labels of its own from here on, numbered through.
    pair, threshold = np.nonzero(iou[:, None] >= iou_thresholds)
    detection = detection[pair] * num_thresholds + threshold
    label = label[pair] * num_thresholds + threshold
    correct = bytearray(sum(sizes) * num_thresholds)
    taken = bytearray(sum(map(len, labels)) * num_thresholds)
    for one, other in zip(detection.tolist(), label.tolist(), strict=True):
        if not correct[one] and not taken[other]:
            correct[one] = taken[other] = True
    matched = np.frombuffer(correct, bool).reshape(-1, num_thresholds)
    return np.split(matched, np.cumsum(sizes))[:-1]


def _pairs_by_choice(
    detections: Sequence[np.ndarray], labels: Sequence[np.ndarray], least_iou: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which detections and labels of a class overlap; the most confident first, its best ahead.

    Returns:
        Numbers of the detection and of the label, counted over the images, and their IoU; each [P].
    """
    parts = [(np.zeros(0, np.int64),) * 2 + (np.zeros(0),) * 2]
    num_detections = num_labels = 0
    for rows, image_labels in zip(detections, labels, strict=True):
        # Image by image: nearly all pairs of a batch lie in different ones.
        iou = box_iou(image_labels[:, 1:].astype(np.float64), rows[:, :4].astype(np.float64))
        same_class = image_labels[:, :1] == rows[None, :, 5]
        label, detection = np.nonzero((iou >= least_iou) & same_class)
        pairs = (detection + num_detections, label + num_labels)
        parts.append((*pairs, rows[detection, 4], iou[label, detection]))
        num_detections, num_labels = num_detections + len(rows), num_labels + len(image_labels)
    detection, label, confidence, iou = map(np.concatenate, zip(*parts, strict=True))
    order = np.lexsort((-iou, detection, -confidence))  # stable: of equal labels the first
    return detection[order], label[order], iou[order]


def _one_to_one(row: np.ndarray, column: np.ndarray, iou: np.ndarray) -> list[int]:
    """Greedy choice of pairs by falling IoU, so that no row and no column occurs twice."""
    taken_rows, taken_columns, chosen = set(), set(), []
    for pair in np.argsort(-iou, kind="stable"):
        if row[pair] not in taken_rows and column[pair] not in taken_columns:
            taken_rows.add(row[pair])
            taken_columns.add(column[pair])
            chosen.append(int(pair))
    return chosen


@dataclass(frozen=True)
class ApResult:
    """Average precision and curves of the C classes that have labels; I IoU thresholds.

    `precision`, `recall`, `f1` are taken at `best_conf`, where the smoothed mean F1 is highest,
    and like all curves at the first IoU threshold.
    """

    classes: np.ndarray  # [C] class numbers, ascending
    num_labels: np.ndarray  # [C]
    ap: np.ndarray  # [C, I]
    precision: np.ndarray  # [C]
    recall: np.ndarray  # [C]
    f1: np.ndarray  # [C]
    best_conf: float
    confidences: np.ndarray  # [1000] x axis of the next three
    precision_curve: np.ndarray  # [C, 1000]
    recall_curve: np.ndarray  # [C, 1000]
    f1_curve: np.ndarray  # [C, 1000]
    recalls: np.ndarray  # [1000] x axis of the next one
    precision_at_recall: np.ndarray  # [C, 1000] precision envelope

    @property
    def ap50(self) -> np.ndarray:
        """[C] AP at the first IoU threshold, 0.5."""
        return self.ap[:, 0]

    @property
    def ap50_95(self) -> np.ndarray:
        """[C] AP averaged over the IoU thresholds."""
        return self.ap.mean(1)


def average_precision_per_class(
    correct: np.ndarray, conf: np.ndarray, pred_cls: np.ndarray, target_cls: np.ndarray
) -> ApResult:
    """Average precision, and precision, recall and F1 over the confidence, for each class.

    Args:
        correct: bool [M, I], detection m is right at IoU threshold i.
        conf: [M]. Those that are equal have no order, see `_count_right`.
        pred_cls: [M].
        target_cls: [T], one entry per label; only classes found here are reported.

    Returns:
        The result over the C classes of `target_cls`; with no label at all, C is 0.
    """
    order = np.argsort(-conf, kind="stable")
    correct, conf, pred_cls = correct[order], conf[order], pred_cls[order]
    classes, num_labels = np.unique(target_cls.astype(np.int64), return_counts=True)
    grid = np.linspace(0, 1, _NUM_CURVE_POINTS)

    ap = np.zeros((len(classes), correct.shape[1]))
    precision_curve, recall_curve, precision_at_recall = (
        np.zeros((len(classes), len(grid))) for _ in range(3)
    )
    for row, (cls, num) in enumerate(zip(classes, num_labels, strict=True)):
        of_class = pred_cls == cls
        if not of_class.any():
            continue  # never detected: all of its figures are 0, precision too
        true_positives = _count_right(correct[of_class], conf[of_class])
        recall = true_positives / (num + _EPS)
        precision = true_positives / np.arange(1, len(true_positives) + 1)[:, None]
        # np.interp wants rising x: confidences fall, so both are negated. Above the highest
        # confidence ("left") nothing is detected.
        falling_conf = -conf[of_class]
        recall_curve[row] = np.interp(-grid, falling_conf, recall[:, 0], left=0)
        precision_curve[row] = np.interp(-grid, falling_conf, precision[:, 0], left=1)
        for i in range(ap.shape[1]):
            ap[row, i], envelope = _average_precision(recall[:, i], precision[:, i])
            if i == 0:
                precision_at_recall[row] = np.interp(grid, *envelope)

    f1_curve = 2 * precision_curve * recall_curve / (precision_curve + recall_curve + _EPS)
    best = int(_smooth(f1_curve.mean(0)).argmax()) if len(classes) else 0
    return ApResult(
        classes=classes,
        num_labels=num_labels,
        ap=ap,
        precision=precision_curve[:, best],
        recall=recall_curve[:, best],
        f1=f1_curve[:, best],
        best_conf=float(grid[best]),
        confidences=grid,
        precision_curve=precision_curve,
        recall_curve=recall_curve,
        f1_curve=f1_curve,
        recalls=grid,
        precision_at_recall=precision_at_recall,
    )


def _count_right(correct: np.ndarray, falling_conf: np.ndarray) -> np.ndarray:
    """How many detections down to each one are right, [m, I]; m is at least 1.

    Detections of the same confidence get equal shares of what they have right together, so that
    nothing depends on the order of the images. Each of them counts on its own: taken as one step,
    a network that is equally sure of everything would get a straight line down from precision 1.
    """
    counts = correct.cumsum(0)
    starts = np.flatnonzero(np.append(True, falling_conf[1:] != falling_conf[:-1]))
    sizes = np.diff(starts, append=len(counts))
    tied = np.flatnonzero(np.repeat(sizes, sizes) > 1)
    if not len(tied):
        return counts
    start, size = np.repeat(starts, sizes)[tied], np.repeat(sizes, sizes)[tied]
    before, end = counts[start] - correct[start], counts[start + size - 1]
    counts = counts.astype(np.float64)
    counts[tied] = before + (end - before) * ((tied - start + 1) / size)[:, None]
    return counts


def _average_precision(
    recall: np.ndarray, precision: np.ndarray
) -> tuple[float, tuple[np.ndarray, np.ndarray]]:
    """Area under the precision envelope (trapezoid rule, 101 recalls), and the envelope."""
    recall = np.concatenate(([0.0], recall, [1.0]))
    precision = np.concatenate(([1.0], precision, [0.0]))
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    grid = np.linspace(0, 1, _NUM_AP_POINTS)
    sampled = np.interp(grid, recall, envelope)
    area = float((sampled[:-1] + sampled[1:]).sum() / 2 / (_NUM_AP_POINTS - 1))
    return area, (recall, envelope)


def _smooth(curve: np.ndarray, share: float = 0.1) -> np.ndarray:
    """Moving average over about `share` of the curve; its ends are continued as constants."""
    half = round(len(curve) * share / 2)
    window = 2 * half + 1
    return np.convolve(np.pad(curve, half, mode="edge"), np.full(window, 1 / window), mode="valid")


def fitness(map50: float, map50_95: float) -> float:
    """The figure by which epochs are compared: mostly mAP@.5:.95, a little mAP@.5."""
    return 0.1 * map50 + 0.9 * map50_95


class ConfusionMatrix:
    """Counts of (detected class, labelled class), gathered image by image.

    `matrix` is int64 [K+1, K+1]. Row: detected class, the last row "background" for labels that
    were not found. Column: labelled class, the last column "background" for detections where
    there is no object. The diagonal holds what is right.
    """

    def __init__(self, num_classes: int, conf_thres: float = 0.25, iou_thres: float = 0.45) -> None:
        """Count detections above `conf_thres` that overlap a label by more than `iou_thres`."""
        self.matrix = np.zeros((num_classes + 1, num_classes + 1), np.int64)
        self.conf_thres = conf_thres
        self.iou_thres = iou_thres

    def update(self, detections: np.ndarray, labels: np.ndarray) -> None:
        """Add one image: [M, 6] xyxy, confidence, class; [T, 5] class, xyxy in the same pixels.

        Pairs are matched by falling IoU whatever their classes.
        """
        background = len(self.matrix) - 1
        detections = detections[detections[:, 4] > self.conf_thres]
        pred_cls, label_cls = detections[:, 5].astype(np.int64), labels[:, 0].astype(np.int64)
        found, justified = np.zeros(len(labels), bool), np.zeros(len(detections), bool)
        iou = box_iou(labels[:, 1:].astype(np.float64), detections[:, :4].astype(np.float64))
        label_idx, detection_idx = np.nonzero(iou > self.iou_thres)
        for pair in _one_to_one(label_idx, detection_idx, iou[label_idx, detection_idx]):
            label, detection = label_idx[pair], detection_idx[pair]
            self.matrix[pred_cls[detection], label_cls[label]] += 1
            found[label] = justified[detection] = True
        size = len(self.matrix)
        self.matrix[background] += np.bincount(label_cls[~found], minlength=size)
        self.matrix[:, background] += np.bincount(pred_cls[~justified], minlength=size)
