"""Opening a file that somebody else made: a regular one, of a size that can be meant."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: str | Path, max_bytes: int) -> BinaryIO:
    """Open a file for reading, unbuffered, if it is one and not too large.

    A pipe or a device in the place of a file would be waited for or read without end.

    Raises:
        OSError: as `open` does; it is a pipe, a device or a socket; it is larger than `max_bytes`.
    """
    file = open(path, "rb", buffering=0, opener=_open_at_once)  # noqa: SIM115
    status = os.fstat(file.fileno())
    problem = ""
    if not stat.S_ISREG(status.st_mode):
        problem = "not a regular file but a pipe or a device; remove it or put a file there"
    elif status.st_size > max_bytes:
        problem = f"{status.st_size} bytes, no more than {max_bytes} are read; remove or shorten it"
    if problem:
        file.close()
        raise OSError(f"{os.fspath(path)}: {problem}")
    return file  # type: ignore[return-value]  # a RawIOBase reads and seeks as well


def read_regular(path: str | Path, max_bytes: int) -> bytes:
    """All of such a file; errors name it, also those of a drive that fails while it is read."""
    with open_regular(path, max_bytes) as file:
        try:
            content = file.read()
        except OSError as error:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    return content or b""  # None: a file of the system that would wait for what comes next


def why_no_file(path: Path, absent: str = "no such file") -> str:
    """In a few words, what is wrong with a path at which there is no regular file."""
    if path.is_dir():
        return "a folder, not a file"
    if path.exists():
        return "not a regular file but a pipe or a device"
    return "a link that leads to no file" if path.is_symlink() else absent


def _open_at_once(path: str, flags: int) -> int:
    """Open a pipe without waiting for somebody to write into it."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
