"""Names of devices as they are typed; what is wrong with others is in test_device.py."""

import pytest

from utils.device_text import gpu_indices


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", []), ("cpu", []), ("mps", []), ("0", [0]), ("cuda:1", [1]), ("0, 1", [0, 1])],
)
def test_indices(text, expected):
    assert gpu_indices(text) == expected
