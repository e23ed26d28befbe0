"""The flags of prune.py: names, defaults, and what can be checked without a file or torch."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence

from utils.choices import COMPENSATIONS, DEFAULT_IMPORTANCE, IMPORTANCES, SHORTCUT_RULES
from utils.flags.checks import (
    WORKERS_HELP,
    add_download_flag,
    add_run_dir_flags,
    check_device,
    check_imgsz,
    check_least,
    check_shares,
    flag_of,
    new_parser,
)
from utils.pruning.targets import TARGET_UNITS, Target, parse_target

DEFAULT_RECALIBRATION = 4  # batches, tried where there is a data set
LEAST_VALUES = {
    **dict.fromkeys(("workers", "recalibrate"), 0),
    **dict.fromkeys(
        ("batch_size", "calibration_images", "min_channels", "round_to", "latency_batch"), 1
    ),
}
# Flags of measurements on images.
ACTS_ONLY_WITH_DATA = (
    "batch_size",
    "conf_thres",
    "iou_thres",
    "single_cls",
    "calibration_images",
    "allow_download_scripts",
)
AMOUNTS = ("percent", "sweep", "target_gflops", "target_params", "target_latency", "max_drop")


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """All flags with their defaults."""
    parser = new_parser(description)
    parser.add_argument(
        "--weights", required=True, help="checkpoint: ours, a public YOLOv5 .pt or a known name"
    )
    parser.add_argument(
        "--cfg", default="", help="model yaml; stops if the checkpoint is another network"
    )
    parser.add_argument("--dry-run", action="store_true", help="print all tables, write nothing")
    add_amount_flags(parser.add_argument_group("how much to remove (one of these)"))
    add_choice_flags(parser.add_argument_group("what to remove, and how"))
    group = parser.add_argument_group("comparison before and after")
    group.add_argument("--data", default="", help="data set yaml; without it no mAP is measured")
    group.add_argument("--imgsz", "--img", "--img-size", type=int, default=640, help="pixels")
    group.add_argument("--batch-size", type=int, default=32, help="images")
    group.add_argument("--conf-thres", type=float, default=0.001, help="least confidence, 0 to 1")
    group.add_argument("--iou-thres", type=float, default=0.6, help="of NMS, 0 to 1")
    group.add_argument("--single-cls", action="store_true", help="treat all classes as one")
    group.add_argument(
        "--latency-batch",
        type=int,
        nargs="+",
        help="batch sizes to measure the speed at; default: 1, with --data also 16",
    )
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="", help="'' (best), cpu, mps or 0")
    group.add_argument("--workers", type=int, help=WORKERS_HELP)
    add_download_flag(group)
    group = parser.add_argument_group("results")
    add_run_dir_flags(group, "val")
    return parser


def add_amount_flags(group: argparse._ArgumentGroup) -> None:
    """Percent, sweep and targets."""
    group.add_argument(
        "--percent",
        type=float,
        nargs="+",
        help="share of the prunable channels to remove, from 0 to below 1; several make a sweep",
    )
    group.add_argument(
        "--sweep", action="store_true", help="try 10 %% to 90 %%; the model at the knee is saved"
    )
    for quantity, described in (
        ("gflops", "GFLOPs for one image of --imgsz, or a share such as 50%%"),
        ("params", "parameters (800k, 1.2M), or a share"),
        ("latency", "milliseconds for one image on the device in use, or a share"),
    ):
        group.add_argument(
            f"--target-{quantity}",
            type=functools.partial(target_flag, quantity),
            metavar="TARGET",
            help=f"what may be left: {described}",
        )
    group.add_argument(
        "--max-drop",
        type=float,
        help="remove the most that costs at most this much mAP@.5 on the validation images",
    )


def target_flag(quantity: str, text: str) -> Target:
    """What argparse calls for --target-*."""
    try:
        return parse_target(text, TARGET_UNITS[quantity])
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_choice_flags(group: argparse._ArgumentGroup) -> None:
    """Rule, importance, compensation, floors."""
    group.add_argument(
        "--shortcut",
        choices=SHORTCUT_RULES,
        help="keep: leave bottlenecks with a shortcut alone; group: cut channels that a shortcut "
        "adds together; default: as in the sparse training, else group",
    )
    group.add_argument(
        "--importance",
        choices=IMPORTANCES,
        default=DEFAULT_IMPORTANCE,
        help="what channels are ranked by; default: %(default)s",
    )
    group.add_argument(
        "--compensate",
        choices=COMPENSATIONS,
        help="what dropped channels are replaced by; default: linear with --data, else mean",
    )
    group.add_argument(
        "--calibration-images", type=int, default=64, help="training images to learn that from"
    )
    group.add_argument(
        "--recalibrate",
        type=int,
        metavar="N",
        help="re-estimate the BN statistics on N batches of 16 training images, augmented as they "
        "were in the training, 0: never; default: "
        f"{DEFAULT_RECALIBRATION} with --data, kept only if mAP@.5:.95 is higher with it",
    )
    group.add_argument("--min-channels", type=int, default=1, help="every layer keeps so many")
    group.add_argument("--round-to", type=int, default=1, help="keep multiples of this, such as 8")


def parse_args(
    argv: Sequence[str] | None = None, description: str | None = None
) -> argparse.Namespace:
    """Parse and check what can be checked without reading files.

    Args:
        argv: the command line; None takes that of the program.
        description: what `--help` says above the flags.
    """
    parser = build_parser(description)
    options = parser.parse_args(argv)
    check_amount(parser, options)
    check_shares(parser, options, ("conf_thres", "iou_thres"))
    check_imgsz(parser, options)
    check_least(parser, options, LEAST_VALUES)
    check_device(parser, options)
    needs_images = (
        ("--max-drop", options.max_drop is not None),
        ("--recalibrate", bool(options.recalibrate)),
        ("--compensate linear", options.compensate == "linear"),
    )
    for flag, is_given in needs_images:
        if is_given and not options.data:
            parser.error(f"{flag} needs images: give --data")
    for name in ACTS_ONLY_WITH_DATA:
        if getattr(options, name) != parser.get_default(name) and not options.data:
            parser.error(f"{flag_of(name)} acts only with --data")
    return options


def check_amount(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exactly one way to say how much, and a number that can be meant."""
    given = [name for name in AMOUNTS if getattr(options, name) not in (None, False)]
    flags = [flag_of(name) for name in (given or AMOUNTS)]
    if not given:
        parser.error(f"say how much to remove: {', '.join(flags[:-1])} or {flags[-1]}")
    if len(given) > 1:
        parser.error(f"{' and '.join(flags)} exclude each other; give one of them")
    for percent in options.percent or []:
        if not 0 <= percent < 1:
            hint = f"; for {percent:g} % type {percent / 100:g}" if 1 <= percent < 100 else ""
            parser.error(
                f"--percent is a share, from 0 to below 1, and was given as {percent:g}{hint}"
            )
    if options.percent and not any(options.percent) and not options.dry_run:
        parser.error("--percent 0 removes nothing; add --dry-run to see the tables alone")
    if options.max_drop is not None and not 0 <= options.max_drop < 1:
        hint = ""
        if 1 <= options.max_drop < 100:
            hint = f"; {options.max_drop:g} points are typed as {options.max_drop / 100:g}"
        parser.error(f"--max-drop is {options.max_drop:g}, expected 0 to below 1{hint}")
