"""Being asked to end: noted first, obeyed where nothing is lost."""

import os
import signal
import time

import pytest

from utils.stopping import StopRequest


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
