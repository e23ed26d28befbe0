"""End train.py and val.py in every way while loader processes work for them; say what is left.

    python -m tests.end_commands FLAGS.json REPORT.json

with {"train": [flags], "val": [flags], "folder": for temporary files}. The report has for every
case the exit status, the seconds until no process of it was left, and the files that it left in
its folder for temporary files and in shared memory. tests/test_leftovers.py reads it. Each case is
a fork of this process, so that torch is loaded once: Linux only.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # what any optimizer and NMS import, for two seconds: here once for all forks
import torchvision.ops  # noqa: F401

import train
import val
from utils.command import run_command
from utils.training import report

# By itself, by a mistake of ours, and by signals to the process, or as a terminal to all of them.
CASES = [
    *(("train", how) for how in ("end", "error", "SIGTERM", "SIGINT all", "SIGHUP all", "SIGKILL")),
    *(("val", how) for how in ("end", "error", "SIGTERM", "SIGTERM all", "SIGINT all", "SIGKILL")),
]
LONGEST = 30  # seconds until a process that has lost its parent must be gone


def main() -> None:
    """Start all cases, end them, and wait for their processes."""
    flags = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(1)  # a process that computes in threads cannot be forked
    gc.freeze()  # forks that look at all objects copy their pages
    children = {case: start(case, flags) for case in CASES}
    workers = {case: end(case, *child) for case, child in children.items()}
    report = {}
    for case, (pid, _) in children.items():
        _, status = os.waitpid(pid, 0)
        report[" ".join(case)] = {"code": os.waitstatus_to_exitcode(status)}
    started = time.monotonic()
    for case, (pid, _) in children.items():
        while group_of(pid) and time.monotonic() < started + LONGEST:
            time.sleep(0.1)
        report[" ".join(case)] |= {
            "processes": group_of(pid),
            "seconds": time.monotonic() - started,
            "num_workers": len(workers[case]),
            "files": [
                path.name
                for path in temporary_folder(case, flags).iterdir()
                if not path.name.startswith("torchinductor")  # a cache that torch keeps
            ],
            "memory": [
                path.name
                for path in Path("/dev/shm").glob("torch_*")
                if int(path.name.split("_")[1]) in (pid, *workers[case])
            ],
        }
    Path(sys.argv[2]).write_text(json.dumps(report, indent=1), encoding="utf-8")


def start(case: tuple[str, str], flags: dict[str, Any]) -> tuple[int, int]:
    """The process that runs the command, and a file that has something to read once it is busy."""
    busy, is_busy = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(is_busy)
        return pid, busy
    os.setsid()
    command, how = case
    folder = temporary_folder(case, flags)
    folder.mkdir(parents=True)
    tempfile.tempdir = str(folder)
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)

    def interfere(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            workers = [worker.pid for worker in multiprocessing.active_children()]
            os.write(is_busy, json.dumps(workers).encode())
            if how == "error":
                raise RuntimeError("a mistake of ours")
            if how != "end":
                time.sleep(0.1 if command == "train" else 60)
            return original(*arguments)

        return call

    report.draw = val.draw = lambda *_, **__: None
    train.optimizer_step = interfere(train.optimizer_step)
    val.BatchSaver.__call__ = interfere(val.BatchSaver.__call__)
    epochs = ["--epochs", "1" if how == "end" else "1000"] if command == "train" else []
    name = ["--name", f"{command} {how}"]
    script = {"train": train, "val": val}[command]
    run_command(lambda: script.main([*flags[command], *epochs, *name]))
    sys.exit(0)  # as a program ends, and not by os._exit


def temporary_folder(case: tuple[str, str], flags: dict[str, Any]) -> Path:
    """Where a case has its temporary files."""
    return Path(flags["folder"]) / "-".join(case).replace(" ", "-")


def end(case: tuple[str, str], pid: int, busy: int) -> list[int]:
    """Wait until its workers work, then end a case; returns the workers."""
    workers = json.loads(os.read(busy, 100).decode().partition("]")[0] + "]")
    name, _, to_whom = case[1].partition(" ")
    if name.startswith("SIG"):
        (os.killpg if to_whom else os.kill)(pid, signal.Signals[name])
    return workers


def group_of(leader: int) -> list[int]:
    """The processes of a group that live."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text(encoding="utf-8").rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(group) == leader and state not in "ZX":
            found.append(int(path.parent.name))
    return found


if __name__ == "__main__":
    main()
