"""What all pictures share: a figure without a window, text as it is, colours, class names."""

from __future__ import annotations

import atexit
import colorsys
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOGGER = logging.getLogger(__name__)
Parameters = ParamSpec("Parameters")

NAMED_CLASSES = 20  # up to here a legend or a number per cell can still be read
GREY = "0.75"
_LONGEST_NAME = 48  # characters of a class name


def draw(
    function: Callable[Parameters, None], *args: Parameters.args, **kwargs: Parameters.kwargs
) -> None:
    """Call a function that draws; a failure is a warning, as no picture is worth a run."""
    try:
        function(*args, **kwargs)
    except (ValueError, RuntimeError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        LOGGER.warning("warning: %s failed, the picture is missing: %s", function.__name__, reason)


def printable(text: str) -> str:
    """Text in one line; what has no glyph of its own (control characters) becomes a mark."""
    marks = ("�", " ")
    return "".join(char if char.isprintable() else marks[char.isspace()] for char in text)


def literal(text: str) -> str:
    """Text for matplotlib, shown as it is: `$` would start a formula, `_` hide it in a legend."""
    text = printable(text).replace("$", r"\$")
    return "\u200b" + text if text.startswith("_") else text


def class_name(name: str) -> str:
    """A class name for matplotlib, short enough to leave room for the picture."""
    return literal(name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…")


def class_colour(cls: int) -> tuple[int, int, int]:
    """RGB 0-255 of a class; neighbours in the list of classes differ clearly."""
    golden_ratio = 0.618034
    hue = (0.02 + cls * golden_ratio) % 1.0
    value = (1.0, 0.8, 0.9)[cls % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def prepare_matplotlib() -> None:
    """Give it a temporary folder, before it is imported, if there is no home to keep its files in.

    It would take one itself, but not without three lines of warning.
    """
    home = os.path.expanduser("~")  # noqa: PTH111 (Path.home fails where nothing names one)
    has_place = {"MPLCONFIGDIR", "XDG_CONFIG_HOME", "XDG_CACHE_HOME"} & os.environ.keys()
    if not has_place and not os.access(home, os.W_OK):
        folder = tempfile.mkdtemp(prefix="matplotlib-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["MPLCONFIGDIR"] = folder


def new_figure(width: float, height: float) -> Figure:
    """Inches."""
    prepare_matplotlib()
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, out: str | Path) -> None:
    """At a size that screens show in full."""
    with warnings.catch_warnings():  # a name in a script that the font lacks is drawn as boxes
        warnings.filterwarnings("ignore", "Glyph .* missing from (current )?font")
        figure.savefig(out, dpi=110)


def save_note(text: str, out: str | Path) -> None:
    """A picture that says why there is nothing to see."""
    figure = new_figure(6, 3)
    figure.text(0.5, 0.5, text, ha="center", va="center", fontsize=14, color="0.4")
    save_figure(figure, out)


def as_numpy(values: Any) -> np.ndarray:
    """Array of a tensor on any device, a list or an array."""
    return values.detach().cpu().numpy() if hasattr(values, "detach") else np.asarray(values)


def set_epoch_axis(axis: Axes, epochs: Sequence[float]) -> None:
    """Whole epochs along x, also where there is only one."""
    from matplotlib.ticker import MaxNLocator

    axis.set_xlabel("epoch")
    if len(epochs) == 1:
        axis.set_xlim(epochs[0] - 0.5, epochs[0] + 0.5)
        axis.set_xticks([epochs[0]])
    else:
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def label_classes(axis: Axes, which: str, names: Sequence[str]) -> None:
    """Class names at the ticks 0, 1, 2 ... of the axis; numbers alone above 120 classes."""
    if len(names) > 120:
        return
    names = [class_name(name) for name in names]
    few = len(names) <= NAMED_CLASSES
    style: dict[str, Any] = {"fontsize": 9 if few else 6.5}
    if which == "x":
        crowded = sum(len(name) + 2 for name in names) > 110
        style |= {"rotation": 90 if not few else 40 if crowded else 0}
        if style["rotation"] == 40:
            style |= {"ha": "right", "rotation_mode": "anchor"}
        axis.set_xticks(range(len(names)), names, **style)
    else:
        axis.set_yticks(range(len(names)), names, **style)
