"""The flags of demo.py: names, defaults, and what can be checked before the first stage."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from utils.flags.checks import (
    WORKERS_HELP,
    check_device,
    check_imgsz,
    check_least,
    new_parser,
    number_or_auto,
)

# Epochs of dense, sparse and fine-tuning; image size; share of the channels to remove; rate.
EPOCHS = (45, 35, 15)
IMGSZ = 160
PERCENT = 0.5
SPARSITY_RATE = "auto"

LEAST_VALUES = {
    **dict.fromkeys(("batch_size", "epochs"), 1),
    **dict.fromkeys(("sparsity_rate", "workers"), 0),
}


def parse_args(
    argv: Sequence[str] | None = None, description: str | None = None
) -> argparse.Namespace:
    """Parse and check; a mistake found by a later stage would cost minutes.

    Args:
        argv: the command line; None takes that of the program.
        description: what `--help` says above the flags.
    """
    parser = new_parser(description)
    parser.add_argument("--data", default="data/shapes.yaml", help="data set yaml")
    parser.add_argument("--cfg", default="yolov5n.yaml", help="model yaml")
    parser.add_argument("--hyp", default="hyp.shapes.yaml", help="hyperparameter yaml")
    parser.add_argument("--imgsz", type=int, default=IMGSZ, help="side of the input, pixels")
    parser.add_argument("--batch-size", type=int, default=16, help="images")
    parser.add_argument(
        "--epochs",
        type=int,
        nargs=3,
        default=EPOCHS,
        metavar=("DENSE", "SPARSE", "FINETUNE"),
        help=f"epochs of the three training stages, default {EPOCHS}",
    )
    parser.add_argument(
        "--sparsity_rate",
        type=number_or_auto,
        default=SPARSITY_RATE,
        help="of the sparse stage: a number or auto",
    )
    parser.add_argument("--percent", type=float, default=PERCENT, help="share of channels to cut")
    parser.add_argument("--device", default="", help="'' (best), cpu, mps or 0")
    parser.add_argument("--workers", type=int, help=WORKERS_HELP)
    parser.add_argument("--project", default="runs/demo", help="parent folder")
    options = parser.parse_args(argv)
    check_imgsz(parser, options)
    check_least(parser, options, LEAST_VALUES)
    if not 0 < options.percent < 1:
        parser.error(f"--percent is {options.percent:g}, expected more than 0 and less than 1")
    check_device(parser, options)
    return options
