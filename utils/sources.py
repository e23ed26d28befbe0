"""Where pictures come from: image files, videos, cameras, streams.

`find_sources` says what the text of `--source` means, `FrameReader` yields the pictures one by one.
What cannot be read is logged, kept in `problems`, and passed over.
"""

from __future__ import annotations

import glob
import itertools
import logging
import math
import os
import re
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

import cv2
import numpy as np

from utils.image_address import is_image_address, read_image_address
from utils.image_files import (
    IMAGE_SUFFIXES,
    is_image_name,
    is_unicode,
    read_image,
    silent_decoder,
)
from utils.lookup import SOURCES, expand_home, no_such_source
from utils.regular_file import read_regular

LOGGER = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts"}
    | {".mts", ".m2ts", ".3gp", ".ogv", ".asf", ".gif"}
)
# Of the addresses that end so, what is there has an end, whether it says how long it is or not.
WITH_AN_END = VIDEO_SUFFIXES - {".ts", ".flv"}
SCHEMES = frozenset({"rtsp", "rtsps", "rtmp", "http", "https", "tcp", "udp", "rtp", "srt"})

RECONNECT_WAITS_S = (1.0, 2.0, 4.0)  # before each attempt to get a lost stream back
STREAM_TIMEOUT_MS = 10_000  # silence after which a stream counts as lost
MAX_BROKEN = 500  # frames in a row: then the rest of a video is lost
MAX_BROKEN_AT_END = 10  # the same where no more frames are stated, as that is an estimate
MAX_STATED = 10**8  # frames, 46 days of them; a file that states more states nothing
MAX_BROKEN_LIVE = 3  # failures in a row: then a stream is lost
MAX_LIST_BYTES = 1 << 28
MAX_CAMERA_DIGITS = 9
FALLBACK_FPS = 25.0  # where a camera or a file does not say


class Sources(NamedTuple):
    """Either files, or one camera number or address: of a stream, a video or an image."""

    files: tuple[Path, ...] = ()
    address: str | int | None = None

    @property
    def has_clips(self) -> bool:
        """Whether there is anything else than images."""
        if self.address is not None:
            return not self.is_image_address
        return not all(is_image_name(path.name) for path in self.files)

    @property
    def is_image_address(self) -> bool:
        """Whether there is one image, elsewhere."""
        return isinstance(self.address, str) and is_image_address(self.address)


class Frame(NamedTuple):
    """A picture and where it is from."""

    image: np.ndarray  # uint8 BGR [H, W, 3]
    origin: str  # the file or, without passwords, the address
    number: int | None = None  # in a video or stream, from 1; None: an image file
    fps: float = 0.0  # at which its video shows these frames: 1 / n of its own for every n-th
    time_s: float | None = None  # of a stream: when it came, since the first one
    is_repeat: bool = False  # a copy of the picture before, for a frame that cannot be decoded


# ----------------------------------------------------------------------------------- what is there
def find_sources(text: str) -> Sources:
    """Say what `--source` means.

    Args:
        text: a camera number, the address of a stream, video or image, an image or video file, a
            folder (without its subfolders), a pattern with `*`, `?` or `**`, or a `.txt` list of
            files, one a line, relative to the list's folder or failing that to the working
            directory.

    Raises:
        FileNotFoundError: there is no such file, or nothing fits the pattern.
        ValueError: there is neither an image nor a video in it.
    """
    path = expand_home(text)
    if text.isdecimal() and len(text) <= MAX_CAMERA_DIGITS and not path.exists():
        return Sources(address=int(text))
    if "://" in text:
        scheme = _scheme_of(text)
        if scheme not in SCHEMES:
            known = ", ".join(sorted(SCHEMES))
            raise ValueError(f"{text}: unknown kind of address {scheme}://; known are {known}")
        return Sources(address=text)
    if path.is_dir():
        return Sources(_media_in(path))
    if path.is_file():
        if path.suffix.lower() == ".txt":
            return Sources(_read_list(path))
        if not is_media(path):
            raise ValueError(f"{path}: neither an image nor a video; expected {SOURCES}")
        return Sources((path,))
    if glob.has_magic(text):
        found = sorted(map(Path, glob.glob(str(path), recursive=True)))  # noqa: PTH207 (takes absolute patterns)
        if not found:
            raise FileNotFoundError(f"{text}: no file fits this pattern")
        return Sources(_only_media(found, text))
    raise no_such_source(text)


def _scheme_of(address: str) -> str:
    try:
        return urlsplit(address).scheme.lower()
    except ValueError as error:
        raise ValueError(f"{describe_address(address)}: not an address ({error})") from None


def is_media(path: Path) -> bool:
    """Whether the suffix is that of an image or a video."""
    is_video = path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".")
    return is_video or is_image_name(path.name)


def _media_in(folder: Path) -> tuple[Path, ...]:
    found = sorted(path for path in folder.iterdir() if path.is_file())
    if not any(map(is_media, found)) and _has_media_below(folder):
        raise ValueError(
            f"{folder}: has images and videos in subfolders only; for these: '{folder}/**/*'"
        )
    return _only_media(found, str(folder))


def _has_media_below(folder: Path) -> bool:
    """Whether any of its subfolders has some; what cannot be read, or goes meanwhile, has none."""
    return any(is_media(Path(name)) for *_, names in os.walk(folder) for name in names)


def _only_media(found: list[Path], where: str) -> tuple[Path, ...]:
    media = tuple(path for path in found if is_media(path) and path.is_file())
    if not media:
        suffixes = " ".join(sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES))
        raise ValueError(f"{where}: no image and no video there; expected files of {suffixes}")
    return media


def _read_list(source: Path) -> tuple[Path, ...]:
    try:
        lines = read_regular(source, MAX_LIST_BYTES).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not a text file in UTF-8: {error}") from None
    paths = []
    for number, line in enumerate(lines, 1):
        entry = line.strip()
        if not entry:
            continue
        path = source.parent / expand_home(entry)
        if not is_media(path):
            raise ValueError(
                f"{source}:{number}: {entry!r} has no suffix of an image or video; a stream or a "
                "camera must be the only --source"
            )
        paths.append(Path(entry) if not path.exists() and Path(entry).exists() else path)
    if not paths:
        raise ValueError(f"{source}: an empty list; expected the path of an image or video a line")
    return tuple(dict.fromkeys(paths))


def describe_address(address: str | int) -> str:
    """A camera or stream as it may be shown: without user, password, and what follows a `?`."""
    if isinstance(address, int):
        return f"camera {address}"
    return re.sub(r"//[^/@]*@", "//", address.partition("?")[0])


# ----------------------------------------------------------------------------------------- reading
class FrameReader:
    """Yields the pictures of all sources in order.

    Files are read in the loop. A camera or a stream is read by a thread that keeps the newest frame
    alone, so that no frame is old when it is looked at, however long the last one took.

    Args:
        sources: from `find_sources`.
        vid_stride: of videos and streams, every n-th frame.

    Raises:
        OSError: the camera, stream or image elsewhere cannot be opened.
    """

    def __init__(self, sources: Sources, vid_stride: int = 1) -> None:
        self.sources, self.vid_stride = sources, vid_stride
        self.problems: list[str] = []
        self._live_capture: cv2.VideoCapture | None = None
        if sources.address is not None and not sources.is_image_address:
            self._live_capture = self._open_live(sources.address)  # or not: before a run begins
        self._picture: np.ndarray | None = None
        if sources.is_image_address:
            self._picture = self._fetch(str(sources.address))

    def count(self) -> int | None:
        """About how many pictures there will be; None for a stream, or if a file does not say."""
        if self._picture is not None:
            return 1
        if self.sources.address is not None:
            return None
        total = 0
        for path in self.sources.files:
            num_frames = 1
            if not is_image_name(path.name):
                capture = _open_capture(str(path))
                is_open, num_frames = capture.isOpened(), _stated_frames(capture)
                capture.release()
                if is_open and not num_frames:
                    return None
            total += math.ceil(num_frames / self.vid_stride)
        return total

    def __iter__(self) -> Generator[Frame, None, None]:
        address = self.sources.address
        if self._picture is not None:
            yield Frame(self._picture, describe_address(str(address)))
        elif address is not None:
            yield from self._live(address)
        for path in self.sources.files:
            if is_image_name(path.name):
                yield from self._image(path)
            else:
                yield from self._video_file(path)

    def _report(self, problem: str) -> None:
        LOGGER.warning("passed over: %s", problem)
        self.problems.append(problem)

    def _image(self, path: Path) -> Iterator[Frame]:
        try:
            with silent_decoder():
                image = read_image(path)
        except OSError as error:
            self._report(f"{path}: {error.strerror}" if error.strerror else str(error))
        else:
            yield Frame(image, str(path))

    def _video_file(self, path: Path) -> Iterator[Frame]:
        capture = _open_capture(str(path))
        try:
            if capture.isOpened():
                yield from self._video(capture, str(path))
            elif is_unicode(path):
                self._report(f"{path}: not a video, or a damaged one")
            else:
                self._report(f"{path}: videos need a name in UTF-8; rename it")
        finally:
            capture.release()

    def _fetch(self, address: str) -> np.ndarray:
        try:
            return read_image_address(address)
        except OSError as error:
            raise OSError(f"{describe_address(address)}: {error}") from None

    def _open_live(self, address: str | int) -> cv2.VideoCapture:
        capture = _open_capture(address)
        if not capture.isOpened():
            raise OSError(
                f"{describe_address(address)}: cannot be opened; expected a camera or a stream "
                "that is on"
            )
        return capture

    def _live(self, address: str | int) -> Iterator[Frame]:
        origin = describe_address(address)
        capture = self._live_capture or self._open_live(address)
        self._live_capture = None
        suffix = PurePosixPath(urlsplit(origin).path).suffix.lower()
        if _stated_frames(capture) or suffix in WITH_AN_END:  # a file elsewhere
            try:
                yield from self._video(capture, origin)
            finally:
                capture.release()
        else:
            yield from self._stream(capture, address, origin)

    def _video(self, capture: cv2.VideoCapture, origin: str) -> Iterator[Frame]:
        """All frames; a copy of its neighbour stands in for one that is broken, for the length."""
        stated, rate = _stated_frames(capture), _frame_rate(capture)
        fps = rate / self.vid_stride
        reached = 0.0  # of the stated frames: where their distances vary, these are the time
        last: Frame | None = None
        broken: list[int] = []  # numbers in a row, up to now
        owed: list[int] = []  # numbers of copies that are due
        for number in itertools.count(1):
            is_due = (number - 1) % self.vid_stride == 0
            image = _next_image(capture, decode=is_due)
            if image is None:
                broken.append(number)
                if len(broken) >= (MAX_BROKEN if number < stated else MAX_BROKEN_AT_END):
                    break
                continue
            reached = max(number, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000 * rate + 1)
            if broken:
                self._report(f"{origin}: {_span(broken)} cannot be decoded")
                owed += [n for n in broken if (n - 1) % self.vid_stride == 0]
                broken = []
            if is_due and last is None:
                last = Frame(image, origin, number, fps)
                yield last
                is_due = False
            if last is not None:
                yield from (last._replace(number=due, is_repeat=True) for due in owed)
                owed = []
            if is_due:
                last = Frame(image, origin, number, fps)
                yield last
        if last is None:
            remedy = "; try to download it first" if "://" in origin else ""
            self._report(f"{origin}: no frame can be decoded{remedy}")
        elif stated - reached > 1 + stated // 50:  # some files only estimate how many there are
            self._report(f"{origin}: ends after frame {broken[0] - 1} of {stated}")

    def _stream(
        self, capture: cv2.VideoCapture, address: str | int, origin: str
    ) -> Iterator[Frame]:
        fps = _frame_rate(capture) / self.vid_stride
        newest = _NewestFrame(capture, address, origin, self.vid_stride)
        try:
            start = None
            for number, came_at, image in newest:
                start = came_at if start is None else start
                yield Frame(image, origin, number, fps, came_at - start)
            problem = f"{origin}: lost, {len(RECONNECT_WAITS_S)} attempts did not bring it back"
            LOGGER.warning("%s", problem)
            self.problems.append(problem)
        finally:
            newest.close()


class _NewestFrame:
    """Reads something live in a thread; iterating gives the newest frame, each at most once."""

    def __init__(
        self, capture: cv2.VideoCapture, address: str | int, origin: str, vid_stride: int
    ) -> None:
        self.address, self.origin, self.vid_stride = address, origin, vid_stride
        self._capture = capture
        self._changed = threading.Condition()
        self._newest: tuple[int, float, np.ndarray] | None = None
        self._ended = self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, float, np.ndarray]]:
        """Number from 1, time in seconds, uint8 BGR [H, W, 3]; ends when the source is lost."""
        while True:
            with self._changed:
                while self._newest is None and not self._ended:
                    self._changed.wait(0.2)  # not for ever: Ctrl-C must get through on Windows
                if self._newest is None:
                    return
                newest, self._newest = self._newest, None
            yield newest

    def close(self) -> None:
        """Stop the thread, unless it hangs in a read: that ends by its own time limit."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=1)

    def _run(self) -> None:
        number = failures = attempts = num_since = 0  # the latter: frames of this connection
        try:
            while not self._closed:
                image = _next_image(self._capture, decode=number % self.vid_stride == 0)
                if image is not None:
                    if failures and not attempts:
                        LOGGER.warning("passed over: %s: a broken frame", self.origin)
                    failures = 0
                    number, num_since = number + 1, num_since + 1
                    if num_since > 1:  # a single one is a picture that is served again and again
                        attempts = 0
                    if image.size:
                        self._offer((number, time.monotonic(), image))
                elif failures < MAX_BROKEN_LIVE:
                    failures += 1
                elif attempts < len(RECONNECT_WAITS_S):
                    self._reconnect(RECONNECT_WAITS_S[attempts])
                    attempts, num_since = attempts + 1, 0
                else:
                    break
        finally:
            self._capture.release()
            with self._changed:
                self._ended = True
                self._changed.notify_all()

    def _offer(self, newest: tuple[int, float, np.ndarray]) -> None:
        with self._changed:
            self._newest = newest
            self._changed.notify_all()

    def _reconnect(self, wait_s: float) -> None:
        LOGGER.warning("%s: lost; trying again in %g s", self.origin, wait_s)
        self._capture.release()
        with self._changed:
            self._changed.wait_for(lambda: self._closed, wait_s)
        if not self._closed:
            self._capture = _open_capture(self.address)


def _open_capture(source: str | int) -> cv2.VideoCapture:
    """A capture, opened or not; what is wrong with a source is for us to say, not for FFmpeg."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    if isinstance(source, str) and not is_unicode(source):
        return cv2.VideoCapture()
    with silent_decoder():
        if isinstance(source, int):
            return cv2.VideoCapture(source)
        if "://" not in source:
            return cv2.VideoCapture(source)
        limits = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, STREAM_TIMEOUT_MS]
        limits += [cv2.CAP_PROP_READ_TIMEOUT_MSEC, STREAM_TIMEOUT_MS]
        return cv2.VideoCapture(source, cv2.CAP_FFMPEG, limits)


def _next_image(capture: cv2.VideoCapture, *, decode: bool) -> np.ndarray | None:
    """The next frame; an empty array for a whole one that need not be seen; None: a broken one."""
    try:
        if not capture.grab():
            return None
        if not decode:
            return np.zeros((0, 0, 3), np.uint8)
        is_whole, image = capture.retrieve()
    except cv2.error:
        return None
    return image if is_whole and image is not None and image.size else None


def _stated_frames(capture: cv2.VideoCapture) -> int:
    """How many a video has, by its own estimate; 0 where it does not say, or nonsense."""
    count = capture.get(cv2.CAP_PROP_FRAME_COUNT)
    return int(count) if 1 <= count <= MAX_STATED else 0


def _frame_rate(capture: cv2.VideoCapture) -> float:
    """Frames per second as stated, if that can be."""
    fps = capture.get(cv2.CAP_PROP_FPS)
    return fps if math.isfinite(fps) and 0.1 <= fps <= 1000 else FALLBACK_FPS


def _span(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return f"frame {numbers[0]}"
    return f"frames {numbers[0]} to {numbers[-1]}"
