"""The flags of detect.py: names, defaults, and what can be checked without a file or torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from utils.flags.checks import (
    add_run_dir_flags,
    check_device,
    check_half,
    check_imgsz,
    check_least,
    check_shares,
    flag_of,
    new_parser,
)

LEAST_VALUES = {"max_det": 1, "classes": 0, "line_thickness": 1, "vid_stride": 1}
DRAWING = ("line_thickness", "hide_labels", "hide_conf")


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """All flags with their defaults."""
    parser = new_parser(description)
    group = parser.add_argument_group("network and source")
    group.add_argument(
        "--weights",
        default="yolov5s.pt",
        help="our checkpoint, a public YOLOv5 .pt or a known name, or an exported network",
    )
    group.add_argument(
        "--source",
        required=True,
        help="image, video, folder, 'glob', .txt list of files, camera number, or the address of "
        "a stream, video or image (rtsp://, http://)",
    )
    group.add_argument("--vid-stride", type=int, default=1, help="take every n-th frame")
    group = parser.add_argument_group("detection")
    group.add_argument(
        "--imgsz", "--img", "--img-size", type=int,
        help="long side of the input in pixels; default 640, or what an export was made for",
    )  # fmt: skip
    group.add_argument("--conf-thres", type=float, default=0.25, help="least confidence, 0 to 1")
    group.add_argument("--iou-thres", type=float, help="of NMS, 0 to 1; default 0.45")
    group.add_argument("--max-det", type=int, default=1000, help="detections per image, at most")
    group.add_argument("--classes", type=int, nargs="+", help="numbers of the classes to keep")
    group.add_argument(
        "--agnostic-nms", action="store_true", help="boxes suppress those of other classes too"
    )
    group.add_argument(
        "--augment", action="store_true", help="three passes, scaled and mirrored, put together"
    )
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="", help="'' (best), cpu, mps or 0")
    group.add_argument("--half", action="store_true", help="float16; needs a GPU")
    group = parser.add_argument_group("results")
    group.add_argument("--save-txt", action="store_true", help="labels/<image>.txt in YOLO form")
    group.add_argument("--save-conf", action="store_true", help="confidences in these files")
    group.add_argument("--save-crop", action="store_true", help="crops/<class>/<image>_<n>.jpg")
    group.add_argument("--nosave", action="store_true", help="no pictures and videos")
    group.add_argument("--view-img", action="store_true", help="show them in a window; q ends")
    group.add_argument("--line-thickness", type=int, help="of boxes, pixels; default: by size")
    group.add_argument("--hide-labels", action="store_true", help="boxes only")
    group.add_argument("--hide-conf", action="store_true", help="class names, no confidences")
    add_run_dir_flags(group, "detect")
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
    if not options.source.strip():
        parser.error("--source is empty")
    if options.save_conf and not options.save_txt:
        parser.error("--save-conf acts only with --save-txt")
    if options.nosave and not options.view_img:
        for name in DRAWING:
            if getattr(options, name):
                parser.error(f"{flag_of(name)} does not act with --nosave: nothing is drawn")
    check_shares(parser, options, ("conf_thres", "iou_thres"))
    check_imgsz(parser, options)
    check_least(parser, options, LEAST_VALUES)
    check_device(parser, options)
    check_half(parser, options)
    return options
