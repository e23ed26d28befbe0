"""The report of a pruning run: `report.json` for programs, `report.html` for people.

The page is one file without scripts or outside links: pictures are embedded, colours follow the
reader's light or dark setting, tables and pictures fit a phone and paper. Every text is escaped,
as class names and paths come from users.
"""

from __future__ import annotations

import base64
import dataclasses
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from utils.pruning.sweep import SWEEP_TITLES, SweepRow, sweep_cells
from utils.run_dir import write_text_atomic

# --- what a run found, as plain values ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one network can do and what it costs."""

    precision: float | None  # None: not measured, there was no data set
    recall: float | None
    map50: float | None
    map50_95: float | None
    channels: int
    parameters: int
    gflops: float  # 2 x MACs, at imgsz
    file_mb: float  # 1e6 bytes, in half precision as saved
    latency_ms: float  # one image, float32


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """Channels of one convolution block before and after."""

    layer: str
    before: int
    after: int
    prunable: bool
    added: int = 0  # kept by min_channels and round_to beyond what the ranking keeps
    note: str = ""  # why it is as it is, for people; "" says it from the other fields


@dataclasses.dataclass(frozen=True)
class SpeedRow:
    """Latency of both networks for one batch size."""

    batch_size: int
    before_ms: float  # the whole batch
    after_ms: float
    speed_up: float  # times as fast
    speed_up_low: float
    speed_up_high: float


@dataclasses.dataclass(frozen=True)
class ClassRow:
    """Accuracy for one class before and after."""

    name: str
    labels: int  # in the validation images
    ap50_before: float
    ap50_after: float
    ap_before: float  # mean over IoU 0.5 to 0.95
    ap_after: float


@dataclasses.dataclass(frozen=True)
class Report:
    """All that a pruning run asked for and found; None where it does not apply."""

    command: str
    weights: str
    data: str  # "" without a data set
    imgsz: int  # pixels
    device: str
    percent: float  # share of the prunable channels asked for, or that target or knee led to
    target: str  # such as "target-gflops 50%"; "" if percent led
    shortcut: str  # rule for tied channels: keep, group
    importance: str
    compensate: str  # what was done for the channels that go
    recalibrate: int  # batches for batch norm statistics, 0 = none
    min_channels: int
    round_to: int  # 1 = not rounded
    suggested_percent: float | None
    threshold: float | None  # importance a channel needed to stay
    cut_difference: float  # relative, against the masked dense network
    removed: float  # share of the prunable channels that went
    before: Figures
    after: Figures
    speed_up: tuple[float, float, float]  # times as fast: middle, lowest, highest
    layers: tuple[LayerRow, ...]
    widths: Mapping[str, int]  # output channels of each convolution that stay
    speeds: tuple[SpeedRow, ...] = ()  # per batch size; the first is that of speed_up
    classes: tuple[ClassRow, ...] = ()
    sweep: tuple[SweepRow, ...] = ()
    knee: int | None = None  # index into sweep
    verdict: str = ""  # is the network ready to be pruned
    readiness: Mapping[str, Any] | None = None  # the figures behind the verdict
    warnings: tuple[str, ...] = ()
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further settings

    def to_dict(self) -> dict[str, Any]:
        """Lists, dicts, text and finite numbers only, for `report.json`; NaN becomes None."""
        return _to_plain(dataclasses.asdict(self))


@dataclasses.dataclass(frozen=True)
class SweepReport:
    """What a sweep found after which no network was saved."""

    weights: str
    reason: str  # why nothing was saved
    sweep: tuple[SweepRow, ...]
    verdict: str
    warnings: tuple[str, ...]
    settings: tuple[tuple[str, str], ...]  # name, value


def _to_plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_plain(item) for item in value]
    if hasattr(value, "item"):  # a number of numpy
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Files to be embedded; of what is not there the report says so."""

    layers: Path | None = None
    gamma: Path | None = None
    sweep: Path | None = None
    detections: Mapping[str, Path] = dataclasses.field(default_factory=dict)  # by caption


# --- sentences and tables, for the page and for the log -------------------------------------


def comparison_rows(
    before: Figures, after: Figures, imgsz: int, device: str
) -> list[tuple[str, str, str, str]]:
    """The table before/after: quantity, before, after, change. Accuracy only if it was measured."""
    rows = []
    for title, old, new in (
        ("precision", before.precision, after.precision),
        ("recall", before.recall, after.recall),
        ("mAP@.5", before.map50, after.map50),
        ("mAP@.5:.95", before.map50_95, after.map50_95),
    ):
        if old is not None and new is not None:
            rows.append((title, f"{old:.4f}", f"{new:.4f}", _signed(new - old, 4)))
    for title, form, old, new in (
        ("channels", "{:,}", before.channels, after.channels),
        ("parameters", "{:,}", before.parameters, after.parameters),
        (f"GFLOPs at {imgsz} px", "{:.3f}", before.gflops, after.gflops),
        ("file size, MB", "{:.3f}", before.file_mb, after.file_mb),
        (f"latency on {device}, ms", "{:.2f}", before.latency_ms, after.latency_ms),
    ):
        rows.append((title, form.format(old), form.format(new), _relative(old, new)))
    return rows


def _relative(old: float, new: float) -> str:
    return f"{_signed(100 * (new / old - 1), 1)} %" if old else ""


def _signed(value: float, digits: int) -> str:
    """With its sign, of which 0 has the plus."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def format_layers(rows: Sequence[LayerRow]) -> str:
    """The channels before and after as text for people, without a newline at the end."""
    lines = [f"{'layer':<14} {'channels':>8} {'after':>8} {'kept':>6}"]
    for row in rows:
        note = row.note or _describe_layer(row)
        share = row.after / row.before
        lines.append(
            f"{row.layer:<14} {row.before:8d} {row.after:8d} {share:6.0%}  {note}".rstrip()
        )
    total, left = sum(row.before for row in rows), sum(row.after for row in rows)
    return "\n".join([*lines, f"{'all':<14} {total:8d} {left:8d} {left / total:6.0%}"])


def describe_speed(row: SpeedRow, flops_ratio: float, device: str) -> str:
    """How much faster, of what the FLOPs alone would give; or that it is not, or nobody knows."""
    ratio = f"{row.speed_up:.2f}x ({row.speed_up_low:.2f}-{row.speed_up_high:.2f})"
    pieces = "one image" if row.batch_size == 1 else f"{row.batch_size} images"
    if row.speed_up_low > 1:
        return (
            f"{ratio} faster on {device}, {pieces}; {row.speed_up / flops_ratio:.2f} of the "
            f"{flops_ratio:.2f}x by which the FLOPs fell"
        )
    if row.speed_up_high >= 1:
        return (
            f"no measurable difference on {device}: {ratio}, {pieces}. If the range is wide, "
            "measure again on an idle machine; if not, more has to go"
        )
    return (
        f"not faster on {device}: {ratio}, {pieces}. Fewer channels save time only where "
        "arithmetic takes it, so not in small or lightly pruned networks"
    )


def headline(report: Report) -> str:
    """One sentence or two: what was removed, what it saves, what it cost, how much faster it is."""
    before, after = report.before, report.after
    parts = [
        f"{100 * report.removed:.1f} % of the prunable channels are removed: "
        f"{_relative(before.parameters, after.parameters)} parameters, "
        f"{_relative(before.gflops, after.gflops)} GFLOPs, {_describe_speed(report)}."
    ]
    if before.map50 is not None and after.map50 is not None:
        points = 100 * (after.map50 - before.map50)
        change = f"{points:+.1f} points" if abs(points) >= 0.05 else "unchanged"
        parts.append(
            f"Before fine-tuning, mAP@.5 goes from {before.map50:.3f} to {after.map50:.3f} "
            f"({change})."
        )
    else:
        parts.append("What it costs in mAP was not measured: there was no data set.")
    return " ".join(parts)


def _describe_speed(report: Report) -> str:
    middle, lowest, highest = report.speed_up
    where = f"on {report.device}, {_batch_size(report)}"
    spread = f"({lowest:.2f} to {highest:.2f})"
    if lowest > 1:
        return f"{middle:.2f} times as fast {spread} {where}"
    kind = "no measurable difference in speed" if highest >= 1 else "slower"
    return f"{kind}: {middle:.2f} times as fast {spread} {where}"


def _batch_size(report: Report) -> str:
    """For how many images at a time `speed_up` holds: the first that was measured."""
    size = report.speeds[0].batch_size if report.speeds else 1
    return "one image" if size == 1 else f"{size} images"


def setting_rows(report: Report) -> list[tuple[str, str]]:
    """What was asked for: name, value."""
    rows = [
        ("command", report.command),
        ("weights", report.weights),
        ("data", report.data or "none"),
        ("imgsz", f"{report.imgsz} px"),
        ("device", report.device),
        ("target", report.target or "none"),
        ("percent", f"{report.percent:.4g}"),
        ("shortcut rule", report.shortcut),
        ("importance", report.importance),
        ("threshold", "none" if report.threshold is None else f"{report.threshold:.4g}"),
        ("compensation", report.compensate),
        ("recalibration", f"{report.recalibrate} batches" if report.recalibrate else "none"),
        ("fewest channels of a layer", f"{report.min_channels}"),
        ("rounded to multiples of", f"{report.round_to}"),
    ]
    rows += [(str(name), str(value)) for name, value in report.more.items()]
    rows.append(("proof of the cut", f"relative difference {report.cut_difference:.1g}"))
    return rows


# --- the page -------------------------------------------------------------------------------

# The policy forbids the browser to load anything, or run a script, that this file does not hold.
_PAGE = Template("""\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<main>
<h1>Pruning report</h1>
$body</main>
</body>
</html>
""")

_STYLE = """\
:root { --ink: #1b1f24; --paper: #ffffff; --faint: #5b6570; --line: #d5dae0; --plate: #f3f5f7;
  --accent: #1f6fb2; --alarm: #b3261e; --alarm-plate: #fdecea; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --paper: #15181c; --faint: #9aa4af; --line: #363c44; --plate: #1f2329;
    --accent: #6bb3f0; --alarm: #ff8a80; --alarm-plate: #3a1d1b; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; padding-bottom: 0.2rem;
  border-bottom: 1px solid var(--line); }
p, li, td { overflow-wrap: anywhere; }
.headline { font-size: 1.1rem; }
.faint { color: var(--faint); }
.tiles { display: flex; flex-wrap: wrap; gap: 0.6rem; margin: 1rem 0; padding: 0; }
.tiles li { list-style: none; flex: 1 1 8rem; padding: 0.6rem 0.8rem; border-radius: 8px;
  background: var(--plate); color: var(--faint); font-size: 0.9rem; }
.tiles strong { display: block; color: var(--ink); font-size: 1.4rem; line-height: 1.2; }
.warnings { margin: 1rem 0; padding: 0.6rem 1rem; border-left: 4px solid var(--alarm);
  background: var(--alarm-plate); }
.warnings ul { margin: 0; padding-left: 1.1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
th { color: var(--faint); font-weight: 600; white-space: nowrap; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; white-space: normal; }
.numbers td:first-child { min-width: 5rem; }
.words td { text-align: left; white-space: normal; }
.words td:first-child { color: var(--faint); width: 13rem; }
tr.marked td { background: var(--plate); font-weight: 600; }
summary { cursor: pointer; padding: 0.4rem 0; color: var(--accent); }
figure { margin: 1rem 0; }
figcaption { color: var(--faint); font-size: 0.9rem; overflow-wrap: anywhere; }
img { display: block; width: auto; max-width: 100%; height: auto; border-radius: 6px;
  background: #ffffff; }
@media (max-width: 40rem) { .scroll img { max-width: none; width: 40rem; }
  .words td:first-child { width: 7rem; } }
@media print {
  :root { --ink: #000000; --paper: #ffffff; --faint: #444444; --line: #bbbbbb; --plate: #f3f5f7;
    --accent: #000000; --alarm: #b3261e; --alarm-plate: #ffffff; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  h2, section > p, summary { break-after: avoid; }
  th, td { padding: 0.1rem 0.5rem; }
  figure, tr, .tiles, .warnings { break-inside: avoid; }
  .scroll { overflow: visible; }
  .scroll img { width: auto; max-width: 100%; max-height: 23cm; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""


def write_report(path: str | Path, report: Report, pictures: Pictures) -> None:
    """Write the page; it appears complete or not at all.

    Raises:
        OSError: the page cannot be written. A picture that cannot be read is only left out.
    """
    write_text_atomic(path, format_page(report, pictures))


def write_sweep_report(path: str | Path, report: SweepReport, picture: Path) -> None:
    """The same for a sweep after which no network was saved."""
    head = f"No network is saved: {report.reason}."
    sections = [
        f'<p class="headline">{_escape(head)}</p>\n',
        _remarks(report.verdict, report.warnings),
        _sweep_section(report.sweep, None, picture),
        _section("Settings", _table((), report.settings, style="words")),
    ]
    write_text_atomic(path, _fill_page(report.weights, sections))


def format_page(report: Report, pictures: Pictures) -> str:
    """The page as html."""
    sections = [
        _headline_section(report),
        _comparison_section(report),
        _class_section(report.classes),
        _sweep_section(report.sweep, report.knee, pictures.sweep),
        _detection_section(pictures.detections),
        _layer_section(report.layers, pictures.layers),
        _gamma_section(pictures.gamma),
        _settings_section(report),
    ]
    return _fill_page(report.weights, sections)


def _fill_page(weights: str, sections: Sequence[str]) -> str:
    title = f"Pruning report: {Path(weights).name}"
    return _PAGE.substitute(title=_escape(title), style=_STYLE, body="".join(sections))


def _escape(text: object) -> str:
    """Text for html, also within attributes; what UTF-8 cannot write (odd file names) as `?`."""
    return html.escape(str(text).encode("utf-8", "replace").decode("utf-8"))


def _headline_section(report: Report) -> str:
    before, after = report.before, report.after
    tiles = [
        ("parameters", _relative(before.parameters, after.parameters)),
        ("GFLOPs", _relative(before.gflops, after.gflops)),
        (f"times as fast, {_batch_size(report)}", f"{report.speed_up[0]:.2f}"),
    ]
    if before.map50 is not None and after.map50 is not None:
        change = _signed(100 * (after.map50 - before.map50), 1)
        tiles.append(("points of mAP@.5, before fine-tuning", change))
    items = "".join(
        f"<li><strong>{_escape(value)}</strong> {_escape(name)}</li>\n" for name, value in tiles
    )
    parts = [
        f'<p class="headline">{_escape(headline(report)).replace(" %", "&nbsp;%")}</p>\n',
        f'<ul class="tiles">\n{items}</ul>\n',
        _remarks(report.verdict, report.warnings),
    ]
    return "".join(parts)


def _remarks(verdict: str, warnings: Sequence[str]) -> str:
    """The verdict, and what was warned of."""
    text = f"<p>{_escape(verdict)}</p>\n" if verdict else ""
    if warnings:
        lines = "".join(f"<li>{_escape(line)}</li>\n" for line in warnings)
        text += f'<div class="warnings" role="note"><ul>\n{lines}</ul></div>\n'
    return text


def _comparison_section(report: Report) -> str:
    rows = comparison_rows(report.before, report.after, report.imgsz, report.device)
    table = _table(("", "before", "after", "change"), rows)
    return _section("Before and after", table + _speed_table(report.speeds))


def _speed_table(speeds: Sequence[SpeedRow]) -> str:
    """Per batch size, if there is more than the one of the main table."""
    if len(speeds) < 2:
        return ""
    rows = [
        (
            f"{row.batch_size}",
            f"{row.before_ms:.2f}",
            f"{row.after_ms:.2f}",
            f"{row.speed_up:.2f}x ({row.speed_up_low:.2f} to {row.speed_up_high:.2f})",
        )
        for row in speeds
    ]
    return "<br>\n" + _table(("images a batch", "ms before", "after", "times as fast"), rows)


def _class_section(classes: Sequence[ClassRow]) -> str:
    """The classes, those that lost most first."""
    if not classes:
        return ""
    titles = ("class", "labels", "AP@.5 before", "after", "AP@.5:.95 before", "after")
    rows = [
        (
            row.name,
            f"{row.labels:,}",
            *(f"{x:.3f}" for x in (row.ap50_before, row.ap50_after, row.ap_before, row.ap_after)),
        )
        for row in sorted(classes, key=lambda row: row.ap50_after - row.ap50_before)
    ]
    table = _table(titles, rows)
    if len(rows) > 10:
        table = _details(f"{len(rows)} classes, those that lost most first", table)
    return _section("Classes", table)


def _sweep_section(sweep: Sequence[SweepRow], knee: int | None, picture: Path | None) -> str:
    if not sweep:
        return ""
    words = f"Measured right after pruning, before fine-tuning. {_describe_knee(sweep, knee)}"
    table = _table(SWEEP_TITLES, sweep_cells(sweep), marked=knee)
    return _section("Sweep", f"<p>{_escape(words)}</p>\n{table}{_figure('', picture, 'sweep')}")


def _describe_knee(sweep: Sequence[SweepRow], knee: int | None) -> str:
    if knee is None:
        return "No knee is marked."
    percent = sweep[knee].percent
    if percent == min(row.percent for row in sweep):
        return "No percent of the sweep is without a clear loss of mAP@.5."
    return f"The knee (marked), beyond which mAP@.5 falls, is at {100 * percent:.3g} %."


def _detection_section(detections: Mapping[str, Path]) -> str:
    if not detections:
        return ""
    figures = [_figure(caption, path, caption) for caption, path in detections.items()]
    words = "<p>Left the dense network, right the slim one before fine-tuning.</p>\n"
    return _section("Detections side by side", words + "".join(figures))


def _layer_section(layers: Sequence[LayerRow], picture: Path | None) -> str:
    rows = [
        (
            row.layer,
            f"{row.before}",
            f"{row.after}",
            f"{row.after / row.before:.0%}" if row.before else "",
            row.note or _describe_layer(row),
        )
        for row in layers
    ]
    table = _table(("layer", "before", "after", "kept", "remark"), rows)
    details = _details(f"all {len(rows)} layers as a table", table)
    return _section("Channels per layer", _figure("", picture, "channels per layer") + details)


def _describe_layer(row: LayerRow) -> str:
    if not row.prunable:
        return "frozen (shortcut)"
    return f"{row.added} more for floor and rounding" if row.added else ""


def _gamma_section(picture: Path | None) -> str:
    if picture is None:
        return ""
    words = (
        "<p>|gamma| is the weight of a channel's batch norm. A network that is ready to be pruned "
        "has two hills: channels near 0 that can go, and those it uses.</p>\n"
    )
    figure = _figure("", picture, "distribution of |gamma|")
    return _section("Distribution of |gamma|", words + figure)


def _settings_section(report: Report) -> str:
    return _section("Settings", _table((), setting_rows(report), style="words"))


def _section(title: str, content: str) -> str:
    """A heading and html."""
    return f"<section>\n<h2>{_escape(title)}</h2>\n{content}</section>\n"


def _details(summary: str, content: str) -> str:
    """Html that a click unfolds."""
    return f"<details>\n<summary>{_escape(summary)}</summary>\n{content}</details>\n"


def _table(
    titles: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    marked: int | None = None,
    style: str = "numbers",
) -> str:
    """A table of texts; row number `marked` stands out, without titles there is no head."""
    head = "".join(f'<th scope="col">{_escape(title)}</th>' for title in titles)
    head = f"<thead><tr>{head}</tr></thead>\n" if titles else ""
    lines = []
    for index, row in enumerate(rows):
        cells = "".join(f"<td>{_escape(cell)}</td>" for cell in row)
        style_of_row = ' class="marked"' if index == marked else ""
        lines.append(f"<tr{style_of_row}>{cells}</tr>\n")
    body = f"<tbody>\n{''.join(lines)}</tbody>\n"
    return f'<div class="scroll"><table class="{style}">\n{head}{body}</table></div>\n'


_MIME_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


def _figure(caption: str, path: Path | None, described: str) -> str:
    """A picture as a data URI, with its caption if there is one; a word where it is missing.

    Args:
        caption: stands below it.
        path: a png or jpg; None if there is to be none.
        described: what it shows, for those who cannot see it.
    """
    if path is None:
        return ""
    try:
        content = base64.b64encode(path.read_bytes()).decode("ascii")
    except OSError:
        return f'<p class="faint">The picture of {_escape(described)} could not be made.</p>\n'
    source = f"data:{_MIME_TYPES[path.suffix.lower()]};base64,{content}"
    image = f'<div class="scroll"><img src="{source}" alt="{_escape(described)}"></div>'
    below = f"<figcaption>{_escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{image}{below}</figure>\n"
