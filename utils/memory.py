"""How much memory a process may still take: of the machine, or of its container if that is less."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

MEMINFO = Path("/proc/meminfo")
MEMBERSHIP = Path("/proc/self/cgroup")  # lines `number:controllers:/path of the group`
# Control groups, version 2 and 1: root folder, controller, limit, use, and how memory.stat calls
# the cached files among the latter that were not looked at for long. The kernel gives those up
# before anything else, so they count as free, as in the working set that Kubernetes measures.
CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup"), "", "memory.max", "memory.current", "inactive_file"),
    (
        Path("/sys/fs/cgroup/memory"),
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
)
SHARE_UNTOLD = 0.5  # of all memory, where the system says how much there is, but not what is free


def available_memory() -> int | None:
    """Bytes; None where the system does not say."""
    rooms = [_room_in_machine()]
    for root, controller, *files in CONTROL_GROUPS:
        rooms += [_room_in_group(folder, *files) for folder in _own_groups(root, controller)]
    return min((room for room in rooms if room is not None), default=None)


def _room_in_machine() -> int | None:
    told = _numbers(MEMINFO).get("MemAvailable:")
    if told is not None:
        return told * 1024
    if sys.platform == "win32":
        status = _WindowsStatus(length=ctypes.sizeof(_WindowsStatus))
        is_told = ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
        return status.free_physical if is_told else None
    try:
        num_pages, page_bytes = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # another system, or it does not know
        return None
    return int(num_pages * page_bytes * SHARE_UNTOLD) if num_pages > 0 else None


class _WindowsStatus(ctypes.Structure):
    """MEMORYSTATUSEX."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("percent_used", ctypes.c_uint32),
        ("all_physical", ctypes.c_uint64),
        ("free_physical", ctypes.c_uint64),
        ("others", ctypes.c_uint64 * 5),
    )


def _own_groups(root: Path, controller: str) -> list[Path]:
    """The group of this process and all that it is nested in: the limits of each hold.

    In a container the path may be that outside of it; what is not there has no limit here.
    """
    try:
        lines = MEMBERSHIP.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    rows = [row for line in lines if len(row := line.split(":", 2)) == 3]
    path = next((path for _, names, path in rows if controller in names.split(",")), "/")
    own = root / path.lstrip("/")
    return [own, *(folder for folder in own.parents if folder.is_relative_to(root))]


def _room_in_group(folder: Path, limit: str, usage: str, inactive: str) -> int | None:
    try:
        room = int((folder / limit).read_text("utf-8")) - int((folder / usage).read_text("utf-8"))
    except (OSError, ValueError):  # no such control group, or the limit is "max"
        return None
    return max(room + _numbers(folder / "memory.stat").get(inactive, 0), 0)


def _numbers(path: Path) -> dict[str, int]:
    """The first number of each line, by the word before it; none where there is no such file."""
    try:
        rows = [line.split() for line in path.read_text("utf-8").splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}
