"""The recipes of docs/scale.md, run and read; what a cluster would bring is made up."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from torch.distributed.run import get_args_parser

from utils.flags.train import parse_args

PAGE = Path(__file__).resolve().parents[1] / "docs/scale.md"

# What a batch script calls, each a program that notes how it was called. The training saves when
# it is asked to; without that it ends well, or as it is told to.
STAND_INS = {
    "torchrun": """
        echo $$ > pid
        trap 'echo saved >> log; exit 1' TERM
        printf '%s\\n' "$@" > words.new
        mv words.new words
        for _ in $(seq ${TICKS:-0}); do sleep 0.05; done
        exit ${CODE:-0}
    """,
    "srun": 'while [ "$1" != torchrun ]; do echo "srun $1" >> log; shift; done; exec "$@"',
    "scancel": 'echo "scancel $*" >> log; kill -TERM "$(cat pid)"',
    "scontrol": """
        [ "$1" = requeue ] && echo "requeue $2" >> log
        [ "$1" = show ] && printf '%s\\n' node7 node8
        exit 0
    """,
}

SLURM = {"SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[7-8]"}
SLURM["SLURM_CPUS_PER_TASK"] = "72"


def find_block(kind):
    (block,) = re.findall(rf"^```{kind}\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    return block


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that starts a command among the stand-ins."""
    monkeypatch.chdir(tmp_path)
    for name, lines in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    started = []

    def run(*command, **environment):
        process = subprocess.Popen(command, env={**os.environ, "PATH": path, **environment})
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


class Started(NamedTuple):
    """How torchrun was called, and train.py by it."""

    torchrun: object
    train: object


def read_words():
    words = Path("words").read_text("utf-8").splitlines()
    torchrun = get_args_parser().parse_args(words)
    assert torchrun.training_script == "train.py"
    return Started(torchrun, parse_args(torchrun.training_script_args)[0])


# --------------------------------------------------------------------------------------- Slurm
@pytest.fixture
def script(tmp_path):
    path = tmp_path / "job.sh"
    path.write_text(find_block("bash"), encoding="utf-8")
    return str(path)


def test_slurm_asks_for_what_is_used(script, start):
    assert start("bash", script, **SLURM).wait(30) == 0
    torchrun, training = read_words()
    asked = dict(re.findall(r" --([\w-]+)=(\S+)", find_block("bash").partition("\n\n")[0]))
    assert (torchrun.nnodes, asked["nodes"], asked["ntasks-per-node"]) == ("2", "2", "1")
    assert torchrun.nproc_per_node == asked["gpus-per-node"]
    assert int(asked["cpus-per-task"]) >= 8 * int(torchrun.nproc_per_node)  # loaders
    assert (torchrun.rdzv_endpoint, torchrun.rdzv_id) == ("node7:23456", "123456")
    assert training.batch_size % (2 * int(torchrun.nproc_per_node)) == 0
    assert Path("log").read_text() == "srun --cpus-per-task=72\n"
    assert asked["signal"].startswith("B:USR1@")


@pytest.mark.parametrize(
    ("environment", "code"), [({"CODE": "3"}, 3), ({"CODE": "1", "TICKS": "4"}, 1)]
)
def test_slurm_learns_how_a_training_ended(script, start, environment, code):
    assert start("bash", script, **SLURM, **environment).wait(30) == code
    assert "requeue" not in Path("log").read_text()


def test_slurm_saves_and_queues_again_before_the_time_is_up(script, start):
    job = start("bash", script, **SLURM, TICKS="600")
    wait_for(Path("words"))
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 1
    said = Path("log").read_text().splitlines()[1:]
    assert said == ["scancel --signal=TERM 123456", "saved", "requeue 123456"]


# ---------------------------------------------------------------------------------- Kubernetes
def test_pods_find_each_other_and_may_save(start):
    service, job = yaml.safe_load_all(find_block("yaml"))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    name = job["metadata"]["name"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["spec"]["clusterIP"] == "None"  # a text
    assert job["spec"]["completionMode"] == "Indexed"
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    for index in ("0", "1"):
        words = [*container["command"], *container["args"]]
        process = start(*words, **environment, JOB_COMPLETION_INDEX=index)
        assert process.wait(30) == 0
        assert Path("pid").read_text().strip() == str(process.pid)  # so signals reach it
        torchrun, training = read_words()
        assert torchrun.rdzv_conf == f"is_host={int(index == '0')},join_timeout=3600"
        assert torchrun.rdzv_endpoint == f"{name}-0.{pod['subdomain']}:29500"
    num_pods = job["spec"]["completions"]
    assert num_pods == job["spec"]["parallelism"] == int(torchrun.nnodes)
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == int(torchrun.nproc_per_node)
    assert training.batch_size % (num_pods * gpus) == 0
    assert container["resources"]["requests"]["cpu"] >= 8 * gpus  # loaders
    for path in (training.data, training.weights, training.project):
        assert Path(path).is_relative_to(mounts["shared"])
    # Whoever may not write elsewhere has these.
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert {"/tmp", "/dev/shm"} < set(mounts.values())
    assert environment["HOME"] in mounts.values()
    grace = pod["terminationGracePeriodSeconds"]
    assert grace > int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) + 15
