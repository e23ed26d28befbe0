"""The table of a sweep: what each percent removes, costs and gains, and where the cliff begins.

Plain data; who measured it is not known here.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import math
from collections.abc import Sequence

MAX_DROP = 0.01  # of mAP@.5 that counts as nothing lost
_TINY = 1e-9  # a drop of exactly `max_drop` passes, however the subtraction was rounded


@dataclasses.dataclass(frozen=True)
class SweepRow:
    """One network of a sweep, measured before fine-tuning."""

    percent: float  # share of the prunable channels asked for, 0 to below 1
    removed: float  # share of the prunable channels that went
    parameters: int
    gflops: float  # 2 x MACs of one image
    latency_ms: float  # one image
    speed_up: float  # times as fast as the unpruned network
    map50: float | None  # None: not measured, there was no data set
    map50_95: float | None


def find_knee(rows: Sequence[SweepRow], max_drop: float = MAX_DROP) -> int | None:
    """Index of the cheapest row before mAP falls.

    The rows are gone through by rising percent up to the first that lost more than `max_drop`:
    a return behind the cliff is luck. Of those passed, the one with the fewest GFLOPs is the knee.

    Args:
        rows: in any order; the one with the lowest percent is the unpruned network.
        max_drop: the most that mAP@.5 may lie below that of the unpruned network; 0.01 is a point.

    Returns:
        An index into `rows`; that of the unpruned network if every other row lost too much. None
        without mAP, or where that of the unpruned network is too low to lose `max_drop`.
    """
    order = sorted(range(len(rows)), key=lambda index: rows[index].percent)
    if not order:
        return None
    highest = _score(rows[order[0]])
    if not highest > max_drop:
        return None
    passed: list[int] = []
    for index in order:
        if not is_borne(_score(rows[index]), highest, max_drop):
            break
        passed.append(index)
    return min(passed, key=lambda index: (rows[index].gflops, rows[index].parameters))


def is_borne(score: float, before: float, max_drop: float) -> bool:
    """Whether a score lies at most `max_drop` below that of the unpruned network."""
    return score >= before - max_drop - _TINY


def _score(row: SweepRow) -> float:
    """The mAP@.5; below every other number where there is none."""
    return -math.inf if row.map50 is None or math.isnan(row.map50) else row.map50


SWEEP_TITLES = (
    "percent",
    "removed",
    "parameters",
    "GFLOPs",
    "saved",
    "latency, ms",
    "speed-up",
    "mAP@.5",
    "mAP@.5:.95",
)


def sweep_cells(rows: Sequence[SweepRow]) -> list[tuple[str, ...]]:
    """The rows as text, a cell per title of `SWEEP_TITLES`; `-` where nothing was measured.

    GFLOPs are saved against the row with the lowest percent.
    """
    if not rows:
        return []
    dense = min(rows, key=lambda row: row.percent).gflops
    return [
        (
            _format(row.percent, "{:.1%}"),
            _format(row.removed, "{:.1%}"),
            f"{row.parameters:,}",
            _format(row.gflops, "{:.3f}"),
            _format(1 - row.gflops / dense if dense else None, "{:.1%}"),
            _format(row.latency_ms, "{:.2f}"),
            _format(row.speed_up, "{:.2f}x"),
            _format(row.map50, "{:.4f}"),
            _format(row.map50_95, "{:.4f}"),
        )
        for row in rows
    ]


def _format(value: float | None, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else form.format(value)


def format_sweep(rows: Sequence[SweepRow], knee: int | None) -> str:
    """The table as text for people, without a newline at the end; the knee is marked."""
    lines = [SWEEP_TITLES, *sweep_cells(rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    texts = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    if knee is not None:
        texts[1 + knee] += "  <- knee"
    return "\n".join(texts)


def sweep_csv(rows: Sequence[SweepRow]) -> str:
    """The rows as csv in full precision: a header, a line per row, empty where not measured."""
    buffer = io.StringIO()
    names = [field.name for field in dataclasses.fields(SweepRow)]
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return buffer.getvalue()
