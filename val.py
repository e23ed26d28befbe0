"""Validate a YOLOv5 detector: precision, recall, mAP, speed.

    python val.py --data data/coco128.yaml --weights yolov5s.pt --img 640
    python val.py --data data/bccd.yaml --weights runs/train/exp/weights/best.pt --verbose
    python val.py --data data/coco.yaml --weights yolov5s.pt --save-json
    python val.py --data data/coco128.yaml --weights yolov5s.pt --task speed --device 0
    python val.py --data data/coco128.yaml --weights yolov5n.pt yolov5s.pt --task study
    python val.py --data data/coco128.yaml --weights yolov5s.onnx

Results are in runs/val/exp*: results.json, curves, confusion matrix, pictures.
"""

from __future__ import annotations

from utils.stopping import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()  # from here on, as an import can lose it

from utils.flags.answer import answer_early
from utils.flags.val import IMGSZ, STUDY_SIZES, parse_args

if __name__ == "__main__":
    answer_early(parse_args, __doc__)  # help and mistakes, before torch is loaded

import argparse
import csv
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models import Model
from utils import heap
from utils.atomic import name_in_errors
from utils.backends import ExportedNetwork, is_exported
from utils.backends import load_network as load_exported
from utils.boxes import to_letterbox
from utils.checkpoint import load_detector
from utils.coco_json import (
    CocoIds,
    detections_as_coco,
    ground_truth_as_coco,
    number_for_coco,
    score_with_pycocotools,
    write_json,
)
from utils.command import run_command
from utils.config import DatasetSpec
from utils.dataset import (
    RECT_PAD,
    Batch,
    DetectionDataset,
    Loader,
    Split,
    build_loader,
    round_imgsz,
    scan_split,
)
from utils.device import count_loader_processes, describe_device, select_device
from utils.downloads import find_weights, open_dataset
from utils.evaluate import EvaluationResult, check_class_names, evaluate
from utils.output_names import unique_stems
from utils.plots.evaluation import (
    plot_confidence_curve,
    plot_confusion_matrix,
    plot_pr_curve,
    plot_study,
)
from utils.plots.figures import draw
from utils.plots.images import plot_batch
from utils.profile import count_gflops, count_parameters
from utils.run_dir import open_run_dir, save_options, write_text_atomic
from utils.yolo_text import write_text

ROOT = Path(__file__).resolve().parent
LOGGER = logging.getLogger("val")

NUM_BATCH_PICTURES = 3


def main(argv: Sequence[str] | None = None) -> None:
    """Run one validation from its options to its files."""
    options = parse_args(argv, __doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    device = select_device(options.device)
    precision = select_precision(options.half, device)
    if device.type == "cpu":
        heap.keep_large_blocks()
    LOGGER.info("device %s, %s", describe_device(device), str(precision).removeprefix("torch."))
    data = load_data(options)
    models = {weights: load_network(weights, data, options, device) for weights in options.weights}
    split = scan(data, options)
    with open_run_dir(options.project, options.name, options.exist_ok) as run_dir:
        save_options(run_dir / "opt.yaml", vars(options))
        if options.task == "study":
            study(models, split, data.names, run_dir, options, device, precision)
        else:
            (model,) = models.values()
            validate(model, split, data.names, run_dir, options, device, precision)
    LOGGER.info("results in %s", run_dir)


def select_precision(half: bool, device: torch.device) -> torch.dtype:
    """Number format of the network."""
    if half and device.type == "cpu":
        raise ValueError(
            "--half needs a GPU: float16 on a CPU is emulated and many times slower than float32; "
            "leave --half away or choose a --device"
        )
    return torch.float16 if half else torch.float32


def load_data(options: argparse.Namespace) -> DatasetSpec:
    """The data set with the split that the task needs."""
    needed = (split_name(options.task),)
    return open_dataset(options.data, splits=needed, allow_scripts=options.allow_download_scripts)


def split_name(task: str) -> str:
    """The split that a task looks at."""
    return task if task in ("train", "val", "test") else "val"


def load_network(
    weights: str, data: DatasetSpec, options: argparse.Namespace, device: torch.device
) -> Model | ExportedNetwork:
    """Read a network and check that it fits the data set."""
    model: Model | ExportedNetwork
    path = find_weights(weights, ROOT)
    if is_exported(path):
        model = load_exported(path, device, half=options.half)
        names = model.names
        if options.task == "study" and model.imgsz_hw is not None:
            raise ValueError(f"{path}: takes one size only; --task study needs all, see --dynamic")
    else:
        model, names, _ = load_detector(path, device)
    if not options.single_cls:
        check_class_names(names, data.names, str(path), str(data.source))
    return model


def scan(data: DatasetSpec, options: argparse.Namespace) -> Split:
    """Find and check images and labels of the split."""
    wants_files_alone = options.task == "test" and (options.save_txt or options.save_json)
    return scan_split(
        getattr(data, split_name(options.task)),
        data.names,
        single_cls=options.single_cls,
        require_labels=options.task != "speed" and not wants_files_alone,
    )


def select_imgsz(model: Model | ExportedNetwork, options: argparse.Namespace) -> int:
    """Long side of the input: as asked for, or the only one that an exported file takes."""
    if isinstance(model, ExportedNetwork) and model.imgsz_hw is not None:
        side = max(model.imgsz_hw)
        if options.imgsz not in (None, side):
            raise ValueError(
                f"--imgsz {options.imgsz}: {model.path} was exported for {side}; leave --imgsz "
                "away, or export with that --imgsz or --dynamic"
            )
        return side
    return round_imgsz(options.imgsz or IMGSZ, stride_of(model))


def stride_of(model: Model | ExportedNetwork) -> int:
    """Sides of the input must be multiples of this."""
    return model.stride if isinstance(model, ExportedNetwork) else model.max_stride


def describe_network(model: Model | ExportedNetwork, imgsz: int) -> None:
    """Log the size of the network, or what an exported file says about itself."""
    if isinstance(model, ExportedNetwork):
        LOGGER.info(
            "network: %s, %s%s", model.format, model.metadata.precision,
            ", NMS inside: its thresholds hold" if model.has_nms else "",
        )  # fmt: skip
        return
    LOGGER.info(
        "network: %s parameters, %.2f GFLOPs at %d x %d",
        f"{count_parameters(model):,}", count_gflops(model, imgsz), imgsz, imgsz,
    )  # fmt: skip


def validate(
    model: Model | ExportedNetwork,
    split: Split,
    names: tuple[str, ...],
    run_dir: Path,
    options: argparse.Namespace,
    device: torch.device,
    precision: torch.dtype,
) -> None:
    """Evaluate one network, print and save what was found."""
    imgsz = options.imgsz = select_imgsz(model, options)
    describe_network(model, imgsz)
    loader = build_network_loader(model, split, imgsz, options)
    saver = BatchSaver(run_dir, split, names, options)
    result = run(model, loader, names, options, device, precision, saver)
    save_results(result, imgsz, run_dir, speed_only=options.task == "speed")
    if options.task != "speed":
        print_table(result, options.verbose)
        if options.save_json:
            score_as_coco(saver, split, run_dir)
        if not options.noplots:
            draw_curves(result, run_dir)
    print_speed(result, imgsz)


def build_network_loader(
    model: Model | ExportedNetwork, split: Split, imgsz: int, options: argparse.Namespace
) -> Loader:
    """Batches of images of like shape, or of the only shape that an exported file takes."""
    if not isinstance(model, ExportedNetwork) or model.imgsz_hw is None:
        return build_free_loader(split, imgsz, stride_of(model), options)
    shape_hw = model.imgsz_hw
    LOGGER.info("all images are letterboxed to %d x %d (height x width)", *shape_hw)
    dataset = DetectionDataset(split, imgsz, stride=model.stride, shape_hw=shape_hw)
    return batch_up(dataset, options)


def build_free_loader(split: Split, imgsz: int, stride: int, options: argparse.Namespace) -> Loader:
    """Batches of images of like shape, or of squares, without augmentation."""
    dataset = DetectionDataset(
        split,
        imgsz,
        rect=not options.square,
        batch_size=options.batch_size,
        stride=stride,
        pad=RECT_PAD,
    )
    return batch_up(dataset, options)


def batch_up(dataset: DetectionDataset, options: argparse.Namespace) -> Loader:
    """A loader with as many processes as suit the device."""
    workers = count_loader_processes(options.workers, select_device(options.device))
    return build_loader(dataset, options.batch_size, workers=workers)


class BatchSaver:
    """What is written while the evaluation runs: text files, COCO results, pictures."""

    def __init__(
        self, run_dir: Path, split: Split, names: tuple[str, ...], options: argparse.Namespace
    ) -> None:
        """Prepare the folder of the text files and the numbers of the COCO results."""
        self.run_dir, self.options = run_dir, options
        self.names = names[:1] if options.single_cls else names
        self.num_batches = 0
        self.coco_ids: CocoIds | None = None
        self.coco_results: list[dict[str, Any]] = []
        self._texts: dict[str, Path] = {}
        if options.save_txt:
            folder, stems = run_dir / "labels", unique_stems(split.paths)
            folder.mkdir(exist_ok=True)
            self._texts = {path: folder / f"{stem}.txt" for path, stem in stems.items()}
        if options.save_json:
            self.coco_ids = number_for_coco(split.paths, len(self.names))

    def __call__(self, batch: Batch, detections: list[Tensor]) -> None:
        """Save what the options ask for of one batch; detections are in original pixels."""
        for path, letterbox, rows in zip(batch.paths, batch.letterboxes, detections, strict=True):
            if self.options.save_txt:
                write_text(self._texts[path], rows, letterbox.original_hw, self.options.save_conf)
            if self.coco_ids is not None:
                self.coco_results += detections_as_coco(rows, path, self.coco_ids)
        wants_pictures = not self.options.noplots and self.options.task != "speed"
        if wants_pictures and self.num_batches < NUM_BATCH_PICTURES:
            draw_batch(batch, detections, self.names, self.run_dir, self.num_batches)
        self.num_batches += 1


def draw_batch(
    batch: Batch, detections: list[Tensor], names: tuple[str, ...], run_dir: Path, number: int
) -> None:
    """Pictures of the labels and of the detections of one batch."""
    on_input = [
        torch.cat((to_letterbox(rows[:, :4], letterbox), rows[:, 4:]), 1)
        for rows, letterbox in zip(detections, batch.letterboxes, strict=True)
    ]
    labels, found = f"val_batch{number}_labels.jpg", f"val_batch{number}_pred.jpg"
    draw(plot_batch, batch.images, batch.targets, batch.paths, names, run_dir / labels)
    draw(plot_batch, batch.images, on_input, batch.paths, names, run_dir / found)


def run(
    model: Model | ExportedNetwork,
    loader: Loader,
    names: tuple[str, ...],
    options: argparse.Namespace,
    device: torch.device,
    precision: torch.dtype,
    saver: BatchSaver | None = None,
) -> EvaluationResult:
    """Evaluate with folded BN, as a detector in use runs."""
    return evaluate(
        model.fuse() if isinstance(model, Model) else model,
        loader,
        names,
        device=device,
        precision=precision,
        conf_thres=options.conf_thres,
        iou_thres=options.iou_thres,
        max_det=options.max_det,
        single_cls=options.single_cls,
        on_batch=saver,
    )


def print_table(result: EvaluationResult, verbose: bool) -> None:
    """Means over the classes; with `verbose` each class that has labels."""
    LOGGER.info("%22s" + "%11s" * 6, "Class", "Images", "Labels", "P", "R", "mAP@.5", "mAP@.5:.95")
    row = "%22s" + "%11d" * 2 + "%11.4f" * 4
    LOGGER.info(
        row, "all", result.num_images, result.num_labels, result.precision, result.recall,
        result.map50, result.map50_95,
    )  # fmt: skip
    if verbose:
        for values in per_class_rows(result):
            LOGGER.info(row, *values)
    if not result.num_labels:
        LOGGER.warning("no labels: there is nothing to measure, all figures are 0")


def per_class_rows(result: EvaluationResult) -> list[tuple[Any, ...]]:
    """Name, images, labels, precision, recall, AP@.5, AP@.5:.95 of each class with labels."""
    ap = result.ap_result
    figures = np.stack((ap.precision, ap.recall, ap.ap50, ap.ap50_95), 1).tolist()
    return [
        (
            result.names[cls],
            int(result.num_images_per_class[cls]),
            int(result.num_labels_per_class[cls]),
            *numbers,
        )
        for cls, numbers in zip(ap.classes.tolist(), figures, strict=True)
    ]


def print_speed(result: EvaluationResult, imgsz: int) -> None:
    """Milliseconds per image."""
    LOGGER.info(
        "speed per image at %d px: %.1f ms pre-process, %.1f ms inference, %.1f ms NMS",
        imgsz, *result.speed_ms,
    )  # fmt: skip


def save_results(result: EvaluationResult, imgsz: int, run_dir: Path, speed_only: bool) -> None:
    """`results.json`: the speed and, unless it alone was asked for, the table, for programs."""
    keys = ("name", "images", "labels", "precision", "recall", "map50", "map50_95")
    content: dict[str, Any] = {
        "imgsz": imgsz,
        "images": result.num_images,
        "speed_ms": dict(zip(("pre_process", "inference", "nms"), result.speed_ms, strict=True)),
    }
    if not speed_only:
        content |= {
            "labels": result.num_labels,
            "precision": result.precision,
            "recall": result.recall,
            "map50": result.map50,
            "map50_95": result.map50_95,
            "best_conf": result.ap_result.best_conf,
            "classes": [dict(zip(keys, row, strict=True)) for row in per_class_rows(result)],
        }
    write_text_atomic(run_dir / "results.json", json.dumps(content, indent=1))


def draw_curves(result: EvaluationResult, run_dir: Path) -> None:
    """Confusion matrix, and the curves over recall and confidence."""
    ap = result.ap_result
    names = [result.names[cls] for cls in ap.classes]
    matrix = result.confusion.matrix
    draw(plot_confusion_matrix, matrix, result.names, run_dir / "confusion_matrix.png")
    out = run_dir / "PR_curve.png"
    draw(plot_pr_curve, ap.recalls, ap.precision_at_recall, ap.ap50, names, out)
    for letter, curve, quantity in (
        ("P", ap.precision_curve, "precision"),
        ("R", ap.recall_curve, "recall"),
        ("F1", ap.f1_curve, "F1"),
    ):
        out = run_dir / f"{letter}_curve.png"
        draw(plot_confidence_curve, ap.confidences, curve, names, out, quantity=quantity)


def score_as_coco(saver: BatchSaver, split: Split, run_dir: Path) -> None:
    """`predictions.json`, and what pycocotools says about it."""
    ids = saver.coco_ids
    assert ids is not None
    predictions = run_dir / "predictions.json"
    write_json(predictions, saver.coco_results)
    annotations = ids.annotations
    if annotations is None:
        if not split.report.num_boxes:
            LOGGER.info(
                "%s written%s; without labels there is nothing to score here",
                predictions,
                " with COCO's numbers, to be submitted" if ids.is_coco else "",
            )
            return
        annotations = run_dir / "annotations.json"
        shapes_hw, names = split.shapes_hw, saver.names
        write_json(
            annotations, ground_truth_as_coco(split.paths, split.labels, shapes_hw, names, ids)
        )
    LOGGER.info("scoring %s with pycocotools against %s", predictions.name, annotations)
    score = score_with_pycocotools(annotations, predictions, list(ids.images.values()))
    for line in score.summary.rstrip().split("\n"):
        LOGGER.info("%s", line)
    write_text_atomic(run_dir / "pycocotools.txt", score.summary)


def study(
    models: dict[str, Model | ExportedNetwork],
    split: Split,
    names: tuple[str, ...],
    run_dir: Path,
    options: argparse.Namespace,
    device: torch.device,
    precision: torch.dtype,
) -> None:
    """Evaluate each network at a range of image sizes: `study.csv`, `study.png`."""
    header = ("weights", "imgsz", "precision", "recall", "map50", "map50_95")
    header += ("pre_process_ms", "inference_ms", "nms_ms")
    curves: dict[str, list[tuple[int, float, float]]] = {weights: [] for weights in models}
    path = run_dir / "study.csv"
    with (
        name_in_errors(path),
        path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(header)
        for weights, model in models.items():
            for imgsz in STUDY_SIZES:
                loader = build_free_loader(split, imgsz, stride_of(model), options)
                result = run(model, loader, names, options, device, precision)
                scores = (result.precision, result.recall, result.map50, result.map50_95)
                numbers = [f"{number:.5g}" for number in (*scores, *result.speed_ms)]
                writer.writerow([weights, imgsz, *numbers])
                file.flush()  # a sweep is long: keep what there is
                LOGGER.info("%s %s", weights, imgsz)
                print_table(result, verbose=False)
                print_speed(result, imgsz)
                curves[weights].append((imgsz, sum(result.speed_ms), result.map50_95))
    if not options.noplots:
        draw(plot_study, curves, run_dir / "study.png")


if __name__ == "__main__":
    run_command(main)
