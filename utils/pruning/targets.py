"""What may be left of a cost, as it is typed: a number with a unit, or a share such as `50%`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

# What may stand behind the number of a target, and what it is worth.
TARGET_UNITS: Mapping[str, Mapping[str, float]] = {
    "gflops": {"": 1, "G": 1, "M": 1e-3},
    "params": {"": 1, "k": 1e3, "K": 1e3, "M": 1e6},
    "latency": {"": 1, "ms": 1},
}


class Target(NamedTuple):
    """What may be left of a cost."""

    text: str  # as it was typed
    number: float
    is_share: bool  # of the cost of the network as it is

    def of(self, cost: float) -> float:
        """In units of the cost."""
        return self.number * cost if self.is_share else self.number


def parse_target(text: str, units: Mapping[str, float]) -> Target:
    """A number with one of the units behind it, or a share such as `50%`.

    Raises:
        ValueError: neither, or not above 0, or a share of 100 % and more.
    """
    typed = text.strip()
    number = typed.rstrip("%" + "".join(units)).rstrip()
    unit = typed[len(number) :].strip()
    is_share = unit == "%"
    try:
        value = float(number) * (0.01 if is_share else units[unit])
    except (ValueError, KeyError):
        raise ValueError(f"{text!r} is no number and no share such as 50%") from None
    if not 0 < value < (1 if is_share else math.inf):
        raise ValueError(f"{typed} is not {'between 0% and 100%' if is_share else 'above 0'}")
    return Target(typed, value, is_share)
