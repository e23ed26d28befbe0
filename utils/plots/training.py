"""A training: its results over the epochs, the labels of its images, and its gammas."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from utils.plots.figures import (
    GREY,
    NAMED_CLASSES,
    as_numpy,
    class_colour,
    label_classes,
    new_figure,
    save_figure,
    save_note,
    set_epoch_axis,
)
from utils.run_dir import read_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
        save_note("no epoch finished yet", out)
        return
    num_columns = 3 if len(panels) <= 6 else 4
    num_rows = math.ceil(len(panels) / num_columns)
    figure = new_figure(4.4 * num_columns, 3.2 * num_rows)
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axis, (title, names) in zip(axes, panels, strict=False):
        _draw_curves(axis, title, epochs, {name: columns[name] for name in names})
    for axis in axes[len(panels) :]:
        axis.remove()
    save_figure(figure, out)


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
    set_epoch_axis(axis, epochs)
    axis.xaxis.label.set_fontsize(8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    if title in ("precision and recall", "mAP", "share of small gammas"):
        axis.set_ylim(0, 1)
    axis.legend(fontsize=8, framealpha=0.7, ncols=1 if len(curves) <= 4 else 2)


def _short_name(name: str, curves: Mapping[str, Sequence[float]]) -> str:
    """`train` or `val` where that is the difference, else what follows the last slash."""
    prefix, _, rest = name.rpartition("/")
    return prefix if prefix in ("train", "val") and len(curves) <= 2 else rest


def plot_labels(labels: ArrayLike, names: Sequence[str], out: str | Path) -> None:
    """Draw class counts, box centres, widths against heights, and the sizes of the boxes.

    Args:
        labels: all boxes of the split, [n, 5]: class, cx, cy, w, h normalised. May be empty.
        names: class names in order.
        out: picture file.
    """
    boxes = as_numpy(labels).reshape(-1, 5).astype(np.float64)
    if not len(boxes):
        save_note("no labels", out)
        return
    figure = new_figure(13, 9)
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.15))
    _draw_class_counts(figure.add_subplot(grid[0, :]), boxes[:, 0].astype(np.int64), names)
    _draw_density(figure.add_subplot(grid[1, 0]), boxes[:, 1], boxes[:, 2], "box centres", "x", "y")
    shapes = figure.add_subplot(grid[1, 1])
    _draw_density(shapes, boxes[:, 3], boxes[:, 4], "box shapes", "width", "height")
    _draw_box_sizes(figure.add_subplot(grid[1, 2]), boxes[:, 3], boxes[:, 4])
    save_figure(figure, out)


def _draw_class_counts(axis: Axes, classes: np.ndarray, names: Sequence[str]) -> None:
    num_classes = max(len(names), int(classes.max()) + 1)
    counts = np.bincount(classes, minlength=num_classes)
    colours = [np.divide(class_colour(cls), 255) for cls in range(num_classes)]
    width = min(0.8, 0.12 * num_classes)
    bars = axis.bar(range(num_classes), counts, width, color=colours)
    if num_classes <= NAMED_CLASSES:
        axis.bar_label(bars, fontsize=9)
    axis.set_title(f"{len(classes)} boxes of {num_classes} classes", fontsize=11)
    axis.set_ylabel("boxes")
    axis.set_xlim(-0.6, num_classes - 0.4)
    axis.margins(y=0.12)
    label_classes(axis, "x", [*names, *map(str, range(len(names), num_classes))])


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
    quantiles = as_numpy(overall).astype(np.float64)
    layers = {name: as_numpy(rows).astype(np.float64) for name, rows in per_layer.items()}
    if not len(epochs):
        save_note("no gammas recorded yet", out)
        return
    height = float(np.clip(0.13 * len(layers), 4, 24))
    figure = new_figure(14, 4.6 + height)
    halves = figure.add_gridspec(2, 1, height_ratios=(4.6, height))
    top, bottom = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    fan, shares = top.subplots(1, 2)
    _draw_quantile_fan(fan, epochs, quantiles)
    _draw_small_shares(shares, epochs, quantiles)
    medians, spread = bottom.subplots(1, 2, sharey=True)
    _draw_layer_medians(medians, epochs, layers)
    _draw_layer_spread(spread, layers, f"|gamma| per layer after epoch {epochs[-1]}")
    save_figure(figure, out)


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
    set_epoch_axis(axis, epochs)
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
    set_epoch_axis(axis, epochs)
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
    set_epoch_axis(axis, epochs)
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
    axis.hlines(rows, low, high, color=GREY, linewidth=1)
    axis.hlines(rows, lower, upper, color="tab:blue", linewidth=4)
    axis.plot(middle, rows, "o", color="navy", markersize=3)
    axis.set_xlim(left=0)
    axis.tick_params(labelleft=False)
    axis.grid(alpha=0.3, axis="x")
