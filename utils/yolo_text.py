"""Detections as text, in the form of YOLO labels."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from utils.atomic import name_in_errors
from utils.boxes import cxcywh_from_xyxy


def write_text(
    path: Path, detections: Tensor, original_hw: tuple[int, int], save_conf: bool
) -> None:
    """Write `class cx cy w h [conf]` per detection, normalised to the original image."""
    height, width = original_hw
    boxes_norm = cxcywh_from_xyxy(detections[:, :4]) / torch.tensor([width, height, width, height])
    lines = []
    for row, conf, cls in zip(
        boxes_norm.tolist(), detections[:, 4].tolist(), detections[:, 5].tolist(), strict=True
    ):
        numbers = [*row, conf] if save_conf else row
        lines.append(" ".join([str(int(cls)), *(f"{number:.6g}" for number in numbers)]) + "\n")
    with name_in_errors(path):
        path.write_text("".join(lines), encoding="utf-8")
