"""Memory that is free goes back to the system, and cycles are found soon."""

import gc
import subprocess
import sys
import weakref

import pytest

from utils import heap

GROW_AND_FREE = """
import sys
from utils import heap

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

if sys.argv[1] == "give_large_blocks_back":
    heap.give_large_blocks_back()
size, count = (2**21, 50) if sys.argv[1] == "give_large_blocks_back" else (2**14, 6400)
bytearray(2**24)  # freed, it makes glibc keep all that is smaller
before, blocks = resident(), []
for _ in range(count):
    blocks.append((bytearray(b"1") * size, bytearray(600)))
small = [pair[1] for pair in blocks]  # lie between the large ones
del blocks
if sys.argv[1] == "trim":
    heap.trim()
print(resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what malloc of Linux does")
def test_free_memory_goes_back():
    grown = {}
    for what in ("nothing", "trim", "give_large_blocks_back"):
        done = subprocess.run(
            [sys.executable, "-c", GROW_AND_FREE, what], capture_output=True, text=True, check=True
        )
        grown[what] = float(done.stdout)
    assert grown["nothing"] > 80, grown  # of 100 MiB
    assert max(grown["trim"], grown["give_large_blocks_back"]) < 40, grown


TOUCH_AGAIN = """
import resource, sys
from utils import heap

if sys.argv[1] == "keep_large_blocks":
    heap.keep_large_blocks()
for _ in range(12):
    blocks = [b"1" * 2**23 for _ in range(4)]
    del blocks
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="what malloc of Linux does")
def test_kept_blocks_are_used_again():
    faults = {}
    for what in ("nothing", "keep_large_blocks"):
        done = subprocess.run(
            [sys.executable, "-c", TOUCH_AGAIN, what], capture_output=True, text=True, check=True
        )
        faults[what] = int(done.stdout)
    assert faults["nothing"] - faults["keep_large_blocks"] > 50_000, faults  # of 98,304 pages


def test_cycles_are_found_soon(monkeypatch):
    """Without, the collector waits until there are a quarter more objects than there were."""
    monkeypatch.setattr(heap, "gc", gc)  # not that of the other tests
    gc.unfreeze()
    libraries = [[] for _ in range(1_500_000)]
    with heap.settled():
        picture = type("Picture", (), {})()
        picture.axes = [picture]
        gc.collect(1)  # now it is as old as what is left of a picture
        left = weakref.ref(picture)
        del picture
        work = [[] for _ in range(300_000)]
        assert left() is None
    assert gc.get_freeze_count() == 0
    assert len(libraries) > len(work)
