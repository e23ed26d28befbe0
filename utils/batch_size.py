"""How many images fit into the memory of the device: found by trying."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from utils.command import is_gpu_out_of_memory
from utils.device import free_memory

CPU_BATCH = 16  # where memory is not what limits a batch


def candidate_sizes(most: int) -> list[int]:
    """Batch sizes worth a trial, ascending: 1, 2, 4, multiples of 8, and `most`."""
    sizes = {1, 2, 4, *range(8, most + 1, 8), most}
    return sorted(size for size in sizes if 1 <= size <= most)


def find_largest_fitting(
    sizes: Sequence[int], attempt: Callable[[int], None], device: torch.device
) -> int:
    """The last of these sizes whose attempt does not run out of memory; 0 if none is left.

    Args:
        sizes: ascending; if one fits, so do all before it. The last is tried first.
        attempt: does the work of that size.
        device: whose memory is given back between the attempts.
    """
    low, high = 0, len(sizes)  # what is before `low` fits, what is from `high` on does not
    probe = high - 1
    while low < high:
        if _fits(sizes[probe], attempt, device):
            low = probe + 1
        else:
            high = probe
        probe = (low + high) // 2
    return sizes[low - 1] if low else 0


def _fits(size: int, attempt: Callable[[int], None], device: torch.device) -> bool:
    try:
        attempt(size)
    except RuntimeError as error:
        if not is_gpu_out_of_memory(error):
            raise
        fits = False  # the error holds the tensors of the attempt until it is left
    else:
        fits = True
    free_memory(device)
    return fits
