"""One process at a time writes to a run folder."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"

_held: dict[Path, TextIO] = {}


def claim(run_dir: Path, job: str = "") -> None:
    """Keep other processes out of a run folder until this one ends, however it does.

    The lock is one of the system: it goes with the process, and loader processes do not inherit
    it. Where the file system has none, nobody is kept out.

    Args:
        run_dir: the folder.
        job: by which `find_claimed` finds it again; without one it stays that of an earlier claim.

    Raises:
        OSError: another process has it, or the folder cannot be written.
    """
    run_dir = run_dir.resolve()
    if run_dir in _held:
        return
    file = (run_dir / NAME).open("a+", encoding="utf-8", errors="replace")
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().splitlines()[1:] or ["another process"]
        file.close()
        raise OSError(
            f"{run_dir}: {holder[0]} is writing there; wait until it has ended, or stop it first "
            f"(delete {NAME} there if its machine is gone)"
        ) from None
    except OSError:
        pass  # a file system without locks
    file.seek(0)
    job = job or file.readline().strip()
    file.truncate(0)
    file.write(f"{job}\nprocess {os.getpid()} on {platform.node()}\n")
    file.flush()
    _held[run_dir] = file


def release(run_dir: Path) -> None:
    """Let another process have the folder."""
    file = _held.pop(run_dir.resolve(), None)
    if file is not None:
        file.close()


def find_claimed(project: Path, job: str) -> Path | None:
    """The newest folder below `project` that another process of this job has claimed."""
    folders = [path.parent for path in project.glob(f"*/{NAME}")]
    # To look into a lock of this process would let go of it.
    found = [folder for folder in folders if folder.resolve() not in _held]
    times = {folder: time for folder in found if (time := _claimed_at(folder / NAME, job))}
    return max(times, key=lambda folder: times[folder], default=None)


def _claimed_at(lock: Path, job: str) -> float:
    """When, by this job; 0 if not, or if the file is not to be read."""
    try:
        is_own = lock.read_text("utf-8", errors="replace").partition("\n")[0] == job
        return lock.stat().st_mtime if is_own else 0.0
    except OSError:
        return 0.0
