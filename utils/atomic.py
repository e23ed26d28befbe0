"""Writing a file so that it appears complete or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

STAGING, STAGING_SECONDS = ".staging-", 24 * 3600  # after which nobody can still be at work in it


@contextmanager
def atomic_write(path: str | Path, *, is_precious: bool = True) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the name `path` when the block ends without an error.

    Until then it has a temporary name in the same folder. The content is on the disk before the
    name changes, so neither a killed process nor a power cut leaves half a file; after an error
    the previous file, if any, is as it was. What is not precious is not waited for, which takes
    milliseconds: a power cut may leave a part of it.

    Raises:
        OSError: it cannot be written; `filename` is `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{_own_mark()}.tmp")
    try:
        with name_in_errors(path, temporary):
            with temporary.open("xb") as file:
                yield file
                file.flush()
                if is_precious:
                    os.fsync(file.fileno())
            temporary.replace(path)
    finally:
        with contextlib.suppress(OSError):  # the drive has gone, for example
            temporary.unlink(missing_ok=True)


def _own_mark() -> str:
    """For temporary names: containers that share a drive may have the same process numbers."""
    return secrets.token_hex(4)


@contextmanager
def name_in_errors(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Errors of the system within the block name this file.

    A disk that is full does not say for which file, and a temporary name says nothing to users. Of
    a folder, what lies in it is named likewise.
    """
    try:
        yield
    except OSError as error:
        name = error.filename
        if isinstance(name, str) and temporary is not None and Path(name).is_relative_to(temporary):
            path, name = path / Path(name).relative_to(temporary), None
        if error.errno is not None and name is None:
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


@contextmanager
def staging_folder(beside: str | Path) -> Iterator[Path]:
    """Yield an empty folder in that folder, for files that move there once they are good.

    It goes with all that is left in it when the block ends, whatever happened. What a killed
    process has left there goes a day later, when the next one begins.
    """
    for left_over in Path(beside).glob(f"{STAGING}*"):
        with contextlib.suppress(OSError):  # another process may be doing the same
            if time.time() - left_over.stat().st_mtime > STAGING_SECONDS:
                shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(prefix=STAGING, dir=beside) as folder:
        yield Path(folder)


def move_into_place(source: Path, target: Path) -> None:
    """Give a finished file or folder its name, on the same drive, instead of what has it now.

    The content is on the disk before the name changes. A folder cannot be replaced in one step: if
    the process is killed in between, the old one lies beside the new name with `.old` behind.
    """
    for path in [source, *source.rglob("*")]:
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    if not target.is_dir():
        source.replace(target)
        return
    old = target.with_name(f"{target.name}.{_own_mark()}.old")
    target.replace(old)
    try:
        source.replace(target)
    except OSError:
        old.replace(target)
        raise
    shutil.rmtree(old)
