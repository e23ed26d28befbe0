"""Export a YOLOv5 detector, dense or pruned, for other runtimes, and prove that it is the same.

    python export.py --weights yolov5s.pt --include onnx torchscript openvino
    python export.py --weights runs/val/pruned/pruned_model.pt --include onnx --img 320 --dynamic
    python export.py --weights best.pt --include onnx --img 320 --nms --conf-thres 0.25
    python export.py --weights best.pt --data data/bccd.yaml --include openvino --img 320 --int8

The files are written beside the weights (x.onnx, x.torchscript, x_openvino_model/, x.engine; with
--half, --int8, --nms x_half.onnx, x_int8_nms.onnx ...), each after it was loaded by its own runtime
and compared with torch: on images of --data, with mAP, or on synthetic pictures. The packages are
those of requirements-export.txt.
"""

from __future__ import annotations

from utils.stopping import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()  # from here on, as an import can lose it

from utils.flags.answer import answer_early
from utils.flags.export import THROUGH_ONNX, parse_args

if __name__ == "__main__":
    answer_early(parse_args, __doc__)  # help and mistakes, before torch is loaded

import argparse
import itertools
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from utils.atomic import move_into_place, name_in_errors, staging_folder
from utils.backends import InferenceError, Network, PytorchNetwork, import_runtime, load_network
from utils.command import run_command
from utils.config import DatasetSpec
from utils.dataset import DetectionDataset, Loader, build_loader, round_imgsz, scan_split
from utils.device import describe_device, select_device
from utils.downloads import find_weights, open_dataset
from utils.evaluate import EvaluationResult, check_class_names, evaluate
from utils.export_check import (
    Difference,
    check_difference,
    check_map,
    compare_detections,
    compare_predictions,
    predict,
    synthetic_pictures,
)
from utils.export_metadata import ExportMetadata
from utils.exports import Exporter, NmsSettings
from utils.nms import non_max_suppression, split_detections
from utils.profile import count_parameters

ROOT = Path(__file__).resolve().parent
LOGGER = logging.getLogger("export")

NUM_PICTURES = 16  # images of --data on which single predictions are compared
THRESHOLDS_FOR_MAP = NmsSettings(conf_thres=0.001, iou_thres=0.6, max_det=300)
INT8_LOSS_TO_MENTION = 0.01  # of mAP@.5: one point
PACKAGES = {
    "onnx": ("onnx", "onnxruntime"),
    "torchscript": (),
    "openvino": ("onnx", "openvino"),
    "engine": ("onnx", "tensorrt"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one export from its options to its files."""
    options = parse_args(argv, __doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    device = select_device(options.device)
    check_packages(options, device)
    weights = find_weights(options.weights, ROOT)
    check_folder(weights.parent)
    network = load_checkpoint(weights, device)
    metadata = describe_export(network, options)
    data = load_data(network, options)
    LOGGER.info(
        "%s: %s parameters with folded BN, %d classes; device %s",
        weights, f"{count_parameters(network):,}", len(network.names), describe_device(device),
    )  # fmt: skip
    LOGGER.info("%s", describe_settings(metadata, options))
    nms = NmsSettings(options.conf_thres, options.iou_thres, options.max_det)
    calibration = load_calibration(data, metadata, options) if data and options.int8 else []
    exporter = Exporter(
        network.model, metadata, options.opset, options.simplify, nms if options.nms else None,
        calibration,
    )  # fmt: skip
    trial = prepare_trial(network, data, metadata, exporter.nms, device, options)
    stem = name_export(weights.stem, metadata.precision, metadata.has_nms)

    for export_format in options.include:
        start = time.perf_counter()
        place = weights.parent
        with staging_folder(place) as folder, name_in_errors(place, folder):
            written = exporter.write(export_format, folder, stem)
            check_export(written, trial)
            target = place / written.name
            replaces = ", replaces the one before" if target.exists() else ""
            move_into_place(written, target)
        LOGGER.info(
            "%s: %s, %.1f MB, %.1f s%s",
            export_format, target, size_mb(target), time.perf_counter() - start, replaces,
        )  # fmt: skip


def check_packages(options: argparse.Namespace, device: torch.device) -> None:
    """See that all that will be needed is there, before anything is done."""
    for export_format in options.include:
        packages = list(PACKAGES[export_format])
        if options.int8:
            packages.append("onnxruntime")
        if options.simplify and export_format in THROUGH_ONNX:
            packages.append("onnxslim")
        for package in packages:
            import_runtime(package, f"--include {export_format}")
        if export_format == "engine" and device.type != "cuda":
            raise ValueError(
                "--include engine needs an NVIDIA GPU: TensorRT builds for the GPU that it runs "
                "on; give --device 0"
            )


def check_folder(folder: Path) -> None:
    """See that files can be written there: now, not after the comparison."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        raise OSError(
            f"cannot write to {folder}: {error.strerror or error}; exports lie beside the weights, "
            "so copy the .pt to a folder of yours"
        ) from None


def load_checkpoint(weights: Path, device: torch.device) -> PytorchNetwork:
    """The network to export; only checkpoints can be."""
    if weights.suffix != ".pt":
        raise ValueError(f"{weights}: only .pt checkpoints can be exported")
    return PytorchNetwork(weights, device)


def describe_export(network: PytorchNetwork, options: argparse.Namespace) -> ExportMetadata:
    """What the files will say about themselves."""
    sides = [round_imgsz(side, network.stride) for side in options.imgsz]
    anchors = network.model.head.anchors_px.flatten(1).tolist()
    return ExportMetadata(
        names=network.names,
        stride=network.stride,
        imgsz_hw=(sides[0], sides[-1]),
        batch_size=options.batch_size,
        dynamic=options.dynamic,
        anchors=tuple(tuple(round(number, 4) for number in level) for level in anchors),
        precision="int8" if options.int8 else "float16" if options.half else "float32",
        has_nms=options.nms,
    )


def name_export(stem: str, precision: str, has_nms: bool = False) -> str:
    """How the names of the files begin: what computes or answers otherwise has its own."""
    kind = {"float32": "", "float16": "_half", "int8": "_int8"}[precision]
    return f"{stem}{kind}{'_nms' if has_nms else ''}"


def describe_settings(metadata: ExportMetadata, options: argparse.Namespace) -> str:
    """One line: the shape that the files take, and how they are made."""
    height, width = metadata.imgsz_hw
    batch = "any" if metadata.batch_is_free else str(metadata.batch_size)
    size = f"any (compared at {height} x {width})" if metadata.dynamic else f"{height} x {width}"
    parts = [f"batch {batch}", f"height x width {size}", metadata.precision]
    if set(options.include) & set(THROUGH_ONNX):
        parts.append(f"ONNX opset {options.opset}")
    if metadata.has_nms:
        parts.append(
            f"NMS inside (conf {options.conf_thres:g}, IoU {options.iou_thres:g}, "
            f"{options.max_det} detections)"
        )
    return "export: " + ", ".join(parts)


def load_data(network: Network, options: argparse.Namespace) -> DatasetSpec | None:
    """The data set, if one is given, seen to fit the network."""
    if options.data is None:
        return None
    splits = ("train", "val") if options.int8 else ("val",)
    data = open_dataset(options.data, splits=splits, allow_scripts=options.allow_download_scripts)
    check_class_names(network.names, data.names, options.weights, str(data.source))
    return data


def load_calibration(
    data: DatasetSpec, metadata: ExportMetadata, options: argparse.Namespace
) -> list[Tensor]:
    """Training images, evenly spread, as float inputs of the size and batch of the export."""
    split = scan_split(data.train, data.names)
    dataset = fixed_size_dataset(split, metadata)
    wanted = min(options.calib_images, len(dataset))
    indices = np.linspace(0, len(dataset) - 1, wanted).astype(int).tolist()
    LOGGER.info("calibrating with %d of %d training images", wanted, len(dataset))
    images = [dataset[index].image.float().div(255) for index in indices]
    size = metadata.batch_size
    images += itertools.islice(itertools.cycle(images), -wanted % size)  # to fill the last batch
    batches = [torch.stack(images[at : at + size]) for at in range(0, len(images), size)]
    return [batch.contiguous() for batch in batches]


# ---------------------------------------------------------------------------------------- comparing
class Trial(NamedTuple):
    """What every export is put to, and what torch made of it."""

    network: PytorchNetwork
    pictures: list[Tensor]  # inputs [B, 3, H, W]; several sizes where the export takes them
    expected: list[Tensor]  # predictions
    loader: Loader | None  # for mAP
    result: EvaluationResult | None  # of torch
    nms: NmsSettings | None
    metadata: ExportMetadata
    device: torch.device


def prepare_trial(
    network: PytorchNetwork,
    data: DatasetSpec | None,
    metadata: ExportMetadata,
    nms: NmsSettings | None,
    device: torch.device,
    options: argparse.Namespace,
) -> Trial:
    """Images, and what torch detects in them."""
    loader, result = None, None
    if data is None:
        LOGGER.info(
            "no --data: compared on synthetic pictures and noise, without mAP; give --data for a "
            "test on real images"
        )
        pictures = [synthetic_pictures(metadata.imgsz_hw)]
    else:
        split = scan_split(data.val, data.names)
        dataset = fixed_size_dataset(split, metadata)
        chosen = np.linspace(0, len(dataset) - 1, min(NUM_PICTURES, len(dataset))).astype(int)
        images = [dataset[index].image.float().div(255) for index in chosen.tolist()]
        pictures = [torch.stack(images).contiguous()]
        loader = build_loader(dataset, max(options.batch_size, 16), workers=options.workers)
        result = run(network, loader, network.names, nms, device)
    if metadata.dynamic:
        height, width = metadata.imgsz_hw
        other_hw = (height + network.stride, max(width - network.stride, network.stride))
        pictures.append(interpolate(pictures[0][:3], other_hw))
    expected = [predict(network, batch, device) for batch in pictures]
    return Trial(network, pictures, expected, loader, result, nms, metadata, device)


def fixed_size_dataset(split, metadata: ExportMetadata) -> DetectionDataset:
    """Images letterboxed to the size of the export."""
    shape_hw = metadata.imgsz_hw
    return DetectionDataset(split, max(shape_hw), stride=metadata.stride, shape_hw=shape_hw)


def run(
    network: nn.Module,
    loader: Loader,
    names: tuple[str, ...],
    nms: NmsSettings | None,
    device: torch.device,
) -> EvaluationResult:
    """Evaluate as val.py does; with NMS inside, at its thresholds."""
    conf_thres, iou_thres, max_det = nms or THRESHOLDS_FOR_MAP
    return evaluate(
        network, loader, names, device=device, conf_thres=conf_thres, iou_thres=iou_thres,
        max_det=max_det,
    )  # fmt: skip


def check_export(path: Path, trial: Trial) -> None:
    """Load a file with its own runtime and compare.

    Raises:
        ValueError: it cannot be loaded, or differs too much from torch.
    """
    network = load_network(path, trial.device)
    precision = trial.metadata.precision
    try:
        if network.metadata != trial.metadata:
            raise ValueError("does not give back the metadata written into it")
        for pictures, expected in zip(trial.pictures, trial.expected, strict=True):
            difference = compare(network, pictures, expected, trial)
            height, width = pictures.shape[2:]
            LOGGER.info("%s at %d x %d: %s", network.format, height, width, difference)
            check_difference(difference, precision, max(height, width))
        if trial.loader is not None and trial.result is not None:
            result = run(network, trial.loader, trial.network.names, trial.nms, trial.device)
            report_map(network.format, trial.result, result, precision)
            check_map(trial.result, result, precision)
    except InferenceError as error:
        raise ValueError(f"{path.name}: {error.problem}; it was not kept") from None
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}; it was not kept") from None


def compare(network: Network, pictures: Tensor, expected: Tensor, trial: Trial) -> Difference:
    """The largest differences on some images."""
    exported = predict(network, pictures, trial.device)
    if trial.nms is None:
        return compare_predictions(expected, exported)
    conf_thres, iou_thres, max_det = trial.nms
    detections = non_max_suppression(expected, conf_thres, iou_thres, max_det=max_det)
    return compare_detections(detections, split_detections(exported))


def report_map(
    name: str, reference: EvaluationResult, exported: EvaluationResult, precision: str
) -> None:
    """Both figures, and a word where 8 bits cost more than they should."""
    LOGGER.info(
        "%s on %d images: mAP@.5 %.4f, mAP@.5:.95 %.4f; torch %.4f, %.4f",
        name, exported.num_images, exported.map50, exported.map50_95, reference.map50,
        reference.map50_95,
    )  # fmt: skip
    loss = reference.map50 - exported.map50
    if precision == "int8" and loss > INT8_LOSS_TO_MENTION:
        LOGGER.warning(
            "warning: 8 bits cost %.1f points of mAP@.5; more --calib-images may help", 100 * loss
        )


def size_mb(path: Path) -> float:
    """Size of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6


if __name__ == "__main__":
    run_command(main)
