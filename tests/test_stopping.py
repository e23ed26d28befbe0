"""Being asked to end: noted first, obeyed where nothing is lost."""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from utils.stopping import Interrupted, StopRequest, heeding_signals

ROOT = Path(__file__).resolve().parents[1]
unix = pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends a process there")


@unix
def test_a_second_signal_does_not_disturb_what_is_tidied_up():
    tidied = []

    def work():
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), number)
                tidied.append(number)

    with pytest.raises(Interrupted) as caught, heeding_signals():
        work()
    assert caught.value.signal == signal.SIGINT
    assert len(tidied) == 2


@unix
def test_a_signal_that_a_library_has_lost_can_be_sent_again():
    with heeding_signals():
        for _ in range(3):
            with suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                pytest.fail("it goes on")


@unix
@pytest.mark.parametrize(
    ("error", "is_ignored"), [(KeyboardInterrupt, True), (SystemExit, True), (ValueError, False)]
)
def test_ctrl_c_does_not_disturb_the_end_of_an_interrupted_program(error, is_ignored):
    """SystemExit is that of a training that has saved; other errors may leave what hangs."""
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(error), heeding_signals():
        raise error
    assert signal.getsignal(signal.SIGINT) == (signal.SIG_IGN if is_ignored else before)


# What each command calls once it has begun; of prune.py and demo.py once they have a run folder.
BEGUN = {
    "train.py --data data/bccd.yaml": "utils.device.select_device",
    "val.py": "utils.device.select_device",
    "prune.py --weights yolov5n.pt --percent 0.5": "utils.downloads.find_weights",
    "detect.py --source docs/pictures": "utils.device.select_device",
    "export.py": "utils.device.select_device",
    "demo.py": "subprocess.call",
}


@unix
@pytest.mark.parametrize("command", BEGUN)
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_every_command_ends_in_one_line(run_script, monkeypatch, tmp_path, command, name, code):
    def end(*_, **__):
        os.kill(os.getpid(), signal.Signals[name])
        pytest.fail("it goes on")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(BEGUN[command], end)
    words = command.split()
    if words[0] != "export.py":
        words += ["--project", str(tmp_path / "runs")]
    ended = run_script(*words)
    assert (ended.returncode, ended.stderr) == (code, "")
    line = ended.stdout.splitlines()[-1]
    assert line.partition(";")[0] == f"ended by {name}"
    assert not list(tmp_path.iterdir())


def test_a_signal_is_noted_and_the_old_handler_comes_back(capfd):
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.signal is None
        for _ in range(2):  # batch systems signal more than once
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal is signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopping after this step" in capfd.readouterr().err


def test_a_second_ctrl_c_interrupts_at_once(monkeypatch):
    now = [5.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with StopRequest() as stop:
        for _ in range(2):  # of a terminal, and passed on by what has started the process
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.signal is signal.SIGINT
        now[0] += 0.6
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_nobody_need_read_what_a_signal_is_answered(capfd):
    """Ctrl-C ends `tee` as well, and a terminal that closes is gone before its signal comes."""
    reader, writer = os.pipe()
    os.close(reader)
    stderr = os.dup(2)
    os.dup2(writer, 2)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.signal is signal.SIGINT
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(writer)


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_watched_loop_ends_at_the_next_item():
    seen = []

    def loop(stop):
        for item in stop.watch("abcd"):
            seen.append(item)
            if item == "b":
                os.kill(os.getpid(), signal.SIGTERM)

    with StopRequest() as stop:
        loop(stop)
        assert stop.signal is signal.SIGTERM
    assert seen == ["a", "b"]
    assert list(StopRequest().watch("")) == []
