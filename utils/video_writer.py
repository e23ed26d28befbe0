"""Writing a video that lasts as long as what it shows."""

from __future__ import annotations

import math
from pathlib import Path

import cv2
import numpy as np

from utils.augment import letterbox
from utils.image_files import is_unicode, silent_decoder

_CODEC = "mp4v"  # MPEG-4 part 2: every build of OpenCV has it


class VideoWriter:
    """An mp4 file, opened with the first picture, playable once closed.

    Frames of a file follow each other. Those of a stream come when they come: with `time_s` each
    is repeated, or left out, so that the video runs as fast as the world did.
    """

    def __init__(self, path: Path, fps: float) -> None:
        self.path, self.fps = path, fps
        self.num_written = 0
        self._writer: cv2.VideoWriter | None = None
        self._hw = (0, 0)
        self._last: np.ndarray | None = None

    def write(self, image: np.ndarray, time_s: float | None = None) -> None:
        """Add a picture (uint8 BGR [H, W, 3]); one of another size than the first is fitted in.

        Args:
            image: what is to be seen.
            time_s: since the first picture, seconds; None for the frame after the last.

        Raises:
            OSError: no video can be written there.
        """
        if self._writer is None:
            self._open(image)
        if image.shape[:2] != self._hw:
            image = letterbox(image, self._hw, enlarge=True)[0]
        copies = 1
        if time_s is not None:
            # What was to be seen until now, then this one.
            self._hold(math.floor(time_s * self.fps) - self.num_written)
            copies = math.floor(time_s * self.fps) + 1 - self.num_written
        self._last = image
        self._hold(copies)

    def repeat(self) -> None:
        """The last picture once more."""
        self._hold(1)

    def close(self) -> None:
        """Complete the file.

        Raises:
            OSError: it did not become whole, which OpenCV does not tell.
        """
        if self._writer is None:
            return
        self._writer.release()
        self._writer = None
        with silent_decoder():
            written = cv2.VideoCapture(str(self.path))
            count = int(written.get(cv2.CAP_PROP_FRAME_COUNT))
            written.release()
        if count < self.num_written:
            raise OSError(
                f"{self.path}: {max(count, 0)} of {self.num_written} frames could be written; free "
                "some space there, or write elsewhere"
            )

    def _open(self, image: np.ndarray) -> None:
        if not is_unicode(self.path):
            raise OSError(f"{self.path}: videos need a name in UTF-8; choose another --project")
        self._hw = (image.shape[0], image.shape[1])
        codec = cv2.VideoWriter.fourcc(*_CODEC)
        self._writer = cv2.VideoWriter(str(self.path), codec, self.fps, self._hw[::-1])
        if not self._writer.isOpened():
            raise OSError(
                f"{self.path}: OpenCV cannot write a video of {self._hw[1]} x {self._hw[0]} "
                f"pixels, {self.fps:g} frames per second; --nosave does without"
            )

    def _hold(self, copies: int) -> None:
        if self._writer is None or self._last is None:
            return
        for _ in range(copies):
            self._writer.write(self._last)
            self.num_written += 1
