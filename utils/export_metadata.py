"""What every exported file says about itself: classes, stride, size, anchors, task.

All values are text, because some formats hold nothing else. The keys `names` and `stride` are
spelled as stock YOLOv5 programs read them: `{0: 'cat', 1: 'dog'}` and `32`.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

TASK = "detect"
PRECISIONS = ("float32", "float16", "int8")


@dataclass(frozen=True)
class ExportMetadata:
    """Facts about an exported network that its graph does not show."""

    names: tuple[str, ...]  # classes
    stride: int  # input sides are multiples of it
    imgsz_hw: tuple[int, int]  # input size of the export, pixels
    batch_size: int  # images at once
    dynamic: bool  # other input sizes (and batches, see `batch_is_free`) are taken too
    anchors: tuple[tuple[float, ...], ...]  # per level w, h, w, h, ... in input pixels
    precision: str  # weights: one of PRECISIONS; images and predictions are float32 always
    has_nms: bool  # gives detections [B, M, 6] instead of predictions [B, N, 5+K]

    @property
    def batch_is_free(self) -> bool:
        """Whether any number of images is taken; NMS inside the graph goes image by image."""
        return self.dynamic and not self.has_nms

    def to_text(self) -> dict[str, str]:
        """The form in which files hold it."""
        return {
            "task": TASK,
            "names": repr(dict(enumerate(self.names))),
            "stride": str(self.stride),
            "imgsz": json.dumps(self.imgsz_hw),
            "batch": str(self.batch_size),
            "dynamic": json.dumps(self.dynamic),
            "anchors": json.dumps(self.anchors),
            "precision": self.precision,
            "nms": json.dumps(self.has_nms),
        }

    @classmethod
    def from_text(cls, text: Mapping[str, str], source: str) -> ExportMetadata:
        """Read it back.

        Args:
            text: as `to_text` gives it; other keys do not matter.
            source: the file, for the message.

        Raises:
            ValueError: something is missing or makes no sense.
        """
        missing = [key for key in _KEYS if key not in text]
        if missing:
            raise ValueError(
                f"{source}: says nothing about its {', '.join(missing)}, so it was not written by "
                "export.py of this toolkit; export the .pt file again"
            )
        try:
            height, width = (int(side) for side in json.loads(text["imgsz"]))
            metadata = cls(
                names=_names(ast.literal_eval(text["names"])),
                stride=int(text["stride"]),
                imgsz_hw=(height, width),
                batch_size=int(text["batch"]),
                dynamic=_flag(text["dynamic"]),
                anchors=tuple(tuple(map(float, level)) for level in json.loads(text["anchors"])),
                precision=text["precision"],
                has_nms=_flag(text["nms"]),
            )
        except (ValueError, TypeError, SyntaxError, AttributeError) as error:
            raise ValueError(f"{source}: its metadata is damaged ({error})") from None
        if text["task"] != TASK or metadata.precision not in PRECISIONS:
            raise ValueError(
                f"{source}: made for task {text['task']!r} in {metadata.precision!r}; this toolkit "
                f"runs {TASK!r} in {', '.join(PRECISIONS)}"
            )
        return metadata


_KEYS = ("task", "names", "stride", "imgsz", "batch", "dynamic", "anchors", "precision", "nms")


def _names(numbered: Mapping[Any, Any]) -> tuple[str, ...]:
    """Class names by ascending number."""
    if sorted(numbered) != list(range(len(numbered))):
        raise ValueError(f"classes are numbered {list(numbered)}")
    return tuple(str(numbered[number]) for number in range(len(numbered)))


def _flag(text: str) -> bool:
    if text not in ("true", "false"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text == "true"
