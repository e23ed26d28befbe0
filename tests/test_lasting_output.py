"""Output that nobody reads any more ends nothing."""

import os
import sys
from pathlib import Path

import pytest

from utils.lasting_output import lasting_output


@pytest.fixture
def closed_pipe():
    """A stream whose reader has gone."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        yield stream


@pytest.fixture
def closed_terminal():
    """The same for a terminal."""
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    os.close(master)
    with os.fdopen(slave, "w") as stream:
        yield stream


@pytest.mark.parametrize("kind", ["closed_pipe", "closed_terminal"])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_reader_that_has_gone_is_not_missed(request, monkeypatch, kind, name):
    stream = request.getfixturevalue(kind)
    monkeypatch.setattr(sys, name, stream)
    with lasting_output():
        for _ in range(2):
            print("word", file=getattr(sys, name), flush=True)
    assert getattr(sys, name) is stream
    stream.flush()  # Python does so in the end
    assert os.write(stream.fileno(), b"as other libraries do") == 21


def test_what_is_read_arrives(capsys):
    with lasting_output():
        print("word")
        assert sys.stdout.isatty() is False
    assert capsys.readouterr().out == "word\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_other_errors_are_errors(monkeypatch):
    with Path("/dev/full").open("w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with lasting_output(), pytest.raises(OSError, match="No space left"):
            print("word")
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
