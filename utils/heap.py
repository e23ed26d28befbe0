"""What long runs do so that their memory stays flat: freed blocks go back to the system.

glibc keeps them for others of the size, and images, batches and pictures are of many sizes. With
other C libraries, and on other systems, nothing happens here.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager

M_MMAP_THRESHOLD = -3  # of malloc.h


def give_large_blocks_back() -> None:
    """From here on freed blocks of a mebibyte and more go back at once, at the cost of page faults.

    A loader process that validated held up to 450 MB of them.
    """
    _call("mallopt", M_MMAP_THRESHOLD, 2**20)


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
