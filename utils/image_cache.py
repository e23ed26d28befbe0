"""Decoded, resized images kept in memory or on disk (`--cache`)."""

from __future__ import annotations

import io
import logging
import mmap
import os
import shutil
import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np

from utils.atomic import atomic_write
from utils.device import local_world_size, num_own_cores, num_usable_cores
from utils.memory import available_memory
from utils.regular_file import read_regular

LOGGER = logging.getLogger(__name__)

MEMORY_SHARE = 0.8  # of the memory that is available now; the rest is for the training itself
DISK_SHARE = 0.9
# What `auto` may take without being asked: of the memory that is available, and at most.
SMALL_SHARE, SMALL_BYTES = 0.05, 256 * 2**20
CHECKSUM_BYTES = 4
LOOKS = 8  # at files at a time: on a network drive each takes a round trip or two


class ImageCache(Protocol):
    """What the data set asks for an image; None means: decode it yourself."""

    def get(self, index: int) -> np.ndarray | None:
        """The uint8 BGR image [H, W, 3] of this index."""
        ...


def build_image_cache(
    kind: str,
    paths: Sequence[str],
    resized_hw: np.ndarray,
    load: Callable[[int], np.ndarray | None],
    variant: str,
) -> ImageCache | None:
    """Make a cache, saying its size first.

    Args:
        kind: `ram` or `disk` reads all images now; `auto` keeps them in memory as they are read,
            where they are few.
        paths: image files.
        resized_hw: int [N, 2], the size each will have once loaded.
        load: decodes and resizes one image; None for one that is damaged.
        variant: tells apart ways of resizing, for file names.

    Returns:
        None where there is not enough room or the place cannot be written; the log says so, but
        for `auto`.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in ("auto", "ram", "disk"):
        raise ValueError(f"cache {kind!r}: expected auto, ram or disk")
    if kind == "auto":
        return RamCache.fill_as_read(resized_hw, load)
    if kind == "ram":
        return RamCache.fill(resized_hw, load)
    return DiskCache.fill(paths, resized_hw, load, variant)


# ------------------------------------------------------------------------------------------ memory
class RamCache:
    """All images in one block of memory, which forked loader workers share."""

    def __init__(self, resized_hw: np.ndarray, load: Callable[[int], np.ndarray | None]) -> None:
        sizes = resized_hw.prod(1) * 3
        self.offsets = np.concatenate([[0], np.cumsum(sizes)])
        self.shapes_hw, self.load = resized_hw, load
        self.filled = _shared_bytes(len(resized_hw)).view(bool)
        self.pixels = _shared_bytes(int(self.offsets[-1]))

    @classmethod
    def fill(
        cls, resized_hw: np.ndarray, load: Callable[[int], np.ndarray | None]
    ) -> RamCache | None:
        """Decode everything; None if it does not fit."""
        needed, free = _count_bytes(resized_hw), available_memory()
        size = f"{len(resized_hw)} images need {_gigabytes(needed)} of memory"
        share = MEMORY_SHARE / local_world_size()  # every process has a cache of its own
        if free is None:
            LOGGER.warning(
                "no image cache: %s, and this system does not say how much is free; --cache disk "
                "needs none",
                size,
            )
            return None
        if needed > share * free:
            LOGGER.warning(
                "no image cache: %s, only %s of the available %s may be used",
                size, _gigabytes(share * free), _gigabytes(free),
            )  # fmt: skip
            return None
        LOGGER.info("caching images in memory: %s", size)
        cache = cls(resized_hw, load)
        _for_each(cache._keep, range(len(resized_hw)), num_own_cores())
        return cache

    @classmethod
    def fill_as_read(
        cls, resized_hw: np.ndarray, load: Callable[[int], np.ndarray | None]
    ) -> RamCache | None:
        """Decode each image when it is asked for first; None if they are not few."""
        needed, free = _count_bytes(resized_hw), available_memory()
        room = min(SMALL_SHARE * (free or 0), SMALL_BYTES) / local_world_size()
        # Workers that are not forked would each have a cache of their own.
        if sys.platform != "linux" or needed > room:
            return None
        LOGGER.info(
            "%d images stay in memory once they are read: %.0f MiB (--cache off: they do not)",
            len(resized_hw), needed / 2**20,
        )  # fmt: skip
        return cls(resized_hw, load)

    def _keep(self, index: int) -> None:
        image = self.load(index)
        # Another size: the file has changed since the scan.
        if image is not None and image.shape[:2] == tuple(self.shapes_hw[index]):
            self._block(index)[...] = image
            self.filled[index] = True

    def _block(self, index: int) -> np.ndarray:
        block = self.pixels[self.offsets[index] : self.offsets[index + 1]]
        return block.reshape(*self.shapes_hw[index], 3)

    def get(self, index: int) -> np.ndarray | None:
        """The image, not to be written to."""
        if not self.filled[index]:
            self._keep(index)
        if not self.filled[index]:
            return None
        image = self._block(index)
        image.flags.writeable = False
        return image


def _shared_bytes(count: int) -> np.ndarray:
    """Zeros, uint8; what a forked process writes to them all see."""
    return np.frombuffer(mmap.mmap(-1, max(count, 1)), np.uint8, count)


def _count_bytes(resized_hw: np.ndarray) -> int:
    return int(resized_hw.prod(1).sum()) * 3


# -------------------------------------------------------------------------------------------- disk
class DiskCache:
    """One `.npy` file per image in a folder `image_cache` beside the folder `images`.

    Size and time of the image are part of the file's name, so a changed image is decoded anew. A
    checksum follows the pixels, as a power cut leaves zeros in files whose size is right.
    """

    def __init__(self, files: Sequence[str], resized_hw: np.ndarray) -> None:
        self.files, self.shapes_hw = files, resized_hw
        self._were_whole = np.zeros(len(files), bool)  # in this process

    @classmethod
    def fill(
        cls,
        paths: Sequence[str],
        resized_hw: np.ndarray,
        load: Callable[[int], np.ndarray | None],
        variant: str,
    ) -> DiskCache | None:
        """Write what is not there yet; None if it does not fit or cannot be written."""
        files, todo = [""] * len(paths), []

        def look(index: int) -> None:
            files[index] = _cache_file(paths[index], variant)
            if not _has_size(files[index], _count_bytes(resized_hw[index : index + 1])):
                todo.append(index)

        def keep(index: int) -> None:
            image = load(index)
            if image is not None:
                with atomic_write(files[index], is_precious=False) as stream:
                    np.save(stream, image, allow_pickle=False)
                    stream.write(_checksum(np.ascontiguousarray(image).data))

        try:
            _for_each(look, range(len(paths)), LOOKS)
            if todo and not _make_room([files[index] for index in todo], resized_hw[todo]):
                return None
            _for_each(keep, sorted(todo), num_usable_cores())  # the other processes wait for it
        except OSError as error:
            LOGGER.warning("no image cache: %s", error)
            return None
        LOGGER.info("images are cached on disk, for example %s", files[0])
        return cls(files, resized_hw)

    def get(self, index: int) -> np.ndarray | None:
        """The image, or None if the file has gone or is damaged.

        A damaged one is removed, so that the next run writes it again.
        """
        height, width = self.shapes_hw[index].tolist()
        head, num_bytes = _npy_head((height, width, 3)), height * width * 3
        try:
            content = read_regular(self.files[index], len(head) + num_bytes + CHECKSUM_BYTES)
        except OSError:
            return None
        # What stands in the file is compared, not believed: a size in it may be a lie.
        is_whole = len(content) == len(head) + num_bytes + CHECKSUM_BYTES
        is_whole = is_whole and content.startswith(head)
        pixels = memoryview(content)[len(head) : len(head) + num_bytes]
        if is_whole and not self._were_whole[index]:  # once: it takes 0.2 ms for a megabyte
            is_whole = content.endswith(_checksum(pixels))
        if not is_whole:
            with suppress(OSError):
                Path(self.files[index]).unlink()
            return None
        self._were_whole[index] = True
        return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)


def _checksum(pixels: memoryview) -> bytes:
    return zlib.crc32(pixels).to_bytes(CHECKSUM_BYTES, "little")


def _npy_head(shape: tuple[int, ...]) -> bytes:
    """With what `np.save` begins the file of a uint8 array."""
    stream = io.BytesIO()
    description = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, description)
    return stream.getvalue()


NPY_HEAD_BYTES = len(_npy_head((1, 1, 3)))  # the same for all sizes that an image can have


def _has_size(file: str, num_bytes: int) -> bool:
    """Whether an array of so many bytes is there; after a power cut it may be shorter."""
    try:
        found = os.stat(file).st_size  # noqa: PTH116 (millions)
        return found == NPY_HEAD_BYTES + num_bytes + CHECKSUM_BYTES
    except OSError:
        return False


def _cache_file(image: str, variant: str) -> str:
    # As text: a path is several times as large and slow, for each of millions of files.
    stat = os.stat(image)  # noqa: PTH116
    folder, images, name = image.rpartition(f"{os.sep}images{os.sep}")
    if not images:
        folder, _, name = image.rpartition(os.sep)
    state = f"{stat.st_size:x}-{stat.st_mtime_ns:x}"
    return f"{folder}{os.sep}image_cache{os.sep}{name}.{variant}.{state}.npy"


def _make_room(files: Sequence[str], resized_hw: np.ndarray) -> bool:
    """Make the folders and remove outdated files; False, with a warning, if space is short.

    Raises:
        OSError: a folder cannot be written.
    """
    folders = sorted({os.path.dirname(file) for file in files})  # noqa: PTH120
    for folder in folders:
        _make_writable_folder(Path(folder))
    _remove_outdated(files, folders)
    needed, free = _count_bytes(resized_hw), shutil.disk_usage(folders[0]).free
    size = f"{len(files)} images need {_gigabytes(needed)} in {folders[0]}"
    if needed > DISK_SHARE * free:
        LOGGER.warning("no image cache: %s, where %s are free", size, _gigabytes(free))
        return False
    LOGGER.info("caching images on disk: %s", size)
    return True


def _make_writable_folder(folder: Path) -> None:
    """Create a folder unless the place was meant to stay as it is.

    Raises:
        OSError: also for a superuser if no one has the permission to write there.
    """
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    if not existing.stat().st_mode & 0o222:
        raise PermissionError(f"{existing}: the folder is read-only")
    folder.mkdir(parents=True, exist_ok=True)


def _remove_outdated(files: Sequence[str], folders: Sequence[str]) -> None:
    """Remove what was cached of earlier states of these images."""
    wanted = {file.rsplit(".", 2)[0] for file in files}
    for folder in folders:
        with os.scandir(folder) as entries:
            names = [entry.path for entry in entries if entry.name.endswith(".npy")]
        for old in names:
            if old.rsplit(".", 2)[0] in wanted:
                Path(old).unlink(missing_ok=True)


def _for_each(action: Callable[[int], None], indices: Iterable[int], num_threads: int) -> None:
    """Call it for all in threads, which take the next where there is one: nothing is queued."""
    waiting = iter(indices)

    def work() -> None:
        for index in waiting:
            action(index)

    with ThreadPoolExecutor(num_threads) as pool:
        threads = [pool.submit(work) for _ in range(num_threads)]
        try:
            wait(threads, return_when=FIRST_EXCEPTION)
        finally:
            deque(waiting, maxlen=0)  # after an error or Ctrl-C the others end too
    for thread in threads:
        thread.result()


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
