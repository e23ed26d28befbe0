"""The flags of val.py: names, defaults, and what can be checked without a file or torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from utils.flags.checks import (
    WORKERS_HELP,
    add_download_flag,
    add_run_dir_flags,
    check_device,
    check_half,
    check_imgsz,
    check_least,
    check_shares,
    flag_of,
    new_parser,
)

IMGSZ = 640  # default of --imgsz, but for exported files of one size
STUDY_SIZES = range(256, 1536 + 1, 128)
# Default --conf-thres and --iou-thres: for mAP, and as in use (--task speed).
THRESHOLDS_FOR_MAP, THRESHOLDS_IN_USE = (0.001, 0.6), (0.25, 0.45)
LEAST_VALUES = {"batch_size": 1, "max_det": 1, "workers": 0}


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """All flags with their defaults."""
    parser = new_parser(description)
    group = parser.add_argument_group("network and data")
    group.add_argument(
        "--weights",
        nargs="+",
        default=["yolov5s.pt"],
        help="checkpoint: ours, a public YOLOv5 .pt or a known name; or what export.py writes; "
        "several for --task study",
    )
    group.add_argument("--data", default="data/coco128.yaml", help="data set yaml")
    group.add_argument(
        "--task",
        choices=("train", "val", "test", "speed", "study"),
        default="val",
        help="split to use; or the speed on val; or a sweep over image sizes on val",
    )
    group.add_argument("--single-cls", action="store_true", help="treat all classes as one")
    add_download_flag(group)
    group = parser.add_argument_group("detection")
    group.add_argument(
        "--imgsz",
        "--img",
        "--img-size",
        type=int,
        help="pixels, default 640 or that of an exported file; study has its own",
    )
    group.add_argument("--batch-size", type=int, default=32, help="images")
    group.add_argument(
        "--square",
        action="store_true",
        help="pad every image to a square, not those of a batch to their common shape: slower, "
        "but mAP does not depend on --batch-size",
    )
    group.add_argument(
        "--conf-thres", type=float, help="least confidence, 0 to 1; default 0.001, speed: 0.25"
    )
    group.add_argument("--iou-thres", type=float, help="of NMS, 0 to 1; default 0.6, speed: 0.45")
    group.add_argument("--max-det", type=int, default=300, help="detections per image, at most")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="", help="'' (best), cpu, mps or 0")
    group.add_argument(
        "--half",
        action="store_true",
        help="float16, on a GPU; default: float32 on all devices, for the same figures",
    )
    group.add_argument("--workers", type=int, help=WORKERS_HELP)
    group = parser.add_argument_group("results")
    group.add_argument("--verbose", action="store_true", help="a row per class")
    group.add_argument("--save-txt", action="store_true", help="labels/<image>.txt in YOLO form")
    group.add_argument("--save-conf", action="store_true", help="confidences in these files")
    group.add_argument(
        "--save-json", action="store_true", help="predictions.json, scored with pycocotools"
    )
    group.add_argument("--noplots", action="store_true", help="no pictures")
    add_run_dir_flags(group, "val")
    return parser


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
    check_task(parser, options)
    if options.save_conf and not options.save_txt:
        parser.error("--save-conf acts only with --save-txt")
    if len(options.weights) > 1 and options.task != "study":
        parser.error("several --weights can be compared with --task study only")
    thresholds = THRESHOLDS_IN_USE if options.task == "speed" else THRESHOLDS_FOR_MAP
    for name, default in zip(("conf_thres", "iou_thres"), thresholds, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, default)
    check_shares(parser, options, ("conf_thres", "iou_thres"))
    check_imgsz(parser, options)
    check_least(parser, options, LEAST_VALUES)
    check_device(parser, options)
    check_half(parser, options)
    return options


def check_task(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse flags that do not act with the task."""
    if options.task in ("speed", "study"):
        for name in ("verbose", "save_txt", "save_json"):
            if getattr(options, name):
                parser.error(f"{flag_of(name)} does not act with --task {options.task}")
    if options.task == "study" and options.imgsz is not None:
        parser.error(
            "--imgsz does not act with --task study, which goes through the sizes "
            f"{STUDY_SIZES[0]} to {STUDY_SIZES[-1]}"
        )
