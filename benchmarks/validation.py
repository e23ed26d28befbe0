"""Measure validation: the whole command, and its loop without start-up and pictures.

    python -m benchmarks.validation --weights runs/train/exp/weights/best.pt --out validation.md
    python -m benchmarks.validation --data coco128.yaml --weights yolov5n.pt --splits train

Ours is val.py with its defaults, from the shell to its last picture, against `python -m
benchmarks.plain`. Then loader, network, NMS, matching and metrics of both in one process. The mAP
of both is there to show that they did the same work. It means little where --weights has other
classes than the data set: the head is then fresh.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import val
from benchmarks import harness, plain
from benchmarks.training import silence
from models import Model
from utils.checkpoint import (
    build_checkpoint,
    load_detector,
    save_checkpoint,
    transfer_weights,
)
from utils.command import run_command
from utils.config import DatasetSpec
from utils.dataset import Split, round_imgsz, scan_split
from utils.device import select_device
from utils.downloads import find_weights, open_dataset

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Time whole commands, and whole passes over the images of the splits."""
    parser = harness.build_parser(__doc__, img=640, batch=32)
    parser.add_argument("--weights", default="yolov5n.pt", help="checkpoint")
    parser.add_argument(
        "--splits", nargs="+", default=["train", "val", "test"], help="whose images are taken"
    )
    parser.add_argument("--only", choices=("command", "loop"), help="one of the two tables")
    options = parser.parse_args(argv)
    device = select_device(options.device)
    harness.set_threads(options.threads)
    data = open_dataset(options.data, splits=options.splits)
    sources = list(itertools.chain(*(getattr(data, split) for split in options.splits)))
    split = scan_split(sources, data.names, cache=False)
    model = load_network(options.weights, data.num_classes).to(device)
    imgsz = round_imgsz(options.img, model.max_stride)

    sections = [f"{len(split)} images at {imgsz} px."]
    if options.only != "loop":
        times = time_commands(options, model, data, sources)
        table = harness.timing_table(times, len(split), "images")
        sections.append(f"## The whole command\n\n{table}")
    if options.only != "command":
        sections.append("## Without start-up and pictures")
        sections += time_loops(options, model, data.names, split, imgsz)
    harness.report("Validation", device, sections, options.out)


def time_loops(
    options: argparse.Namespace, model: Model, names: tuple[str, ...], split: Split, imgsz: int
) -> list[str]:
    """Tables of the seconds of both in this process, and of their mAP."""
    device = select_device(options.device)
    val_options = val.parse_args(harness.format_flags(options, ("batch", "workers", "device")))
    precision = val.select_precision(val_options.half, device)
    our_loader = val.build_free_loader(split, imgsz, model.max_stride, val_options)
    plain_set = plain.PlainDataset(split, imgsz, None, options.batch, model.max_stride)
    plain_loader = plain.build_loader(
        plain_set, options.batch, harness.count_plain_workers(options)
    )
    scores: dict[str, plain.Score] = {}

    def run_plain() -> None:
        with silence():
            scores["plain"] = plain.evaluate(model, plain_loader, device)

    def run_ours() -> None:
        network = copy.deepcopy(model)  # which is changed for speed
        with silence():
            result = val.run(network, our_loader, names, val_options, device, precision)
        scores["ours"] = plain.Score(result.map50, result.map50_95)

    variants = {"plain": run_plain, "ours": run_ours}
    times = harness.take_turns(variants, options.repeats, device)
    rows = [(name, *(f"{value:.4f}" for value in score)) for name, score in scores.items()]
    return [
        harness.timing_table(times, len(split), "images"),
        harness.table(("variant", "mAP@.5", "mAP@.5:.95"), rows),
    ]


def time_commands(
    options: argparse.Namespace, model: Model, data: DatasetSpec, sources: Sequence[Path]
) -> harness.Times:
    """Seconds of val.py and of the plain script, each in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        weights, yaml = Path(folder, "model.pt"), Path(folder, "data.yaml")
        save_checkpoint(weights, build_checkpoint(model, data.names))
        content = {"path": str(data.root), "val": [str(source) for source in sources]}
        yaml.write_text(json.dumps(content | {"names": list(data.names)}), encoding="utf-8")
        flags = ["--data", str(yaml), "--weights", str(weights), "--img", str(options.img)]
        plain_flags = ["--batch", options.batch, "--workers", harness.count_plain_workers(options)]
        plain_flags += ["--device", str(select_device(options.device)), "--out", f"{folder}/plain"]
        our_flags = ["--project", folder, "--name", "ours", "--exist-ok"]
        our_flags += harness.format_flags(options, ("batch", "workers", "device"))
        commands = {
            "plain": ["-m", "benchmarks.plain", *flags, *map(str, plain_flags)],
            "ours": ["val.py", *flags, *our_flags],
        }
        environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
        variants: dict[str, Callable[[], object]] = {
            name: functools.partial(run_to_its_end, command, environment)
            for name, command in commands.items()
        }
        return harness.take_turns(variants, options.repeats, select_device("cpu"))


def run_to_its_end(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """A Python command that must not fail; what it writes is not shown."""
    command = [sys.executable, *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr}")


def load_network(weights: str, num_classes: int) -> Model:
    """The network of a checkpoint, with a fresh head where the number of classes differs."""
    trained = load_detector(find_weights(weights, ROOT)).model
    if trained.spec.num_classes == num_classes:
        return trained
    model = Model(trained.spec.with_num_classes(num_classes))
    transfer_weights(model, trained.state_dict())
    return model.eval()


if __name__ == "__main__":
    run_command(main)
