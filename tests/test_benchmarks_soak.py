"""The watch over a long run: known leaks are found, and what a script leaves behind is counted."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from benchmarks import soak

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

LEAK = """
import subprocess, time
subprocess.Popen(["sleep", "20"])
kept = []
for number in range(30):
    kept.append((b"x" * 4 * 2**20, open("/dev/null")))
    time.sleep(0.1)
"""  # 4 MiB with each file handle


def test_leaks_and_orphans_are_found(tmp_path, capsys):
    csv = tmp_path / "samples.csv"
    soak.main(["--every", "0.1", "--warm-up", "0.01", "--csv", str(csv), "--", "-c", LEAK])
    samples = np.loadtxt(csv, delimiter=",", skiprows=1)
    # On a busy machine the first sample may be of the start, and the last of the end.
    samples = samples[(samples[:, 4] == 2) & (np.arange(len(samples)) <= samples[:, 3].argmax())]
    _, memory, _, handles, _, _ = samples.T
    assert handles[-1] - handles[0] > 3
    assert np.polyfit(handles, memory, 1)[0] == pytest.approx(4, rel=0.25)
    assert "processes left behind: 1" in capsys.readouterr().out


def test_a_run_within_the_warm_up_is_refused():
    with pytest.raises(SystemExit, match="--warm-up"):
        soak.main(["--every", "0.1", "--", "-c", "import time; time.sleep(0.3)"])
