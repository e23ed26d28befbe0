"""Measure training: whole epochs (loader and step), the step alone, and peak memory.

    python -m benchmarks.training --models n s --out training.md
    python -m benchmarks.training --models n --img 640 --batch 64 --workers 16 --device 0

Ours is what train.py does with its defaults; all take an optimizer step a batch. The textbook way
comes with loader processes, without, and with its images in memory; --compile adds our steps with
the network through torch.compile. Each variant has a process of its own and takes its turn. The
networks start from fresh weights, or with --weights from the tensors of that file that fit.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import io
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

import train
from benchmarks import harness, plain
from models import Model
from utils import heap
from utils.command import run_command
from utils.dataset import Batch, Loader, round_imgsz, scan_split
from utils.device import forbid_chance, select_device, select_precision
from utils.downloads import open_dataset
from utils.training.inputs import Inputs, find_inputs
from utils.training.loaders import build_loaders, scan_splits
from utils.training.networks import build_network
from utils.training.run import Run, build_run, loss_settings

NUM_BATCHES = 4  # in memory, for the step alone
PEAK_RUNS = 3  # of each variant, for its memory
# Loader processes (None: those asked for), and whether images are kept in memory.
TEXTBOOKS: dict[str, tuple[int | None, bool]] = {
    "plain": (None, False),
    "plain, no loader process": (0, False),
    "plain, no loader process, images in memory": (0, True),
}
OURS, COMPILED = "ours", "ours, torch.compile"


def build_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The flags that `build_ours` and `build_plain` read, and --models."""
    parser = harness.build_parser(description)
    parser.add_argument("--weights", default="", help="checkpoint to start from; default: none")
    parser.add_argument("--hyp", default="hyp.scratch-low.yaml", help="hyperparameter yaml")
    parser.add_argument("--optimizer", choices=("SGD", "AdamW"), default="SGD")
    models = parser.add_argument(
        "--models", nargs="+", metavar="SIZE", help="n, s, m, l, x, n6 ..."
    )
    models.default = ["n", "s"]
    parser.set_defaults(**defaults)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Epoch, step and memory of each network."""
    parser = build_parser(__doc__)
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    options = parser.parse_args(argv)
    device = select_device(options.device)
    harness.set_threads(options.threads)
    sections = []
    for size in options.models:
        for title, table in measure(options, size, device).items():
            sections.append(f"## YOLOv5{size}: {title}\n\n{table}")
    harness.report("Training", device, sections, options.out)


def measure(options: argparse.Namespace, size: str, device: torch.device) -> dict[str, str]:
    """The tables of one network by title."""
    tables = {}
    steps = ["plain, no loader process", OURS, *([COMPILED] if options.compile else [])]
    for title, names, in_memory in (
        ("epoch with loader", [*TEXTBOOKS, OURS], False),
        (f"{NUM_BATCHES} steps, data in memory", steps, True),
    ):
        with contextlib.ExitStack() as processes:
            variants = {
                name: processes.enter_context(
                    harness.Remote(
                        prepare, options=vars(options), size=size, name=name, in_memory=in_memory
                    )
                )
                for name in names
            }
            times = harness.take_turns(variants, options.repeats, device)
        count = NUM_BATCHES * options.batch if in_memory else count_images(options)
        tables[title] = harness.timing_table(times, count, "images")
        if not in_memory:
            tables[title] += "\n\n" + harness.ratio_table(times, OURS)
    peaks: dict[str, list[harness.Peak]] = {name: [] for name in (*TEXTBOOKS, OURS)}
    for _ in range(PEAK_RUNS):
        for name, runs in peaks.items():
            runs.append(
                harness.measure_peak(train_alone, options=vars(options), size=size, name=name)
            )
    tables["peak memory"] = harness.memory_table(peaks)
    return tables


def count_images(options: argparse.Namespace) -> int:
    """Of the training split."""
    data = open_dataset(options.data)
    return len(scan_split(data.train, data.names))


def prepare(
    options: Mapping[str, Any], size: str, name: str, in_memory: bool = False
) -> Callable[[], None]:
    """What trains one epoch of a variant; or, with `in_memory`, a few batches that are loaded now.

    The process is its own: what train.py sets for all of it is set here.
    """
    given = argparse.Namespace(**options)
    harness.set_threads(given.threads)
    if name in (OURS, COMPILED):
        settled = contextlib.ExitStack()
        atexit.register(settled.close)
        run, loader = build_ours(given, size)
        if name == COMPILED:
            run.network = torch.compile(run.network)
        settled.enter_context(heap.settled())
        return our_epoch(
            run, InMemory(itertools.islice(loader, NUM_BATCHES)) if in_memory else loader
        )
    textbook, plain_loader = build_plain(given, size, *TEXTBOOKS[name])
    batches = list(itertools.islice(plain_loader, NUM_BATCHES)) if in_memory else plain_loader
    return plain_epoch(textbook, batches)


class InMemory(list[Batch]):
    """Batches in the place of a loader."""

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """The same in every epoch."""


def _prepare(
    options: argparse.Namespace, size: str
) -> tuple[argparse.Namespace, Inputs, torch.device, Model, int]:
    """Options of train.py, what it finds, and a network with the image size that suits it."""
    # There is no run folder: what train.py saves every ten minutes has no place.
    argv = ["--cfg", f"yolov5{size}.yaml", "--nominal-batch", str(options.batch), "--nosave"]
    names = ("data", "weights", "hyp", "img", "batch", "optimizer", "workers", "device")
    flags, _ = train.parse_args([*argv, *harness.format_flags(options, names)])
    inputs = find_inputs(flags, None)
    torch.manual_seed(0)
    model = build_network(inputs, flags)
    return (
        flags,
        inputs,
        select_device(flags.device),
        model,
        round_imgsz(flags.imgsz, model.max_stride),
    )


def build_ours(options: argparse.Namespace, size: str) -> tuple[Run, Loader]:
    """A training run and its loader as train.py builds them."""
    flags, inputs, device, model, imgsz = _prepare(options, size)
    forbid_chance(device, flags.deterministic)
    if device.type == "cpu":
        heap.keep_large_blocks()
    splits = scan_splits(inputs.data, flags)
    loader, _ = build_loaders(flags, inputs.hyp, *splits, imgsz, model.max_stride)
    precision = select_precision(flags.amp, device)
    run = build_run(flags, inputs, model, imgsz, device, precision, len(loader))
    return run, loader


def build_plain(
    options: argparse.Namespace, size: str, workers: int | None = None, cache: bool = False
) -> tuple[plain.PlainTraining, DataLoader[Any]]:
    """The textbook training of the same network on the same images."""
    flags, inputs, device, model, imgsz = _prepare(options, size)
    split, _ = scan_splits(inputs.data, flags)
    dataset = plain.PlainDataset(split, imgsz, inputs.hyp, cache=cache)
    workers = harness.count_plain_workers(options) if workers is None else workers
    loader = plain.build_loader(dataset, options.batch, workers)
    settings = loss_settings(inputs.hyp, model, imgsz)
    return plain.PlainTraining(model, settings, inputs.hyp, options.optimizer, device), loader


def our_epoch(run: Run, batches: Loader | InMemory) -> Callable[[], None]:
    """One pass as train.py does it; a new epoch at each call, from 1, as 0 draws pictures."""
    epochs = itertools.count(1)

    def epoch() -> None:
        heap.trim()
        run.batches = 0  # of the epoch that comes
        with silence():
            train.train_one_epoch(run, batches, next(epochs))

    return epoch


def plain_epoch(training: plain.PlainTraining, batches: Iterable[Any]) -> Callable[[], None]:
    """One pass the textbook way."""

    def epoch() -> None:
        with silence():
            training.train_one_epoch(batches)

    return epoch


def silence() -> contextlib.AbstractContextManager[Any]:
    """Keep progress bars off the screen; they are drawn all the same."""
    return contextlib.redirect_stderr(io.StringIO())


def train_alone(options: Mapping[str, Any], size: str, name: str) -> object:
    """One epoch of one variant, for its peak memory; returns what holds the loader processes."""
    epoch = prepare(options, size, name)
    epoch()
    return epoch


if __name__ == "__main__":
    run_command(main)
