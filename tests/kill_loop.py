"""Kill a small training at random moments, many times; nothing saved may be lost or change.

    python -m tests.kill_loop --kills 60 --folder /tmp/kills

Each run is killed (SIGKILL), asked to end (SIGTERM, Ctrl-C) and resumed until it is over; the
signal goes to the training alone or, as from a terminal, to its loader process too. Half of the
runs write into a pipe that is closed at that moment, as behind `| tee`; it may be all that happens.
After every kill its last.pt must load; at the end its results, and all that a checkpoint holds,
must be those of a run that nothing has interrupted. Takes minutes, so it is no part of the test
suite. Needs fork, so it runs on Linux and macOS.
"""

from __future__ import annotations

import argparse
import mmap
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import torch
import yaml

import train
from utils.checkpoint import load_checkpoint, load_detector
from utils.lasting_output import lasting_output
from utils.training import report, saving
from utils.training.run import Run

# What the training is doing, for the process that kills it.
PHASES = ("start", "train_one_epoch", "validate", "log_epoch", "save_checkpoint", "finish")
CALLERS = {"save_checkpoint": saving}  # of the others: train.py
CLOCKS = {"validation_seconds"}  # in a checkpoint: times, which no two runs share
CAUSES = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
KINDS = {
    "dense": ["--optimizer", "SGD"],
    "sparse": ["--optimizer", "AdamW", "--bn_sparsity", "--sparsity_rate", "auto"],
}
SPEC = {
    "nc": 2,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[10, 13, 16, 30, 33, 23]],
    "backbone": [
        [-1, 1, "Conv", [8, 6, 2, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "C3", [16]],
        [-1, 1, "Conv", [16, 3, 2]],
    ],
    "head": [[-1, 1, "C3", [16]], [[4], 1, "Detect", ["nc", "anchors"]]],
}


def main() -> None:
    """Kill until it was often enough, then say what happened where."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--folder", type=Path, required=True, help="for data and runs; made anew")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process that computes in threads cannot be forked
    rng = random.Random(options.seed)
    flags = make_inputs(options.folder)
    phase = mmap.mmap(-1, 1)
    wholes = {kind: train_whole(flags, kind, options.folder, phase) for kind in KINDS}
    tally, groups, runs = Counter(), [], Counter()
    while tally.total() < options.kills:
        kind = rng.choice(sorted(KINDS))
        name = f"{kind}-{runs.total()}"
        run_dir = options.folder / "runs" / name
        while not is_finished(run_dir):
            argv = command(flags, kind, name, run_dir)
            is_killed = tally.total() < options.kills
            reader, output = open_output(options.folder / f"{name}.log", is_killed, rng)
            pid = start(argv, output, phase, reader)
            groups.append(pid)
            if is_killed:
                tally.update(kill(pid, phase, rng, reader))
                print(f"{tally.total()} kills", end="\r", flush=True)
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            if code not in (0, -9, -15, -2, 130, 143):
                sys.exit(f"{name}: exit status {code}, see {options.folder / name}.log")
            check_folder(run_dir)
        compare(run_dir, wholes[kind])
        runs[kind] += 1
        print(f"{name}: equal to the uninterrupted run; {tally.total()} kills so far", flush=True)
    time.sleep(8)  # a worker whose parent was killed looks for it every five seconds
    left = [group for group in groups if is_alive(group)]
    print(f"{tally.total()} kills, {runs.total()} runs equal to the uninterrupted ones")
    for (where, cause), count in sorted(tally.items()):
        print(f"  {where:16s} {cause:20s} {count}")
    print(f"processes left over: {len(left)}")


def make_inputs(folder: Path) -> list[str]:
    """Twelve images of coloured squares, a small network, and the flags that train it on them."""
    shutil.rmtree(folder, ignore_errors=True)
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (folder / "data" / name).mkdir(parents=True)
    for number in range(12):
        image = rng.integers(90, 130, (64, 64, 3), dtype=np.uint8)
        x, y = rng.integers(4, 36, 2).tolist()
        image[y : y + 24, x : x + 24] = (0, 0, 255) if number % 2 else (255, 0, 0)
        cv2.imwrite(str(folder / f"data/images/{number}.png"), image)
        line = f"{number % 2} {(x + 12) / 64} {(y + 12) / 64} 0.375 0.375\n"
        (folder / f"data/labels/{number}.txt").write_text(line, encoding="utf-8")
    data = {"path": str(folder / "data"), "train": "images", "val": "images", "names": ["a", "b"]}
    (folder / "data.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(SPEC), encoding="utf-8")
    return [
        *("--data", str(folder / "data.yaml"), "--cfg", str(folder / "tiny.yaml"), "--weights", ""),
        *("--img", "64", "--batch", "1", "--nominal-batch", "2", "--workers", "1"),
        *("--epochs", "12"),  # of a fraction of a second each: most of a part is its start
        *("--device", "cpu", "--amp", "off", "--noautoanchor", "--project", str(folder / "runs")),
    ]


def command(flags: list[str], kind: str, name: str, run_dir: Path) -> list[str]:
    """Resume where there is something to resume; a run killed before that starts anew."""
    if (run_dir / "weights/last.pt").exists():
        return ["--resume", str(run_dir)]
    return [*flags, *KINDS[kind], "--name", name, "--exist-ok"]


def open_output(log: Path, may_be_pipe: bool, rng: random.Random) -> tuple[int | None, int]:
    """Where a run writes: into its log, or into a pipe, whose other end comes first."""
    if may_be_pipe and rng.random() < 0.5:
        return os.pipe()  # it holds more than such a run writes, so nobody need read it
    return None, os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def start(argv: list[str], output: int, phase: mmap.mmap, reader: int | None = None) -> int:
    """Train in a process of its own, which leads a process group; returns its id.

    Closes `output`; `reader` is its other end, which only this process shall have.
    """
    phase[0] = 0
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(output)
        return pid
    os.setsid()
    terminal = os.dup(2)
    if reader is not None:
        os.close(reader)
    os.dup2(output, 1)
    os.dup2(output, 2)
    for number, name in enumerate(PHASES[1:], start=1):
        tell(name, number, phase)
    train.finish = keeping_state(train.finish)
    report.draw = lambda *_: None  # most of the time, and no picture is worth it
    code = 1
    try:
        with lasting_output():  # as train.py does
            train.main(argv)
        code = 0
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code = 130
    except (OSError, RuntimeError, ValueError, FloatingPointError):
        os.dup2(terminal, 2)  # nobody reads a pipe
        traceback.print_exc()
    finally:
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    return 0


def keeping_state(finish: Callable[[Run, float], None]) -> Callable[[Run, float], None]:
    """Let it leave the whole state, which it strips from last.pt, for `compare`."""

    def keep_and_finish(run: Run, seconds: float) -> None:
        last = run.dir / "weights/last.pt"
        if "training" in load_checkpoint(last):  # not again after a kill within `finish`
            shutil.copy(last, run.dir / "state.pt")
        finish(run, seconds)

    return keep_and_finish


def tell(name: str, number: int, phase: mmap.mmap) -> None:
    """Let a function say when it is at work."""
    caller = CALLERS.get(name, train)
    original = getattr(caller, name)

    def call(*arguments: object) -> object:
        before, phase[0] = phase[0], number
        result = original(*arguments)
        phase[0] = before
        return result

    setattr(caller, name, call)


def kill(
    pid: int, phase: mmap.mmap, rng: random.Random, reader: int | None
) -> list[tuple[str, str]]:
    """Wait for some phase and a moment more, then signal; returns where and how, if it did.

    `reader` is closed first.
    """
    wanted, cause = rng.choices(range(len(PHASES)), (1, 4, 3, 2, 4, 1))[0], rng.choice(CAUSES)
    skipped = rng.randrange(4)  # of the times that the phase comes
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        while phase[0] != wanted and not has_ended(pid) and time.monotonic() < deadline:
            time.sleep(0.0002)
        if not skipped or wanted in (0, 1, 5) or has_ended(pid):
            break
        skipped -= 1
        while phase[0] == wanted and not has_ended(pid):
            time.sleep(0.0002)
    longest = {"start": 2.0, "train_one_epoch": 0.12}.get(PHASES[wanted], 0.03)
    time.sleep(rng.uniform(0, longest))
    is_late, where, how = has_ended(pid), PHASES[phase[0]], []
    if reader is not None:
        os.close(reader)
        how.append("pipe")
    if is_late:
        return []
    if reader is None or rng.random() < 0.7:
        is_for_all = rng.random() < 0.5
        (os.killpg if is_for_all else os.kill)(pid, cause)
        how.append(f"{cause.name} to {'all' if is_for_all else 'it'}")
    return [(where, ", ".join(how))]


def has_ended(pid: int) -> bool:
    """Without taking its exit status."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def is_alive(group: int) -> bool:
    """Whether any process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def check_folder(run_dir: Path) -> None:
    """Whatever has happened: where there is a folder its last.pt must load."""
    if run_dir.exists():
        load_detector(run_dir / "weights/last.pt")


def is_finished(run_dir: Path) -> bool:
    """Whether nothing is left to resume."""
    last = run_dir / "weights/last.pt"
    return last.exists() and "training" not in load_checkpoint(last)


def train_whole(flags: list[str], kind: str, folder: Path, phase: mmap.mmap) -> Path:
    """The same training without a kill."""
    _, output = open_output(folder / f"{kind}.log", False, random.Random())
    pid = start([*flags, *KINDS[kind], "--name", f"{kind}-whole"], output, phase)
    _, status = os.waitpid(pid, 0)
    if status:
        sys.exit(f"the run without kills has failed, see {folder / kind}.log")
    return folder / f"runs/{kind}-whole"


def compare(run_dir: Path, whole: Path) -> None:
    """Results, final weights and the whole state before them: bit by bit."""
    if (run_dir / "results.csv").read_bytes() != (whole / "results.csv").read_bytes():
        sys.exit(f"{run_dir / 'results.csv'} differs from that in {whole}")
    for name in ("state.pt", "weights/last.pt", "weights/best.pt"):
        mine, theirs = (load_checkpoint(folder / name) for folder in (run_dir, whole))
        for content in (mine, theirs):
            del content["options"]  # they hold the name of the run
        difference = first_difference(mine, theirs, name)
        if difference:
            sys.exit(f"{run_dir} differs from {whole}: {difference}")


def first_difference(a: object, b: object, where: str) -> str | None:
    """Where two contents of checkpoints differ, but for times."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else where
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        pairs = [(f"{where}.{key}", a[key], b[key]) for key in a.keys() - CLOCKS]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        pairs = [(f"{where}.{number}", *pair) for number, pair in enumerate(zip(a, b, strict=True))]
    else:
        return None if a == b else where
    found = (first_difference(x, y, inner) for inner, x, y in pairs)
    return next((difference for difference in found if difference), None)


if __name__ == "__main__":
    main()
