"""Processes that are started together end together."""

import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from utils import launch as launching
from utils.launch import launch
from utils.ranks import SEARCH

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


class Ending:
    """A process that has ended with this status when it is looked at so many times."""

    def __init__(self, code, looks=0):
        self.code, self.looks = code, looks

    def poll(self):
        self.looks -= 1
        return None if self.looks >= 0 else self.code

    def terminate(self):
        self.looks = 0


class Listening(Ending):
    """One that runs until it has been sent a signal, and a few looks more."""

    def __init__(self):
        super().__init__(143, 1000)
        self.heard = []

    def send_signal(self, number):
        self.heard.append(number)
        self.looks = 3

    def terminate(self):
        pass


def test_processes_of_a_search_that_was_killed_are_told_to_end(monkeypatch):
    monkeypatch.setenv(SEARCH, str(os.getpid()))  # which is not the parent of this process
    processes = [Listening(), Listening()]
    assert launching._wait(processes, []) == 143
    assert [process.heard for process in processes] == [[signal.SIGTERM]] * 2


def test_processes_are_not_those_of_the_search(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(SEARCH, str(os.getppid()))
    knows_none = f"assert {SEARCH!r} not in os.environ"
    assert launch(processes([knows_none], [knows_none]), 2) == 0


@pytest.mark.parametrize(
    "processes",
    [
        pytest.param([Ending(1), Ending(-9), Ending(0, 9)], id="found at one glance"),
        pytest.param([Ending(-9, 1), Ending(1), Ending(0, 9)], id="between two looks"),
        pytest.param([Ending(1), Ending(-9)], id="all are gone"),
    ],
)
def test_one_that_was_killed_is_told_before_those_that_have_lost_it(processes, capfd):
    assert launching._wait(processes, []) == 137
    assert "one of the" in capfd.readouterr().err


def patch_popen(monkeypatch, change):
    """Let `change(number, process)` be called for each that is started."""
    processes, popen = [], subprocess.Popen

    def start(*args, **rest):
        processes.append(popen(*args, **rest))
        change(len(processes), processes[-1])
        return processes[-1]

    monkeypatch.setattr(launching, "subprocess", SimpleNamespace(Popen=start))
    return processes


def test_a_process_that_cannot_be_started_leaves_none_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fail(number, process):
        if number == 2:
            process.kill()
            raise OSError("no memory")

    started = patch_popen(monkeypatch, fail)
    with pytest.raises(OSError, match="no memory"):
        launch(processes([SLEEP], [SLEEP]), 2)
    # The first has been waited for: one that is killed may hold its GPU for a while.
    assert started[0].returncode == -signal.SIGKILL
    assert started[1].wait(10) == -signal.SIGKILL


def test_a_signal_between_two_starts_comes_once(tmp_path, monkeypatch):
    """A training takes a second Ctrl-C, if it comes later, for the wish to end at once."""
    monkeypatch.chdir(tmp_path)

    def ask(number, process):
        if number == 2:  # the second is not among the others yet
            while not (tmp_path / "w0").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    patch_popen(monkeypatch, ask)
    count = "signal.signal(2, lambda *_: open('came', 'a').write('x'))"
    launch(processes([count, DEAF, "time.sleep(1)"], ["signal.pause()"]), 2)
    assert (tmp_path / "came").read_text() == "x"


def test_a_signal_between_two_starts_is_for_all(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def ask(number, process):
        if number == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    started = patch_popen(monkeypatch, ask)
    start = time.monotonic()
    assert launch([sys.executable, "-c", "import time; time.sleep(30)"], 2) == 143
    assert time.monotonic() - start < 20
    assert [process.returncode for process in started] == [-signal.SIGTERM] * 2
