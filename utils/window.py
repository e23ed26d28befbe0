"""Showing pictures in a window."""

from __future__ import annotations

import subprocess
import sys

import cv2
import numpy as np

_TRIAL = "import cv2; cv2.namedWindow('trial'); cv2.destroyAllWindows()"
_KEYS_TO_END = frozenset({ord("q"), 27})  # 27: Esc
_POLL_MS = 50


def check_display() -> None:
    """Find out whether a window can be opened.

    Another process tries, because without a display some builds of OpenCV end the whole program.

    Raises:
        ValueError: it cannot.
    """
    done = subprocess.run([sys.executable, "-c", _TRIAL], capture_output=True, check=False)
    if done.returncode:
        raise ValueError(
            "--view-img: no window can be opened here (no display, or OpenCV without windows as "
            "in opencv-python-headless); leave it away and look at the saved pictures"
        )


def show(title: str, image: np.ndarray, *, wait: bool) -> bool:
    """Show a BGR picture; False once the user wants no more (q, Esc, or the window closed).

    Args:
        title: of the window, which is opened at the first call.
        image: uint8 BGR [H, W, 3].
        wait: until a key is pressed.
    """
    cv2.namedWindow(title, cv2.WINDOW_NORMAL | cv2.WINDOW_KEEPRATIO)
    cv2.imshow(title, image)
    while True:
        key = cv2.waitKey(_POLL_MS if wait else 1)
        if key >= 0:
            return key & 0xFF not in _KEYS_TO_END
        if cv2.getWindowProperty(title, cv2.WND_PROP_VISIBLE) < 1:
            return False
        if not wait:
            return True
