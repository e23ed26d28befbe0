import numpy as np
import pytest
import torch

from utils.boxes import box_iou, xyxy_from_cxcywh
from utils.nms import non_max_suppression


def predictions_of(*rows):
    """One image; a row is cx, cy, w, h, objectness, class scores."""
    return torch.tensor([rows], dtype=torch.float32)


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("shape", [(0, 0, 8), (2, 0, 8), (2, 5, 8), (1, 5, 6)])
def test_nothing_to_find(shape, multi_label):
    detections = non_max_suppression(torch.zeros(shape), multi_label=multi_label)
    assert len(detections) == shape[0]
    assert all(rows.shape == (0, 6) and rows.dtype == torch.float32 for rows in detections)


def test_weaker_box_of_same_class_goes():
    predictions = predictions_of(
        (50, 50, 20, 20, 0.9, 0.8, 0.0),
        (51, 50, 20, 20, 0.9, 0.9, 0.0),  # stronger
        (51, 50, 20, 20, 0.9, 0.0, 0.7),  # another class
        (90, 90, 20, 20, 0.9, 0.5, 0.0),  # elsewhere
        (20, 20, 20, 20, 0.2, 1.0, 0.0),  # too weak
    )
    (rows,) = non_max_suppression(predictions, 0.25, 0.45)
    assert rows[:, 5].tolist() == [0, 1, 0]
    assert rows[:, 4].tolist() == pytest.approx([0.81, 0.63, 0.45])
    assert rows[0, :4].tolist() == [41, 40, 61, 60]


def test_agnostic_boxes_suppress_other_classes():
    predictions = predictions_of((50, 50, 20, 20, 1, 0.9, 0.1), (51, 50, 20, 20, 1, 0, 0.7))
    (rows,) = non_max_suppression(predictions, 0.25, 0.45, agnostic=True)
    assert rows[:, 5].tolist() == [0]


def test_multi_label_gives_a_box_several_classes():
    predictions = predictions_of((50, 50, 20, 20, 1, 0.9, 0.6, 0.1))
    (single,) = non_max_suppression(predictions, 0.25, 0.45)
    (several,) = non_max_suppression(predictions, 0.25, 0.45, multi_label=True)
    assert single[:, 5].tolist() == [0]
    assert several[:, 5].tolist() == [0, 1]


def test_classes_select():
    predictions = predictions_of((50, 50, 20, 20, 1, 0.9, 0.6), (20, 20, 9, 9, 1, 0.1, 0.8))
    (rows,) = non_max_suppression(predictions, 0.25, 0.45, classes=[1], multi_label=True)
    assert rows[:, 5].tolist() == [1, 1]
    (rows,) = non_max_suppression(predictions, 0.25, 0.45, classes=[])
    assert len(rows) == 0


def test_limits_keep_the_most_confident():
    rng = torch.Generator().manual_seed(0)
    predictions = torch.rand(1, 200, 7, generator=rng)
    predictions[..., :2] *= 5000  # far apart
    (all_rows,) = non_max_suppression(predictions, 0.01, 0.5)
    (few,) = non_max_suppression(predictions, 0.01, 0.5, max_det=7)
    (candidates,) = non_max_suppression(predictions, 0.01, 0.5, max_candidates=7)
    assert len(all_rows) > 100
    assert torch.equal(few, all_rows[:7])
    assert torch.equal(candidates, all_rows[:7])


def test_input_stays_and_half_precision_works():
    predictions = torch.rand(2, 50, 9)
    predictions[..., :4] *= 100
    half = predictions.half()
    before = half.clone()
    detections = non_max_suppression(half, 0.1, 0.5, multi_label=True)
    assert torch.equal(half, before)
    assert all(rows.dtype == torch.float32 for rows in detections)
    expected = non_max_suppression(half.float(), 0.1, 0.5, multi_label=True)
    assert all(torch.equal(a, b) for a, b in zip(detections, expected, strict=True))


def slow_nms(predictions, conf_thres, iou_thres):
    """Box after box, class after class: independent of the tested code."""
    boxes = xyxy_from_cxcywh(predictions[:, :4])
    kept = []
    for cls in range(predictions.shape[1] - 5):
        scores = predictions[:, 4] * predictions[:, 5 + cls]
        chosen = []
        for index in np.argsort(-scores, kind="stable"):
            if scores[index] <= conf_thres:
                break
            rivals = boxes[chosen].reshape(-1, 4)
            if not (box_iou(boxes[index][None], rivals) > iou_thres).any():
                chosen.append(index)
        kept += [(*boxes[i], scores[i], cls) for i in chosen]
    return sorted(kept, key=lambda row: -row[4])


@pytest.mark.parametrize(
    ("num", "offset"), [(40, 0), (300, 0), (300, -400), (2000, 0), (100, 50_000)]
)
def test_equals_slow_loop(num, offset):
    """Also left of the image and far to the right, where class offsets can mix classes up."""
    rng = np.random.default_rng(num)
    predictions = rng.random((num, 5 + 4))
    predictions[:, :2] = predictions[:, :2] * 300 + offset
    predictions[:, 2:4] = predictions[:, 2:4] * 80 + 10
    predictions = predictions.astype(np.float32)
    (rows,) = non_max_suppression(
        torch.from_numpy(predictions)[None], 0.2, 0.5, multi_label=True, max_det=10_000
    )
    expected = np.array(slow_nms(predictions, 0.2, 0.5))
    assert rows.shape == expected.shape
    order = np.lexsort((rows[:, 0], rows[:, 5], -rows[:, 4]))
    order_expected = np.lexsort((expected[:, 0], expected[:, 5], -expected[:, 4]))
    np.testing.assert_allclose(rows.numpy()[order], expected[order_expected], atol=1e-2, rtol=1e-5)


@pytest.mark.parametrize("name", ["conf_thres", "iou_thres"])
def test_threshold_out_of_range(name):
    with pytest.raises(ValueError, match=rf"{name} 1\.5 lies outside 0 to 1"):
        non_max_suppression(torch.zeros(1, 1, 6), **{name: 1.5})


def test_has_no_clock():
    """A time limit would drop detections on a busy machine."""
    assert "time" not in vars(__import__("utils.nms", fromlist=["x"]))


@pytest.mark.usefixtures("two_threads")
def test_images_of_a_batch_keep_their_order():
    torch.manual_seed(0)
    batch = torch.rand(7, 50, 8)
    batch[..., :2] *= 300
    batch[..., 2:4] *= 90
    batch.requires_grad_()
    together = non_max_suppression(batch, 0.2, multi_label=True)
    apart = [non_max_suppression(image[None], 0.2, multi_label=True)[0] for image in batch]
    assert len({len(rows) for rows in together}) > 1
    for ours, expected in zip(together, apart, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
