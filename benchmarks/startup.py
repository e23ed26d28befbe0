"""Measure how long the scripts take to answer, and train.py to its first optimizer step.

    python -m benchmarks.startup --weights yolov5n.pt --out startup.md

Seconds from the shell, each in a process of its own. The baseline is a Python that imports what a
plain script imports at its top. The run trains on one batch of images, scanned before.
"""

from __future__ import annotations

import functools
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks import harness
from utils.command import run_command
from utils.dataset import scan_split
from utils.device import select_device
from utils.downloads import open_dataset

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train.py", "prune.py", "val.py")
BASELINE = ("-c", "import torch, torchvision, cv2, numpy, yaml, tqdm")
TRAIN = ("-c", "from benchmarks.startup import train_one_step; train_one_step()")
STEP_DONE = "first optimizer step at "  # then time.time()


def main(argv: Sequence[str] | None = None) -> None:
    """Help, a wrong flag, and the first step."""
    parser = harness.build_parser(__doc__)
    parser.add_argument("--weights", default="yolov5n.pt", help="checkpoint to start from")
    options = parser.parse_args(argv)
    harness.set_threads(options.threads)
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    commands = {"imports of a plain script": BASELINE}
    for script in SCRIPTS:
        for flag in ("--help", "--no-such-flag"):
            commands[f"{script} {flag}"] = (str(ROOT / script), flag)
    variants: dict[str, Callable[[], object]] = {
        name: functools.partial(answer, command, environment) for name, command in commands.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        spec = open_dataset(options.data)
        data = harness.copy_dataset(spec, Path(folder, "data"), options.batch)
        scan_split(open_dataset(data).train, spec.names)
        flags = ["--data", str(data), "--epochs", "1", "--project", folder]
        flags += harness.format_flags(options, ("weights", "img", "batch", "workers", "device"))
        variants["train.py to its first step"] = functools.partial(first_step, flags, environment)
        times = harness.take_turns(variants, options.repeats, select_device("cpu"))
    ratios = harness.speed_ups(times)
    rows = [(name, f"{harness.spread(s):.2f}", f"{ratios[name]:.2f}") for name, s in times.items()]
    table = harness.table(("command", "seconds", "times as fast"), rows)
    harness.report("Start-up", select_device(options.device), [table], options.out)


def answer(arguments: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run Python to its end; of a script its usage must be the answer."""
    command = [sys.executable, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    is_answer = result.returncode == 0 if arguments == BASELINE else "usage: " in str(result)
    if not is_answer:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr}")


def first_step(flags: Sequence[str], environment: Mapping[str, str]) -> float:
    """Seconds from the start of train.py to the end of its first optimizer step."""
    start = time.time()
    command = [sys.executable, *TRAIN, *flags]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    for line in result.stdout.splitlines():
        if line.startswith(STEP_DONE):
            return float(line.removeprefix(STEP_DONE)) - start
    raise RuntimeError(f"train.py made no step: {result.stdout}{result.stderr}")


def train_one_step() -> None:
    """Run train.py with the arguments of this process and interrupt it after its first step."""

    def stop(*_: Any) -> NoReturn:
        print(f"\n{STEP_DONE}{time.time()}", flush=True)
        raise KeyboardInterrupt

    register_optimizer_step_post_hook(stop)
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


if __name__ == "__main__":
    run_command(main)
