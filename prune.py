"""Remove the weakest channels of a sparse-trained YOLOv5 detector (network slimming).

    python prune.py --percent 0.5 --weights runs/train/sparse/weights/last.pt --dry-run
    python prune.py --percent 0.5 --weights runs/train/sparse/weights/last.pt \
        --data data/bccd.yaml --imgsz 320

All prunable channels are ranked by |gamma| of their batch norm; the weakest go. Results are in
runs/val/exp*: pruned_model.pt (fine-tune it: train.py --ft_pruned_model --weights ...),
pruned_model.yaml (train the slim network from scratch: train.py --cfg ...), prune.json.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import json
import logging
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from models import Model, ModelSpec
from models.blocks import Bottleneck
from utils.checkpoint import Detector, build_checkpoint, load_detector, save_final
from utils.command import run_command
from utils.config import find_config, load_yaml
from utils.dataset import (
    RECT_PAD,
    DetectionDataset,
    Loader,
    build_loader,
    round_imgsz,
    scan_split,
)
from utils.device import describe_device, select_device
from utils.downloads import find_weights, open_dataset
from utils.evaluate import EvaluationResult, check_class_names, evaluate
from utils.profile import (
    Latency,
    compare_latency,
    count_gflops,
    count_parameters,
)
from utils.pruning.channel_groups import ChannelGroups, find_channel_groups
from utils.pruning.keep_masks import KeepMasks, select_keep_masks, suggested_percent
from utils.pruning.rewrite import CUT_TOLERANCE, check_cut, mask_model, prune_model
from utils.pruning.slimming import beta_magnitude, gamma_importance
from utils.run_dir import new_run_dir, save_options, write_text_atomic

ROOT = Path(__file__).resolve().parent
LOGGER = logging.getLogger("prune")

# A channel is near 0 when its |gamma| is below this share of the 90 % quantile of those that stay.
# Measured on a sparse yolov5n (BCCD): up to a share of 0.05 the cut cost less than half a point of
# mAP@.5, at 0.15 it cost 7.5. The median will not do: most of what stays may be near 0 as well.
NEAR_ZERO = 0.1


def build_parser() -> argparse.ArgumentParser:
    """All flags with their defaults."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--weights", required=True, help="checkpoint: ours, a public YOLOv5 .pt or a known name"
    )
    group.add_argument(
        "--percent",
        type=float,
        required=True,
        help="share of the prunable channels to remove, from 0 to below 1",
    )
    group.add_argument(
        "--cfg", default="", help="model yaml; stops if the checkpoint is another network"
    )
    group.add_argument("--dry-run", action="store_true", help="print all tables, write nothing")
    group = parser.add_argument_group("comparison before and after")
    group.add_argument("--data", default="", help="data set yaml; without it no mAP is measured")
    group.add_argument("--imgsz", "--img", "--img-size", type=int, default=640, help="pixels")
    group.add_argument("--batch-size", type=int, default=32, help="images")
    group.add_argument("--conf-thres", type=float, default=0.001, help="least confidence, 0 to 1")
    group.add_argument("--iou-thres", type=float, default=0.6, help="of NMS, 0 to 1")
    group.add_argument("--single-cls", action="store_true", help="treat all classes as one")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="", help="'' (best), cpu, mps or 0")
    group.add_argument("--workers", type=int, default=8, help="loader processes, at most")
    group.add_argument(
        "--allow-download-scripts",
        action="store_true",
        help="run the `download:` command of a data set yaml that is not part of this project",
    )
    group = parser.add_argument_group("results")
    group.add_argument("--project", default=str(ROOT / "runs/val"), help="parent folder")
    group.add_argument("--name", default="exp", help="folder name; a number is added")
    group.add_argument("--exist-ok", action="store_true", help="write into an existing folder")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse and check what can be checked without reading files."""
    parser = build_parser()
    options = parser.parse_args(argv)
    if not 0 <= options.percent < 1:
        hint = ""
        if 1 <= options.percent <= 100:
            hint = f"; for {options.percent:g} % type {options.percent / 100:g}"
        parser.error(
            f"--percent is a share, from 0 to below 1, and was given as {options.percent:g}{hint}"
        )
    if options.percent == 0 and not options.dry_run:
        parser.error("--percent 0 removes nothing; add --dry-run to see the tables alone")
    for name in ("conf_thres", "iou_thres"):
        if not 0 <= getattr(options, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, expected 0 to 1")
    for name, low in (("imgsz", 32), ("batch_size", 1), ("workers", 0)):
        if getattr(options, name) < low:
            parser.error(
                f"--{name.replace('_', '-')} is {getattr(options, name)}, expected at least {low}"
            )
    return options


def main(argv: Sequence[str] | None = None) -> None:
    """Prune one network, from its options to its files."""
    options = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    device = select_device(options.device)
    if options.dry_run:
        prune(options, device, None)
        LOGGER.info("dry run: nothing was written")
        return
    with open_run_dir(options) as run_dir:
        prune(options, device, run_dir)


@contextlib.contextmanager
def open_run_dir(options: argparse.Namespace) -> Iterator[Path]:
    """Make the run folder before the long work; what is still empty at the end goes again.

    Raises:
        OSError: no folder can be made there, or not written to.
    """
    place = Path(options.project) / options.name
    absent = [folder for folder in place.parents if not folder.exists()]
    is_reused = options.exist_ok and place.exists()
    run_dir = new_run_dir(options.project, options.name, options.exist_ok)
    try:
        yield run_dir
    finally:
        for folder in absent if is_reused else [run_dir, *absent]:
            with contextlib.suppress(OSError):  # not empty, or gone
                folder.rmdir()


def prune(options: argparse.Namespace, device: torch.device, run_dir: Path | None) -> None:
    """Prune and compare; save into the run folder if there is one."""
    detector = load_detector(find_weights(options.weights, ROOT))
    model = detector.model
    if options.cfg:
        check_is_network(model, load_cfg(options.cfg), options)
    imgsz = round_imgsz(options.imgsz, model.max_stride)
    loader = load_data(options, detector, imgsz) if options.data else None

    channel_groups = find_channel_groups(model)
    importance = gamma_importance(model, channel_groups)
    keep = select_keep_masks(importance, options.percent)
    suggested = suggested_percent(importance)
    pruned = prune_model(model, channel_groups, keep.masks)
    print_layers(model, pruned, channel_groups, keep)
    print_choice(suggested, keep)
    warn_if_not_sparse(importance, beta_magnitude(model, channel_groups), keep)
    check_is_smaller(keep, options)

    masked = mask_model(model, channel_groups, keep.masks)
    difference = verify_cut(pruned, masked)
    evaluations = evaluate_both(model, pruned, loader, detector.names, options, device)
    latencies = compare_latency([model, pruned], imgsz, device)
    before, after = describe_both(model, pruned, evaluations, latencies, detector.names, imgsz)
    print_comparison(before, after, device, imgsz)
    print_speed_up(latencies[1], device)
    if run_dir is None:
        return
    report = {
        "weights": str(options.weights),
        "data": str(options.data),
        "imgsz": imgsz,
        "device": describe_device(device),
        "percent": options.percent,
        "suggested_percent": suggested,
        "threshold": keep.threshold,
        "cut_difference": difference,
        "before": dataclasses.asdict(before),
        "after": dataclasses.asdict(after),
        "speed_up": list(latencies[1][1:]),  # times as fast; lowest, highest
        "layers": layer_rows(model, pruned, channel_groups, keep),
    }
    save_results(run_dir, options, pruned, detector.names, report)


def load_cfg(name: str) -> ModelSpec:
    """The model yaml that `--cfg` means."""
    path = find_config(name, ["models"], ROOT)
    return ModelSpec.from_dict(load_yaml(path), str(path))


def check_is_network(model: Model, spec: ModelSpec, options: argparse.Namespace) -> None:
    """Stop if `model` is not of the architecture of `spec`, whatever its widths and classes are.

    Raises:
        ValueError: names the first row that differs.
    """
    expected = Model(spec.with_widths({}).with_num_classes(model.head.num_classes))
    dense = Model(model.spec.with_widths({}))
    ours, theirs = (
        [_describe_row(row, route) for row, route in zip(net.model, net.routes, strict=True)]
        for net in (dense, expected)
    )
    if ours != theirs:
        longest = max(len(ours), len(theirs))
        first = next(n for n in range(longest) if ours[n : n + 1] != theirs[n : n + 1])
        raise ValueError(
            f"{options.weights} is not the network of --cfg {options.cfg}: they differ from row "
            f"{first} on; give the yaml it was trained with, or leave out --cfg"
        )


def _describe_row(row: nn.Module, sources: tuple[int, ...]) -> tuple[Any, ...]:
    """All that makes a row what it is, weights aside."""
    shortcuts = [part.add for part in row.modules() if isinstance(part, Bottleneck)]
    return sources, repr(row), shortcuts


def load_data(options: argparse.Namespace, detector: Detector, imgsz: int) -> Loader:
    """Batches of the validation images; gets the data set if it is not there yet.

    Raises:
        ValueError: the data set has other classes than the network.
    """
    data = open_dataset(options.data, splits=("val",), allow_scripts=options.allow_download_scripts)
    if not options.single_cls:
        check_class_names(detector.names, data.names, options.weights, str(data.source))
    split = scan_split(
        data.val,
        data.names,
        single_cls=options.single_cls,
        cache=not options.dry_run,
        workers=options.workers,
    )
    dataset = DetectionDataset(
        split,
        imgsz,
        hyp=None,
        rect=True,
        batch_size=options.batch_size,
        stride=detector.model.max_stride,
        pad=RECT_PAD,
        cache=None,
        seed=0,
    )
    return build_loader(dataset, options.batch_size, workers=options.workers, shuffle=False, seed=0)


def layer_rows(
    model: Model, pruned: Model, channel_groups: ChannelGroups, keep: KeepMasks
) -> list[dict[str, Any]]:
    """Per convolution block: channels before and after, and why they are as they are."""
    widths = pruned.widths()
    return [
        {
            "layer": path,
            "before": width,
            "after": widths[path],
            "prunable": channel_groups.is_prunable(path),
            "floored": any(s.group in keep.floored for s in channel_groups.outputs[path]),
        }
        for path, width in model.widths().items()
    ]


def print_layers(
    model: Model, pruned: Model, channel_groups: ChannelGroups, keep: KeepMasks
) -> None:
    """The table of channels before and after."""
    LOGGER.info("%-14s %8s %8s %6s", "layer", "channels", "after", "kept")
    for row in layer_rows(model, pruned, channel_groups, keep):
        note = "" if row["prunable"] else "frozen (shortcut)"
        note = "floor: one channel" if row["floored"] else note
        share = row["after"] / row["before"]
        columns = (row["layer"], row["before"], row["after"], share, note)
        LOGGER.info("%s", "{:<14} {:8d} {:8d} {:6.0%}  {}".format(*columns).rstrip())
    total, left = (sum(network.widths().values()) for network in (model, pruned))
    LOGGER.info("%-14s %8d %8d %6.0f%%", "all", total, left, 100 * left / total)


def print_choice(suggested: float, keep: KeepMasks) -> None:
    """Threshold and suggestion, and a word where the masks are not what was asked for."""
    total = sum(len(mask) for mask in keep.masks.values())
    removed = count_removed(keep)
    LOGGER.info(
        "threshold: |gamma| >= %.4g stays; %d of %d prunable channels go (%.1f %%)",
        keep.threshold,
        removed,
        total,
        100 * removed / total,
    )
    LOGGER.info(
        "suggested percent: %.4f (the most that leaves every layer a channel; it says nothing "
        "about mAP)",
        math.floor(suggested * 1e4) / 1e4,
    )
    if keep.floored:
        LOGGER.warning(
            "warning: every channel of %s lies below the threshold; the strongest one stays",
            ", ".join(keep.floored),
        )


def count_removed(keep: KeepMasks) -> int:
    """Channels that go."""
    return sum(int((~mask).sum()) for mask in keep.masks.values())


def warn_if_not_sparse(
    importance: Mapping[str, Tensor], betas: Mapping[str, Tensor], keep: KeepMasks
) -> None:
    """One line where what goes is not silent, measured against what stays."""
    gamma_kept = torch.cat([importance[name][mask] for name, mask in keep.masks.items()])
    gamma_cut = torch.cat([importance[name][~mask] for name, mask in keep.masks.items()])
    beta_cut = torch.cat([betas[name][~mask] for name, mask in keep.masks.items()])
    if not len(gamma_cut):
        return
    largest_gamma, typical = float(gamma_cut.max()), float(gamma_kept.quantile(0.9))
    large_beta = float(beta_cut.quantile(0.95))
    if largest_gamma > NEAR_ZERO * typical:
        LOGGER.warning(
            "warning: channels with |gamma| up to %.3g go, against %.3g of strong ones that stay: "
            "they are not near 0, expect mAP to fall. Train longer with --bn_sparsity, with a "
            "larger --sparsity_rate, or remove less",
            largest_gamma,
            typical,
        )
    elif large_beta > NEAR_ZERO * typical:
        LOGGER.warning(
            "warning: gamma is near 0 in all channels that go, but |beta| is %.3g or more in 5 %% "
            "of them (|gamma| of strong ones that stay: %.3g): they are constant, not silent, "
            "expect mAP to fall. Train longer with --bn_sparsity",
            large_beta,
            typical,
        )


def check_is_smaller(keep: KeepMasks, options: argparse.Namespace) -> None:
    """Stop before a network is measured and saved as pruned that is not; a dry run goes on.

    Raises:
        ValueError: nothing is removed.
    """
    if count_removed(keep) or options.percent == 0:
        return
    reason = (
        f"nothing is removed: no |gamma| is below {keep.threshold:.4g}, the value at --percent "
        f"{options.percent:g}; where all are alike, train with --bn_sparsity first, else give a "
        "larger --percent"
    )
    if not options.dry_run:
        raise ValueError(f"{reason}. Nothing was saved")
    LOGGER.warning("warning: %s", reason)


def verify_cut(pruned: Model, masked: Model) -> float:
    """Compare the cut network with the masked dense one; returns the relative difference.

    The image is noise of a few cells: every channel is read and the cut does not depend on the
    size, so a larger or a real image would only take longer.

    Raises:
        ValueError: they differ; nothing may be saved.
    """
    side = 2 * pruned.max_stride
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    difference = check_cut(pruned, masked, image)
    if not difference <= CUT_TOLERANCE:  # NaN too
        raise ValueError(
            f"the pruned network differs from the masked dense one by {difference:.2g} (at most "
            f"{CUT_TOLERANCE:g} can be rounding); nothing was saved. Please report this, it is a "
            "fault of the toolkit or of the weights (NaN)"
        )
    LOGGER.info("cut verified: differs from the masked dense network by %.1g", difference)
    return difference


def evaluate_both(
    model: Model,
    pruned: Model,
    loader: Loader | None,
    names: tuple[str, ...],
    options: argparse.Namespace,
    device: torch.device,
) -> list[EvaluationResult] | None:
    """Same images, thresholds and precision (float32) for both; None without data."""
    if loader is None:
        return None
    return [
        evaluate(
            copy.deepcopy(network).to(device),
            loader,
            names,
            device=device,
            conf_thres=options.conf_thres,
            iou_thres=options.iou_thres,
            single_cls=options.single_cls,
        )
        for network in (model, pruned)
    ]


@dataclasses.dataclass(frozen=True)
class Figures:
    """What one network can do and what it costs."""

    precision: float | None  # None: not measured, there was no data set
    recall: float | None
    map50: float | None
    map50_95: float | None
    channels: int
    parameters: int
    gflops: float  # 2 x MACs, at imgsz
    file_mb: float  # 1e6 bytes, in half precision as saved
    latency_ms: float  # one image, float32


def describe_both(
    model: Model,
    pruned: Model,
    evaluations: list[EvaluationResult] | None,
    latencies: list[Latency],
    names: tuple[str, ...],
    imgsz: int,
) -> tuple[Figures, Figures]:
    """Accuracy from the evaluations, time from the latencies, and the sizes of both networks."""
    before, after = (
        Figures(
            precision=result.precision if result else None,
            recall=result.recall if result else None,
            map50=result.map50 if result else None,
            map50_95=result.map50_95 if result else None,
            channels=sum(network.widths().values()),
            parameters=count_parameters(network),
            gflops=count_gflops(network, imgsz),
            file_mb=file_size(network, names) / 1e6,
            latency_ms=latency.milliseconds,
        )
        for network, result, latency in zip(
            (model, pruned), evaluations or (None, None), latencies, strict=True
        )
    )
    return before, after


def file_size(model: Model, names: Sequence[str]) -> int:
    """Bytes of the stripped checkpoint in half precision."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        save_final(path, build_checkpoint(model, names), model.state_dict())
        return path.stat().st_size


def print_comparison(before: Figures, after: Figures, device: torch.device, imgsz: int) -> None:
    """The table before/after."""
    LOGGER.info("\n%-24s %12s %12s %12s", "", "before", "after", "change")
    accuracy = (
        ("precision", "P"),
        ("recall", "R"),
        ("map50", "mAP@.5"),
        ("map50_95", "mAP@.5:.95"),
    )
    for field, title in accuracy:
        old, new = getattr(before, field), getattr(after, field)
        if old is not None and new is not None:
            LOGGER.info("%-24s %12.4f %12.4f %+12.4f", title, old, new, new - old)
    for field, title, form in (
        ("channels", "channels", "{:,}"),
        ("parameters", "parameters", "{:,}"),
        ("gflops", f"GFLOPs at {imgsz} px", "{:.3f}"),
        ("file_mb", "file size, MB", "{:.3f}"),
        ("latency_ms", f"latency on {device}, ms", "{:.2f}"),
    ):
        old, new = getattr(before, field), getattr(after, field)
        change = f"{100 * (new / old - 1):+.1f} %"
        LOGGER.info("%-24s %12s %12s %12s", title, form.format(old), form.format(new), change)
    if before.map50 is None:
        LOGGER.info("mAP was not measured: give --data to compare it")


def print_speed_up(latency: Latency, device: torch.device) -> None:
    """The ratio with its spread, and a plain word where it may be noise."""
    ratio = "{:.2f}x ({:.2f}-{:.2f})".format(*latency[1:])
    if latency.speed_up_low > 1:
        LOGGER.info("speed: %s faster on %s, one image", ratio, device)
    else:
        LOGGER.warning(
            "warning: not faster on %s: %s, one image. Fewer channels save time only where "
            "arithmetic takes it, so not in small or lightly pruned networks",
            device,
            ratio,
        )


def save_results(
    run_dir: Path,
    options: argparse.Namespace,
    pruned: Model,
    names: tuple[str, ...],
    report: dict[str, Any],
) -> None:
    """Write the checkpoint, its yaml and the figures."""
    save_options(run_dir / "opt.yaml", vars(options))
    origin = {"weights": str(options.weights), "percent": options.percent}
    content = build_checkpoint(pruned, names, pruned_from=origin)
    save_final(run_dir / "pruned_model.pt", content, pruned.state_dict())
    comment = f"{options.weights} pruned by {options.percent:g} of its prunable channels"
    write_text_atomic(run_dir / "pruned_model.yaml", format_spec(pruned.spec, comment))
    report = {**report, "widths": pruned.widths()}
    write_text_atomic(run_dir / "prune.json", json.dumps(report, indent=1) + "\n")
    LOGGER.info("\nsaved %s (and pruned_model.yaml, prune.json)", run_dir / "pruned_model.pt")
    LOGGER.info(
        "fine-tune it: python train.py --ft_pruned_model --hyp hyp.finetune_prune.yaml "
        "--weights %s",
        run_dir / "pruned_model.pt",
    )


def format_spec(spec: ModelSpec, comment: str) -> str:
    """The spec as a model yaml for people: one line a row, numbered."""

    def flow(value: Any) -> str:
        text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
        return text.removesuffix("\n").removesuffix("\n...")

    lines = ["# " + " ".join(comment.split())]
    number = 0
    for key, value in spec.to_dict().items():
        if key in ("backbone", "head"):
            lines += [f"{key}:  # [from, number, module, arguments]"]
            lines += [f"  - {flow(row)}  # {number + n}" for n, row in enumerate(value)]
            number += len(value)
        elif isinstance(value, list):
            lines += [f"{key}:", *(f"  - {flow(item)}" for item in value)]
        elif isinstance(value, dict):
            lines += [f"{key}:  # output channels of each convolution"]
            lines += [f"  {flow(path)}: {width}" for path, width in value.items()]
        else:
            lines += [f"{key}: {flow(value)}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(main)
