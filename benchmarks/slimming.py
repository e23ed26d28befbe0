"""Measure what slimming costs and gains: the scripted tables of `benchmarks/slimming.md`, again.

    python -m benchmarks.slimming bccd --weights yolov5n.pt
    python -m benchmarks.slimming shapes
    python -m benchmarks.slimming bccd --weights yolov5n.pt --list

Runs the commands of a study one after the other and reads what they write; a command whose result
is there already is passed over, so an interrupted study goes on where it was. `--list` prints the
commands. The tables are printed and written to runs/slimming/<study>/slimming.md.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import machine_lines
from utils.command import run_command
from utils.device import select_device
from utils.run_dir import read_results, write_text_atomic

ROOT = Path(__file__).resolve().parents[1]

CLASSIC = ["--shortcut", "keep", "--importance", "gamma", "--compensate", "none"]
CLASSIC += ["--recalibrate", "0"]
PERCENTS = [f"{step / 10:g}" for step in range(1, 8)]
DEEP = ("50%", "35%", "25%")  # of the GFLOPs, for comparisons
SLIM = "25%"  # of the GFLOPs, for fine-tuning
METHODS = {
    "|gamma|, nothing folded": ["--importance", "gamma", "--compensate", "none"],
    "|gamma|, constants folded": ["--importance", "gamma", "--compensate", "constant"],
    "|gamma|, least squares": ["--importance", "gamma", "--compensate", "linear"],
    "error, least squares": ["--importance", "error", "--compensate", "linear"],
    "error per cost, means folded": ["--importance", "error-per-cost", "--compensate", "mean"],
    "error per cost, least squares": ["--importance", "error-per-cost", "--compensate", "linear"],
}


# Short runs need many steps: a step is a batch.
COMMON = ("--batch", "16", "--nominal-batch", "16", "--optimizer", "AdamW")


@dataclasses.dataclass(frozen=True)
class Study:
    """A data set and the training that suits it."""

    data: str
    imgsz: int
    train: tuple[str, ...]  # flags of every training
    penalty: tuple[str, ...] = ()  # flags of the sparse training
    has_teacher: bool = False  # in the sparse training
    start: tuple[str, ...] = ()  # of the dense training; default: --weights of the command line


STUDIES = {
    "bccd": Study(
        "data/bccd.yaml",
        320,
        (*COMMON, "--epochs", "60"),
        ("--sparsity_rate", "0.001", "--sparsity_cost", "0.5", "--sparsity_schedule", "hold"),
        has_teacher=True,
    ),
    "coco128": Study(
        "data/coco128.yaml",
        320,
        (*COMMON, "--epochs", "120"),
    ),
    "shapes": Study(
        "data/shapes.yaml",
        160,
        (*COMMON, "--epochs", "45", "--hyp", "hyp.shapes.yaml"),
        start=("--weights", "", "--cfg", "yolov5n.yaml"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Step:
    """One command and the file that is there when it is done."""

    name: str
    command: list[str]
    result: Path


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--weights", default="yolov5n.pt", help="where the dense training starts")
    parser.add_argument("--data", help="another place of the data set yaml")
    parser.add_argument("--device", default="", help="'' (best), cpu or 0")
    parser.add_argument("--project", default=str(ROOT / "runs/slimming"), help="parent folder")
    parser.add_argument("--list", action="store_true", help="print the commands, run nothing")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing, then make the tables."""
    options = parse_args(argv)
    folder = Path(options.project) / options.study
    for step in list_steps(options, folder):
        print(shlex.join(["python", *step.command]), flush=True)
        if not options.list and not step.result.exists():
            subprocess.run([sys.executable, *step.command], cwd=ROOT, check=True)
    if options.list:
        return
    machine = "\n".join(machine_lines(select_device(options.device)))
    text = f"## {options.study}\n\n{machine}\n\n" + "\n\n".join(tables(folder)) + "\n"
    write_text_atomic(folder / "slimming.md", text)
    print(f"\n{text}\nwritten to {folder / 'slimming.md'}")


def list_steps(options: argparse.Namespace, folder: Path) -> Iterator[Step]:
    """Every command of a study, in order; later ones read the results of earlier ones."""
    study = STUDIES[options.study]
    data = ["--data", options.data or study.data, "--img", str(study.imgsz)]
    machine = ["--project", str(folder), "--exist-ok"]
    machine += ["--device", options.device] if options.device else []

    def train(name: str, *flags: str) -> Step:
        command = ["train.py", *data, *study.train, *flags, *machine, "--name", name]
        return Step(name, command, folder / name / "results.png")  # drawn last

    def prune(name: str, *flags: str, result: str = "report.json", source: str = "sparse") -> Step:
        weights = folder / source / "weights/last.pt"
        command = ["prune.py", *data, "--weights", str(weights), *flags, *machine, "--name", name]
        return Step(name, command, folder / name / result)

    start = study.start or ("--weights", options.weights)
    yield train("dense", *start)
    penalty = ["--bn_sparsity", *(study.penalty or ("--sparsity_rate", "auto"))]
    teacher = ["--teacher", str(folder / "dense/weights/best.pt")]
    yield train("sparse", *start, *penalty, *(teacher if study.has_teacher else ()))
    classic = ("--sparsity_cost", "0", "--sparsity_share", "1")
    yield train("plain", *start, "--bn_sparsity", "--sparsity_rate", "auto", *classic)
    yield prune("classic", "--percent", *PERCENTS, *CLASSIC, result="sweep.csv")
    yield prune("ours", "--percent", *PERCENTS, result="sweep.csv")
    for percent, gflops in _classic_gflops(folder):
        yield prune(f"equal-{percent}", "--target-gflops", f"{gflops:.6g}")
    for share in DEEP:
        for method, choice in METHODS.items():
            amount = ["--target-gflops", share, "--recalibrate", "0", "--latency-batch", "1"]
            yield prune(f"{share}, {method}", *amount, *choice)
    for share in DEEP:
        for source in ("sparse", "plain"):
            yield prune(f"{source}-{share}", "--target-gflops", share, source=source)
    yield prune("slim", "--target-gflops", SLIM)
    slim = ["--weights", str(folder / "slim/pruned_model.pt"), "--ft_pruned_model"]
    slim += ["--hyp", "hyp.finetune_slim.yaml"]
    yield train("finetuned", *slim)
    yield train("distilled", *slim, *teacher)


def _classic_gflops(folder: Path) -> list[tuple[str, float]]:
    """Percents and GFLOPs of the classic cuts; empty before they are made."""
    rows = _read_sweep(folder / "classic/sweep.csv")
    return [(f"{float(row['percent']):g}", float(row["gflops"])) for row in rows[1:]]


def _read_sweep(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _read_report(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / "report.json").read_text(encoding="utf-8"))


def tables(folder: Path) -> list[str]:
    """The results as Markdown."""
    makers = (_training_table, _penalty_table, _equal_table, _percent_table, _method_table)
    return [maker(folder) for maker in (*makers, _slim_table)]


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [f"### {title}", "", "| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _pair(before: float | str, after: float | str) -> str:
    return f"{float(before):.3f} / {float(after):.3f}"


def _training_table(folder: Path) -> str:
    """MAP of the last epoch, and of the best."""
    rows = []
    for name in ("dense", "sparse", "plain"):
        results = read_results(folder / name / "results.csv")
        scores = list(zip(results["metrics/mAP_0.5"], results["metrics/mAP_0.5:0.95"], strict=True))
        best = max(scores, key=lambda pair: 0.1 * pair[0] + 0.9 * pair[1])
        near_0 = results.get("gamma/below_1e-2")
        rows.append((name, _pair(*scores[-1]), _pair(*best), f"{near_0[-1]:.0%}" if near_0 else ""))
    heads = ("training", "last epoch, mAP@.5 / .5:.95", "best epoch", "abs(gamma) below 0.01")
    return _table("Training", heads, rows)


def _penalty_table(folder: Path) -> str:
    """What is left of mAP after deep cuts, with the classic penalty and ours."""
    rows = []
    for name, text in (("sparse", "by cost"), ("plain", "the same for all")):
        reports = [_read_report(folder, f"{name}-{share}") for share in DEEP]
        cells = [
            f"{_pair(r['after']['map50'], r['after']['map50_95'])}, "
            f"{r['after']['parameters'] / r['before']['parameters']:.0%} of the parameters"
            for r in reports
        ]
        before = reports[0]["before"]
        rows.append((text, _pair(before["map50"], before["map50_95"]), *cells))
    heads = ("sparse training", "uncut", *(f"GFLOPs {share}" for share in DEEP))
    return _table("Before fine-tuning, by the penalty of the sparse training", heads, rows)


def _equal_table(folder: Path) -> str:
    """The classic rule at each percent, and ours with the same GFLOPs."""
    rows = []
    for classic in _read_sweep(folder / "classic/sweep.csv")[1:]:
        percent = f"{float(classic['percent']):g}"
        ours = _read_report(folder, f"equal-{percent}")
        saved = 1 - ours["after"]["gflops"] / ours["before"]["gflops"]
        rows.append(
            (percent, f"-{saved:.0%}", _pair(classic["map50"], classic["map50_95"]),
             _pair(ours["after"]["map50"], ours["after"]["map50_95"]))
        )  # fmt: skip
    heads = ("percent, classic", "GFLOPs", "classic rule, mAP@.5 / .5:.95", "ours, equal GFLOPs")
    return _table("Before fine-tuning, at equal GFLOPs", heads, rows)


def _percent_table(folder: Path) -> str:
    """Classic and ours at equal percent."""
    sweeps = [_read_sweep(folder / name / "sweep.csv") for name in ("classic", "ours")]
    dense = float(sweeps[0][0]["gflops"])
    rows = []
    for pair in zip(*(sweep[1:] for sweep in sweeps), strict=True):
        cells = [f"{float(pair[0]['percent']):g}"]
        for row in pair:
            cells += [f"{float(row['gflops']) / dense - 1:+.0%}",
                      _pair(row["map50"], row["map50_95"])]  # fmt: skip
        rows.append(cells)
    heads = ("percent", "classic: GFLOPs", "mAP@.5 / .5:.95", "ours: GFLOPs", "mAP@.5 / .5:.95")
    return _table("Before fine-tuning, at equal percent", heads, rows)


def _method_table(folder: Path) -> str:
    """Importance and compensation at equal GFLOPs, the whole network prunable."""
    rows = []
    for method in METHODS:
        after = [_read_report(folder, f"{share}, {method}")["after"] for share in DEEP]
        rows.append((method, *(_pair(figures["map50"], figures["map50_95"]) for figures in after)))
    heads = ("importance, compensation", *(f"GFLOPs {share}" for share in DEEP))
    return _table("What does it (tied channels pruned, no fine-tuning)", heads, rows)


def _slim_table(folder: Path) -> str:
    """The slim network before and after fine-tuning, its size and its speed."""
    report = _read_report(folder, "slim")
    before, after = report["before"], report["after"]
    rows = [
        ("sparse", _pair(before["map50"], before["map50_95"])),
        ("cut", _pair(after["map50"], after["map50_95"])),
    ]
    for name in ("finetuned", "distilled"):
        results = read_results(folder / name / "results.csv")
        scores = list(zip(results["metrics/mAP_0.5"], results["metrics/mAP_0.5:0.95"], strict=True))
        best = max(scores, key=lambda pair: 0.1 * pair[0] + 0.9 * pair[1])
        rows.append((f"{name}, best epoch", _pair(*best)))
        rows.append((f"{name}, last epoch", _pair(*scores[-1])))
    sizes = [
        f"GFLOPs {before['gflops']:.3f} -> {after['gflops']:.3f} "
        f"({after['gflops'] / before['gflops'] - 1:+.1%}), parameters {before['parameters']:,} -> "
        f"{after['parameters']:,} ({after['parameters'] / before['parameters'] - 1:+.1%})"
    ]
    for row in report["speeds"]:
        spread = f"{row['speed_up_low']:.2f}-{row['speed_up_high']:.2f}"
        sizes.append(f"batch {row['batch_size']}: {row['speed_up']:.2f}x faster ({spread})")
    table = _table("The slim network", ("stage", "mAP@.5 / .5:.95"), rows)
    return table + "\n\n" + "; ".join(sizes) + "."


if __name__ == "__main__":
    run_command(main)
