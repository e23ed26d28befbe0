"""Accuracy and latency of networks in every format that runs on this machine.

    python -m benchmarks.formats --weights dense.pt pruned.pt --data bccd.yaml --img 320

Every network is exported by export.py into a temporary folder: ONNX and OpenVINO, in float32,
float16 and with 8 bits. All are evaluated on the val images, letterboxed to the square. Latency is
that of one image, without loading, scaling and NMS: all variants take turns, round after round.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import export
from benchmarks import harness
from benchmarks.training import silence
from utils import exports
from utils.backends import Network, PytorchNetwork, load_network
from utils.command import run_command
from utils.config import DatasetSpec
from utils.dataset import DetectionDataset, build_loader, round_imgsz, scan_split
from utils.device import select_device
from utils.downloads import find_weights, open_dataset
from utils.evaluate import EvaluationResult, evaluate

ROOT = Path(__file__).resolve().parents[1]
RUNTIMES = {"pytorch": "torch", "onnx": "ONNX Runtime", "openvino": "OpenVINO"}
PRECISION_FLAGS = {"float32": [], "float16": ["--half"], "int8": ["--int8"]}
PASSES = 5  # timed together, so that the caches belong to the variant


class Variant(NamedTuple):
    """One network in one format."""

    weights: str
    precision: str
    network: Network
    size_mb: float
    result: EvaluationResult


def main(argv: Sequence[str] | None = None) -> None:
    """Export, evaluate and time all variants."""
    parser = harness.build_parser(__doc__, repeats=30)
    parser.add_argument("--weights", nargs="+", required=True, help="checkpoints, the dense first")
    parser.add_argument(
        "--formats", nargs="+", choices=("onnx", "openvino"), default=["onnx", "openvino"]
    )
    parser.add_argument(
        "--precisions", nargs="+", choices=list(PRECISION_FLAGS), default=list(PRECISION_FLAGS)
    )
    options = parser.parse_args(argv)
    device = select_device(options.device)
    harness.set_threads(options.threads)
    data = open_dataset(options.data)
    variants: dict[str, Variant] = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, name in enumerate(options.weights):
            weights = find_weights(name, ROOT)
            network = PytorchNetwork(weights, device)
            imgsz = round_imgsz(options.img, network.stride)
            for path, precision in write_files(weights, Path(folder) / str(number), imgsz, options):
                if path.suffix != ".pt":
                    network = load_network(path, device)
                result = score(network, data, imgsz, options.batch, device)
                size = export.size_mb(path)
                label = f"{name} {network.format} {precision}"
                variants[label] = Variant(name, precision, network, size, result)
        times = harness.take_turns(
            {label: timer(variant.network, imgsz, device) for label, variant in variants.items()},
            options.repeats,
            device,
        )
    sections = [
        f"{imgsz} x {imgsz} pixels, batch 1, {options.repeats} rounds; milliseconds: median "
        "(quartiles).",
        formats_table(variants, times),
    ]
    harness.report("Formats", device, sections, options.out)


def write_files(weights: Path, folder: Path, imgsz: int, options) -> list[tuple[Path, str]]:
    """The checkpoint itself and its exports."""
    files = [(weights, "float32")]
    folder.mkdir()
    copy = folder / "network.pt"
    shutil.copyfile(weights, copy)
    for precision in options.precisions:
        flags = ["--weights", str(copy), "--data", options.data, "--img", str(imgsz)]
        flags += ["--device", options.device or "cpu", *PRECISION_FLAGS[precision]]
        with silence():
            export.main([*flags, "--include", *options.formats])
        suffixes = [exports.SUFFIXES[name] for name in options.formats]
        stem = export.name_export("network", precision)
        files += [(folder / f"{stem}{suffix}", precision) for suffix in suffixes]
    return files


def score(
    network: Network, data: DatasetSpec, imgsz: int, batch: int, device: torch.device
) -> EvaluationResult:
    """Evaluate on the val images."""
    with silence():
        split = scan_split(data.val, data.names)
        loader = build_loader(DetectionDataset(split, imgsz, stride=network.stride), batch)
        return evaluate(network, loader, data.names, device=device, progress=False)


def timer(network: Network, imgsz: int, device: torch.device):
    """A function that runs one image a few times."""
    image = torch.rand(1, 3, imgsz, imgsz, generator=torch.Generator().manual_seed(0)).to(device)

    @torch.no_grad()
    def run() -> None:
        for _ in range(PASSES):
            network(image)

    return run


def formats_table(variants: dict[str, Variant], times: harness.Times) -> str:
    """One row a variant; the speed-up is over the first."""
    ratios = harness.speed_ups(times)
    rows = []
    for label, variant in variants.items():
        milliseconds = np.asarray(times[label]) / PASSES * 1e3
        rows.append(
            (
                variant.weights,
                RUNTIMES[variant.network.format],
                variant.precision,
                f"{variant.size_mb:.1f}",
                f"{variant.result.map50:.4f}",
                f"{variant.result.map50_95:.4f}",
                f"{harness.spread(milliseconds):.1f}",
                f"{ratios[label].median:.2f}",
            )
        )
    heads = (
        "weights", "runtime", "precision", "MB", "mAP@.5", "mAP@.5:.95", "ms", "times as fast",
    )  # fmt: skip
    return harness.table(heads, rows)


if __name__ == "__main__":
    run_command(main)
