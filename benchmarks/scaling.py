"""Measure how cost grows with work: anything that grows faster than its work is a defect.

    python -m benchmarks.scaling --out scaling.md
    python -m benchmarks.scaling --only images prune --quick
    python -m benchmarks.scaling --only caches --img 640

The rows of a table take turns. It says how much time a unit of work costs, relative to the first
row in the same round, and the peak memory of each row in a process of its own. Images are copies of
the training images; --img and --batch hold where something else grows. Their files have been read
before: what a disk or a network adds is not in the figures.
"""

from __future__ import annotations

import argparse
import functools
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks import harness
from benchmarks.loader import our_epoch as loader_epoch
from benchmarks.peak import synthetic_steps
from benchmarks.training import build_ours, build_parser, our_epoch
from models import Model, ModelSpec
from utils.choices import DEFAULT_IMPORTANCE
from utils.command import run_command
from utils.config import load_dataset_spec, load_hyperparameters, load_yaml
from utils.dataset import DetectionDataset, Split, build_loader, scan_split
from utils.device import select_device
from utils.downloads import open_dataset
from utils.lookup import find_config
from utils.profile import count_gflops, count_parameters
from utils.pruning.search import build_pruner

ROOT = Path(__file__).resolve().parents[1]
FACTORS = (1, 4, 16)  # times the training images
SIDES = (160, 320, 640, 1280)
BATCHES = (1, 4, 16, 64)
SIZES_TO_PRUNE = ("n", "s", "m", "l", "x", "n6", "s6", "m6", "l6", "x6")
PRUNE_RATIO = 0.5
QUICK_ROWS, QUICK_IMAGES = 2, 8


class Row(NamedTuple):
    """One amount of work."""

    run: Callable[[], object]
    work: float
    alone: functools.partial[Any]  # the same from scratch, of this module, with JSON arguments
    folder: Path | None = None  # where it writes


Tables = Iterator[tuple[str, str, dict[str, Row]]]  # title, unit of work, rows by name


def main(argv: Sequence[str] | None = None) -> None:
    """The tables asked for."""
    parser = build_parser(__doc__, batch=4, repeats=3, models=["n", "s", "m", "l", "x"])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="tables")
    parser.add_argument("--quick", action="store_true", help="two rows a table, few images")
    options = parser.parse_args(argv)
    device = select_device(options.device)
    harness.set_threads(options.threads)
    sections = []
    for part in options.only:
        for title, unit, rows in PARTS[part](options):
            table = measure(rows, unit, options.repeats, device)
            sections.append(f"## {title}\n\n{table}")
    harness.report("Cost against work", device, sections, options.out)


def measure(rows: Mapping[str, Row], unit: str, repeats: int, device: torch.device) -> str:
    """Time per unit of work and peak memory of each row."""
    times = harness.take_turns({name: row.run for name, row in rows.items()}, repeats, device)
    growth = harness.growth(times, {name: row.work for name, row in rows.items()})
    lines = []
    for name, row in rows.items():
        peak = harness.measure_peak(row.alone.func, **row.alone.keywords)
        seconds, memory = np.median(times[name]), (f"{mebi:.0f}" for mebi in peak)
        lines.append((
            *(name, f"{row.work:.4g}", f"{seconds:.3f}", f"{seconds / row.work * 1e6:.0f}"),
            *(f"{growth[name]:.2f}", *memory, f"{mebibytes_in(row.folder):.0f}"),
        ))  # fmt: skip
    heads = (
        "work",
        unit,
        "seconds",
        f"us per {unit}",
        f"time per {unit}, relative",
        "process, MiB",
        "loader process",
        "GPU tensors",
        "disk",
    )
    return harness.table(heads, lines)


def mebibytes_in(folder: Path | None) -> float:
    """What all its files hold."""
    files = [] if folder is None else [path for path in folder.rglob("*") if path.is_file()]
    return sum(path.stat().st_size for path in files) / harness.MEBI


def _rows(options: argparse.Namespace, values: Sequence[Any]) -> Sequence[Any]:
    return values[:QUICK_ROWS] if options.quick else values


# ------------------------------------------------------------------------------------------ images
def grow_images(options: argparse.Namespace) -> Tables:
    """Scan, cached scan and an epoch of the loader."""
    return grow_files(options, ("scan", "cached scan", "epoch of the loader"))


def grow_caches(options: argparse.Namespace) -> Tables:
    """Filling the caches of images and reading from them."""
    return grow_files(options, CACHE_TASKS)


def grow_files(options: argparse.Namespace, tasks: Sequence[str]) -> Tables:
    """A table for each task."""
    spec = open_dataset(options.data)
    with tempfile.TemporaryDirectory() as folder:
        first = QUICK_IMAGES if options.quick else len(scan_split(spec.train, spec.names))
        counts = [first * factor for factor in _rows(options, FACTORS)]
        sets = {n: str(harness.copy_dataset(spec, Path(folder, str(n)), n)) for n in counts}
        for task in tasks:
            rows = {}
            for count, data in sets.items():
                alone = functools.partial(
                    work_on_images, options=vars(options), data=data, task=task
                )
                place = Path(data).parent / "image_cache"
                rows[f"{count} images"] = Row(prepare_images(**alone.keywords), count, alone, place)
            yield f"Images: {task}", "image", rows


def prepare_images(options: Mapping[str, Any], data: str, task: str) -> Callable[[], object]:
    """What does one task on a data set; what comes before it is done."""
    workers, imgsz = options["workers"] or 0, options["img"]
    spec = load_dataset_spec(data, ROOT)
    scan = functools.partial(scan_split, spec.train, spec.names)
    if task == "scan":
        return functools.partial(scan, cache=False)
    split: Split = scan()
    if task == "cached scan":
        return scan
    if task in CACHE_TASKS:
        return prepare_cache(task, split, imgsz, Path(data).parent / "image_cache")
    hyp = load_hyperparameters(find_config(options["hyp"], ["data/hyps"], ROOT))
    return loader_epoch(split, imgsz, hyp, options["batch"], workers)


READ, AUTO, RAM, DISK, LATER = CACHE_TASKS = (
    "reading the files, one thread",
    "--cache auto, first pass",
    "--cache ram",
    "--cache disk",
    "--cache disk, later start",
)


def prepare_cache(task: str, split: Split, imgsz: int, folder: Path) -> Callable[[], object]:
    """What does one of `CACHE_TASKS`; the cache on disk lies in the folder."""
    build = functools.partial(DetectionDataset, split, imgsz)

    def read() -> None:
        for path in split.paths:
            Path(path).read_bytes()

    def pass_once() -> object:
        dataset = build(cache="auto")
        for _ in build_loader(dataset, 16):
            pass
        return dataset

    def fill_disk() -> float:
        shutil.rmtree(folder, ignore_errors=True)
        start = time.perf_counter()
        build(cache="disk")
        return time.perf_counter() - start

    if task == LATER:
        build(cache="disk")
    later = functools.partial(build, cache="disk")
    ram = functools.partial(build, cache="ram")
    return {READ: read, AUTO: pass_once, RAM: ram, DISK: fill_disk, LATER: later}[task]


def work_on_images(options: Mapping[str, Any], data: str, task: str) -> object:
    """One task on a data set, for its peak memory; returns what holds the loader processes."""
    harness.set_threads(options["threads"])
    work = prepare_images(options, data, task)
    work()
    return work


# ------------------------------------------------------------------------------------------- steps
def grow_sides(options: argparse.Namespace) -> Tables:
    """Training steps on larger images."""
    jobs = {f"{side} px": (options.models[0], side, options.batch) for side in SIDES}
    yield "Image size: training steps", "GFLOP", step_rows(options, jobs)


def grow_batches(options: argparse.Namespace) -> Tables:
    """Training steps on more images."""
    jobs = {f"batch {batch}": (options.models[0], options.img, batch) for batch in BATCHES}
    yield "Batch: training steps", "GFLOP", step_rows(options, jobs)


def grow_models(options: argparse.Namespace) -> Tables:
    """Training steps of larger networks."""
    jobs = {f"YOLOv5{size}": (size, options.img, options.batch) for size in options.models}
    yield "Network: training steps", "GFLOP", step_rows(options, jobs)


def step_rows(
    options: argparse.Namespace, jobs: Mapping[str, tuple[str, int, int]]
) -> dict[str, Row]:
    """A row for each network, image side and batch."""
    rows = {}
    for name in _rows(options, list(jobs)):
        size, side, batch = jobs[name]
        own = vars(options) | {"img": side, "batch": batch}
        run, _ = build_ours(argparse.Namespace(**own), size)
        steps = synthetic_steps(run, batch)
        gflops = 3 * count_gflops(run.model, run.imgsz) * batch * len(steps)
        alone = functools.partial(take_steps, options=own, size=size)
        rows[name] = Row(our_epoch(run, steps), gflops, alone)
    return rows


def take_steps(options: Mapping[str, Any], size: str) -> None:
    """A few training steps, for their peak memory."""
    harness.set_threads(options["threads"])
    run, _ = build_ours(argparse.Namespace(**options), size)
    our_epoch(run, synthetic_steps(run, options["batch"]))()


# ----------------------------------------------------------------------------------------- pruning
def grow_pruned(options: argparse.Namespace) -> Tables:
    """Ranking and cutting half the channels of larger networks, without images."""
    rows = {}
    for size in _rows(options, SIZES_TO_PRUNE):
        model = random_network(size)
        alone = functools.partial(prune_fresh, size=size, imgsz=options.img)
        run = functools.partial(prune_half, model, options.img)
        rows[f"YOLOv5{size}"] = Row(run, count_parameters(model) / 1e6, alone)
    yield "Network: pruning", "million parameters", rows


def random_network(size: str) -> Model:
    """Fresh weights with gammas that differ, so that there is a ranking."""
    path = find_config(f"yolov5{size}.yaml", ["models"], ROOT)
    model = Model(ModelSpec.from_dict(load_yaml(path), str(path))).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight)
    return model


def prune_half(model: Model, imgsz: int) -> Model:
    """The slim network, as prune.py makes it by default."""
    pruner = build_pruner(
        model, imgsz, shortcut="group", importance=DEFAULT_IMPORTANCE, compensation="mean"
    )
    return pruner.cut(pruner.select(PRUNE_RATIO))


def prune_fresh(size: str, imgsz: int) -> None:
    """Build and prune a network, for the peak memory."""
    prune_half(random_network(size), imgsz)


PARTS: dict[str, Callable[[argparse.Namespace], Tables]] = {
    "images": grow_images,
    "caches": grow_caches,
    "sides": grow_sides,
    "batches": grow_batches,
    "models": grow_models,
    "prune": grow_pruned,
}

if __name__ == "__main__":
    run_command(main)
