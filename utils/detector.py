"""A detector for Python programs: pictures in, boxes out.

    from models import load_model

    model = load_model("yolov5n.pt")
    found = model("street.jpg")
    print(found.boxes, found.scores, found.names)
    for row in found.table: ...

What is found is what `detect.py` finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import cv2
import numpy as np
from PIL import Image, ImageOps

from utils.backends import load_network
from utils.device import select_device
from utils.downloads import find_weights
from utils.image_files import read_image
from utils.pipeline import DetectionSettings, Pipeline, check_half

Picture = str | Path | np.ndarray | Image.Image


@dataclass(frozen=True)
class ImageDetections:
    """What was found in one picture; the most confident first."""

    boxes: np.ndarray  # float32 [M, 4], xyxy in pixels of the picture
    scores: np.ndarray  # float32 [M], 0-1
    classes: np.ndarray  # int64 [M]
    names: list[str]  # of the class of each box

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def table(self) -> list[dict[str, Any]]:
        """A dict per box, of plain numbers: name, class, score, x1, y1, x2, y2."""
        return [
            {"name": name, "class": cls, "score": score, "x1": x1, "y1": y1, "x2": x2, "y2": y2}
            for name, cls, score, (x1, y1, x2, y2) in zip(
                self.names, self.classes.tolist(), self.scores.tolist(), self.boxes.tolist(),
                strict=True,
            )
        ]  # fmt: skip


class ImageDetector:
    """A network with its settings; call it with pictures. `names` are its classes."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self.names = pipeline.network.names

    @overload
    def __call__(self, pictures: Picture) -> ImageDetections: ...  # type: ignore[overload-overlap]

    @overload
    def __call__(self, pictures: Sequence[Picture]) -> list[ImageDetections]: ...

    def __call__(
        self, pictures: Picture | Sequence[Picture]
    ) -> ImageDetections | list[ImageDetections]:
        """Detect in a picture, or in each of several; those of equal size go together.

        Args:
            pictures: path of an image file; uint8 array, RGB [H, W, 3] or grey [H, W]; PIL image;
                or a list of these.

        Raises:
            OSError: a file is missing or damaged.
            TypeError, ValueError: something is no picture.
        """
        if isinstance(pictures, Picture):
            return self._detect([pictures])[0]
        return self._detect(list(pictures))

    def _detect(self, pictures: list[Picture]) -> list[ImageDetections]:
        results = []
        for rows in self._pipeline([_as_bgr(picture) for picture in pictures]):
            classes = rows[:, 5].numpy().astype(np.int64)
            names = [self.names[cls] for cls in classes]
            results.append(ImageDetections(rows[:, :4].numpy(), rows[:, 4].numpy(), classes, names))
        return results


def load_model(
    weights: str | Path,
    device: str = "",
    *,
    imgsz: int | None = None,
    conf_thres: float = 0.25,
    iou_thres: float | None = None,
    max_det: int = 1000,
    classes: Sequence[int] | None = None,
    agnostic: bool = False,
    augment: bool = False,
    half: bool = False,
) -> ImageDetector:
    """Load a detector; what it finds is what `detect.py` finds with the same settings.

    Args:
        weights: checkpoint of this toolkit, public YOLOv5 `.pt` file or name, or an export.
        device: `''` (best), `cpu`, `mps` or the number of a GPU.
        imgsz: long side of the input in pixels; None: 640, or what an export was made for.
        conf_thres: least confidence, 0-1.
        iou_thres: of NMS, 0-1; None: 0.45.
        max_det: most detections per picture.
        classes: numbers of the classes to keep; None: all.
        agnostic: boxes suppress those of other classes too.
        augment: three passes, scaled and mirrored, put together.
        half: compute in float16; needs a GPU.

    Raises:
        OSError: no such file.
        ValueError: the file cannot be read, or a setting cannot act.
    """
    target = select_device(device)
    check_half(half, target)
    network = load_network(find_weights(weights), target, half=half)
    settings = DetectionSettings(
        imgsz=imgsz,
        conf_thres=conf_thres,
        iou_thres=iou_thres,
        max_det=max_det,
        classes=None if classes is None else tuple(classes),
        agnostic=agnostic,
        augment=augment,
    )
    return ImageDetector(Pipeline(network, target, settings))


def _as_bgr(picture: Picture) -> np.ndarray:
    """Any picture as uint8 BGR [H, W, 3]."""
    if isinstance(picture, str | Path):
        return read_image(picture)
    if isinstance(picture, Image.Image):
        picture = ImageOps.exif_transpose(picture)  # read_image does so too
        if picture.mode.startswith("I;16"):
            picture = (np.asarray(picture) >> 8).astype(np.uint8)
        else:
            picture = np.asarray(picture.convert("RGB"))
    if not isinstance(picture, np.ndarray):
        raise TypeError(f"expected a path, an array or a PIL image, not {type(picture).__name__}")
    if picture.dtype != np.uint8 or not picture.size:
        raise ValueError(f"expected uint8 pixels, not {picture.dtype} of shape {picture.shape}")
    if picture.ndim == 2:
        return cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR)
    if picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"expected an RGB array [H, W, 3], not one of shape {picture.shape}")
    return cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
