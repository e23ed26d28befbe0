import numpy as np
import pytest
import torch

from utils.boxes import (
    Letterbox,
    box_area,
    box_iou,
    clip_boxes,
    cxcywh_from_xyxy,
    paired_iou,
    to_letterbox,
    to_original,
    xyxy_from_cxcywh,
)

# Corners of two boxes and their IoU, by hand.
IOU_ROWS = [
    pytest.param((0, 0, 10, 10), (0, 0, 10, 10), 1.0, id="same"),
    pytest.param((0, 0, 10, 10), (10, 0, 20, 10), 0.0, id="touching"),
    pytest.param((0, 0, 10, 10), (30, 30, 40, 40), 0.0, id="apart"),
    pytest.param((0, 0, 10, 10), (5, 0, 15, 10), 50 / 150, id="half"),
    pytest.param((0, 0, 10, 10), (2, 2, 4, 4), 4 / 100, id="inside"),
    pytest.param((5, 5, 5, 5), (5, 5, 5, 5), 0.0, id="empty boxes"),
    pytest.param((0, 0, 1e-3, 1e-3), (0, 0, 1e-3, 5e-4), 0.5, id="normalised, tiny"),
    pytest.param((-20, -10, -10, 0), (-15, -10, -5, 0), 50 / 150, id="negative"),
]


@pytest.mark.parametrize(("a", "b", "expected"), IOU_ROWS)
def test_box_iou_by_hand(a, b, expected):
    a, b = np.array([a], np.float64), np.array([b], np.float64)
    assert box_iou(a, b)[0, 0] == pytest.approx(expected, abs=1e-9)
    assert box_iou(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("num_a", "num_b"), [(0, 0), (0, 3), (3, 0), (4, 5)])
def test_box_iou_shape(num_a, num_b):
    assert box_iou(np.zeros((num_a, 4)), np.zeros((num_b, 4))).shape == (num_a, num_b)
    assert box_iou(torch.zeros(num_a, 4), torch.zeros(num_b, 4)).shape == (num_a, num_b)


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_formats_round_trip(library):
    rng = np.random.default_rng(0)
    boxes = rng.uniform(0.1, 100, (5, 7, 4))
    boxes = torch.from_numpy(boxes) if library == "torch" else boxes
    back = cxcywh_from_xyxy(xyxy_from_cxcywh(boxes))
    assert type(back) is type(boxes)
    np.testing.assert_allclose(np.asarray(back), np.asarray(boxes), atol=1e-12)


@pytest.mark.parametrize("convert", [xyxy_from_cxcywh, cxcywh_from_xyxy])
def test_formats_of_no_boxes(convert):
    assert convert(np.zeros((0, 4))).shape == (0, 4)
    assert convert(torch.zeros(0, 4)).shape == (0, 4)


def test_xyxy_by_hand():
    np.testing.assert_allclose(xyxy_from_cxcywh(np.array([10.0, 20, 4, 6])), [8, 17, 12, 23])


def test_box_area_of_turned_box_is_zero():
    assert box_area(np.array([[3.0, 3, 1, 5], [0, 0, 2, 4]])).tolist() == [0, 8]


def test_clip_leaves_input_alone():
    boxes = torch.tensor([[-5.0, -5, 300, 90]])
    assert clip_boxes(boxes, (80, 200)).tolist() == [[0, 0, 200, 80]]
    assert boxes.tolist() == [[-5, -5, 300, 90]]


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_letterbox_round_trip(library):
    letterbox = Letterbox(original_hw=(480, 640), ratio_wh=(0.5, 0.501), pad_wh=(16.0, 40.5))
    boxes = np.random.default_rng(1).uniform(0, 480, (20, 4))
    boxes = torch.from_numpy(boxes) if library == "torch" else boxes
    back = to_original(to_letterbox(boxes, letterbox), letterbox)
    np.testing.assert_allclose(np.asarray(back), np.asarray(boxes), atol=1e-9)


def test_letterbox_by_hand():
    letterbox = Letterbox(original_hw=(100, 200), ratio_wh=(0.5, 0.25), pad_wh=(3.0, 7.0))
    on_input = to_letterbox(np.array([[10.0, 20, 200, 100]]), letterbox)
    assert on_input.tolist() == [[8.0, 12.0, 103.0, 32.0]]
    padding = np.array([[0.0, 0, 500, 500]])
    assert to_original(padding, letterbox).tolist() == [[0, 0, 200, 100]]


def boxes_cxcywh(*corners):
    return cxcywh_from_xyxy(torch.tensor(corners, dtype=torch.float64))


@pytest.mark.parametrize(("a", "b", "expected"), IOU_ROWS)
def test_paired_iou_equals_box_iou(a, b, expected):
    iou = paired_iou(boxes_cxcywh(a), boxes_cxcywh(b), kind="iou", eps=1e-12)
    assert iou.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # Boxes 10 x 10 at distance 10 (touching at x = 10): hull 20 x 10, of diagonal^2 500.
        ("iou", 0),
        ("ciou", 0 - 100 / (400 + 100)),
    ],
)
def test_paired_iou_of_touching_boxes(kind, expected):
    a, b = boxes_cxcywh((0, 0, 10, 10)), boxes_cxcywh((10, 0, 20, 10))
    assert paired_iou(a, b, kind=kind).item() == pytest.approx(expected, abs=1e-6)


def test_ciou_by_hand():
    # Same centre: 4 x 2 in 4 x 4. IoU 8 / 16, no distance, v from the angles.
    a, b = torch.tensor([[5.0, 5, 4, 2]]).double(), torch.tensor([[5.0, 5, 4, 4]]).double()
    v = 4 / np.pi**2 * (np.arctan(1) - np.arctan(2)) ** 2
    alpha = v / (1 - 0.5 + v)
    assert paired_iou(a, b).item() == pytest.approx(0.5 - alpha * v, abs=1e-6)


@pytest.mark.parametrize("kind", ["iou", "ciou"])
def test_paired_iou_is_one_and_differentiable(kind):
    boxes = torch.rand(6, 4, dtype=torch.float64) + 0.5
    assert torch.allclose(paired_iou(boxes, boxes, kind=kind), torch.ones(6).double(), atol=1e-5)
    moved = (boxes + 0.1).requires_grad_()
    paired_iou(moved, boxes, kind=kind).sum().backward()
    assert torch.isfinite(moved.grad).all()
    assert moved.grad.abs().sum() > 0


def test_ciou_gradient_is_finite_for_degenerate_boxes():
    boxes = torch.zeros(2, 4, requires_grad=True)
    paired_iou(boxes, torch.tensor([[1.0, 1, 2, 2], [0, 0, 0, 0]])).sum().backward()
    assert torch.isfinite(boxes.grad).all()


def test_paired_iou_refuses_unknown_kind():
    with pytest.raises(ValueError, match="'giou' is not one of"):
        paired_iou(torch.ones(1, 4), torch.ones(1, 4), kind="giou")
