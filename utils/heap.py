"""What long runs do about freed blocks of memory: some give them back, some keep them.

glibc keeps small ones for others of the size, and images, batches and pictures are of many sizes;
large ones it gives back at once. With other C libraries, and on other systems, nothing happens
here.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # of malloc.h
KEPT, STEP, LARGEST = 2**30, 2**26, 2**25  # bytes; malloc takes no larger one than that


def give_large_blocks_back() -> None:
    """From here on freed blocks of a mebibyte and more go back at once, at the cost of page faults.

    A loader process that validated held up to 450 MB of them. It may be the fork of a process that
    keeps its blocks: the free memory at the end of the heap would serve large ones still.
    """
    _call("mallopt", M_MMAP_THRESHOLD, 2**20)
    _call("mallopt", M_TRIM_THRESHOLD, 2**17)
    _call("mallopt", M_TOP_PAD, 2**17)
    trim()


def keep_large_blocks() -> None:
    """From here on freed blocks stay, of up to 32 MiB each, until `trim`.

    A training step on a CPU needs the same blocks again. From the system they come as pages of
    zeros, each at its first use: of a step of YOLOv5n (320 px, batch 16) that took 7 %.
    """
    _call("mallopt", M_MMAP_THRESHOLD, LARGEST)
    _call("mallopt", M_TRIM_THRESHOLD, KEPT)
    _call("mallopt", M_TOP_PAD, STEP)


def trim() -> None:
    """Give all free pages back; a few milliseconds."""
    _call("malloc_trim", 0)


@contextmanager
def settled() -> Iterator[None]:
    """Within the block the garbage collector passes over all objects of before, which stay.

    It looks at the oldest generation once that has grown by a quarter. With half a million objects
    of libraries in it that takes a hundred thousand more, and each picture left in cycles holds ten
    megabytes.
    """
    gc.collect()
    gc.freeze()
    gc.collect()  # notes that it grows from nothing
    try:
        yield
    finally:
        gc.unfreeze()


def _call(name: str, *args: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function(*args)
