"""Processes that are started together end together."""

import os
import signal
import sys
import threading
import time

import pytest

from utils import launch as launching
from utils.launch import launch

# What a process does; those that wait leave at SIGTERM, as one that has saved, or are deaf to it.
BEGIN = "import os, signal, sys, time; open(os.environ['RANK'], 'w').close()"
WAIT = "signal.signal(15, lambda *_: sys.exit(143)); open('w' + os.environ['RANK'], 'w').close()"
DEAF = "signal.signal(15, signal.SIG_IGN); open('w0', 'w').close()"
SLEEP = "time.sleep(60)"
MEET = "while not os.path.exists('w0'): time.sleep(0.01)"


def processes(first, second):
    """One command, that does different things."""
    lines = [BEGIN, "if os.environ['RANK'] == '0':", *first, "else:", *second]
    indented = [
        line if line.startswith(("if", "else:", "import")) else f" {line}" for line in lines
    ]
    return [sys.executable, "-c", "\n".join(indented)]


@pytest.mark.parametrize(
    ("other", "end", "code", "said"),
    [
        pytest.param(WAIT, "sys.exit(3)", 3, "", id="error"),
        pytest.param(DEAF, "sys.exit(3)", 3, "", id="error beside one that does not listen"),
        pytest.param(WAIT, "os.kill(os.getpid(), 9)", 137, "ended by SIGKILL", id="killed"),
    ],
)
def test_one_that_fails_ends_the_others(tmp_path, monkeypatch, capfd, other, end, code, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launching, "GRACE", 0.5)
    start = time.monotonic()
    assert launch(processes([other, SLEEP], [MEET, end]), 2) == code
    assert time.monotonic() - start < 20
    assert said in capfd.readouterr().err


def test_all_end_well(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert launch(processes(["pass"], ["assert os.environ['WORLD_SIZE'] == '2'"]), 2) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"0", "1"}


def test_signals_are_passed_on_and_the_processes_decide_when_they_end(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)

    def signal_both():
        while len(list(tmp_path.glob("w*"))) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=signal_both)
    thread.start()
    assert launch(processes([WAIT, SLEEP], [WAIT, SLEEP]), 2) == 143
    thread.join()
    assert signal.getsignal(signal.SIGTERM) is before
