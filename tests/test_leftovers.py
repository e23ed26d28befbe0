"""Whatever ends a command, its loader processes, memory and temporary files go with it."""

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from models import Model, ModelSpec
from tests.end_commands import CASES
from utils.checkpoint import build_checkpoint, save_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, and reads /proc")


@pytest.fixture
def short():
    """A folder whose name leaves room for those of sockets in it, which tmp_path may not."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.mark.slow
def test_nothing_is_left_of_a_command_that_ends(
    tiny_spec, tiny_dataset, tmp_path, short, pytestconfig
):
    cfg, weights = tmp_path / "tiny_net.yaml", tmp_path / "tiny.pt"
    cfg.write_text(yaml.safe_dump(tiny_spec), encoding="utf-8")
    model = Model(ModelSpec.from_dict(tiny_spec))
    save_checkpoint(weights, build_checkpoint(model, tiny_dataset.names))
    both = [
        *("--data", str(tiny_dataset.yaml), "--img", "64", "--batch", "1", "--workers", "2"),
        *("--device", "cpu", "--project", str(tmp_path / "runs")),
    ]
    flags = {
        "train": [*both, "--cfg", str(cfg), "--weights", "", "--noautoanchor", "--noval"],
        "val": [*both, "--weights", str(weights)],
        "folder": str(short / "temporary"),
    }
    (tmp_path / "flags.json").write_text(json.dumps(flags), encoding="utf-8")
    command = [sys.executable, "-m", "tests.end_commands", "flags.json", "report.json"]
    environment = {"PYTHONPATH": str(pytestconfig.rootpath), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, timeout=300)
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    for command, how in CASES:
        found = report[f"{command} {how}"]
        assert found["num_workers"] == 2, (command, how)
        expected = {"end": 0, "error": 1}.get(how)
        if expected is None:
            number = signal.Signals[how.partition(" ")[0]]
            # What can save or say something first ends with the status that shells know.
            expected = -number if number == signal.SIGKILL else 128 + number
        assert found["code"] == expected, (command, how)
        left = {key: found[key] for key in ("processes", "files", "memory")}
        if how == "SIGKILL":
            del left["files"]  # torch 2.6 has an empty folder there while it runs
        assert not any(left.values()), (command, how, left)
