"""tests/versions.sh with a Python that only notes what it is asked to do."""

import os
import re
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a bash script")

# Makes an "environment" of itself; shows the constraints before they go.
PYTHON = """#!/bin/bash
echo "$@" | head -1
case "$*" in
  "-m venv"*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  *" -c "*constraints.txt) cat "${@: -1}" ;;
  *pytest*fails*) exit 1 ;;
esac
"""


@pytest.fixture
def run(tmp_path, pytestconfig):
    def call(*arguments, **environment):
        (tmp_path / "temporary").mkdir(exist_ok=True)
        python = tmp_path / "python9.9"
        python.write_text(PYTHON)
        python.chmod(0o755)
        variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        return subprocess.run(
            ["bash", str(pytestconfig.rootpath / "tests/versions.sh"), *arguments],
            cwd=tmp_path, capture_output=True, text=True,
            env={**variables, "TMPDIR": str(tmp_path / "temporary"), **environment},
        )  # fmt: skip

    return call


@pytest.mark.parametrize("bound", ["lowest", "newest"])
def test_bounds_and_arguments(run, tmp_path, pytestconfig, bound):
    done = run("9.9", bound, "-x", "tests/test_nms.py", PIP_FLAGS="--no-index --pre")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    make = (pytestconfig.rootpath / "Makefile").read_text()
    as_make = re.search(r"-m pytest -m (.*) \$\(ARGS\)", make)[1].replace("$(JOBS)", "2")
    assert lines[-1] == f"-m pytest -m {as_make} -x tests/test_nms.py".replace('"', "")
    assert any("--no-index --pre --upgrade" in line for line in lines)
    pinned = {line for line in lines if "==" in line}
    text = "".join(
        (pytestconfig.rootpath / f"requirements{part}.txt").read_text() for part in ("", "-export")
    )
    bounds = re.findall(r"^([^#\n]+)>=(.+)$", text, re.MULTILINE)
    assert len(bounds) >= 13
    expected = {f"{name}=={version}.*" for name, version in bounds}
    assert pinned == (expected if bound == "lowest" else set())
    assert not list((tmp_path / "temporary").iterdir())


def test_an_environment_can_be_kept(run, tmp_path):
    assert run("9.9", "newest", "fails", VENV="kept").returncode == 1  # as pytest ended
    assert (tmp_path / "kept/bin/python").exists()
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 2, "tests/versions.sh 3.10 lowest"),
        (("9.9", "latest"), 2, "tests/versions.sh 3.13 newest"),
        (("9.8", "lowest"), 1, "there is no Python 9.8 here; install it"),
    ],
)
def test_mistakes_are_said(run, arguments, code, words):
    done = run(*arguments)
    assert done.returncode == code
    assert words in done.stderr
