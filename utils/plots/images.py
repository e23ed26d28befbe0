"""Boxes in images: batches, detections, two networks side by side. Drawn with Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.plots.figures import as_numpy, class_colour, prepare_matplotlib, printable

_MANY_BOXES = 12  # of more in an image, names and frames are drawn finer
_PAIR_WIDTH = 1920  # pixels of both pictures together, and of one in height


def plot_batch(
    images: Any,
    boxes: Any,
    paths: Sequence[str],
    names: Sequence[str],
    out: str | Path,
    *,
    max_images: int = 16,
    min_conf: float = 0.25,
) -> None:
    """Draw a mosaic of the first images of a batch with boxes, class names and file names.

    Args:
        images: uint8 [B, 3, H, W] RGB, or float 0-1.
        boxes: either `targets` [T, 6] (image index, class, cx, cy, w, h normalised), or a list
            with the `detections` of each image [M, 6]: xyxy in pixels of the network input,
            confidence, class.
        paths: file of each image; the name is written on its tile.
        names: class names in order.
        out: picture file.
        max_images: so many tiles at most.
        min_conf: detections below it are not drawn.
    """
    tiles = as_numpy(images)[:max_images]
    if tiles.dtype != np.uint8:
        tiles = (tiles.clip(0, 1) * 255).round().astype(np.uint8)
    tiles = tiles.transpose(0, 2, 3, 1)
    num_images, height, width, _ = tiles.shape
    per_image = _boxes_per_image(boxes, num_images, height, width)
    num_columns = math.ceil(math.sqrt(num_images))
    num_rows = math.ceil(num_images / num_columns)
    scale = min(1920 / (num_columns * width), 1920 / (num_rows * height), 4.0)
    tile_wh = max(round(width * scale), 1), max(round(height * scale), 1)
    canvas = Image.new("RGB", (num_columns * tile_wh[0], num_rows * tile_wh[1]), (255, 255, 255))
    for index in range(num_images):
        tile = Image.fromarray(tiles[index]).resize(tile_wh, Image.Resampling.BILINEAR)
        kept = per_image[index][per_image[index][:, 4] >= min_conf]
        _draw_boxes(tile, kept * [scale, scale, scale, scale, 1, 1], names)
        _draw_caption(tile, printable(Path(paths[index]).name))
        corner = index % num_columns * tile_wh[0], index // num_columns * tile_wh[1]
        canvas.paste(tile, corner)
    canvas.save(out)


def _boxes_per_image(boxes: Any, num_images: int, height: int, width: int) -> list[np.ndarray]:
    """Per image [M, 6] xyxy in pixels, confidence, class; labels have confidence infinity."""
    if isinstance(boxes, list | tuple):
        return [as_numpy(found).reshape(-1, 6).astype(np.float64) for found in boxes]
    targets = as_numpy(boxes).reshape(-1, 6).astype(np.float64)
    centre = targets[:, 2:4] * (width, height)
    half = targets[:, 4:6] * (width, height) / 2
    confidence = np.full(len(targets), np.inf)
    found = np.column_stack([centre - half, centre + half, confidence, targets[:, 1]])
    return [found[targets[:, 0] == index] for index in range(num_images)]


def annotate(
    image_rgb: np.ndarray,
    detections: Any,
    names: Sequence[str],
    *,
    line_width: int | None = None,
    show_names: bool = True,
    show_conf: bool = True,
) -> np.ndarray:
    """A copy of an image with the detections drawn into it.

    Args:
        image_rgb: uint8 [H, W, 3]; left as it is.
        detections: [M, 6]: xyxy in pixels of the image, confidence, class. M may be 0.
        names: class names in order.
        line_width: of the boxes, pixels; None: by the size of the image and the number of boxes.
        show_names: label the boxes.
        show_conf: with the confidence beside the name.
    """
    image = Image.fromarray(image_rgb)
    found = as_numpy(detections).reshape(-1, 6).astype(np.float64)
    _draw_boxes(
        image, found, names, line_width=line_width, show_names=show_names, show_conf=show_conf
    )
    return np.array(image)


def plot_detections_pair(
    image_rgb: Any,
    left: Any,
    right: Any,
    names: Sequence[str],
    titles: tuple[str, str],
    out: str | Path,
    *,
    min_conf: float = 0.25,
) -> None:
    """Draw the detections of two networks in one image side by side.

    Args:
        image_rgb: uint8 [H, W, 3]; left as it is.
        left: detections of the first network [M, 6]: xyxy in pixels of the image, confidence,
            class. M may be 0.
        right: the same of the second.
        names: class names in order.
        titles: what stands above each; the number of boxes is added.
        out: picture file; as `.jpg` a photograph takes a tenth of the space.
        min_conf: detections below it are not drawn.
    """
    image = Image.fromarray(np.ascontiguousarray(as_numpy(image_rgb)))
    scale = min(_PAIR_WIDTH / 2 / image.width, _PAIR_WIDTH / 2 / image.height, 4.0)
    width, height = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    gap, font_size = 8, _font_size(Image.new("1", (width, 1))) + 2
    font, title_height = _font(font_size), font_size + 10
    canvas = Image.new("RGB", (2 * width + gap, title_height + height), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for side, (detections, title) in enumerate(zip((left, right), titles, strict=True)):
        found = as_numpy(detections).reshape(-1, 6).astype(np.float64)
        found = found[found[:, 4] >= min_conf]
        tile = image.resize((width, height), Image.Resampling.BILINEAR)
        _draw_boxes(tile, found * [scale, scale, scale, scale, 1, 1], names)
        x = side * (width + gap)
        canvas.paste(tile, (x, title_height))
        count = f": {len(found)} {'box' if len(found) == 1 else 'boxes'}"
        draw.text((x + 4, 4), _fit(title, font, width - 8, count), fill=(0, 0, 0), font=font)
    canvas.save(out, quality=90, subsampling=0)  # for jpg: keeps small text sharp


def _fit(text: str, font: ImageFont.FreeTypeFont, width: int, tail: str) -> str:
    """Text, cut short if need be, and `tail`, which stays whole: together at most `width` wide."""
    text, mark = printable(text), ""
    while text and font.getlength(text + mark + tail) > width:
        text, mark = text[:-1], "…"
    return text + mark + tail


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships."""
    prepare_matplotlib()
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def _font_size(tile: Image.Image) -> int:
    return int(np.clip(tile.width / 36, 10, 22))


def _draw_boxes(
    tile: Image.Image,
    boxes: np.ndarray,
    names: Sequence[str],
    *,
    line_width: int | None = None,
    show_names: bool = True,
    show_conf: bool = True,
) -> None:
    """Frames first, then the labels, so that no frame runs through a label.

    What is surer, and of labels what is smaller, lies on top. Without names there are no labels.
    """
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    boxes = boxes[np.lexsort((-areas, boxes[:, 4]))]
    crowded = len(boxes) > _MANY_BOXES
    draw, font = ImageDraw.Draw(tile), _font(_font_size(tile) - 3 * crowded)
    line_width = line_width or max(2 - crowded, round(tile.width / 240))
    for x1, y1, x2, y2, _, cls in boxes:
        corners = (x1, y1, max(x2, x1 + 1), max(y2, y1 + 1))
        draw.rectangle(corners, outline=class_colour(int(cls)), width=line_width)
    if not show_names:
        return
    for x1, y1, _, _, confidence, cls in boxes:
        name = printable(names[int(cls)]) if int(cls) < len(names) else str(int(cls))
        has_conf = show_conf and not math.isinf(confidence)
        text = f"{name} {confidence:.2f}" if has_conf else name
        _draw_text(draw, (x1, y1), text, font, class_colour(int(cls)), tile.size)


def _draw_text(
    draw: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    font: ImageFont.FreeTypeFont,
    colour: tuple[int, int, int],
    size_wh: tuple[int, int],
) -> None:
    """Text on a plate that sits on the corner of a box, moved so that it stays in the tile."""
    left, top, right, bottom = font.getbbox(text)
    width, height = right - left + 4, bottom - top + 4
    x = min(max(corner[0], 0), max(size_wh[0] - width, 0))
    y = corner[1] - height if corner[1] >= height else max(corner[1], 0)
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    luminance = np.dot(colour, (0.299, 0.587, 0.114))
    ink = (0, 0, 0) if luminance > 130 else (255, 255, 255)
    draw.text((x + 2 - left, y + 2 - top), text, fill=ink, font=font)


def _draw_caption(tile: Image.Image, text: str) -> None:
    """File name at the bottom left, and a frame that sets the tile apart."""
    draw, font = ImageDraw.Draw(tile), _font(_font_size(tile))
    while len(text) > 8 and font.getlength(text) > tile.width - 8:
        text = "…" + text[2:]
    height = _font_size(tile) + 9  # the frame covers the last two rows
    draw.rectangle((0, tile.height - height, font.getlength(text) + 8, tile.height), fill=(0, 0, 0))
    draw.text((4, tile.height - height + 2), text, fill=(255, 255, 255), font=font)
    draw.rectangle((0, 0, tile.width - 1, tile.height - 1), outline=(255, 255, 255), width=2)
