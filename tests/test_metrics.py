import contextlib
import io
import json

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from utils.boxes import box_iou
from utils.metrics import (
    IOU_THRESHOLDS,
    ConfusionMatrix,
    average_precision_per_class,
    fitness,
    match_detections,
)


def detection(x1, y1, x2, y2, conf=0.9, cls=0):
    return (x1, y1, x2, y2, conf, cls)


def label(x1, y1, x2, y2, cls=0):
    return (cls, x1, y1, x2, y2)


# ------------------------------------------------------------------------------------- matching
MATCHING_ROWS = [
    pytest.param([], [], [], id="nothing"),
    pytest.param([], [label(0, 0, 10, 10)], [], id="no detections"),
    pytest.param([detection(0, 0, 10, 10)], [], [0], id="no labels"),
    pytest.param([detection(0, 0, 10, 10)], [label(0, 0, 10, 10)], [10], id="exact"),
    pytest.param([detection(0, 0, 10, 10, cls=1)], [label(0, 0, 10, 10)], [0], id="other class"),
    # IoU 8 / 10: right at 0.5 to 0.8
    pytest.param([detection(0, 0, 8, 10)], [label(0, 0, 10, 10)], [7], id="IoU 0.8"),
    pytest.param(
        [detection(0, 0, 8, 10, 0.9), detection(0, 0, 10, 10, 0.8)],
        [label(0, 0, 10, 10)],
        [7, 3],  # the better box is left with the thresholds the first one fails
        id="the more confident chooses first",
    ),
    pytest.param(
        [detection(0, 0, 10, 10, 0.8), detection(0, 0, 8, 10, 0.9)],
        [label(0, 0, 10, 10)],
        [3, 7],
        id="in any order",
    ),
    pytest.param(
        [detection(0, 0, 10, 10, 0.9), detection(0, 0, 10, 9, 0.8)],
        [label(0, 0, 10, 10), label(0, 0, 10, 8)],
        [10, 8],  # the second box prefers the taken label (0.9), and gets the other (8 / 9)
        id="second choice",
    ),
]


@pytest.mark.parametrize(("detections", "labels", "num_right"), MATCHING_ROWS)
def test_matching_by_hand(detections, labels, num_right):
    (correct,) = match_detections(
        [np.array(detections, np.float32).reshape(-1, 6)],
        [np.array(labels, np.float32).reshape(-1, 5)],
        IOU_THRESHOLDS - 1e-6,
    )
    assert correct.dtype == bool
    assert correct.shape == (len(detections), 10)
    assert correct.sum(1).tolist() == num_right


def match_slowly(detections, labels):
    """One image: the detections choose in turn."""
    correct = np.zeros((len(detections), len(IOU_THRESHOLDS)), bool)
    iou = box_iou(labels[:, 1:].astype(float), detections[:, :4].astype(float))
    for i, threshold in enumerate(IOU_THRESHOLDS):
        taken = set()
        for m in sorted(range(len(detections)), key=lambda m: -detections[m, 4]):
            best, best_iou = None, 0
            for t in range(len(labels)):
                is_possible = t not in taken and labels[t, 0] == detections[m, 5]
                if is_possible and iou[t, m] >= threshold and iou[t, m] > best_iou:
                    best, best_iou = t, iou[t, m]
            if best is not None:
                taken.add(best)
                correct[m, i] = True
    return correct


def random_image(rng, num_detections, num_labels, num_classes):
    """Boxes of whole pixels and confidences of five levels, so that both tie."""

    def boxes(count):
        corners = rng.integers(0, 8, (count, 2))
        return np.concatenate((corners, corners + rng.integers(10, 16, (count, 2))), 1)

    sure = rng.choice([0.1, 0.3, 0.5, 0.7, 0.9], num_detections)
    detected, labelled = (rng.integers(0, num_classes, n) for n in (num_detections, num_labels))
    detections = np.column_stack((boxes(num_detections), sure, detected)).astype(np.float32)
    return detections, np.column_stack((labelled, boxes(num_labels))).astype(float)


@pytest.mark.parametrize("num_classes", [1, 3])
def test_the_matching_of_a_batch_equals_that_of_each_image_in_turn(num_classes):
    rng = np.random.default_rng(0)
    sizes = [(0, 0), (5, 0), (0, 4), (1, 1), (12, 3), (40, 30), (90, 60), (3, 12)]
    num_right = []
    for _ in range(4):
        images = [random_image(rng, *size, num_classes) for size in rng.permutation(sizes)]
        matched = match_detections(*zip(*images, strict=True))
        assert len(matched) == len(images)
        for image, correct in zip(images, matched, strict=True):
            np.testing.assert_array_equal(correct, match_slowly(*image))
        num_right.append(np.concatenate(matched).sum(0))
    at_half, at_95 = np.sum(num_right, 0)[[0, -1]]
    assert at_half > 2 * at_95 > 0
    assert match_detections([], []) == []
    (nothing,) = match_detections([np.zeros((0, 6), np.float32)], [np.zeros((0, 5))])
    assert nothing.shape == (0, len(IOU_THRESHOLDS))


# --------------------------------------------------------------------------- average precision
def ap_of(correct, conf, num_labels):
    correct = np.array(correct, bool).reshape(-1, 1)
    cls = np.zeros(len(correct))
    return average_precision_per_class(correct, np.array(conf), cls, np.zeros(num_labels))


def test_no_labels_and_no_detections():
    nothing = np.zeros((0, 10), bool)
    result = average_precision_per_class(nothing, np.zeros(0), np.zeros(0), np.zeros(0))
    assert result.ap.shape == (0, 10)
    assert result.precision_curve.shape == (0, 1000)
    assert len(result.precision) == len(result.ap50) == len(result.ap50_95) == 0


def test_labels_without_detections():
    nothing = np.zeros((0, 10), bool)
    result = average_precision_per_class(nothing, np.zeros(0), np.zeros(0), np.array([3, 3, 1]))
    assert result.classes.tolist() == [1, 3]
    assert result.num_labels.tolist() == [1, 2]
    for values in (result.ap, result.precision, result.recall, result.f1):
        assert not values.any()


def test_detections_without_labels():
    result = average_precision_per_class(
        np.zeros((3, 10), bool), np.ones(3), np.zeros(3), np.zeros(0)
    )
    assert len(result.classes) == 0


@pytest.mark.parametrize(
    ("correct", "num_labels", "expected"),
    [
        # Areas by hand: envelope between the points, a straight line to (1, 0) at the end, which
        # the trapezoid over 101 recalls meets to 0.01 where it is steep.
        pytest.param([1], 1, 1.0, id="perfect"),
        pytest.param([0], 1, 0.0, id="wrong"),
        pytest.param([1], 2, 0.5 + 0.5 / 2, id="half found, line to the end"),
        pytest.param([0, 1], 1, 0.5, id="right one second"),
        pytest.param([1, 0, 1], 2, 0.5 + 0.5 * 2 / 3, id="wrong one between"),
    ],
)
def test_ap_by_hand(correct, num_labels, expected):
    result = ap_of(correct, np.linspace(0.9, 0.5, len(correct)), num_labels)
    assert result.ap[0, 0] == pytest.approx(expected, abs=0.01)


def test_order_of_detections_does_not_matter():
    rng = np.random.default_rng(3)
    correct, conf, cls = rng.random((80, 10)) < 0.4, rng.random(80), rng.integers(0, 3, 80)
    target_cls, shuffled = rng.integers(0, 3, 60), rng.permutation(80)
    a = average_precision_per_class(correct, conf, cls, target_cls)
    b = average_precision_per_class(correct[shuffled], conf[shuffled], cls[shuffled], target_cls)
    np.testing.assert_array_equal(a.ap, b.ap)
    np.testing.assert_array_equal(a.f1_curve, b.f1_curve)


def test_equal_confidences_have_no_order():
    rng = np.random.default_rng(3)
    correct, conf = rng.random((300, 10)) < 0.4, rng.choice([0.1, 0.5, 0.7], 300)
    cls, target_cls = rng.integers(0, 3, 300), rng.integers(0, 3, 200)
    first = average_precision_per_class(correct, conf, cls, target_cls)
    for _ in range(5):
        new = rng.permutation(300)
        other = average_precision_per_class(correct[new], conf[new], cls[new], target_cls)
        for name, expected in vars(first).items():
            np.testing.assert_array_equal(getattr(other, name), expected, err_msg=name)


@pytest.mark.parametrize("levels", [1, 2, 20])
def test_equal_confidences_count_as_in_an_order_by_chance(levels):
    rng = np.random.default_rng(4)
    conf = rng.integers(0, levels, 2000) / levels
    correct = rng.random(2000) < 0.1 + 0.3 * conf
    by_chance = [ap_of(correct, conf + rng.random(2000) / 1e6, 400).ap[0, 0] for _ in range(50)]
    assert max(by_chance) > min(by_chance) + 0.005
    expected = np.mean(by_chance)
    assert ap_of(correct, conf, 400).ap[0, 0] == pytest.approx(
        expected, abs=0.02 * expected + 0.004
    )


def test_equals_facts(shared_dir):
    facts = json.loads((shared_dir / "facts/average_precision.json").read_text())
    result = average_precision_per_class(
        np.array(facts["tp"], bool),
        np.array(facts["conf"]),
        np.array(facts["pred_cls"]),
        np.array(facts["target_cls"]),
    )
    assert result.classes.tolist() == facts["classes"]
    for name in ("precision", "recall", "f1", "ap50", "ap50_95"):
        np.testing.assert_allclose(getattr(result, name), facts[name], atol=1e-6, rtol=0)


def test_operating_point_lies_on_the_curves():
    rng = np.random.default_rng(5)
    conf = rng.random(500)
    correct = np.repeat((rng.random(500) < conf)[:, None], 10, 1)  # confident ones are right
    result = average_precision_per_class(
        correct, conf, rng.integers(0, 4, 500), rng.integers(0, 4, 300)
    )
    assert 0.05 < result.best_conf < 0.95
    for value, curve in ((result.precision, result.precision_curve),
                         (result.recall, result.recall_curve),
                         (result.f1, result.f1_curve)):  # fmt: skip
        at_best = [np.interp(result.best_conf, result.confidences, row) for row in curve]
        np.testing.assert_allclose(value, at_best, atol=1e-9)
    mean_f1 = result.f1_curve.mean(0)
    assert mean_f1[round(result.best_conf * 999)] > mean_f1.max() - 0.02
    assert (np.diff(result.precision_at_recall, axis=1) <= 1e-12).all()


def crowded_images(rng, *, num_labels, spread, jitter, per_label, num_images=12, num_classes=3):
    """Overlapping objects, several boxes for each of them, and a tail of wrong ones."""
    for _ in range(num_images):
        centres = rng.uniform(100, 100 + spread, (num_labels, 2))
        sizes = rng.uniform(30, 70, (num_labels, 2))
        classes = rng.integers(0, num_classes, num_labels)
        labels = np.column_stack((classes, centres - sizes / 2, centres + sizes / 2))
        k = np.repeat(np.arange(num_labels), per_label)
        near = centres[k] + rng.normal(0, jitter, (len(k), 2)) * sizes[k]
        near_sizes = sizes[k] * np.exp(rng.normal(0, jitter, (len(k), 2)))
        far, far_sizes = rng.uniform(80, 300, (200, 2)), rng.uniform(30, 70, (200, 2))
        boxes, wh = np.concatenate((near, far)), np.concatenate((near_sizes, far_sizes))
        conf = np.concatenate((rng.random(len(k)), rng.random(200) * 0.25))
        cls = np.concatenate((classes[k], rng.integers(0, num_classes, 200)))
        yield np.column_stack((boxes - wh / 2, boxes + wh / 2, conf, cls)), labels


def score_by_pycocotools(images, num_classes=3):
    annotations, results = [], []
    for image_id, (detections, labels) in enumerate(images, start=1):
        for cls, x1, y1, x2, y2 in labels.tolist():
            box = [x1, y1, x2 - x1, y2 - y1]
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, "bbox": box,
                                "category_id": int(cls) + 1, "area": box[2] * box[3],
                                "iscrowd": 0})  # fmt: skip
        for x1, y1, x2, y2, conf, cls in detections.tolist():
            results.append({"image_id": image_id, "category_id": int(cls) + 1, "score": conf,
                            "bbox": [x1, y1, x2 - x1, y2 - y1]})  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        ground_truth = COCO()
        ground_truth.dataset = {
            "images": [{"id": i + 1} for i in range(len(images))],
            "annotations": annotations,
            "categories": [{"id": i + 1} for i in range(num_classes)],
        }
        ground_truth.createIndex()
        evaluation = COCOeval(ground_truth, ground_truth.loadRes(results), "bbox")
        evaluation.params.maxDets = [1, 10, 1000]
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][..., 0, 2]  # [I, 101, K]
    return precision[0].mean(), precision.mean()


@pytest.mark.parametrize(
    "crowd",
    [
        pytest.param({"num_labels": 40, "spread": 160, "jitter": 0.1, "per_label": 2}, id="dense"),
        pytest.param({"num_labels": 40, "spread": 60, "jitter": 0.1, "per_label": 2}, id="denser"),
        pytest.param({"num_labels": 40, "spread": 160, "jitter": 0.05, "per_label": 1}, id="exact"),
        pytest.param({"num_labels": 15, "spread": 160, "jitter": 0.15, "per_label": 4}, id="many"),
    ],
)
def test_agrees_with_pycocotools_in_a_crowd(crowd):
    images = list(crowded_images(np.random.default_rng(0), **crowd))
    correct = np.concatenate(match_detections(*zip(*images, strict=True)))
    detections = np.concatenate([image[0] for image in images])
    target_cls = np.concatenate([image[1][:, 0] for image in images])
    result = average_precision_per_class(correct, detections[:, 4], detections[:, 5], target_cls)
    map50, map50_95 = score_by_pycocotools(images)
    assert 0.3 < map50 < 0.95
    assert result.ap50.mean() == pytest.approx(map50, abs=0.01)
    assert result.ap50_95.mean() == pytest.approx(map50_95, abs=0.01)


def test_fitness():
    assert fitness(0.5, 0.3) == pytest.approx(0.32)


# ---------------------------------------------------------------------------- confusion matrix
CONFUSION_ROWS = [
    pytest.param([], [], {}, id="nothing"),
    pytest.param([], [label(0, 0, 9, 9, 1)], {(3, 1): 1}, id="missed"),
    pytest.param([detection(0, 0, 9, 9, 0.9, 2)], [], {(2, 3): 1}, id="nothing there"),
    pytest.param([detection(0, 0, 9, 9, 0.2, 2)], [], {}, id="not confident"),
    pytest.param([detection(0, 0, 9, 9)], [label(0, 0, 9, 9)], {(0, 0): 1}, id="right"),
    pytest.param(
        [detection(0, 0, 9, 9, 0.9, 2)], [label(0, 0, 9, 9, 1)], {(2, 1): 1}, id="mistaken"
    ),
    pytest.param(
        [detection(0, 0, 9, 9), detection(0, 0, 9, 8)],
        [label(0, 0, 9, 9), label(50, 50, 59, 59, 1)],
        {(0, 0): 1, (0, 3): 1, (3, 1): 1},
        id="found, doubled, missed",
    ),
]


@pytest.mark.parametrize(("detections", "labels", "expected"), CONFUSION_ROWS)
def test_confusion_by_hand(detections, labels, expected):
    confusion = ConfusionMatrix(3)
    confusion.update(
        np.array(detections, np.float32).reshape(-1, 6), np.array(labels, float).reshape(-1, 5)
    )
    cells = np.argwhere(confusion.matrix).tolist()
    found = {(r, c): int(confusion.matrix[r, c]) for r, c in cells}
    assert found == expected


def test_confusion_counts_every_label_once():
    rng = np.random.default_rng(2)
    confusion, num_labels, num_detections = ConfusionMatrix(3), 0, 0
    for detections, labels in crowded_images(
        rng, num_labels=30, spread=100, jitter=0.1, per_label=2, num_images=3
    ):
        confusion.update(detections, labels)
        num_labels += len(labels)
        num_detections += int((detections[:, 4] > 0.25).sum())
    assert confusion.matrix[:, :3].sum() == num_labels
    assert confusion.matrix[:3].sum() == num_detections
