"""One process at a time writes to a run folder."""

import os
import re
import subprocess
import sys

import pytest

from utils import claim as claims
from utils.claim import claim, find_claimed, release

HOLD = """
import sys
from pathlib import Path
from utils.claim import claim
claim(Path(sys.argv[1]), sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder():
    """Start a process that claims a folder and stays; all are gone after the test."""
    started = []

    def start(folder, job=""):
        command = [sys.executable, "-c", HOLD, str(folder), job]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline() == b"held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.skipif(claims.fcntl is None, reason="no locks of this kind here")
def test_a_folder_that_another_process_has_is_refused_until_that_ends(tmp_path, holder):
    process = holder(tmp_path)
    words = rf"{re.escape(str(tmp_path))}: process {process.pid} on \S+ is writing there; wait"
    with pytest.raises(OSError, match=words):
        claim(tmp_path)
    process.kill()
    process.wait()
    claim(tmp_path)
    claim(tmp_path)  # again, as a run resumed in the same process
    release(tmp_path)
    holder(tmp_path)  # free for others


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    if claims.fcntl is not None:
        monkeypatch.setattr(claims.fcntl, "lockf", refuse)
    claim(tmp_path)
    assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
    release(tmp_path)


def test_a_job_finds_the_newest_folder_it_has_claimed(tmp_path):
    for number, (name, job) in enumerate([("a", "7"), ("b", "7"), ("c", "8"), ("d", "")]):
        (tmp_path / name).mkdir()
        claim(tmp_path / name, job)
        release(tmp_path / name)
        os.utime(tmp_path / name / ".lock", (number, number))
    assert find_claimed(tmp_path, "7") == tmp_path / "b"
    assert find_claimed(tmp_path, "9") is None
    assert find_claimed(tmp_path / "missing", "7") is None


def test_a_resume_by_hand_leaves_a_run_to_its_job(tmp_path):
    for job in ("job 7", ""):
        claim(tmp_path, job)
        release(tmp_path)
    assert find_claimed(tmp_path.parent, "job 7") == tmp_path


def test_odd_locks_stand_in_nobodys_way(tmp_path):
    for name, content in (("bytes", b"\xff\xfe\n"), ("own", b"job 7\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".lock").write_bytes(content)
    (tmp_path / "folder/.lock").mkdir(parents=True)
    assert find_claimed(tmp_path, "job 7") == tmp_path / "own"


@pytest.mark.skipif(claims.fcntl is None, reason="no locks of this kind here")
def test_looking_for_a_folder_lets_go_of_none(tmp_path, holder):
    folder = tmp_path / "run"
    folder.mkdir()
    claim(folder, "job 7")
    assert find_claimed(tmp_path, "job 7") is None  # nobody else's
    with pytest.raises(AssertionError):
        holder(folder)
    release(folder)
