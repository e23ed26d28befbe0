"""Measure the training loader: mosaic and full augmentation, images per second.

    python -m benchmarks.loader --data data/bccd.yaml --img 640 --out loader.md

Once in this process with one thread, which is the figure per core, and once with --workers. Ours
twice: reading every image from its file (the first epoch, and data sets that are not small), and
from the second epoch on with `--cache`, by default `auto` as in train.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from benchmarks import harness, plain
from utils.command import run_command
from utils.config import Hyperparameters, load_hyperparameters
from utils.dataset import DetectionDataset, Split, build_loader, scan_split
from utils.device import select_device
from utils.downloads import open_dataset
from utils.lookup import find_config

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Time whole passes over the training images."""
    parser = harness.build_parser(__doc__)
    parser.add_argument("--hyp", default="hyp.scratch-low.yaml", help="hyperparameter yaml")
    parser.add_argument("--cache", choices=("auto", "ram", "disk", "off"), default="auto")
    options = parser.parse_args(argv)
    device = select_device(options.device)
    hyp = load_hyperparameters(find_config(options.hyp, ["data/hyps"], ROOT))
    data = open_dataset(options.data)
    split = scan_split(data.train, data.names)
    machine, sections = harness.machine_lines(device), []
    for workers in sorted({0, harness.count_plain_workers(options)}, reverse=True):
        if not workers:
            harness.use_one_core()
        variants = {
            "plain": plain_epoch(split, options.img, hyp, options.batch, workers),
            "ours, files read": our_epoch(split, options.img, hyp, options.batch, workers),
            f"ours, --cache {options.cache}": our_epoch(
                split, options.img, hyp, options.batch, workers, options.cache
            ),
        }
        times = harness.take_turns(variants, options.repeats, device)
        title = f"Loader processes: {workers}" if workers else "One core, no loader process"
        sections.append(f"## {title}\n\n" + harness.timing_table(times, len(split), "images"))
    harness.report("Loader", machine, sections, options.out)


def our_epoch(
    split: Split,
    imgsz: int,
    hyp: Hyperparameters,
    batch: int,
    workers: int,
    cache: Literal["auto", "ram", "disk", "off"] = "off",
) -> Callable[[], None]:
    """One pass of the loader that train.py has; another epoch at each call."""
    dataset = DetectionDataset(split, imgsz, hyp=hyp, cache=cache)
    loader = build_loader(dataset, batch, workers=workers, shuffle=True)
    epochs = itertools.count()

    def run() -> None:
        loader.set_epoch(next(epochs))
        for _ in loader:
            pass

    return run


def plain_epoch(
    split: Split, imgsz: int, hyp: Hyperparameters, batch: int, workers: int
) -> Callable[[], None]:
    """One pass of the textbook loader."""
    loader = plain.build_loader(plain.PlainDataset(split, imgsz, hyp), batch, workers)

    def run() -> None:
        for _ in loader:
            pass

    return run


if __name__ == "__main__":
    run_command(main)
