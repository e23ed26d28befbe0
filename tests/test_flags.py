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
    assert refusal(script, command, capsys).endswith(message)


def refusal(script, command, capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"utils.flags.{script}").parse_args(command)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        *((script, ["--batch-size", "9" * 30], f"--batch-size is {'9' * 30}, expected at most 1")
          for script in ("train", "val", "export", "demo")),
        ("prune", ["--batch-size", "9" * 30, "--data", "a.yaml"], "expected at most 1000000"),
        ("train", ["--epochs", "1000000000000"], "is 1000000000000, expected at most 100000"),
        ("train", ["--nominal-batch", "9" * 30], "expected at most 1000000"),
        ("train", ["--freeze", "9" * 30], "expected at most 100000"),
        ("export", ["--nms", "--max-det", "9" * 30], "expected at most 100000"),
        ("prune", ["--recalibrate", "9" * 30, "--data", "a.yaml"], "expected at most 1000000000"),
        ("demo", ["--epochs", "1", "9" * 12, "1"], "expected at most 100000"),
    ],
)  # fmt: skip
def test_numbers_that_nothing_could_hold_are_refused(script, flags, message, capsys):
    assert message in refusal(script, [*NEEDED[script], *flags], capsys)
