"""What the parsers of all scripts have in common."""

import importlib

import pytest

from utils.flags.checks import MAX_IMGSZ

NEEDED = {
    "train": [],
    "prune": ["--weights", "a.pt", "--percent", "0.5"],
    "val": [],
    "detect": ["--source", "a.jpg"],
    "export": [],
    "demo": [],
}


@pytest.mark.parametrize("script", NEEDED)
@pytest.mark.parametrize(
    ("side", "message"),
    [
        (31, "--imgsz is 31, expected at least 32"),
        (MAX_IMGSZ + 1, "--imgsz is 16385, expected at most 16384"),
        (100_000_000, "--imgsz is 100000000, expected at most 16384"),
        (MAX_IMGSZ, None),
    ],
)
def test_image_sizes_that_cannot_be_drawn_are_refused(script, side, message, capsys):
    module = importlib.import_module(f"utils.flags.{script}")
    command = [*NEEDED[script], "--imgsz", str(side)]
    if message is None:
        module.parse_args(command)
        return
    with pytest.raises(SystemExit) as stop:
        module.parse_args(command)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
