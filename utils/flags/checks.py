"""Flags and checks that the parsers share. A mistake ends the program with `parser.error`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from utils.device_text import gpu_indices

ROOT = Path(__file__).resolve().parents[2]
WORKERS_HELP = "loader processes, at most; default: up to 8 beside a GPU, none on a CPU"
# Pixels. One image of the largest size takes 3 GB; beyond it OpenCV fails with words of its own.
MIN_IMGSZ, MAX_IMGSZ = 32, 16384
# Beyond these a typing error is likelier than a wish; torch counts no further than to 2**63, and a
# plan of all epochs is made before the first.
MOST_VALUES = {
    "imgsz": MAX_IMGSZ,
    **dict.fromkeys(("batch_size", "nominal_batch", "latency_batch"), 1_000_000),
    **dict.fromkeys(("max_det", "epochs", "freeze"), 100_000),
    **dict.fromkeys(("recalibrate", "calibration_images", "calib_images"), 1_000_000_000),
}


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """Without flags; the description, with its commands to copy, is shown as it is written."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_download_flag(group: argparse._ArgumentGroup) -> None:
    """`--allow-download-scripts`."""
    group.add_argument(
        "--allow-download-scripts",
        action="store_true",
        help="run the `download:` command of a data set yaml that is not part of this project",
    )


def add_run_dir_flags(group: argparse._ArgumentGroup, task: str) -> None:
    """Where results go: by default `runs/<task>/exp`, `exp2` and so on."""
    group.add_argument("--project", default=str(ROOT / "runs" / task), help="parent folder")
    group.add_argument("--name", default="exp", help="folder name; a number is added")
    group.add_argument("--exist-ok", action="store_true", help="write into an existing folder")


def flag_of(name: str) -> str:
    """The flag of an option, as it is typed."""
    return "--" + name.replace("_", "-")


def check_least(
    parser: argparse.ArgumentParser, options: argparse.Namespace, least: Mapping[str, float]
) -> None:
    """Numbers, alone or several, must be finite and at least so large; None and words pass.

    Nor may they be larger than `MOST_VALUES` allows.
    """
    for name, low in least.items():
        most = MOST_VALUES.get(name, math.inf)
        for value in _listed(getattr(options, name)):
            if isinstance(value, int | float) and not low <= value < math.inf:
                parser.error(f"{flag_of(name)} is {value}, expected at least {low}")
            if isinstance(value, int | float) and value > most:
                parser.error(f"{flag_of(name)} is {value}, expected at most {most}")


def check_imgsz(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Sides of the input must be such that images can be drawn to them; None passes."""
    check_least(parser, options, {"imgsz": MIN_IMGSZ})


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


def check_shares(
    parser: argparse.ArgumentParser, options: argparse.Namespace, names: Iterable[str]
) -> None:
    """These options must be from 0 to 1; None passes."""
    for name in names:
        value = getattr(options, name)
        if value is not None and not 0 <= value <= 1:
            parser.error(f"{flag_of(name)} is {value}, expected 0 to 1")


def check_device(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """The text of `--device` must mean something."""
    try:
        gpu_indices(options.device)
    except ValueError as error:
        parser.error(str(error))


def check_half(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """`--half` cannot act where `--device` names the CPU; what '' finds is known to torch alone."""
    if options.half and is_device(options, "cpu"):
        parser.error(
            "--half needs a GPU: float16 on a CPU is emulated and many times slower than float32; "
            "leave --half away or choose another --device"
        )


def is_device(options: argparse.Namespace, *names: str) -> bool:
    """Whether `--device` says one of these words."""
    return options.device.strip().lower() in names


def number_or_auto(text: str) -> float | str:
    """What argparse calls for a rate."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, not {text!r}") from None
