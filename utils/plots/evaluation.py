"""A validation: curves per class, the confusion matrix, accuracy over speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from utils.plots.figures import (
    GREY,
    NAMED_CLASSES,
    as_numpy,
    class_colour,
    class_name,
    label_classes,
    literal,
    new_figure,
    save_figure,
    save_note,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    ap50 = as_numpy(ap50)
    mean = f"all classes, mAP@.5 {ap50.mean():.3f}" if len(ap50) else ""
    labels = [f"{class_name(name)} {ap:.3f}" for name, ap in zip(names, ap50, strict=True)]
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
    values = as_numpy(values)
    mean = ""
    if len(values):
        best = int(values.mean(0).argmax())
        height, place = values.mean(0)[best], as_numpy(confidences)[best]
        mean = f"all classes, highest {height:.3f} at {place:.3f}"
    labels = [class_name(name) for name in names]
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
    x, curves = as_numpy(x), as_numpy(curves)
    if not len(curves):
        save_note("no labels", out)
        return
    few = len(curves) <= NAMED_CLASSES
    figure = new_figure(8.5 if few else 7, 5.6)
    axis = figure.add_subplot()
    for index, (curve, label) in enumerate(zip(curves, labels, strict=True)):
        if few:
            axis.plot(
                x, curve, linewidth=1.2, color=np.divide(class_colour(index), 255), label=label
            )
        else:
            axis.plot(x, curve, linewidth=0.7, color=GREY, label="each class" if not index else "")
    if len(curves) > 1:
        axis.plot(x, curves.mean(0), linewidth=3, color="black", label=mean_label)
    axis.set(xlabel=axis_names[0], ylabel=axis_names[1], xlim=(0, 1), ylim=(0, 1.02))
    axis.set_title(f"{axis_names[1]} over {axis_names[0]}", fontsize=11)
    axis.grid(alpha=0.3)
    outside: dict[str, Any] = {"bbox_to_anchor": (1.01, 1), "loc": "upper left", "borderaxespad": 0}
    axis.legend(fontsize=8, **(outside if few else {"loc": "best"}))
    save_figure(figure, out)


def plot_confusion_matrix(matrix: ArrayLike, names: Sequence[str], out: str | Path) -> None:
    """Draw a confusion matrix, each column as shares of its labelled class.

    Args:
        matrix: counts [K+1, K+1]; row: detected class, column: labelled class, the last of
            each is background (missed, or nothing there).
        names: the K class names.
        out: picture file.
    """
    counts = as_numpy(matrix).astype(np.float64)
    shares = counts / np.maximum(counts.sum(0, keepdims=True), 1)
    num = len(counts)
    few = num <= NAMED_CLASSES + 1
    side = 4.2 + 0.62 * num if few else 15.0
    figure = new_figure(side + 1.4, side)
    axis = figure.add_subplot()
    shown = np.ma.masked_equal(shares, 0)
    mesh = axis.imshow(shown, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(mesh, ax=axis, fraction=0.04, pad=0.02, label="share of the labelled class")
    ticks = [*names, "background"]
    label_classes(axis, "x", ticks)
    label_classes(axis, "y", ticks)
    if few:
        _write_cells(axis, counts, shares)
    axis.set_xlabel("labelled class (background: detected where nothing is labelled)")
    axis.set_ylabel("detected class (background: missed)")
    axis.set_title("confusion matrix", fontsize=12)
    axis.set_xticks(np.arange(num + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(num + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="0.9", linewidth=0.5)
    axis.tick_params(which="minor", length=0)
    save_figure(figure, out)


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
    figure = new_figure(7.5, 5)
    axis = figure.add_subplot()
    for name, points in curves.items():
        sizes, times, scores = zip(*sorted(points), strict=True)
        (line,) = axis.plot(times, scores, "o-", label=literal(name))
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
    save_figure(figure, out)
