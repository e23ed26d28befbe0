"""Measure validation: loader, network, NMS, matching and metrics, without start-up and pictures.

    python -m benchmarks.validation --weights runs/train/exp/weights/best.pt --out validation.md
    python -m benchmarks.validation --data coco128.yaml --weights yolov5n.pt --splits train

Ours is what val.py does with its defaults. The mAP of both is there to show that they did the same
work. It means little where --weights has other classes than the data set: the head is then fresh.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from pathlib import Path

import val
from benchmarks import harness, plain
from benchmarks.training import silence
from models import Model
from utils.checkpoint import load_detector, transfer_weights
from utils.command import run_command
from utils.dataset import round_imgsz, scan_split
from utils.device import select_device
from utils.downloads import find_weights, open_dataset

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> None:
    """Time whole passes over the images of the splits."""
    parser = harness.build_parser(__doc__, img=640, batch=32)
    parser.add_argument("--weights", default="yolov5n.pt", help="checkpoint")
    parser.add_argument(
        "--splits", nargs="+", default=["train", "val", "test"], help="whose images are taken"
    )
    options = parser.parse_args(argv)
    device = select_device(options.device)
    harness.set_threads(options.threads)
    data = open_dataset(options.data, splits=options.splits)
    sources = list(itertools.chain(*(getattr(data, split) for split in options.splits)))
    split = scan_split(sources, data.names, cache=False)
    model = load_network(options.weights, data.num_classes).to(device)
    imgsz = round_imgsz(options.img, model.max_stride)

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
            result = val.run(network, our_loader, data.names, val_options, device, precision)
        scores["ours"] = plain.Score(result.map50, result.map50_95)

    variants = {"plain": run_plain, "ours": run_ours}
    times = harness.take_turns(variants, options.repeats, device)
    rows = [(name, *(f"{value:.4f}" for value in score)) for name, score in scores.items()]
    tables = [
        harness.timing_table(times, len(split), "images"),
        harness.table(("variant", "mAP@.5", "mAP@.5:.95"), rows),
    ]
    harness.report("Validation", device, tables, options.out)


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
