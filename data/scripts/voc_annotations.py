"""Pascal VOC annotations (XML) -> YOLO label files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree


class Conversion(NamedTuple):
    """Counts of one conversion."""

    num_images: int
    num_boxes: int
    num_difficult: int  # objects marked as difficult: left out
    num_degenerate: int  # boxes without area inside the image: left out


class _Lines(NamedTuple):
    lines: list[str]
    num_difficult: int
    num_degenerate: int


def convert_image_set(
    source: Path,
    image_set: str,
    images: Path,
    labels: Path,
    names: Sequence[str],
    *,
    first_pixel: int,
) -> Conversion:
    """Move the images of a set to `images` and write their labels.

    Args:
        source: folder with `Annotations`, `ImageSets/Main` and `JPEGImages`.
        image_set: name of a list in `ImageSets/Main`, such as `trainval`.
        images: folder for the images; made if it is not there.
        labels: folder for the label files, likewise.
        names: class names by class index.
        first_pixel: 1 if pixels count from 1 and `xmax` is the last one inside (the original VOC);
            0 if corners lie between pixels, as labelling programs write them.

    Raises:
        FileNotFoundError: a file of the set is missing.
        ValueError: an annotation is damaged, or of a class that `names` lacks.
    """
    identifiers = (source / "ImageSets" / "Main" / f"{image_set}.txt").read_text("utf-8").split()
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    num_boxes = num_difficult = num_degenerate = 0
    for identifier in identifiers:
        result = convert_annotation(
            source / "Annotations" / f"{identifier}.xml", names, first_pixel=first_pixel
        )
        target = images / f"{identifier}.jpg"
        if not target.exists():  # else an earlier, interrupted run has moved it
            shutil.move(source / "JPEGImages" / f"{identifier}.jpg", target)
        (labels / f"{identifier}.txt").write_text("".join(result.lines), encoding="utf-8")
        num_boxes += len(result.lines)
        num_difficult += result.num_difficult
        num_degenerate += result.num_degenerate
    return Conversion(len(identifiers), num_boxes, num_difficult, num_degenerate)


def convert_annotation(path: Path, names: Sequence[str], *, first_pixel: int) -> _Lines:
    """Label lines `class cx cy w h` of one XML file, without difficult and empty objects."""
    try:
        root = ElementTree.parse(path).getroot()
        width, height = (int(_text(root, f"size/{side}")) for side in ("width", "height"))
        objects = [_read_object(element) for element in root.iter("object")]
    except (ElementTree.ParseError, ValueError) as error:
        raise ValueError(f"{path}: not a VOC annotation: {error}") from error
    if width < 1 or height < 1:
        raise ValueError(f"{path}: image size {width} x {height}")
    lines: list[str] = []
    num_difficult = num_degenerate = 0
    for name, is_difficult, (xmin, ymin, xmax, ymax) in objects:
        if name not in names:
            raise ValueError(f"{path}: class {name!r} is none of {', '.join(names)}")
        x1, y1 = max(xmin - first_pixel, 0), max(ymin - first_pixel, 0)
        x2, y2 = min(xmax, width), min(ymax, height)
        if is_difficult:
            num_difficult += 1
        elif x2 <= x1 or y2 <= y1:
            num_degenerate += 1
        else:
            box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height)
            sides = ((x2 - x1) / width, (y2 - y1) / height)
            numbers = " ".join(f"{value:.6f}" for value in (*box, *sides))
            lines.append(f"{names.index(name)} {numbers}\n")
    return _Lines(lines, num_difficult, num_degenerate)


def _read_object(element: ElementTree.Element) -> tuple[str, bool, tuple[float, ...]]:
    corners = tuple(float(_text(element, f"bndbox/{k}")) for k in ("xmin", "ymin", "xmax", "ymax"))
    return _text(element, "name"), (element.findtext("difficult") or "0").strip() == "1", corners


def _text(element: ElementTree.Element, path: str) -> str:
    text = element.findtext(path)
    if text is None or not text.strip():
        raise ValueError(f"no <{path}>")
    return text.strip()
