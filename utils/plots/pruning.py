"""A pruning: what goes and what stays, how much is best, and what the stages came to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from utils.plots.figures import as_numpy, class_name, literal, new_figure, save_figure, save_note

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Quantities of the stage picture: key, title, digits. The first two are scores.
_STAGE_QUANTITIES = (
    ("map50", "mAP@.5", 3),
    ("map50_95", "mAP@.5:.95", 3),
    ("parameters", "parameters (million)", 3),
    ("gflops", "GFLOPs", 2),
    ("latency_ms", "latency (ms per image)", 1),
    ("file_mb", "file size (MB)", 2),
)

_ROWS_PER_COLUMN = 100  # layers one below the other
_SMALLEST_SHARE = 1e-6  # of the largest |gamma|; below it a gamma counts as 0
_GAMMA_BINS = 48


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
    before, after = as_numpy(before), as_numpy(after)
    if not len(paths):
        save_note("no layers", out)
        return
    num_columns = math.ceil(len(paths) / _ROWS_PER_COLUMN)
    num_rows = math.ceil(len(paths) / num_columns)
    width = 7.5 if num_columns == 1 else 5.2 * num_columns
    figure = new_figure(width, 1.2 + 0.165 * num_rows)
    kept = f"{after.sum():,} of {before.sum():,} channels ({after.sum() / before.sum():.0%})"
    figure.suptitle(f"channels per layer: {kept} stay", fontsize=11)
    for column, axis in enumerate(figure.subplots(1, num_columns, squeeze=False)[0]):
        part = slice(column * num_rows, (column + 1) * num_rows)
        _draw_width_bars(axis, paths[part], before[part], after[part], num_rows)
        axis.set_xlim(0, before.max() * 1.22)  # room for the numbers
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save_figure(figure, out)


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
    axis.set_yticks(rows, [class_name(path) for path in paths], fontsize=7.5)
    axis.set_ylim(num_rows - 0.4, -0.6)  # the same height of a bar in every column
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("channels", fontsize=8)


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
    size = np.abs(as_numpy(gamma).astype(np.float64))
    kept = as_numpy(kept).astype(bool)
    if not len(size):
        save_note("no prunable channels", out)
        return
    largest = float(size.max()) or 1.0
    is_zero = size < largest * _SMALLEST_SHARE
    logs = np.log10(np.where(is_zero, largest, size))
    low, high = float(logs.min()), float(logs.max())
    step = max(high - low, 0.2) / _GAMMA_BINS
    line = None if threshold is None else max(math.log10(max(threshold, 1e-300)), low - step / 2)
    edges = _bins_with_edge(low, high, step, line)
    zero_edges = (low - 5 * step, low - 2 * step)

    figure = new_figure(8.5, 4.4)
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
    save_figure(figure, out)


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
        save_note("nothing was swept", out)
        return
    keys = ("percent", "gflops", "latency_ms", "map50", "map50_95")
    table = np.array([[row[key] for key in keys] for row in rows], np.float64)  # None becomes NaN
    order = np.argsort(table[:, 0], kind="stable")
    percents, gflops, latency_ms, *scores = table[order].T
    saved = 100 * (1 - gflops / max(gflops[0], 1e-12))
    marked = None if knee is None else int(np.flatnonzero(order == knee)[0])
    figure = new_figure(11, 4.6)
    left, right = figure.subplots(1, 2)
    _draw_sweep_scores(left, saved, percents, scores, marked)
    _draw_sweep_latency(right, saved, latency_ms, marked)
    for axis in (left, right):
        axis.set_xlabel("GFLOPs saved (%)")
        axis.set_xlim(min(0, saved.min()) - 3, max(saved.max(), 10) + 6)
        axis.grid(alpha=0.3)
    save_figure(figure, out)


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
    figure = new_figure(14, 2.2 + 0.75 * len(rows))
    figure.suptitle(literal(title), fontsize=12)
    axes = figure.subplots(2, 3, sharey=True)
    stages = [str(row["stage"]) for row in rows]
    for axis, (key, name, digits) in zip(axes.ravel(), _STAGE_QUANTITIES, strict=True):
        scale = 1e-6 if key == "parameters" else 1.0
        values = [float(row.get(key, math.nan)) * scale for row in rows]
        _draw_stage_bars(axis, stages, values, digits, is_score=key.startswith("map"))
        axis.set_title(name, fontsize=11)
    if rows:
        axes[0, 0].invert_yaxis()  # first stage on top in all panels
    save_figure(figure, out)


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
