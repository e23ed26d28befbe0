"""Non-maximum suppression: decoded predictions of a batch to detections per image."""

from __future__ import annotations

import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from utils.boxes import xyxy_from_cxcywh

# From here on, looking at each group by itself takes less time than comparing all boxes.
MANY_BOXES, MANY_BOXES_ON_GPU = 1000, 25_000


def non_max_suppression(
    predictions: Tensor,
    conf_thres: float = 0.25,
    iou_thres: float = 0.45,
    *,
    multi_label: bool = False,
    max_det: int = 300,
    agnostic: bool = False,
    classes: Sequence[int] | None = None,
    max_candidates: int = 30_000,
) -> list[Tensor]:
    """Keep, per image and class, the most confident of boxes that overlap.

    There is no time limit: the work is bounded by `max_candidates`, so that the result does not
    depend on how busy the machine is.

    Args:
        predictions: [B, N, 5+K], cx, cy, w, h in pixels, objectness, class scores (sigmoid). Any
            float type; left unchanged.
        conf_thres: least objectness, and least objectness * class score, of a detection; in [0, 1].
        iou_thres: of two boxes with more IoU than this the weaker one goes; in [0, 1].
        multi_label: a box counts once for every class above the threshold, not for its best alone.
        max_det: most detections per image.
        agnostic: boxes suppress those of other classes too.
        classes: keep these class numbers only; None keeps all.
        max_candidates: of more candidates than this in an image, the most confident are looked at.

    Returns:
        Per image [M, 6] float32: xyxy, confidence, class; the most confident first.

    Raises:
        ValueError: a threshold lies outside [0, 1].
    """
    for name, value in (("conf_thres", conf_thres), ("iou_thres", iou_thres)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} {value} lies outside 0 to 1")
    multi_label = multi_label and predictions.shape[2] > 6  # one class: both ways are the same

    candidates = []
    for image_predictions in predictions:
        boxes_xyxy, conf, cls = _candidates(image_predictions, conf_thres, multi_label)
        if classes is not None:
            wanted = torch.isin(cls, torch.as_tensor(classes, device=cls.device, dtype=cls.dtype))
            boxes_xyxy, conf, cls = boxes_xyxy[wanted], conf[wanted], cls[wanted]
        if len(conf) > max_candidates:
            conf, strongest = conf.topk(max_candidates)
            boxes_xyxy, cls = boxes_xyxy[strongest], cls[strongest]
        candidates.append((boxes_xyxy, conf, cls))

    def choose(boxes_xyxy: Tensor, conf: Tensor, cls: Tensor) -> Tensor:
        groups = torch.zeros_like(cls) if agnostic else cls
        keep_idx = _suppress(boxes_xyxy, conf, groups, iou_thres)[:max_det]
        return torch.cat((boxes_xyxy[keep_idx], conf[keep_idx, None], cls[keep_idx, None]), 1)

    if predictions.device.type != "cpu" or len(predictions) <= 1:
        return list(itertools.starmap(choose, candidates))
    # The suppression of an image keeps one core busy, and lets go of Python meanwhile. Whether
    # gradients are recorded is up to each thread.
    with ThreadPoolExecutor(min(torch.get_num_threads(), len(candidates))) as pool:
        return list(pool.map(torch.no_grad()(choose), *zip(*candidates, strict=True)))


def _candidates(
    image_predictions: Tensor, conf_thres: float, multi_label: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes above the threshold: xyxy [n, 4], confidence [n] in float32, class [n] int64."""
    # Objectness alone removes most rows, before the costly float32 copy of all class scores.
    likely = image_predictions[image_predictions[:, 4] > conf_thres].float()
    boxes_xyxy = xyxy_from_cxcywh(likely[:, :4])
    scores = likely[:, 5:] * likely[:, 4:5]  # [n, K]
    if multi_label:
        row, cls = (scores > conf_thres).nonzero(as_tuple=True)
        return boxes_xyxy[row], scores[row, cls], cls
    if scores.shape[1] == 0 or not len(scores):
        return boxes_xyxy[:0], scores.new_zeros(0), scores.new_zeros(0, dtype=torch.int64)
    conf, cls = scores.max(1)
    above = conf > conf_thres
    return boxes_xyxy[above], conf[above], cls[above]


def _suppress(boxes_xyxy: Tensor, conf: Tensor, groups: Tensor, iou_thres: float) -> Tensor:
    """Indices of the kept boxes, the most confident first; groups do not suppress each other."""
    if not len(boxes_xyxy):
        return groups.new_zeros(0)
    nms, boxes_xyxy = load_nms(), boxes_xyxy - boxes_xyxy.min()
    if len(boxes_xyxy) <= (MANY_BOXES if boxes_xyxy.device.type == "cpu" else MANY_BOXES_ON_GPU):
        # Groups lie side by side, too far apart to overlap.
        return nms(boxes_xyxy + (groups * (boxes_xyxy.max() + 1))[:, None], conf, iou_thres)
    kept = []
    for group in groups.unique():
        (members,) = torch.where(groups == group)
        kept.append(members[nms(boxes_xyxy[members], conf[members], iou_thres)])
    keep_idx = torch.cat(kept)
    return keep_idx[conf[keep_idx].argsort(descending=True)]


@functools.cache
def load_nms() -> Callable[[Tensor, Tensor, float], Tensor]:
    """The operator of torchvision, from its library alone.

    Importing torchvision takes a second or two, for data sets and networks that nobody here uses.
    """
    package = importlib.util.find_spec("torchvision")
    if package is not None and package.origin and not hasattr(torch.ops.torchvision, "nms"):
        for library in Path(package.origin).parent.glob("_C*.*"):
            with suppress(OSError):
                torch.ops.load_library(library)
    if not hasattr(torch.ops.torchvision, "nms"):  # another version keeps it elsewhere
        import torchvision.ops  # noqa: F401
    return torch.ops.torchvision.nms


def split_detections(
    padded: Tensor, conf_thres: float = 0.0, max_det: int | None = None
) -> list[Tensor]:
    """Detections `[B, M, 6]` of a network with NMS inside, per image without rows of padding.

    Those have confidence 0. What the network dropped at its own thresholds does not come back.
    """
    return [rows[rows[:, 4] > max(conf_thres, 0.0)][:max_det] for rows in padded.float()]
