"""What is measured is an epoch and nothing else."""

import math

from benchmarks.training import build_ours, build_parser, our_epoch


def test_an_epoch_that_comes_late_saves_nothing(tiny_dataset, tmp_path, monkeypatch):
    """Into the folder that it was started in, which may have weights/last.pt."""
    flags = ["--data", str(tiny_dataset.yaml), "--img", "64", "--batch", "2", "--device", "cpu"]
    run, loader = build_ours(build_parser(None).parse_args(flags), "n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "weights").mkdir()
    run.saved_at = -math.inf
    our_epoch(run, loader)()
    assert run.batches == len(loader) == 2
    assert list((tmp_path / "weights").iterdir()) == []
