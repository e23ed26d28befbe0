"""The flags of export.py: names, defaults, and what can be checked without a file or torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from utils.flags.checks import (
    add_download_flag,
    check_device,
    check_imgsz,
    check_least,
    check_shares,
    flag_of,
    new_parser,
)

FORMATS = ("onnx", "torchscript", "openvino", "engine")
THROUGH_ONNX = ("onnx", "openvino", "engine")

# The oldest version with a scale per channel (--int8): the older, the more programs read it.
# OpenCV's DNN module does from 4.8 on, and in 5.0.
OPSET, OPSETS = 13, range(12, 20 + 1)
OPSET_FOR_INT8 = 13
CALIB_IMAGES = 64  # default of --calib-images
NMS_DEFAULTS = {"conf_thres": 0.25, "iou_thres": 0.45, "max_det": 300}
REFUSED = {
    "dynamic": ("torchscript", "engine"),
    "int8": ("torchscript", "engine"),
    "nms": ("engine",),
}
LEAST_VALUES = {"batch_size": 1, "max_det": 1, "calib_images": 1, "workers": 0}


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """All flags with their defaults."""
    parser = new_parser(description)
    group = parser.add_argument_group("network and data")
    group.add_argument(
        "--weights",
        default="yolov5s.pt",
        help="checkpoint: ours, dense or pruned, a public YOLOv5 .pt or a known name",
    )
    group.add_argument(
        "--data",
        help="data set yaml: its val images check the result, its train images calibrate --int8",
    )
    add_download_flag(group)
    group = parser.add_argument_group("formats")
    group.add_argument(
        "--include", nargs="+", choices=FORMATS, default=["onnx"], help="what to write"
    )
    group.add_argument(
        "--half", action="store_true", help="weights in float16; input and output stay float32"
    )
    group.add_argument(
        "--int8", action="store_true", help="8 bits, calibrated on --data; onnx and openvino"
    )
    group.add_argument(
        "--calib-images",
        type=int,
        help=f"training images that calibrate --int8; default {CALIB_IMAGES}",
    )
    group.add_argument(
        "--opset", type=int, help=f"of ONNX, {OPSETS[0]} to {OPSETS[-1]}; default {OPSET}"
    )
    group.add_argument("--simplify", action="store_true", help="simplify the graph with onnxslim")
    group = parser.add_argument_group("input")
    group.add_argument(
        "--imgsz",
        "--img",
        "--img-size",
        type=int,
        nargs="+",
        default=[640],
        help="pixels: a side, or height and width",
    )
    group.add_argument("--batch-size", type=int, default=1, help="images at once")
    group.add_argument(
        "--dynamic",
        action="store_true",
        help="take any batch, height and width (onnx and openvino)",
    )
    group = parser.add_argument_group("NMS inside the graph")
    group.add_argument(
        "--nms",
        action="store_true",
        help="give detections [batch, max-det, 6]: x1, y1, x2, y2, confidence, class",
    )
    group.add_argument("--conf-thres", type=float, help="least confidence, 0 to 1; default 0.25")
    group.add_argument("--iou-thres", type=float, help="0 to 1; default 0.45")
    group.add_argument("--max-det", type=int, help="detections per image; default 300")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="cpu", help="cpu, mps or 0; '' takes the best")
    group.add_argument(
        "--workers", type=int, default=0, help="loader processes, at most; default none"
    )
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
    options.include = list(dict.fromkeys(options.include))
    if len(options.imgsz) > 2:
        parser.error(f"--imgsz takes one or two numbers, not {len(options.imgsz)}")
    check_imgsz(parser, options)
    check_least(parser, options, LEAST_VALUES)
    check_shares(parser, options, ("conf_thres", "iou_thres"))
    check_device(parser, options)
    check_int8(parser, options)
    check_formats(parser, options)
    for name, default in NMS_DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
        elif not options.nms:
            parser.error(f"{flag_of(name)} acts only with --nms")
    return options


def check_int8(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What 8 bits need, and do not go with; sets the defaults of --opset and --calib-images."""
    if options.int8 and options.half:
        parser.error("--int8 and --half exclude each other")
    if options.int8 and options.data is None:
        parser.error("--int8 needs --data, whose training images show how large activations get")
    if options.calib_images is None:
        options.calib_images = CALIB_IMAGES
    elif not options.int8:
        parser.error("--calib-images acts only with --int8")
    if options.opset is not None and options.opset not in OPSETS:
        parser.error(f"--opset is {options.opset}, expected {OPSETS[0]} to {OPSETS[-1]}")
    if options.int8 and options.opset is not None and options.opset < OPSET_FOR_INT8:
        parser.error(f"--int8 needs --opset {OPSET_FOR_INT8} or later, not {options.opset}")


def check_formats(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse flags that a format has no use for."""
    for name, formats in REFUSED.items():
        for export_format in formats:
            if getattr(options, name) and export_format in options.include:
                parser.error(f"{flag_of(name)} does not act on {export_format}; run it by itself")
    if not set(options.include) & set(THROUGH_ONNX):
        for name in ("opset", "simplify"):
            if getattr(options, name):
                parser.error(f"{flag_of(name)} acts only on {', '.join(THROUGH_ONNX)}")
    if options.opset is None:
        options.opset = OPSET
