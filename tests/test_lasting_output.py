"""Output that nobody reads any more ends nothing."""

import os
import subprocess
import sys
from contextlib import suppress
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
def test_other_errors_are_errors_at_the_end(monkeypatch):
    with Path("/dev/full").open("w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        steps = []

        def work():
            with lasting_output():
                for step in range(3):
                    print("word")
                    steps.append(step)

        with pytest.raises(OSError, match="No space left") as caught:
            work()
        assert caught.value.filename == "standard output"
        assert steps == [0, 1, 2], "a full disk costs the log, not the run"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize("buffering", [1, -1])
@pytest.mark.parametrize(("code", "error"), [(None, OSError), (0, OSError), (143, SystemExit)])
def test_what_ends_well_by_itself_has_said_all(monkeypatch, buffering, code, error):
    """As argparse does after help."""

    def work():
        with lasting_output():
            print("usage")
            raise SystemExit(code)

    with suppress(OSError), Path("/dev/full").open("w", buffering=buffering) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(error):
            work()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_help_that_is_lost_is_an_error(pytestconfig):
    with Path("/dev/full").open("w") as full:
        ended = subprocess.run(
            [sys.executable, "train.py", "--help"],
            cwd=pytestconfig.rootpath,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: standard output: No space left on device; free some")
    assert ended.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
def test_an_error_of_the_work_comes_first(monkeypatch):
    with Path("/dev/full").open("w", buffering=1) as stream:
        monkeypatch.setattr(sys, "stdout", stream)

        def work():
            with lasting_output():
                print(1 / print("word"))

        with pytest.raises(TypeError):
            work()


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_streams_that_were_closed_before_lead_nowhere(monkeypatch, name):
    monkeypatch.setattr(sys, name, None)
    with lasting_output():
        print("word", file=getattr(sys, name), flush=True)
        assert getattr(sys, name) is not None
    assert getattr(sys, name) is None
