"""Run all five stages on the generated shapes and compare them: under ten minutes on two cores.

    python demo.py
    python demo.py --epochs 200 60 60 --imgsz 320 --device 0

Each stage is a command that is printed before it runs, and that can be typed as it stands. The
table of the stages is in runs/demo/exp*: stages.txt, stages.csv, stages.png.
"""

from __future__ import annotations

from utils.stopping import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()  # from here on, as an import can lose it

from utils.flags.answer import answer_early
from utils.flags.demo import parse_args

if __name__ == "__main__":
    answer_early(parse_args, __doc__)  # help and mistakes, before torch is loaded

import argparse
import csv
import io
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from utils.checkpoint import load_detector
from utils.command import run_command
from utils.device import describe_device, select_device
from utils.metrics import fitness
from utils.plots.figures import draw
from utils.plots.pruning import plot_stage_table
from utils.profile import compare_latency, count_gflops, count_parameters
from utils.run_dir import open_run_dir, read_results, write_text_atomic

ROOT = Path(__file__).resolve().parent

# Columns of the table: key, heading, format.
COLUMNS = (
    ("map50", "mAP@.5", ".3f"),
    ("map50_95", "mAP@.5:.95", ".3f"),
    ("parameters", "parameters", ",d"),
    ("gflops", "GFLOPs", ".2f"),
    ("latency_ms", "latency ms", ".1f"),
    ("file_mb", "file MB", ".2f"),
)


class Stage(NamedTuple):
    """One command, and the files it leaves behind that the table is made from."""

    name: str
    command: list[str]
    weights: Path
    scores: Path  # results.csv, report.json or results.json


def main(argv: Sequence[str] | None = None) -> None:
    """Run the stages, then measure and compare what they made."""
    options = parse_args(argv, __doc__)
    if Path.cwd() != ROOT:
        raise SystemExit(f"the commands are meant for the project's folder: cd {ROOT}")
    started = time.perf_counter()
    with open_run_dir(options.project, "exp") as run_dir:
        stages = list_stages(options, run_dir)
        for number, stage in enumerate(stages, 1):
            run_stage(number, stage)
    rows = measure_stages(stages, options)
    device = describe_device(select_device(options.device))
    title = f"{Path(options.cfg).stem} on {Path(options.data).stem}, {options.imgsz} px, {device}"
    table = format_table(rows, title)
    save_table(run_dir, rows, table, title)
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{table}\n\n{minutes:.1f} minutes; table and picture: {run_dir}/stages.*")


def list_stages(options: argparse.Namespace, run_dir: Path) -> list[Stage]:
    """The five commands of the README, with the settings of the demo."""
    dense, sparse, pruned, tuned, validated = (
        run_dir / name for name in ("1_dense", "2_sparse", "3_pruned", "4_finetuned", "5_val")
    )
    # A short run needs many steps, so a step is a batch, not the 64 images of a long training.
    batch = ["--batch-size", str(options.batch_size), "--nominal-batch", str(options.batch_size)]
    train = ["train.py", "--data", options.data, "--hyp", options.hyp, *batch]
    common = ["--imgsz", str(options.imgsz)]
    common += [] if options.workers is None else ["--workers", str(options.workers)]
    common += ["--device", options.device] if options.device else []
    epochs = [["--epochs", str(count)] for count in options.epochs]
    adamw = ["--optimizer", "AdamW"]
    penalty = ["--bn_sparsity", "--sparsity_rate", str(options.sparsity_rate)]
    slim = ["--ft_pruned_model"]
    cut = ["--percent", f"{options.percent:g}", "--data", options.data]

    def weights(path: Path) -> list[str]:
        return ["--weights", str(path)]

    def to(folder: Path) -> list[str]:
        return [*common, "--project", str(folder.parent), "--name", folder.name]

    best, last = dense / "weights" / "best.pt", sparse / "weights" / "last.pt"
    slim_model, final = pruned / "pruned_model.pt", tuned / "weights" / "best.pt"
    fresh = ["--cfg", options.cfg, "--weights", ""]
    return [
        Stage("train", train + fresh + epochs[0] + adamw + to(dense), best, dense / "results.csv"),
        Stage(
            "sparse train",
            train + weights(best) + epochs[1] + adamw + penalty + to(sparse),
            last,
            sparse / "results.csv",
        ),
        Stage(
            "prune",
            ["prune.py", *weights(last), *cut, *to(pruned)],
            slim_model,
            pruned / "report.json",
        ),
        Stage(
            "fine-tune",
            train + weights(slim_model) + epochs[2] + adamw + slim + to(tuned),
            final,
            tuned / "results.csv",
        ),
        Stage(
            "val",
            ["val.py", *weights(final), "--data", options.data, *to(validated)],
            final,
            validated / "results.json",
        ),
    ]


def run_stage(number: int, stage: Stage) -> None:
    """Print the command and run it; stop everything if it fails."""
    print(f"\n=== {number} {stage.name}\n$ python {shlex.join(stage.command)}\n", flush=True)
    code = subprocess.call([sys.executable, *stage.command])
    if code:
        raise SystemExit(f"stage {number} ({stage.name}) ended with code {code}; see above")


def measure_stages(stages: Sequence[Stage], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per stage: the mAP it reported itself; size and speed, measured here in turns."""
    device = select_device(options.device)
    models = [load_detector(stage.weights).model for stage in stages]
    latencies = compare_latency(models, options.imgsz, device)
    rows = []
    for number, (stage, model, latency) in enumerate(
        zip(stages, models, latencies, strict=True), 1
    ):
        map50, map50_95 = read_scores(stage)
        rows.append(
            {
                "stage": f"{number} {stage.name}",
                "map50": map50,
                "map50_95": map50_95,
                "parameters": count_parameters(model),
                "gflops": count_gflops(model, options.imgsz),
                "latency_ms": latency.milliseconds,
                "file_mb": stage.weights.stat().st_size / 1e6,
            }
        )
    return rows


def read_scores(stage: Stage) -> tuple[float, float]:
    """mAP@.5 and mAP@.5:.95 of the stage's weights, as the stage wrote them down."""
    if stage.scores.suffix == ".json":
        report = json.loads(stage.scores.read_text(encoding="utf-8"))
        report = report.get("after", report)  # report.json holds both networks
        return report["map50"], report["map50_95"]
    columns = read_results(stage.scores)
    pairs = list(zip(columns["metrics/mAP_0.5"], columns["metrics/mAP_0.5:0.95"], strict=True))
    return pairs[-1] if stage.weights.stem == "last" else max(pairs, key=lambda p: fitness(*p))


def format_table(rows: Sequence[Mapping[str, Any]], title: str) -> str:
    """The rows as aligned text."""
    lines = [f"{'stage':<15}" + "".join(f"{heading:>12}" for _, heading, _ in COLUMNS)]
    for row in rows:
        cells = (f"{row[key]:{style}}" for key, _, style in COLUMNS)
        lines.append(f"{row['stage']:<15}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join([title, "", *lines])


def save_table(run_dir: Path, rows: Sequence[Mapping[str, Any]], table: str, title: str) -> None:
    """Write stages.txt, stages.csv and stages.png."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(run_dir / "stages.txt", table + "\n")
    write_text_atomic(run_dir / "stages.csv", buffer.getvalue())
    draw(plot_stage_table, rows, run_dir / "stages.png", title=title)


if __name__ == "__main__":
    run_command(main)
