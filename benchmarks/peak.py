"""Measure which share of the machine's convolution peak our training step reaches, and why.

    python -m benchmarks.peak --models n s --profile --out peak.md

The peak is the fastest of several large 3x3 convolutions, channels last, in the number format of
the step; they take turns, so that both meet the same machine. A step counts as three forward passes
of floating point operations. --profile says where its time goes, by kind of operation.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import harness
from benchmarks.training import InMemory, build_ours, build_parser, our_epoch
from utils.command import run_command
from utils.dataset import Batch
from utils.device import select_device
from utils.profile import count_gflops, synchronize
from utils.training.run import Run

CONVOLUTIONS = ((64, 80), (128, 40), (256, 40), (256, 20), (512, 20))  # channels, side
MIN_SECONDS = 0.2  # a measurement of the peak
NUM_STEPS = 3
BOXES_PER_IMAGE = 12
# Kinds of operation, and what their names or those of the operations they are part of contain.
GROUPS = {
    "casts and copies": ("aten::_to_copy", "aten::copy_", "ToCopyBackward"),
    "convolution backward": ("convolution_backward", "ConvolutionBackward"),
    "convolution forward": ("conv",),
    "batch norm": ("batch_norm", "BatchNorm"),
    "activation": ("silu", "Silu"),
}
REGIONS = {"loss": "loss", "EMA": "EMA", "Optimizer.step": "optimizer"}  # start of name: kind


def main(argv: Sequence[str] | None = None) -> None:
    """The peaks, the shares of them, and the profiles."""
    parser = build_parser(__doc__)
    parser.add_argument("--profile", action="store_true", help="where the time of a step goes")
    options = parser.parse_args(argv)
    device = select_device(options.device)
    harness.set_threads(options.threads)
    runs = {size: build_ours(options, size)[0] for size in options.models}
    steps = {size: synthetic_steps(run, options.batch) for size, run in runs.items()}
    jobs: dict[str, tuple[Callable[[], object], float, str]] = {}  # GFLOPs, what is its peak
    precisions = {torch.float32, torch.bfloat16, *(run.precision for run in runs.values())}
    for precision in sorted(precisions, key=str):
        name = f"convolution, {_short(precision)}"
        best = fastest_convolution(precision, device)
        jobs[name] = best, best.gflops * best.passes, name
    for size, run in runs.items():
        work = 3 * count_gflops(run.model, run.imgsz) * options.batch * NUM_STEPS
        suffix = _short(run.precision)
        job = our_epoch(run, steps[size]), work, f"convolution, {suffix}"
        jobs[f"training YOLOv5{size}, {suffix}"] = job
    times = harness.take_turns({k: job[0] for k, job in jobs.items()}, options.repeats, device)
    speeds = {name: work / times[name] for name, (_, work, _) in jobs.items()}
    rows = [
        (name, f"{harness.spread(speeds[name]):.0f}",
         f"{harness.spread(speeds[name] / speeds[peak]):.3f}")
        for name, (_, _, peak) in jobs.items()
    ]  # fmt: skip
    sections = [harness.table(("work", "GFLOP/s", "share of the peak in this format"), rows)]
    if options.profile:
        for size, run in runs.items():
            table = profile_steps(run, steps[size], device)
            sections.append(f"## A training step of YOLOv5{size}\n\n{table}")
    harness.report("Share of the peak", device, sections, options.out)


def _short(precision: torch.dtype) -> str:
    return str(precision).removeprefix("torch.")


def synthetic_steps(run: Run, batch: int) -> InMemory:
    """Noise with boxes, as batches in memory."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (batch, 3, run.imgsz, run.imgsz), dtype=torch.uint8, generator=rng)
    targets = torch.rand(batch * BOXES_PER_IMAGE, 6, generator=rng)
    targets[:, 0] = torch.arange(batch).repeat(BOXES_PER_IMAGE)
    targets[:, 1] = (targets[:, 1] * len(run.names)).floor()
    targets[:, 4:] = 0.05 + 0.2 * targets[:, 4:]
    return InMemory([Batch(images, targets, [""] * batch, [])] * NUM_STEPS)


class Convolution:
    """Forward passes of one 3x3 convolution that keeps its size."""

    def __init__(self, channels: int, side: int, precision: torch.dtype, device: torch.device):
        """As many images as keep the device busy."""
        num_images = 16 if device.type == "cpu" else 128
        x = torch.rand(num_images, channels, side, side)
        weight = torch.rand(channels, channels, 3, 3)
        self.gflops = 2 * x.numel() * weight[0].numel() / 1e9
        self.passes = 1
        self.x, self.weight = (
            t.to(device, precision, memory_format=torch.channels_last) for t in (x, weight)
        )

    @torch.inference_mode()
    def __call__(self) -> None:
        """All passes."""
        for _ in range(self.passes):
            F.conv2d(self.x, self.weight, padding=1)


def fastest_convolution(precision: torch.dtype, device: torch.device) -> Convolution:
    """The shape with the most operations a second, repeated for `MIN_SECONDS`."""
    speeds = {}
    for shape in CONVOLUTIONS:
        convolution = Convolution(*shape, precision, device)
        for _ in range(2):
            seconds = harness.take_turns({"": convolution}, 1, device)[""][0]
            speeds[convolution] = convolution.gflops * convolution.passes / seconds
            convolution.passes = max(round(MIN_SECONDS * convolution.passes / seconds), 1)
    return max(speeds, key=lambda convolution: speeds[convolution])


# ------------------------------------------------------------------------------------- the profile
def profile_steps(run: Run, batches: InMemory, device: torch.device) -> str:
    """Milliseconds of a step by kind of operation; labels the parts of `run`."""
    run.loss = _labelled("loss", run.loss)
    run.ema.update = _labelled("EMA", run.ema.update)
    epoch = our_epoch(run, batches)
    epoch()
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    synchronize(device)
    start = time.perf_counter()
    with profile(activities=activities) as record:
        epoch()
        synchronize(device)
        elapsed = time.perf_counter() - start
    kinds: dict[str, float] = defaultdict(float)  # milliseconds of a step
    others: dict[str, float] = defaultdict(float)
    for kind, name, microseconds in own_times(record.events(), device):
        kinds[kind] += microseconds / 1e3 / len(batches)
        if kind == "other":
            others[name] += microseconds / 1e3 / len(batches)
    total = elapsed * 1e3 / len(batches)
    kinds["outside operators"] = total - sum(kinds.values())
    rows = [(kind, f"{ms:.1f}", f"{ms / total:.1%}") for kind, ms in _falling(kinds)]
    largest = ", ".join(f"{name} {ms:.1f} ms" for name, ms in _falling(others)[:5])
    table = harness.table(("kind", "ms a step", "share"), rows)
    return f"{table}\n\nLargest of the others: {largest}."


def _falling(amounts: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(amounts.items(), key=lambda item: -item[1])


def _labelled(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        with record_function(name):
            return function(*arguments)

    return call


def own_times(events: Sequence[Any], device: torch.device) -> list[tuple[str, str, float]]:
    """Kind, name and microseconds, without what it calls, of each operator of the profiler.

    An operator on its way back belongs to the loss if the one on the way there did; the profiler
    gives both one sequence number.
    """
    on_cpu = [event for event in events if event.device_type == DeviceType.CPU]
    chains = [_chain(event) for event in on_cpu]
    loss_numbers = {
        event.sequence_nr
        for event, chain in zip(on_cpu, chains, strict=True)
        if event.sequence_nr >= 0 and chain[-1].name == "loss"
    }
    attribute = "self_cpu_time_total" if device.type == "cpu" else "self_device_time_total"
    return [
        (_kind(chain, loss_numbers), event.name, getattr(event, attribute))
        for event, chain in zip(on_cpu, chains, strict=True)
    ]


def _chain(event: Any) -> list[Any]:
    """The operator, what called it, and so on."""
    chain = [event]
    while chain[-1].cpu_parent is not None:
        chain.append(chain[-1].cpu_parent)
    return chain


def _kind(chain: Sequence[Any], loss_numbers: set[int]) -> str:
    outermost = chain[-1]
    if outermost.sequence_nr in loss_numbers:
        return "loss"
    for start, kind in REGIONS.items():
        if any(event.name.startswith(start) for event in chain):
            return kind
    for kind, words in GROUPS.items():
        if any(word in event.name for event in chain for word in words):
            return kind
    return "other"


if __name__ == "__main__":
    run_command(main)
