"""Pictures of a run. Functions take numbers and write a file; none of them knows a model.

Drawn with matplotlib's `Figure` alone: no pyplot, hence no window, no global state and no
display needed. Boxes on images are drawn with Pillow, which matplotlib brings along.

Matplotlib is imported by the functions that use it: that takes 0.3 s, and every command loads this
module, while the first picture, if there is any, comes long after the start.
"""

from __future__ import annotations

import colorsys
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image, ImageDraw, ImageFont

from utils.run_dir import read_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOGGER = logging.getLogger(__name__)
Parameters = ParamSpec("Parameters")

_NAMED_CLASSES = 20  # up to here a legend or a number per cell can still be read
_GREY = "0.75"
_MANY_BOXES = 12  # of more in an image, names and frames are drawn finer
_LONGEST_NAME = 48  # characters of a class name


def draw(
    function: Callable[Parameters, None], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> None:
    """Call a function that draws; a failure is a warning, as no picture is worth a run."""
    try:
        function(*args, **kwargs)
    except (ValueError, RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        LOGGER.warning("warning: %s failed, the picture is missing: %s", function.__name__, reason)


def _printable(text: str) -> str:
    """Text in one line; what has no glyph of its own (control characters) becomes a mark."""
    marks = ("�", " ")
    return "".join(char if char.isprintable() else marks[char.isspace()] for char in text)


def _literal(text: str) -> str:
    """Text for matplotlib, shown as it is: `$` would start a formula, `_` hide it in a legend."""
    text = _printable(text).replace("$", r"\$")
    return "\u200b" + text if text.startswith("_") else text


def _class_name(name: str) -> str:
    """A class name for matplotlib, short enough to leave room for the picture."""
    return _literal(name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…")


def class_colour(cls: int) -> tuple[int, int, int]:
    """RGB 0-255 of a class; neighbours in the list of classes differ clearly."""
    golden_ratio = 0.618034
    hue = (0.02 + cls * golden_ratio) % 1.0
    value = (1.0, 0.8, 0.9)[cls % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def _new_figure(width: float, height: float) -> Figure:
    """Inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, out: str | Path) -> None:
    figure.savefig(out, dpi=110)


def _as_numpy(values: Any) -> np.ndarray:
    """Array of a tensor on any device, a list or an array."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


# --- training curves ------------------------------------------------------------------------

# Panels of results.png: title, pattern of the columns that belong there. What matches no
# pattern gets a panel per prefix, so new columns show up without a change here.
_RESULT_PANELS = (
    ("box loss", r"(train|val)/box_loss"),
    ("objectness loss", r"(train|val)/obj_loss"),
    ("class loss", r"(train|val)/cls_loss"),
    ("precision and recall", r"metrics/(precision|recall)"),
    ("mAP", r"metrics/mAP.*"),
    ("learning rate", r"(x/)?lr.*"),
    ("sparsity rate", r".*(sparsity_rate|/rate)"),
    ("|gamma|, quantiles", r".*gamma.*/?(q|quantile)_?\d.*"),
    ("share of small gammas", r".*(below|under).*"),
    ("suggested percent", r".*suggested.*"),
)


def plot_results(csv_path: str | Path, out: str | Path) -> None:
    """Draw the columns of `results.csv` over the epochs: losses, metrics, rates, gammas.

    The legend gives the last value of each curve. Without a row the picture says so.
    """
    columns = read_results(csv_path)
    epochs = columns.pop("epoch", [])
    panels = _group_into_panels(columns)
    if not epochs or not panels:
        _save_note("no epoch finished yet", out)
        return
    num_columns = 3 if len(panels) <= 6 else 4
    num_rows = math.ceil(len(panels) / num_columns)
    figure = _new_figure(4.4 * num_columns, 3.2 * num_rows)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axis, (title, names) in zip(axes, panels, strict=False):
        _draw_curves(axis, title, epochs, {name: columns[name] for name in names})
    for axis in axes[len(panels) :]:
        axis.remove()
    _save(figure, out)


def _group_into_panels(columns: Mapping[str, Sequence[float]]) -> list[tuple[str, list[str]]]:
    """Titles with the columns that hold at least one number."""
    left = [name for name, values in columns.items() if np.isfinite(values).any()]
    panels = []
    for title, pattern in _RESULT_PANELS:
        names = [name for name in left if re.fullmatch(pattern, name)]
        left = [name for name in left if name not in names]
        panels.append((title, names))
    for prefix in dict.fromkeys(name.rpartition("/")[0] for name in left):
        names = [name for name in left if name.rpartition("/")[0] == prefix]
        panels.append((prefix or "other", names))
    return [(title, names) for title, names in panels if names]


def _draw_curves(
    axis: Axes, title: str, epochs: Sequence[float], curves: Mapping[str, Sequence[float]]
) -> None:
    marker = "o" if len(epochs) < 30 else ""
    for name, values in curves.items():
        finite = [value for value in values if math.isfinite(value)]
        label = f"{_short_name(name, curves)}  {finite[-1]:.4g}"
        style = "--" if name.startswith("val/") else "-"
        axis.plot(epochs, values, style, marker=marker, markersize=3, linewidth=1.6, label=label)
    axis.set_title(title, fontsize=11)
    _set_epoch_axis(axis, epochs)
    axis.xaxis.label.set_fontsize(8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if title in ("precision and recall", "mAP", "share of small gammas"):
        axis.set_ylim(0, 1)
    axis.legend(fontsize=8, framealpha=0.7, ncols=1 if len(curves) <= 4 else 2)


def _set_epoch_axis(axis: Axes, epochs: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("epoch")
    if len(epochs) == 1:
        axis.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
        axis.set_xticks([epochs[0]])
    else:
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _short_name(name: str, curves: Mapping[str, Sequence[float]]) -> str:
    """`train` or `val` where that is the difference, else what follows the last slash."""
    prefix, _, rest = name.rpartition("/")
    return prefix if prefix in ("train", "val") and len(curves) <= 2 else rest


def _save_note(text: str, out: str | Path) -> None:
    """A picture that says why there is nothing to see."""
    figure = _new_figure(6, 3)
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=14, color="0.4")
    _save(figure, out)


# --- labels of a data set -------------------------------------------------------------------


def plot_labels(labels: ArrayLike, names: Sequence[str], out: str | Path) -> None:
    """Draw class counts, box centres, widths against heights, and the sizes of the boxes.

    Args:
        labels: all boxes of the split, [n, 5]: class, cx, cy, w, h normalised. May be empty.
        names: class names in order.
        out: picture file.
    """
    boxes = _as_numpy(labels).reshape(-1, 5).astype(np.float64)
    if not len(boxes):
        _save_note("no labels", out)
        return
    figure = _new_figure(13, 9)
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.15))
    _draw_class_counts(figure.add_subplot(grid[0, :]), boxes[:, 0].astype(np.int64), names)
    _draw_density(figure.add_subplot(grid[1, 0]), boxes[:, 1], boxes[:, 2], "box centres", "x", "y")
    shapes = figure.add_subplot(grid[1, 1])
    _draw_density(shapes, boxes[:, 3], boxes[:, 4], "box shapes", "width", "height")
    _draw_box_sizes(figure.add_subplot(grid[1, 2]), boxes[:, 3], boxes[:, 4])
    _save(figure, out)


def _draw_class_counts(axis: Axes, classes: np.ndarray, names: Sequence[str]) -> None:
    num_classes = max(len(names), int(classes.max()) + 1)
    counts = np.bincount(classes, minlength=num_classes)
    colours = [np.divide(class_colour(cls), 255) for cls in range(num_classes)]
    width = min(0.8, 0.12 * num_classes)
    bars = axis.bar(range(num_classes), counts, width, color=colours)
    if num_classes <= _NAMED_CLASSES:
        axis.bar_label(bars, fontsize=9)
    axis.set_title(f"{len(classes)} boxes of {num_classes} classes", fontsize=11)
    axis.set_ylabel("boxes")
    axis.set_xlim(-0.6, num_classes - 0.4)
    axis.margins(y=0.12)
    _label_classes(axis, "x", [*names, *map(str, range(len(names), num_classes))])


def _label_classes(axis: Axes, which: str, names: Sequence[str]) -> None:
    """Class names at the ticks 0, 1, 2 ... of the axis; numbers alone above 120 classes."""
    if len(names) > 120:
        return
    names = [_class_name(name) for name in names]
    few = len(names) <= _NAMED_CLASSES
    style: dict[str, Any] = {"fontsize": 9 if few else 6.5}
    if which == "x":
        crowded = sum(len(name) + 2 for name in names) > 110
        style |= {"rotation": 90 if not few else 40 if crowded else 0}
        if style["rotation"] == 40:
            style |= {"ha": "right", "rotation_mode": "anchor"}
        axis.set_xticks(range(len(names)), names, **style)
    else:
        axis.set_yticks(range(len(names)), names, **style)


def _draw_density(axis: Axes, x: np.ndarray, y: np.ndarray, title: str, x_name: str, y_name: str):
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator

    counts, *edges = np.histogram2d(x, y, bins=50, range=((0, 1), (0, 1)))
    shown = np.ma.masked_less(counts.T, 1)
    mesh = axis.pcolormesh(*edges, shown, cmap="viridis_r", norm=LogNorm(1, max(counts.max(), 2)))
    ticks = LogLocator(subs=(1, 2, 5))
    bar = axis.figure.colorbar(mesh, ax=axis, shrink=0.8, ticks=ticks, format="%d")
    bar.ax.minorticks_off()
    bar.ax.set_title("boxes", fontsize=9)
    axis.set(title=title, aspect="equal", xlim=(0, 1), ylim=(0, 1))
    axis.set_xlabel(f"{x_name} (share of the image)")
    axis.set_ylabel(f"{y_name} (share of the image)")
    if y_name == "y":
        axis.invert_yaxis()  # as in the image: y grows downwards
    axis.title.set_fontsize(11)
    axis.grid(alpha=0.3)


def _draw_box_sizes(axis: Axes, widths: np.ndarray, heights: np.ndarray) -> None:
    sizes = np.sqrt(np.maximum(widths * heights, 0))
    axis.hist(sizes, bins=list(np.linspace(0, 1, 51)), color="tab:blue")
    axis.axvline(np.median(sizes), color="tab:red", label=f"median {np.median(sizes):.3f}")
    axis.set_title("box sizes", fontsize=11)
    axis.set_xlabel("√area (share of the image)")
    axis.set_ylabel("boxes")
    axis.set_xlim(0, max(0.1, float(sizes.max()) * 1.05))
    axis.legend(fontsize=9)


# --- batches --------------------------------------------------------------------------------


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
    tiles = _as_numpy(images)[:max_images]
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
        _draw_caption(tile, _printable(Path(paths[index]).name))
        corner = index % num_columns * tile_wh[0], index // num_columns * tile_wh[1]
        canvas.paste(tile, corner)
    canvas.save(out)


def _boxes_per_image(boxes: Any, num_images: int, height: int, width: int) -> list[np.ndarray]:
    """Per image [M, 6] xyxy in pixels, confidence, class; labels have confidence infinity."""
    if isinstance(boxes, list | tuple):
        return [_as_numpy(found).reshape(-1, 6).astype(np.float64) for found in boxes]
    targets = _as_numpy(boxes).reshape(-1, 6).astype(np.float64)
    centre = targets[:, 2:4] * (width, height)
    half = targets[:, 4:6] * (width, height) / 2
    confidence = np.full(len(targets), np.inf)
    found = np.column_stack([centre - half, centre + half, confidence, targets[:, 1]])
    return [found[targets[:, 0] == index] for index in range(num_images)]


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib ships."""
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
        name = _printable(names[int(cls)]) if int(cls) < len(names) else str(int(cls))
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


# --- evaluation -----------------------------------------------------------------------------


def plot_pr_curve(
    recalls: ArrayLike,
    precisions: ArrayLike,
    ap50: ArrayLike,
    names: Sequence[str],
    out: str | Path,
) -> None:
    """Draw precision over recall at IoU 0.5.

    Args:
        recalls: [P].
        precisions: [C, P], a row per class that has labels. C may be 0.
        ap50: [C].
        names: names of these C classes.
        out: picture file.
    """
    ap50 = _as_numpy(ap50)
    mean = f"all classes, mAP@.5 {ap50.mean():.3f}" if len(ap50) else ""
    labels = [f"{_class_name(name)} {ap:.3f}" for name, ap in zip(names, ap50, strict=True)]
    _plot_class_curves(recalls, precisions, labels, mean, ("recall", "precision"), out)


def plot_confidence_curve(
    confidences: ArrayLike,
    values: ArrayLike,
    names: Sequence[str],
    out: str | Path,
    *,
    quantity: str,
) -> None:
    """Draw precision, recall or F1 over the confidence threshold.

    Args:
        confidences: [P].
        values: [C, P], a row per class that has labels. C may be 0.
        names: names of these C classes.
        out: picture file.
        quantity: "precision", "recall" or "F1"; the label of the y axis.
    """
    values = _as_numpy(values)
    mean = ""
    if len(values):
        best = int(values.mean(0).argmax())
        height, place = values.mean(0)[best], _as_numpy(confidences)[best]
        mean = f"all classes, highest {height:.3f} at {place:.3f}"
    labels = [_class_name(name) for name in names]
    _plot_class_curves(confidences, values, labels, mean, ("confidence", quantity), out)


def _plot_class_curves(
    x: ArrayLike,
    curves: ArrayLike,
    labels: Sequence[str],
    mean_label: str,
    axis_names: tuple[str, str],
    out: str | Path,
) -> None:
    """A line per class, named where they are few, grey where they are many; the mean on top."""
    x, curves = _as_numpy(x), _as_numpy(curves)
    if not len(curves):
        _save_note("no labels", out)
        return
    few = len(curves) <= _NAMED_CLASSES
    figure = _new_figure(8.5 if few else 7, 5.6)
    axis = figure.add_subplot()
    for index, (curve, label) in enumerate(zip(curves, labels, strict=True)):
        if few:
            axis.plot(
                x, curve, linewidth=1.2, color=np.divide(class_colour(index), 255), label=label
            )
        else:
            axis.plot(x, curve, linewidth=0.7, color=_GREY, label="each class" if not index else "")
    if len(curves) > 1:
        axis.plot(x, curves.mean(0), linewidth=3, color="black", label=mean_label)
    axis.set(xlabel=axis_names[0], ylabel=axis_names[1], xlim=(0, 1), ylim=(0, 1.02))
    axis.set_title(f"{axis_names[1]} over {axis_names[0]}", fontsize=11)
    axis.grid(alpha=0.3)
    outside: dict[str, Any] = {"bbox_to_anchor": (1.01, 1), "loc": "upper left", "borderaxespad": 0}
    axis.legend(fontsize=8, **(outside if few else {"loc": "best"}))
    _save(figure, out)


def plot_confusion_matrix(matrix: ArrayLike, names: Sequence[str], out: str | Path) -> None:
    """Draw a confusion matrix, each column as shares of its labelled class.

    Args:
        matrix: counts [K+1, K+1]; row: detected class, column: labelled class, the last of
            each is background (missed, or nothing there).
        names: the K class names.
        out: picture file.
    """
    counts = _as_numpy(matrix).astype(np.float64)
    shares = counts / np.maximum(counts.sum(0, keepdims=True), 1)
    num = len(counts)
    few = num <= _NAMED_CLASSES + 1
    side = 4.2 + 0.62 * num if few else 15.0
    figure = _new_figure(side + 1.4, side)
    axis = figure.add_subplot()
    shown = np.ma.masked_equal(shares, 0)
    mesh = axis.imshow(shown, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(mesh, ax=axis, fraction=0.04, pad=0.02, label="share of the labelled class")
    ticks = [*names, "background"]
    _label_classes(axis, "x", ticks)
    _label_classes(axis, "y", ticks)
    if few:
        _write_cells(axis, counts, shares)
    axis.set_xlabel("labelled class (background: detected where nothing is labelled)")
    axis.set_ylabel("detected class (background: missed)")
    axis.set_title("confusion matrix", fontsize=12)
    axis.set_xticks(np.arange(num + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(num + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="0.9", linewidth=0.5)
    axis.tick_params(which="minor", length=0)
    _save(figure, out)


def _write_cells(axis: Axes, counts: np.ndarray, shares: np.ndarray) -> None:
    """Share, and the count below it, in every cell that is not empty."""
    for row, column in zip(*np.nonzero(counts), strict=True):
        share = shares[row, column]
        text = f"{share:.2f}\n{counts[row, column]:.0f}"
        colour = "white" if share > 0.55 else "black"
        axis.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)


def plot_study(curves: Mapping[str, Sequence[tuple[int, float, float]]], out: str | Path) -> None:
    """Draw mAP@.5:.95 over the time per image, a point per input size.

    Args:
        curves: per model name its points: input side in pixels, milliseconds per image,
            mAP@.5:.95.
        out: picture file.
    """
    figure = _new_figure(7.5, 5)
    axis = figure.add_subplot()
    for name, points in curves.items():
        sizes, times, scores = zip(*sorted(points), strict=True)
        (line,) = axis.plot(times, scores, "o-", label=_literal(name))
        for size, time, score in zip(sizes, times, scores, strict=True):
            axis.annotate(
                str(size),
                (time, score),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=line.get_color(),
            )
    axis.set_xlabel("milliseconds per image")
    axis.set_ylabel("mAP@.5:.95")
    axis.set_title("accuracy over speed; numbers are input sizes in pixels", fontsize=11)
    axis.margins(0.08, 0.15)
    axis.grid(alpha=0.3)
    if curves:
        axis.legend(fontsize=9)
    _save(figure, out)


# --- slimming -------------------------------------------------------------------------------


def plot_gamma_history(
    epochs: Sequence[int],
    overall: ArrayLike,
    per_layer: Mapping[str, ArrayLike],
    out: str | Path,
) -> None:
    """Draw how |gamma| moves during sparse training, overall and per layer (`bn_gamma.png`).

    Args:
        epochs: the E epochs recorded.
        overall: [E, Q], in each row Q evenly spaced quantiles (0 = smallest, 1 = largest) of
            |gamma| over all channels under the penalty; 101 of them give a smooth picture.
        per_layer: layer name -> [E, Q'], the same for each layer alone; Q' may be smaller.
        out: picture file.
    """
    quantiles = _as_numpy(overall).astype(np.float64)
    layers = {name: _as_numpy(rows).astype(np.float64) for name, rows in per_layer.items()}
    if not len(epochs):
        _save_note("no gammas recorded yet", out)
        return
    height = float(np.clip(0.13 * len(layers), 4, 24))
    figure = _new_figure(14, 4.6 + height)
    halves = figure.add_gridspec(2, 1, height_ratios=(4.6, height))
    top, bottom = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    fan, shares = top.subplots(1, 2)
    _draw_quantile_fan(fan, epochs, quantiles)
    _draw_small_shares(shares, epochs, quantiles)
    medians, spread = bottom.subplots(1, 2, sharey=True)
    _draw_layer_medians(medians, epochs, layers)
    _draw_layer_spread(spread, layers, f"|gamma| per layer after epoch {epochs[-1]}")
    _save(figure, out)


def _draw_quantile_fan(axis: Axes, epochs: Sequence[int], quantiles: np.ndarray) -> None:
    """Bands between matching quantiles around the median."""
    levels = np.linspace(0, 1, quantiles.shape[1])
    for low, shade in ((0.0, 0.12), (0.05, 0.2), (0.1, 0.3), (0.25, 0.45)):
        lower = _interpolate_rows(low, levels, quantiles)
        upper = _interpolate_rows(1 - low, levels, quantiles)
        name = "smallest to largest" if not low else f"{low:.0%} to {1 - low:.0%}"
        axis.fill_between(
            epochs, lower, upper, color="tab:blue", alpha=shade, linewidth=0, label=name
        )
    median = _interpolate_rows(0.5, levels, quantiles)
    marker = "o" if len(epochs) < 30 else ""
    axis.plot(epochs, median, color="navy", marker=marker, label=f"median, last {median[-1]:.3g}")
    axis.set_title("|gamma| of all channels under the penalty", fontsize=11)
    _set_epoch_axis(axis, epochs)
    axis.set_ylabel("|gamma|")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper right")


def _interpolate_rows(level: float, levels: np.ndarray, quantiles: np.ndarray) -> np.ndarray:
    return np.array([np.interp(level, levels, row) for row in quantiles])


def _draw_small_shares(axis: Axes, epochs: Sequence[int], quantiles: np.ndarray) -> None:
    """Share of channels below a few thresholds, read off the quantiles."""
    levels = np.linspace(0, 1, quantiles.shape[1])
    marker = "o" if len(epochs) < 30 else ""
    for threshold in (1e-1, 1e-2, 1e-3):
        share = [_share_below(threshold, levels, row) for row in quantiles]
        axis.plot(epochs, share, marker=marker, label=f"below {threshold:g}, last {share[-1]:.1%}")
    axis.set_title("share of channels with small |gamma|", fontsize=11)
    _set_epoch_axis(axis, epochs)
    axis.set(ylabel="share of channels", ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=9)


def _share_below(threshold: float, levels: np.ndarray, quantiles: np.ndarray) -> float:
    """Level at which the quantile function crosses `threshold`."""
    index = int(np.searchsorted(quantiles, threshold, side="left"))
    if index in (0, len(quantiles)):
        return float(index > 0)
    low, high = quantiles[index - 1], quantiles[index]
    fraction = (threshold - low) / (high - low)
    return float(levels[index - 1] + fraction * (levels[index] - levels[index - 1]))


def _draw_layer_medians(
    axis: Axes, epochs: Sequence[int], layers: Mapping[str, np.ndarray]
) -> None:
    """A row per layer, a column per epoch, the colour is the median of |gamma|."""
    axis.set_title("median |gamma| per layer", fontsize=11)
    _set_epoch_axis(axis, epochs)
    if not layers:
        return
    medians = np.stack([np.median(rows, axis=1) for rows in layers.values()])  # [layers, E]
    edges = _cell_edges(epochs)
    mesh = axis.pcolormesh(edges, np.arange(len(layers) + 1) - 0.5, medians, cmap="viridis", vmin=0)
    axis.figure.colorbar(mesh, ax=axis, label="median |gamma|", pad=0.01)
    fontsize = 7.5 if len(layers) <= 70 else 5
    axis.set_yticks(range(len(layers)), list(layers), fontsize=fontsize)
    axis.invert_yaxis()  # first layer on top; the neighbour shares this axis


def _cell_edges(epochs: Sequence[int]) -> np.ndarray:
    """Borders halfway between epochs, half an epoch outside at both ends."""
    centres = np.asarray(epochs, np.float64)
    middle = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[centres[0] - 0.5], middle, [centres[-1] + 0.5]])


def _draw_layer_spread(axis: Axes, layers: Mapping[str, np.ndarray], title: str) -> None:
    """Per layer the range of |gamma| as a line, the middle half as a bar, the median as a dot."""
    axis.set_title(title, fontsize=11)
    axis.set_xlabel("|gamma|")
    rows = np.arange(len(layers))
    last = [quantiles[-1] for quantiles in layers.values()]
    low, lower, middle, upper, high = (
        np.array(
            [np.interp((0, 0.25, 0.5, 0.75, 1), np.linspace(0, 1, len(row)), row) for row in last]
        )
        .reshape(-1, 5)
        .T
    )
    axis.hlines(rows, low, high, color=_GREY, linewidth=1)
    axis.hlines(rows, lower, upper, color="tab:blue", linewidth=4)
    axis.plot(middle, rows, "o", color="navy", markersize=3)
    axis.set_xlim(left=0)
    axis.tick_params(labelleft=False)
    axis.grid(alpha=0.3, axis="x")


# Quantities of the stage picture: key, title, digits. The first two are scores.
_STAGE_QUANTITIES = (
    ("map50", "mAP@.5", 3),
    ("map50_95", "mAP@.5:.95", 3),
    ("parameters", "parameters (million)", 3),
    ("gflops", "GFLOPs", 2),
    ("latency_ms", "latency (ms per image)", 1),
    ("file_mb", "file size (MB)", 2),
)


def plot_stage_table(
    rows: Sequence[Mapping[str, Any]], out: str | Path, *, title: str = ""
) -> None:
    """Draw a bar per stage for each quantity, with its value and the change since the first.

    Args:
        rows: per stage `stage` (its name) and any of `map50, map50_95, parameters, gflops,
            latency_ms, file_mb`. A missing or NaN value leaves its bar out.
        out: picture file.
        title: line above all panels.
    """
    figure = _new_figure(14, 2.2 + 0.75 * len(rows))
    figure.suptitle(_literal(title), fontsize=12)
    axes = figure.subplots(2, 3, sharey=True)
    stages = [str(row["stage"]) for row in rows]
    for axis, (key, name, digits) in zip(axes.ravel(), _STAGE_QUANTITIES, strict=True):
        scale = 1e-6 if key == "parameters" else 1.0
        values = [float(row.get(key, math.nan)) * scale for row in rows]
        _draw_stage_bars(axis, stages, values, digits, is_score=key.startswith("map"))
        axis.set_title(name, fontsize=11)
    if rows:
        axes[0, 0].invert_yaxis()  # first stage on top in all panels
    _save(figure, out)


def _draw_stage_bars(
    axis: Axes, stages: Sequence[str], values: Sequence[float], digits: int, *, is_score: bool
) -> None:
    """Bars with values; the change since the first is absolute for scores, else relative."""
    colour = "tab:green" if is_score else "tab:blue"
    axis.barh(stages, np.nan_to_num(values), color=colour, alpha=0.75)
    first = next((value for value in values if math.isfinite(value)), 0.0)
    for row, value in enumerate(values):
        if not math.isfinite(value):
            continue
        change = f"{value - first:+.{digits}f}" if is_score else _relative_change(value, first)
        axis.annotate(
            f"{value:.{digits}f}" + (f"  ({change})" if change and value != first else ""),
            (value, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axis.set_xlim(0, max([value for value in values if math.isfinite(value)] + [1e-9]) * 1.4)
    axis.tick_params(labelsize=9)
    axis.spines[["top", "right"]].set_visible(False)


def _relative_change(value: float, first: float) -> str:
    return f"{value / first - 1:+.0%}" if first else ""


def plot_sweep(rows: Sequence[Mapping[str, Any]], knee: int | None, out: str | Path) -> None:
    """Draw mAP and latency over the GFLOPs saved, a point per pruned network.

    Args:
        rows: per network `percent, gflops, latency_ms, map50, map50_95` (None or NaN where not
            measured), as the rows of `utils.pruning.sweep` hold them. The one with the lowest
            percent is the unpruned network. May be empty.
        knee: index of the row to be marked.
        out: picture file.
    """
    if not rows:
        _save_note("nothing was swept", out)
        return
    keys = ("percent", "gflops", "latency_ms", "map50", "map50_95")
    table = np.array([[row[key] for key in keys] for row in rows], np.float64)  # None becomes NaN
    order = np.argsort(table[:, 0], kind="stable")
    percents, gflops, latency_ms, *scores = table[order].T
    saved = 100 * (1 - gflops / max(gflops[0], 1e-12))
    marked = None if knee is None else int(np.flatnonzero(order == knee)[0])
    figure = _new_figure(11, 4.6)
    left, right = figure.subplots(1, 2)
    _draw_sweep_scores(left, saved, percents, scores, marked)
    _draw_sweep_latency(right, saved, latency_ms, marked)
    for axis in (left, right):
        axis.set_xlabel("GFLOPs saved (%)")
        axis.set_xlim(min(0, saved.min()) - 3, max(saved.max(), 10) + 6)
        axis.grid(alpha=0.3)
    _save(figure, out)


def _draw_sweep_scores(
    axis: Axes,
    saved: np.ndarray,
    percents: np.ndarray,
    scores: Sequence[np.ndarray],
    knee: int | None,
) -> None:
    """Both mAP; the percents along the upper border, as they are not evenly spaced in GFLOPs."""
    axis.set(title="accuracy before fine-tuning", ylabel="mAP")
    axis.title.set_fontsize(11)
    if not np.isfinite(scores).any():
        axis.text(
            0.5, 0.5, "mAP was not measured", ha="center", color="0.4", transform=axis.transAxes
        )
        axis.set_yticks([])
        return
    colours = ("tab:green", "tab:blue")
    for values, name, colour in zip(scores, ("mAP@.5", "mAP@.5:.95"), colours, strict=True):
        axis.plot(saved, values, "o-", color=colour, markersize=4, label=name)
        axis.axhline(values[0], color=colour, linewidth=0.8, linestyle=":")
    axis.set_ylim(0, max(float(np.nanmax(scores)) * 1.12, 0.05))
    label = "knee" if knee is None else f"knee: percent {percents[knee]:.0%}"
    _mark_knee(axis, saved, scores[0], knee, label)
    upper = axis.secondary_xaxis("top")
    upper.set_xticks(*_spaced_ticks(saved, percents, float(np.ptp(saved))))
    upper.tick_params(labelsize=7.5, length=2)
    axis.legend(fontsize=9, loc="lower left")
    axis.set_title("accuracy before fine-tuning (above: percent of the channels)", fontsize=11)


def _spaced_ticks(
    places: np.ndarray, percents: np.ndarray, span: float
) -> tuple[list[float], list[str]]:
    """Places and labels of those percents that do not run into the one before."""
    ticks: list[float] = []
    labels = []
    for place, percent in zip(places, percents, strict=True):
        if not ticks or place - ticks[-1] >= span / 18:
            ticks.append(float(place))
            labels.append(f"{100 * percent:.3g}")
    return ticks, labels


def _mark_knee(axis: Axes, x: np.ndarray, y: np.ndarray, knee: int | None, label: str) -> None:
    if knee is None or not np.isfinite(y[knee]):
        return
    axis.axvline(x[knee], color="tab:red", linewidth=1, linestyle="--")
    style: dict[str, Any] = {"markeredgecolor": "tab:red", "markeredgewidth": 1.8}
    axis.plot(x[knee], y[knee], "o", markersize=11, markerfacecolor="none", **style, label=label)


def _draw_sweep_latency(
    axis: Axes, saved: np.ndarray, latency_ms: np.ndarray, knee: int | None
) -> None:
    """Milliseconds with the speed-up at each point, and what the GFLOPs alone would promise."""
    axis.set_title("latency (numbers: times as fast)", fontsize=11)
    axis.set_ylabel("milliseconds, one image")
    promised = latency_ms[0] * (1 - saved / 100)
    axis.plot(saved, promised, color="0.5", linewidth=1, linestyle=":", label="in step with GFLOPs")
    axis.plot(saved, latency_ms, "o-", color="tab:purple", markersize=4, label="measured")
    for place, value in zip(saved[1:], latency_ms[1:], strict=True):
        if math.isfinite(value) and value > 0:
            axis.annotate(
                f"{latency_ms[0] / value:.2f}",
                (place, value),
                xytext=(4, 4),
                textcoords="offset points",
                fontsize=8,
                color="tab:purple",
            )
    _mark_knee(axis, saved, latency_ms, knee, "knee")
    axis.set_ylim(0, max(float(np.nan_to_num(latency_ms).max()) * 1.15, 1e-3))
    axis.legend(fontsize=9, loc="lower left")


_ROWS_PER_COLUMN = 100  # layers one below the other


def plot_layer_widths(
    paths: Sequence[str], before: ArrayLike, after: ArrayLike, out: str | Path
) -> None:
    """Draw the channels of each layer before (grey) and after (blue), first layer on top.

    Args:
        paths: names of the n layers. May be empty.
        before: [n] channels of the dense network.
        after: [n] channels that stay.
        out: picture file.
    """
    before, after = _as_numpy(before), _as_numpy(after)
    if not len(paths):
        _save_note("no layers", out)
        return
    num_columns = math.ceil(len(paths) / _ROWS_PER_COLUMN)
    num_rows = math.ceil(len(paths) / num_columns)
    width = 7.5 if num_columns == 1 else 5.2 * num_columns
    figure = _new_figure(width, 1.2 + 0.165 * num_rows)
    kept = f"{after.sum():,} of {before.sum():,} channels ({after.sum() / before.sum():.0%})"
    figure.suptitle(f"channels per layer: {kept} stay", fontsize=11)
    for column, axis in enumerate(figure.subplots(1, num_columns, squeeze=False)[0]):
        part = slice(column * num_rows, (column + 1) * num_rows)
        _draw_width_bars(axis, paths[part], before[part], after[part], num_rows)
        axis.set_xlim(0, before.max() * 1.22)  # room for the numbers
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    _save(figure, out)


def _draw_width_bars(
    axis: Axes, paths: Sequence[str], before: np.ndarray, after: np.ndarray, num_rows: int
) -> None:
    rows = np.arange(len(paths))
    axis.barh(rows, before, 0.82, color="0.85", label="before")
    axis.barh(rows, after, 0.82, color="tab:blue", label="after")
    for row, old, new in zip(rows, before, after, strict=True):
        text = f"{old}" if old == new else f"{old} → {new}"
        style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7}
        axis.annotate(text, (old, row), xytext=(3, -0.5), **style)
    axis.set_yticks(rows, [_class_name(path) for path in paths], fontsize=7.5)
    axis.set_ylim(num_rows - 0.4, -0.6)  # the same height of a bar in every column
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("channels", fontsize=8)


_SMALLEST_SHARE = 1e-6  # of the largest |gamma|; below it a gamma counts as 0
_GAMMA_BINS = 48


def plot_importance_threshold(
    gamma: ArrayLike, kept: ArrayLike, threshold: float | None, out: str | Path
) -> None:
    """Draw how |gamma| is distributed among the channels that stay and those that go.

    The axis is logarithmic; zeros, and what is so small that only averaging left it there, have a
    bin of their own at the left. Where another importance than |gamma| chose, the two colours
    overlap.

    Args:
        gamma: [N] gamma of all prunable channels, of either sign.
        kept: bool [N]; True stays.
        threshold: |gamma| below which channels went; None if |gamma| did not decide.
        out: picture file.
    """
    size = np.abs(_as_numpy(gamma).astype(np.float64))
    kept = _as_numpy(kept).astype(bool)
    if not len(size):
        _save_note("no prunable channels", out)
        return
    largest = float(size.max()) or 1.0
    is_zero = size < largest * _SMALLEST_SHARE
    logs = np.log10(np.where(is_zero, largest, size))
    low, high = float(logs.min()), float(logs.max())
    step = max(high - low, 0.2) / _GAMMA_BINS
    line = None if threshold is None else max(math.log10(max(threshold, 1e-300)), low - step / 2)
    edges = _bins_with_edge(low, high, step, line)
    zero_edges = (low - 5 * step, low - 2 * step)

    figure = _new_figure(8.5, 4.4)
    axis = figure.add_subplot()
    bottom = np.zeros(len(edges))
    for part, colour, name in ((~kept, "tab:orange", "go"), (kept, "tab:blue", "stay")):
        counts, _ = np.histogram(logs[part & ~is_zero], edges)
        heights = np.append(counts, (part & is_zero).sum())
        label = f"{part.sum():,} channels {name}"
        places = np.append(edges[:-1], zero_edges[0])
        widths = np.append(np.diff(edges), zero_edges[1] - zero_edges[0])
        axis.bar(places, heights, widths, bottom, align="edge", color=colour, label=label)
        bottom = bottom + heights
    _limit_zero_bar(axis, bottom, sum(zero_edges) / 2)
    if line is not None:
        style: dict[str, Any] = {"color": "tab:red", "linestyle": "--", "linewidth": 1.5}
        axis.axvline(line, **style, label=f"threshold {threshold:.3g}")
    axis.axvline(low - step, color="0.8", linewidth=0.8)  # what is left of it is not to scale
    axis.set_xlim(low - 7 * step, max(high, line or high) + 2 * step)
    _set_log_ticks(axis, low, high, sum(zero_edges) / 2)
    axis.set_title("|gamma| of the prunable channels", fontsize=11)
    axis.set(xlabel="|gamma|, logarithmic", ylabel="channels")
    axis.grid(alpha=0.3, axis="y")
    axis.set_axisbelow(True)
    figure.legend(fontsize=9, loc="outside lower center", ncols=3)
    _save(figure, out)


def _bins_with_edge(low: float, high: float, step: float, line: float | None) -> np.ndarray:
    """Edges from `low` to beyond `high`; `line` is one of them, so that no bin holds both sides."""
    shift = 0.0 if line is None else (line - low) % step
    edges = np.arange(low + shift, high + 2 * step, step)
    return np.concatenate([[low - 1e-9], edges[edges > low]])


def _limit_zero_bar(axis: Axes, heights: np.ndarray, place: float) -> None:
    """Number on top of the zeros (the last bar); where they dwarf the rest they are cut off."""
    *others, zeros = heights
    top = max(others)
    is_cut = top > 0 and zeros > 2.5 * top
    axis.set_ylim(0, 1.15 * (1.5 * top if is_cut else max(top, zeros)))
    if not zeros:
        return
    style: dict[str, Any] = {"ha": "center", "va": "bottom", "fontsize": 9}
    if is_cut:
        plate = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        text = f"↑ {zeros:,.0f}"
        axis.text(place, axis.get_ylim()[1] * 0.97, text, **style | {"va": "top", "bbox": plate})
    else:
        axis.text(place, zeros, f"{zeros:,.0f}", **style)


def _set_log_ticks(axis: Axes, low: float, high: float, zero_place: float) -> None:
    """Round numbers as ticks of an axis that holds logarithms, and one for the zeros."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    every = math.ceil(len(powers) / 9)
    labelled = (1,) if high - low > 2 else (1, 2, 5) if high - low > 0.9 else range(1, 10)
    values = [digit * 10.0**power for power in powers[::every] for digit in labelled]
    values = [value for value in values if low <= math.log10(value) <= high]
    places = [math.log10(value) for value in values]
    axis.set_xticks([zero_place, *places], ["0", *(f"{value:g}" for value in values)])
    minor = [power + math.log10(digit) for power in powers for digit in range(1, 10)]
    axis.set_xticks([place for place in minor if low <= place <= high], minor=True)


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
    found = _as_numpy(detections).reshape(-1, 6).astype(np.float64)
    _draw_boxes(
        image, found, names, line_width=line_width, show_names=show_names, show_conf=show_conf
    )
    return np.array(image)


_PAIR_WIDTH = 1920  # pixels of both pictures together, and of one in height


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
    image = Image.fromarray(np.ascontiguousarray(_as_numpy(image_rgb)))
    scale = min(_PAIR_WIDTH / 2 / image.width, _PAIR_WIDTH / 2 / image.height, 4.0)
    width, height = max(round(image.width * scale), 1), max(round(image.height * scale), 1)
    gap, font_size = 8, _font_size(Image.new("1", (width, 1))) + 2
    font, title_height = _font(font_size), font_size + 10
    canvas = Image.new("RGB", (2 * width + gap, title_height + height), (255, 255, 255))
    draw = ImageDraw.Draw(canvas)
    for side, (detections, title) in enumerate(zip((left, right), titles, strict=True)):
        found = _as_numpy(detections).reshape(-1, 6).astype(np.float64)
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
    text, mark = _printable(text), ""
    while text and font.getlength(text + mark + tail) > width:
        text, mark = text[:-1], "…"
    return text + mark + tail
