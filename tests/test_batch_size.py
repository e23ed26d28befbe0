"""Finding the batch that fits, with a memory that is made up."""

import pytest
import torch

from utils.batch_size import candidate_sizes, find_largest_fitting

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (0, []),
        (1, [1]),
        (3, [1, 2, 3]),
        (16, [1, 2, 4, 8, 16]),
        (20, [1, 2, 4, 8, 16, 20]),
    ],
)
def test_candidates(most, sizes):
    assert candidate_sizes(most) == sizes


# By torch, and by libraries that ask the driver themselves.
FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("room", range(0, 70))
def test_the_largest_that_fits_is_found_in_a_few_attempts(room):
    tried = []

    def attempt(size):
        tried.append(size)
        if size > room:
            raise FULL[room % len(FULL)]

    sizes = candidate_sizes(64)
    found = find_largest_fitting(sizes, attempt, CPU)
    assert found == max((size for size in sizes if size <= room), default=0)
    assert tried[0] == 64
    assert len(tried) == len(set(tried)) <= 5


def test_nothing_to_try():
    assert find_largest_fitting([], lambda _: None, CPU) == 0


def test_other_errors_are_not_taken_for_a_lack_of_memory():
    def attempt(_):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        find_largest_fitting([1, 2], attempt, CPU)
