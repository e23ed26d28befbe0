"""COCO instance annotations (JSON) -> YOLO label files and image lists."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np


class Conversion(NamedTuple):
    """Counts of one conversion."""

    num_images: int
    num_boxes: int
    num_crowds: int  # regions of many objects: left out
    num_degenerate: int  # boxes without area inside the image: left out


def convert_instances(
    instances: Path, labels: Path, names: Sequence[str], *, polygons: bool = True
) -> Conversion:
    """Write one label file per image.

    Args:
        instances: `instances_*.json`.
        labels: folder for the label files; made if it is not there. An image without objects gets
            an empty file.
        names: class names by class index; they are matched with the categories by name.
        polygons: write the outline of each object where there is one, otherwise its box.

    Raises:
        ValueError: the file is not what it should be, or has a category that `names` lacks.
    """
    content = read_annotations(instances)
    index_of = {name: index for index, name in enumerate(names)}
    unknown = [c["name"] for c in content["categories"] if c["name"] not in index_of]
    if unknown:
        raise ValueError(f"{instances}: categories without a class: {', '.join(unknown)}")
    class_of = {c["id"]: index_of[c["name"]] for c in content["categories"]}
    lines: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
    sizes_wh = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    num_crowds = num_degenerate = 0
    for annotation in content["annotations"]:
        image_id = annotation["image_id"]
        if annotation.get("iscrowd"):
            num_crowds += 1
            continue
        points = _outline(annotation, sizes_wh[image_id], polygons)
        if points is None:
            num_degenerate += 1
            continue
        numbers = " ".join(f"{value:.6f}" for value in points)
        lines[image_id].append(f"{class_of[annotation['category_id']]} {numbers}\n")
    labels.mkdir(parents=True, exist_ok=True)
    for image in content["images"]:
        file = labels / f"{Path(image['file_name']).stem}.txt"
        file.write_text("".join(lines[image["id"]]), encoding="utf-8")
    num_boxes = sum(map(len, lines.values()))
    return Conversion(len(lines), num_boxes, num_crowds, num_degenerate)


def image_names(annotations: Path) -> list[str]:
    """Sorted file names of the images in any COCO JSON with `images`."""
    images = read_annotations(annotations, ("images",))["images"]
    return sorted(Path(image["file_name"]).name for image in images)


def write_image_list(annotations: Path, folder: str, path: Path) -> int:
    """List the images of an annotation file as `./folder/NAME`; returns how many.

    Args:
        annotations: any COCO JSON with `images`.
        folder: of the images, relative to the list.
        path: the `.txt` list.
    """
    names = image_names(annotations)
    path.write_text("".join(f"./{folder}/{name}\n" for name in names), encoding="utf-8")
    return len(names)


def read_annotations(
    path: Path, keys: Sequence[str] = ("images", "annotations", "categories")
) -> dict[str, Any]:
    """Read a COCO JSON.

    Raises:
        ValueError: not JSON, or one of the keys is missing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{path}: not a COCO annotation file, without {', '.join(missing)}")
    return content


def _outline(
    annotation: dict[str, Any], size_wh: tuple[int, int], polygons: bool
) -> list[float] | None:
    """Normalised numbers of a label line: a polygon, or cx cy w h; None for an empty box."""
    width, height = size_wh
    x, y, w, h = annotation["bbox"]
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if x2 <= x1 or y2 <= y1:
        return None
    segmentation = annotation.get("segmentation")
    parts = segmentation if isinstance(segmentation, list) else []  # else run lengths, not points
    outlines = [np.array(part, np.float64).reshape(-1, 2) for part in parts if len(part) >= 6]
    if polygons and outlines:
        points = join_parts(outlines) / (width, height)
        points = points.clip(0, 1)
        if (points.max(0) > points.min(0)).all():
            return points.ravel().tolist()
    centre = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height)
    return [*centre, (x2 - x1) / width, (y2 - y1) / height]


def join_parts(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Make one polygon [k, 2] of an object that something hides into several parts.

    Each further part is entered and left over a bridge of no width from the nearest point, so the
    area inside stays the same.
    """
    joined = parts[0]
    for part in parts[1:]:
        distances = ((joined[:, None] - part[None]) ** 2).sum(-1)  # [joined, part]
        leave, enter = np.unravel_index(distances.argmin(), distances.shape)
        loop = np.concatenate([part[enter:], part[: enter + 1]])
        joined = np.concatenate([joined[: leave + 1], loop, joined[leave:]])
    return joined
