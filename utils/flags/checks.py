"""Checks that the parsers share. A mistake ends the program with `parser.error`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable, Mapping

from utils.device_text import gpu_indices

WORKERS_HELP = "loader processes, at most; default: 8 beside a GPU, none where the CPU computes"


def flag_of(name: str) -> str:
    """The flag of an option, as it is typed."""
    return "--" + name.replace("_", "-")


def check_least(
    parser: argparse.ArgumentParser, options: argparse.Namespace, least: Mapping[str, float]
) -> None:
    """Numbers, alone or several, must be finite and at least so large; None and words pass."""
    for name, low in least.items():
        given = getattr(options, name)
        for value in given if isinstance(given, list | tuple) else [given]:
            if isinstance(value, int | float) and not low <= value < math.inf:
                parser.error(f"{flag_of(name)} is {value}, expected at least {low}")


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


def number_or_auto(text: str) -> float | str:
    """What argparse calls for a rate."""
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, not {text!r}") from None
