"""Box formats, the IoU family, and the way between original and letterboxed image coordinates.

Formats: `xyxy` is left, top, right, bottom; `cxcywh` is centre, width, height. Pixels are measured
on the continuous image plane: x runs from 0 (left border) to the image width (right border).
Functions named without a library take NumPy arrays and tensors alike and return what they got.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

Boxes = TypeVar("Boxes", np.ndarray, Tensor)
IouKind = Literal["iou", "ciou"]

_EPS = 1e-7  # keeps ratios, and their gradients, finite for degenerate boxes
_TINY = 1e-12  # far below the area of any box, normalised ones included


class Letterbox(NamedTuple):
    """How an image was placed on the network input: x_input = x_original * ratio_w + pad_w.

    `ratio_wh` are input pixels per original pixel, `pad_wh` the left and top padding in input
    pixels; the padding may be fractional.
    """

    original_hw: tuple[int, int]
    ratio_wh: tuple[float, float]
    pad_wh: tuple[float, float]


def _stack_last(columns: list[Boxes]) -> Boxes:
    first = columns[0]
    return torch.stack(columns, -1) if isinstance(first, Tensor) else np.stack(columns, -1)


def xyxy_from_cxcywh(boxes_cxcywh: Boxes) -> Boxes:
    """Turn [..., 4] centre form into corners."""
    cx, cy = boxes_cxcywh[..., 0], boxes_cxcywh[..., 1]
    half_w, half_h = boxes_cxcywh[..., 2] / 2, boxes_cxcywh[..., 3] / 2
    return _stack_last([cx - half_w, cy - half_h, cx + half_w, cy + half_h])


def cxcywh_from_xyxy(boxes_xyxy: Boxes) -> Boxes:
    """Turn [..., 4] corners into centre form."""
    x1, y1 = boxes_xyxy[..., 0], boxes_xyxy[..., 1]
    x2, y2 = boxes_xyxy[..., 2], boxes_xyxy[..., 3]
    return _stack_last([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1])


def clip_boxes(boxes_xyxy: Boxes, image_hw: tuple[int, int]) -> Boxes:
    """Move corners that lie outside the image onto its border; the input is left as it is."""
    height, width = image_hw
    x1, y1 = boxes_xyxy[..., 0].clip(0, width), boxes_xyxy[..., 1].clip(0, height)
    x2, y2 = boxes_xyxy[..., 2].clip(0, width), boxes_xyxy[..., 3].clip(0, height)
    return _stack_last([x1, y1, x2, y2])


def to_letterbox(boxes_xyxy: Boxes, letterbox: Letterbox) -> Boxes:
    """Map [..., 4] corners in original-image pixels to network-input pixels."""
    (ratio_w, ratio_h), (pad_w, pad_h) = letterbox.ratio_wh, letterbox.pad_wh
    return _stack_last(
        [
            boxes_xyxy[..., 0] * ratio_w + pad_w,
            boxes_xyxy[..., 1] * ratio_h + pad_h,
            boxes_xyxy[..., 2] * ratio_w + pad_w,
            boxes_xyxy[..., 3] * ratio_h + pad_h,
        ]
    )


def to_original(boxes_xyxy: Boxes, letterbox: Letterbox) -> Boxes:
    """Map [..., 4] corners in network-input pixels to original pixels, clipped to the image."""
    (ratio_w, ratio_h), (pad_w, pad_h) = letterbox.ratio_wh, letterbox.pad_wh
    unclipped = _stack_last(
        [
            (boxes_xyxy[..., 0] - pad_w) / ratio_w,
            (boxes_xyxy[..., 1] - pad_h) / ratio_h,
            (boxes_xyxy[..., 2] - pad_w) / ratio_w,
            (boxes_xyxy[..., 3] - pad_h) / ratio_h,
        ]
    )
    return clip_boxes(unclipped, letterbox.original_hw)


def box_area(boxes_xyxy: Boxes) -> Boxes:
    """Area of [..., 4] corners; 0 where right < left or bottom < top."""
    widths = (boxes_xyxy[..., 2] - boxes_xyxy[..., 0]).clip(0)
    return widths * (boxes_xyxy[..., 3] - boxes_xyxy[..., 1]).clip(0)


def box_iou(boxes_a_xyxy: Boxes, boxes_b_xyxy: Boxes) -> Boxes:
    """IoU of every pair: [N, 4] and [M, 4] give [N, M]; a pair of empty boxes has IoU 0."""
    a, b = boxes_a_xyxy[:, None, :], boxes_b_xyxy[None, :, :]
    if isinstance(a, Tensor):
        top_left, bottom_right = torch.maximum(a, b), torch.minimum(a, b)
    else:
        top_left, bottom_right = np.maximum(a, b), np.minimum(a, b)
    overlap_w = (bottom_right[..., 2] - top_left[..., 0]).clip(0)
    overlap = overlap_w * (bottom_right[..., 3] - top_left[..., 1]).clip(0)
    return overlap / (box_area(a) + box_area(b) - overlap).clip(_TINY)


def paired_iou(
    boxes_a_cxcywh: Tensor, boxes_b_cxcywh: Tensor, kind: IouKind = "ciou", eps: float = _EPS
) -> Tensor:
    """IoU or CIoU of row i of `a` with row i of `b`; differentiable.

    Args:
        boxes_a_cxcywh: [..., 4]; in float32 or better, as CIoU of half precision is too coarse.
        boxes_b_cxcywh: [..., 4], same shape and unit.
        kind: `iou` in [0, 1]; `ciou` also falls with distance and with the angle, down to -1.5.
        eps: added to denominators, in the unit of the boxes.

    Returns:
        [...]; 1 where the boxes coincide.

    Reference: Zheng et al. 2020, arXiv:1911.08287, eqs. 7 to 11, with alpha treated as a constant
    as in section 3.3.
    """
    w_a, h_a = boxes_a_cxcywh[..., 2], boxes_a_cxcywh[..., 3]
    w_b, h_b = boxes_b_cxcywh[..., 2], boxes_b_cxcywh[..., 3]
    a, b = xyxy_from_cxcywh(boxes_a_cxcywh), xyxy_from_cxcywh(boxes_b_cxcywh)
    overlap_wh = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    overlap_wh = overlap_wh.clamp(0)
    overlap = overlap_wh[..., 0] * overlap_wh[..., 1]
    union = w_a * h_a + w_b * h_b - overlap + eps
    iou = overlap / union
    if kind == "iou":
        return iou
    if kind != "ciou":
        raise ValueError(f"kind {kind!r} is not one of iou, ciou")

    hull_wh = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    rho2 = (boxes_a_cxcywh[..., :2] - boxes_b_cxcywh[..., :2]).square().sum(-1)
    diou = iou - rho2 / (hull_wh.square().sum(-1) + eps)
    angle_gap = torch.atan(w_b / (h_b + eps)) - torch.atan(w_a / (h_a + eps))
    v = 4 / math.pi**2 * angle_gap.square()
    with torch.no_grad():
        alpha = v / (1 - iou + v + eps)
    return diou - alpha * v
