"""Whether an exported network does what the torch network does, on the same images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from utils.boxes import box_iou
from utils.evaluate import EvaluationResult

IN_USE = 0.25  # least confidence of rows that matter to programs
LEAST_ROWS = 100  # of each comparison, where fewer are as confident as that


class Tolerance(NamedTuple):
    """How far an export may be off."""

    box: float  # share of the long side of the input
    score: float
    missing: float  # share of detections without a partner
    map50: float  # loss of mAP@.5; 0.01 is one point


# float32 differs by the order of sums. What rounding to 16 and 8 bits does to single boxes depends
# on the network, so that for 8 bits only the mAP tells.
TOLERANCES = {
    "float32": Tolerance(0.0005, 0.002, 0.02, 0.002),
    "float16": Tolerance(0.05, 0.05, 0.05, 0.01),
    "int8": Tolerance(math.inf, math.inf, 1.0, 0.05),
}


class Difference(NamedTuple):
    """The largest differences that a comparison found."""

    box_px: float  # of a coordinate: cx, cy, w, h or xyxy
    score: float
    num_rows: int  # predictions or detections compared
    num_missing: int = 0  # detections of either that the other one does not have

    def __str__(self) -> str:
        missing = f", {self.num_missing} without a partner" if self.num_missing else ""
        return (
            f"boxes differ by {self.box_px:.4f} px at most, scores by {self.score:.5f} "
            f"({self.num_rows} rows{missing})"
        )


def synthetic_pictures(imgsz_hw: tuple[int, int], count: int = 4, seed: int = 0) -> Tensor:
    """Pictures `[count, 3, H, W]` in 0-1 with structure of every size, as photographs have it.

    Noise at half the size again and again, each time of half the strength; the last one is plain
    noise.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, *imgsz_hw)
    pictures = torch.zeros(shape)
    for octave in range(1, 7):
        sides = [max(side * 2**octave // 128, 1) for side in imgsz_hw]
        noise = torch.rand(count, 3, *sides, generator=generator) - 0.5
        pictures += interpolate(noise, imgsz_hw, mode="bicubic") * 2 ** (1 - octave)
    pictures = (pictures + 0.5).clamp(0, 1)
    pictures[-1] = torch.rand(shape[1:], generator=generator)
    return pictures


def compare_predictions(reference: Tensor, exported: Tensor) -> Difference:
    """Largest differences between predictions `[B, N, 5+K]`, where either one is confident.

    Raises:
        ValueError: the shapes differ, or the exported ones are not finite.
    """
    reference, exported = reference.float(), exported.float().to(reference.device)
    if reference.shape != exported.shape:
        raise ValueError(
            f"gives predictions of shape {list(exported.shape)}, torch {list(reference.shape)}"
        )
    if not torch.isfinite(exported).all():
        raise ValueError("gives predictions that are not finite")
    a, b = reference.flatten(0, 1), exported.flatten(0, 1)
    confidence = torch.maximum(_confidence(a), _confidence(b))
    num_rows = min(max(int((confidence >= IN_USE).sum()), LEAST_ROWS), len(confidence))
    rows = confidence.topk(num_rows).indices
    off = (a[rows] - b[rows]).abs()
    return Difference(_max(off[:, :4]), _max(off[:, 4:]), num_rows)


def compare_detections(reference: Sequence[Tensor], exported: Sequence[Tensor]) -> Difference:
    """Largest differences between partners: detections per image [M, 6] of a class, IoU > 0.5."""
    box_px, score, num_rows, num_missing = 0.0, 0.0, 0, 0
    for a, b in zip(reference, exported, strict=True):
        b = b.to(a)
        num_rows += max(len(a), len(b))
        if not len(a) or not len(b):
            num_missing += len(a) + len(b)
            continue
        distance = (a[:, None, :4] - b[None, :, :4]).abs().amax(2)
        # The nearest first; and boxes without an area have no IoU even with themselves.
        affinity = torch.where(distance < 0.5, 2 - distance, box_iou(a[:, :4], b[:, :4]))
        affinity = affinity * (a[:, None, 5] == b[None, :, 5])
        best, partner = affinity.max(1)
        found = best > 0.5
        num_missing += int((~found).sum()) + int((affinity.max(0).values <= 0.5).sum())
        off = (a[found] - b[partner[found]]).abs()
        box_px, score = max(box_px, _max(off[:, :4])), max(score, _max(off[:, 4]))
    return Difference(box_px, score, num_rows, num_missing)


def check_difference(difference: Difference, precision: str, long_side_px: int) -> None:
    """Refuse what differs more than its precision explains.

    Raises:
        ValueError: it does; says by how much.
    """
    allowed = TOLERANCES[precision]
    most_px = allowed.box * long_side_px
    if (
        difference.box_px > most_px
        or difference.score > allowed.score
        or difference.num_missing > allowed.missing * difference.num_rows
    ):
        raise ValueError(
            f"differs too much from torch: {difference}; for {precision} at most {most_px:.2f} px "
            f"and {allowed.score} are accepted"
        )


def check_map(reference: EvaluationResult, exported: EvaluationResult, precision: str) -> None:
    """Refuse a loss of mAP@.5 that the precision does not explain.

    Raises:
        ValueError: there is one.
    """
    loss, allowed = reference.map50 - exported.map50, TOLERANCES[precision].map50
    if loss > allowed:
        raise ValueError(
            f"loses {100 * loss:.2f} points of mAP@.5 ({reference.map50:.4f} -> "
            f"{exported.map50:.4f}); for {precision} at most {100 * allowed:g} are accepted"
        )


@torch.no_grad()
def predict(network: nn.Module, pictures: Tensor, device: torch.device) -> Tensor:
    """First output of a network for images [B, 3, H, W], one image after the other."""
    parts = [network(picture[None].to(device))[0] for picture in pictures]
    return torch.cat(parts).cpu()


def _confidence(predictions: Tensor) -> Tensor:
    return predictions[:, 4] * predictions[:, 5:].amax(1)


def _max(values: Tensor) -> float:
    return float(values.max()) if values.numel() else 0.0
