"""What all benchmarks share: flags, the machine, timing in turns, peak memory, tables.

On a machine that does something else beside, single runs differ by more than what is to be shown.
So the variants take turns, every round gives its own ratio, and the median ratio counts.

    python -m benchmarks.harness peak MODULE:FUNCTION JSON
    python -m benchmarks.harness serve MODULE:FUNCTION JSON

runs one function and prints its peak memory; or calls what the function gives, once for each line
that it reads, and prints the seconds. `measure_peak` and `Remote` start these processes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch

from utils.config import DatasetSpec
from utils.device import describe_device, select_precision
from utils.image_cache import num_usable_cores
from utils.profile import synchronize
from utils.run_dir import write_text_atomic
from utils.scan import label_path, scan_split

MEBI = 2**20
Times = Mapping[str, np.ndarray]  # seconds of each variant, [rounds]; the baseline comes first


# -------------------------------------------------------------------------------- flags and report
def build_parser(description: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The flags of every benchmark; `defaults` are those that differ."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="bccd.yaml", help="data set yaml")
    parser.add_argument("--img", type=int, default=320, help="pixels")
    parser.add_argument("--batch", type=int, default=16, help="images")
    parser.add_argument("--repeats", type=int, default=5, help="rounds after the warm-up")
    parser.add_argument(
        "--workers", type=int, help="loader processes; default: 2 for the baseline, ours chooses"
    )
    parser.add_argument(
        "--threads", type=int, default=num_usable_cores(), help="of torch and OpenCV"
    )
    parser.add_argument("--device", default="", help="'' (best), cpu or 0")
    parser.add_argument("--out", help="write the Markdown here too")
    parser.set_defaults(**defaults)
    return parser


def format_flags(options: argparse.Namespace, names: Sequence[str]) -> list[str]:
    """The command line of these options, but for those that are None."""
    values = [(f"--{name}", getattr(options, name)) for name in names]
    return [word for flag, value in values if value is not None for word in (flag, str(value))]


def count_plain_workers(options: argparse.Namespace) -> int:
    """Loader processes of the baseline: as textbooks have it, two."""
    return 2 if options.workers is None else options.workers


def set_threads(count: int) -> None:
    """Let torch and OpenCV use so many threads in this process."""
    torch.set_num_threads(count)
    cv2.setNumThreads(count)


def use_one_core() -> None:
    """Run on one core from here on, and with one thread; on Linux, elsewhere with one thread."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
    set_threads(1)


def report(
    title: str, device: torch.device | Sequence[str], sections: Iterable[str], out: str | None
) -> None:
    """Print the tables below the command and the machine; write them to a file if asked.

    Args:
        title: of the page.
        device: what was measured; or what `machine_lines` said before the machine was restricted.
        sections: Markdown.
        out: file.
    """
    module = sys.modules["__main__"].__spec__
    command = shlex.join(["python", "-m", module.name if module else title, *sys.argv[1:]])
    machine = machine_lines(device) if isinstance(device, torch.device) else device
    head = [f"# {title}", "", f"`{command}`", "", *machine]
    text = "\n".join(head) + "\n\n" + "\n\n".join(sections) + "\n"
    print(text)
    if out:
        write_text_atomic(out, text)


def machine_lines(device: torch.device) -> list[str]:
    """Processor, GPU and versions as a Markdown list."""
    cpu, cpuinfo = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text("utf-8").splitlines() if "model name" in line]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    precision = select_precision("auto", torch.device("cpu"))
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return [
        f"- CPU: {cpu}, {num_usable_cores()} cores, {torch.backends.cpu.get_cpu_capability()}, "
        f"native {str(precision).removeprefix('torch.')}; load when measured {load}",
        f"- threads: torch {torch.get_num_threads()}, OpenCV {cv2.getNumThreads()}",
        f"- device: {describe_device(device)}",
        f"- Python {platform.python_version()}, torch {torch.__version__}, torchvision "
        f"{version('torchvision')}, numpy {np.__version__}, OpenCV {cv2.__version__}",
    ]


def table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


# -------------------------------------------------------------------------------------------- time
def take_turns(
    variants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, np.ndarray]:
    """Time the variants one after the other, in alternating order, after a warm-up of each.

    Args:
        variants: by name, the baseline first. One that returns a float has timed itself.
        rounds: how often each is timed.
        device: waited for before and after each.
    """
    names = list(variants)
    times = {name: np.zeros(rounds) for name in names}
    for run in variants.values():
        run()
    for number in range(rounds):
        for name in names[::-1] if number % 2 else names:
            synchronize(device)
            start = time.perf_counter()
            result = variants[name]()
            synchronize(device)
            elapsed = time.perf_counter() - start
            times[name][number] = result if isinstance(result, float) else elapsed
    return times


class Spread(NamedTuple):
    """Median and quartiles."""

    median: float
    low: float
    high: float

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.low:{spec}} to {self.high:{spec}})"


def spread(values: np.ndarray) -> Spread:
    """Median and quartiles of values [n], n at least 1."""
    low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
    return Spread(median, low, high)


def speed_ups(times: Times) -> dict[str, Spread]:
    """How many times as fast as the baseline, from the ratio of each round."""
    baseline = next(iter(times.values()))
    return {name: spread(baseline / seconds) for name, seconds in times.items()}


def growth(times: Times, work: Mapping[str, float]) -> dict[str, Spread]:
    """Seconds per unit of work, relative to the first variant in the same round."""
    costs = {name: seconds / work[name] for name, seconds in times.items()}
    first = next(iter(costs.values()))
    return {name: spread(cost / first) for name, cost in costs.items()}


def timing_table(times: Times, work: float, unit: str) -> str:
    """Seconds, units of work per second, and speed-up over the baseline; medians and quartiles."""
    ratios = speed_ups(times)
    rows = [
        (name, f"{spread(seconds):.3f}", f"{work / np.median(seconds):.1f}", f"{ratios[name]:.2f}")
        for name, seconds in times.items()
    ]
    return table(("variant", "seconds", f"{unit}/s", "times as fast"), rows)


def ratio_table(times: Times, name: str) -> str:
    """How many times as fast as each of the others one variant is; medians and quartiles."""
    rows = [
        (other, f"{spread(seconds / times[name]):.2f}")
        for other, seconds in times.items()
        if other != name
    ]
    return table((f"{name} against", "times as fast"), rows)


class Remote:
    """What a function of a module gives, called again and again in a process of its own.

    So each variant has settings of its own, as in use. To be closed by a `with`.
    """

    def __init__(self, function: Callable[..., Callable[[], object]], **arguments: Any) -> None:
        """Start the process; arguments go as JSON. It gets ready while others do."""
        self.process = subprocess.Popen(
            _command("serve", function, arguments),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self) -> float:
        """Call it once; seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended")
        return float(line)

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # the end of its input is that of the process


def serve(target: str, arguments: str) -> None:
    """Answer each line of the input by the seconds that a call takes."""
    call = _load(target, arguments)
    for _ in sys.stdin:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print(time.perf_counter() - start, flush=True)


def _command(kind: str, function: Callable[..., object], arguments: Mapping[str, Any]) -> list[str]:
    module = function.__module__
    spec = sys.modules[module].__spec__
    name = spec.name if spec else module  # of a script that runs, __module__ says "__main__"
    target = f"{name}:{function.__name__}"
    return [sys.executable, "-m", "benchmarks.harness", kind, target, json.dumps(arguments)]


def _load(target: str, arguments: str) -> Any:
    """What `module:function` returns."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)(**json.loads(arguments))


# ------------------------------------------------------------------------------------------ memory
class Peak(NamedTuple):
    """Most memory in use at one time, MiB; not a number where the system is not Linux."""

    process: float
    worker: float  # the largest loader process, pages of its parent that it used included; 0: none
    gpu: float  # tensors


def memory_table(peaks: Mapping[str, Sequence[Peak]]) -> str:
    """Peaks of the variants, a run for each; the process as a share of the baseline's."""
    first = np.array([peak.process for peak in next(iter(peaks.values()))])
    heads = ("variant", "process, MiB", "of baseline", "largest loader process", "GPU tensors")
    rows = []
    for name, runs in peaks.items():
        process, worker, gpu = np.array(runs).T
        rows.append((
            *(name, f"{spread(process):.0f}", f"{spread(process / first):.2f}"),
            *(f"{spread(worker):.0f}", f"{spread(gpu):.0f}"),
        ))  # fmt: skip
    return table(heads, rows)


def measure_peak(function: Callable[..., object], **arguments: Any) -> Peak:
    """Peak memory of a function of a module, called in a process of its own; arguments as JSON."""
    command = _command("peak", function, arguments)
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return Peak(**json.loads(result.stdout.splitlines()[-1]))


def run_alone(target: str, arguments: str) -> Peak:
    """Call `module:function` with JSON arguments and say what it took.

    Loader processes count if they still live, so the function must return what holds them.
    """
    kept = _load(target, arguments)
    workers = [_peak_of(child.pid) for child in multiprocessing.active_children()]
    gpu = torch.cuda.max_memory_allocated() / MEBI if torch.cuda.is_available() else 0.0
    del kept
    return Peak(_peak_of("self"), max(workers, default=0.0), gpu)


def _peak_of(process: int | str | None) -> float:
    """MiB. Not ru_maxrss, which on Linux starts from the memory of the process that started it."""
    status = Path(f"/proc/{process}/status")
    lines = status.read_text("utf-8").splitlines() if status.exists() else []
    kibi = [float(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return kibi[0] / 1024 if kibi else math.nan


# -------------------------------------------------------------------------------------------- data
def copy_dataset(spec: DatasetSpec, folder: Path, num_images: int) -> Path:
    """A data set of so many files, copies of the training images taken in turn; gives its yaml."""
    paths = scan_split(spec.train, spec.names, cache=False).paths
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    for number in range(num_images):
        image = Path(paths[number % len(paths)])
        labels = Path(label_path(str(image)))
        shutil.copyfile(image, folder / "images" / f"{number:06d}{image.suffix}")
        if labels.exists():
            shutil.copyfile(labels, folder / "labels" / f"{number:06d}.txt")
    content = {"path": str(folder.resolve()), "train": "images", "val": "images"}
    yaml = folder / "data.yaml"  # JSON is YAML
    yaml.write_text(json.dumps(content | {"names": list(spec.names)}), encoding="utf-8")
    return yaml


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(*sys.argv[2:])
    else:
        print(json.dumps(run_alone(*sys.argv[2:])._asdict()))
