"""Watch a long run: do its memory, file handles and processes stay flat? Linux only.

    python -m benchmarks.soak --out soak.md -- train.py --data bccd.yaml --epochs 400
    python -m benchmarks.soak --out soak.md -- val.py --weights best.pt --data big.yaml

Runs one script with all its processes, takes a sample of them every few seconds, and prints per
quantity the value early and late and the slope of a straight line through the samples after the
warm-up. Time in which the script was stopped (SIGSTOP) does not count. At the end it counts the
processes that the script left behind.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks import harness
from utils.run_dir import write_text_atomic

ROOT = Path(__file__).resolve().parents[1]
QUANTITIES = ("memory, MiB", "of the script itself", "file handles", "processes", "threads")


def main(argv: Sequence[str] | None = None) -> None:
    """Run, sample, report."""
    options = parse_args(argv)
    command = [sys.executable, *options.command]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True)
    samples: list[list[float]] = []
    try:
        samples.extend(watch(process, options.every))
    except KeyboardInterrupt:  # the figures so far count
        process.terminate()
        process.wait()
    left = session_members(process.pid)
    for member in left:
        os.kill(member, signal.SIGKILL)
    if options.csv:
        heads = ",".join(["seconds", *(name.replace(",", " in") for name in QUANTITIES)])
        rows = [",".join(f"{value:g}" for value in sample) for sample in samples]
        write_text_atomic(options.csv, "\n".join([heads, *rows]) + "\n")
    minutes = samples[-1][0] / 60 if samples else 0.0
    warm = np.array([sample for sample in samples if sample[0] >= options.warm_up * 60])
    if len(warm) < 3:
        raise SystemExit(
            f"{minutes:.1f} minutes are too short after a warm-up of {options.warm_up:g}: give "
            f"less with --warm-up (exit status {process.returncode})"
        )
    lines = [
        f"{minutes / 60:.2f} hours, {len(warm)} samples after a warm-up of "
        f"{options.warm_up:g} minutes; exit status {process.returncode}; "
        f"processes left behind: {len(left)}"
    ]
    harness.report("Soak", torch.device("cpu"), [*lines, slopes(warm)], options.out)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; what follows `--` is the script to run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=float, default=10, help="seconds between samples")
    parser.add_argument("--warm-up", type=float, default=10, help="minutes left out of the slope")
    parser.add_argument("--out", help="write the Markdown here too")
    parser.add_argument("--csv", help="write the samples here")
    parser.add_argument("command", nargs="+", help="-- SCRIPT and its flags")
    options = parser.parse_args(argv)
    for path in filter(None, (options.out, options.csv)):
        if not Path(path).absolute().parent.is_dir():
            parser.error(f"{path}: there is no such folder")
    if options.every <= 0:
        parser.error(f"--every {options.every:g}: more than 0 is needed")
    return options


def watch(process: subprocess.Popen[bytes], every: float) -> Iterator[list[float]]:
    """Seconds that the process ran and QUANTITIES, until it ends."""
    seconds, last = 0.0, time.monotonic()
    while process.poll() is None:
        time.sleep(every)
        now = time.monotonic()
        if read_state(process.pid) not in ("T", "", "Z"):
            seconds += now - last
            yield [seconds, *measure(process.pid)]
        last = now


def measure(session: int) -> list[float]:
    """QUANTITIES of all processes of a session; shared pages count once (proportional set size)."""
    members = session_members(session)
    memory = {pid: read_memory(pid) for pid in members}
    handles = threads = 0
    for pid in members:
        handles += count_entries(Path(f"/proc/{pid}/fd"))
        threads += count_entries(Path(f"/proc/{pid}/task"))
    return [sum(memory.values()), memory.get(session, 0), handles, len(members), threads]


def session_members(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            fields = read_stat(int(folder.name))
            if fields and int(fields[3]) == session and fields[0] != "Z":
                found.append(int(folder.name))
    return found


def read_state(pid: int) -> str:
    """R, S, D, T ... of /proc, or nothing for a process that has ended."""
    return (read_stat(pid) or [""])[0]


def read_stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat after the name: state, parent, group, session, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
    except OSError:
        return []


def read_memory(pid: int) -> float:
    """Proportional set size, MiB; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8").splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def count_entries(folder: Path) -> int:
    """How many entries a folder of /proc has; 0 for a process that has ended."""
    try:
        return sum(1 for _ in folder.iterdir())
    except OSError:
        return 0


def slopes(samples: np.ndarray) -> str:
    """A table of medians of the first and last tenth and least-squares slopes; samples [N, 1+Q]."""
    hours = samples[:, 0] / 3600
    tenth = max(1, len(samples) // 10)
    rows = []
    for name, values in zip(QUANTITIES, samples[:, 1:].T, strict=True):
        early, late = np.median(values[:tenth]), np.median(values[-tenth:])
        slope = np.polyfit(hours, values, 1)[0]
        rows.append((name, f"{early:.1f}", f"{late:.1f}", f"{values.max():.1f}", f"{slope:+.2f}"))
    return harness.table(("quantity", "first tenth", "last tenth", "most", "slope per hour"), rows)


if __name__ == "__main__":
    main()
