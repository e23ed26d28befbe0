"""Size and speed of a network: parameters, multiply-accumulates (thop), latency."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import thop
import torch
from torch import Tensor, nn

from models.yolo import Model

_NUM_BLOCKS = 10
_MIN_ROUNDS = 5  # where one pass takes longer than the time for all


def count_parameters(model: nn.Module) -> int:
    """Weights and biases, BN included; buffers (running statistics, anchors) are not counted."""
    return sum(p.numel() for p in model.parameters())


def count_gflops(model: Model, imgsz: int = 640) -> float:
    """Billions of floating point operations for one image: twice the MACs that thop counts.

    thop hangs hooks and buffers on what it measures, so it gets a copy. All that it counts grows
    with the area of the input; a small input, scaled up, thus gives the same number.
    """
    side = model.max_stride
    model = copy.deepcopy(model).float().cpu()
    macs, _ = thop.profile(model, inputs=(torch.zeros(1, 3, side, side),), verbose=False)
    return 2 * macs / 1e9 * (imgsz / side) ** 2


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all work given to it, so that a clock means something."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class Stopwatch:
    """Adds up the seconds of the three stages, waiting for the device at each reading."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = [0.0, 0.0, 0.0]
        self._start = 0.0

    def start(self) -> None:
        """The first stage begins now."""
        synchronize(self.device)
        self._start = time.perf_counter()

    def lap(self, stage: int) -> None:
        """Count the time since the last reading for a stage, 0 to 2."""
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds[stage] += now - self._start
        self._start = now

    def ms_per_image(self, num_images: int) -> tuple[float, float, float]:
        """Milliseconds of the three stages."""
        return ms_per_image(self.seconds, num_images)


def ms_per_image(seconds: Sequence[float], num_images: int) -> tuple[float, float, float]:
    """Milliseconds an image of three stages that took so many seconds."""
    first, second, third = (s / max(num_images, 1) * 1e3 for s in seconds)
    return first, second, third


class Latency(NamedTuple):
    """How long one network takes, and how many times as fast as the first one it is.

    Between `speed_up_low` and `speed_up_high` the true value lies with about 98 % certainty. Where
    the two include 1, no difference was found.
    """

    milliseconds: float
    speed_up: float
    speed_up_low: float
    speed_up_high: float


@torch.inference_mode()
def compare_latency(
    models: Sequence[Model],
    imgsz: int,
    device: torch.device,
    batch_size: int = 1,
    precision: torch.dtype = torch.float32,
    seconds: float = 2.0,
) -> list[Latency]:
    """Time one forward pass (decoding included, NMS not) of each network; compare with the first.

    On a busy machine single passes take up to several times as long as others. So the networks
    take turns, in changing order: what else the machine does hits all of them alike. And the
    passes are split into blocks, one after the other, of which the fastest pass of each network
    counts: each block gives a time and a ratio, the result is the median, and how far the blocks
    differ says how far to trust it. BN is folded, on copies, and channels come last in memory, the
    layout in which convolutions on a CPU need not copy their input and output (yolov5n at 320 px:
    1.2 to 1.3 times faster on two cores).

    Args:
        models: any number, left as they are.
        imgsz: side of the square input, rounded up to a multiple of each network's stride.
        device: where to measure; the copies are moved there.
        batch_size: images in one pass; the result is for the whole batch.
        precision: type of weights and input.
        seconds: for each network, after the warm-up. Slow ones take longer: five passes each.
    """
    prepared = [_for_inference(model, device, precision) for model in models]
    inputs = [_noise(model.max_stride, imgsz, batch_size, device, precision) for model in prepared]
    for _ in range(2):  # the first passes pay for memory and kernel selection
        for model, x in zip(prepared, inputs, strict=True):
            model(x)
    rounds: list[list[float]] = []  # milliseconds, a row per round, a column per network
    end = time.perf_counter() + seconds * len(prepared)
    while prepared and (len(rounds) < _MIN_ROUNDS or time.perf_counter() < end):
        row = [0.0] * len(prepared)
        order = range(len(prepared))
        for index in reversed(order) if len(rounds) % 2 else order:
            synchronize(device)
            start = time.perf_counter()
            prepared[index](inputs[index])
            synchronize(device)
            row[index] = (time.perf_counter() - start) * 1e3
        rounds.append(row)
    return summarise_rounds(np.reshape(rounds, (len(rounds), len(prepared))))


def summarise_rounds(rounds: np.ndarray) -> list[Latency]:
    """Times of each network, milliseconds [rounds, networks], as `compare_latency` gives them."""
    blocks = np.array_split(rounds, min(_NUM_BLOCKS, len(rounds)) or 1)
    fastest = np.stack([block.min(0, initial=np.inf) for block in blocks])  # [blocks, networks]
    ratios = np.sort(fastest[:, :1] / fastest, axis=0)
    # Of ten blocks the second lowest and second highest enclose the median with 98 %, of five
    # the lowest and highest with 94 % (binomial, p = 1/2).
    outside = len(blocks) // _NUM_BLOCKS
    middle = np.median(ratios, axis=0)
    columns = (np.median(fastest, axis=0), middle, ratios[outside], ratios[-1 - outside])
    return [Latency(*numbers) for numbers in np.stack(columns, 1).tolist()]


def _for_inference(model: Model, device: torch.device, precision: torch.dtype) -> Model:
    """A copy in eval mode with BN folded; folded before the cast, in full precision."""
    fused = copy.deepcopy(model).float().eval().fuse()
    return fused.to(device, precision).to(memory_format=torch.channels_last)


def _noise(
    stride: int, imgsz: int, batch_size: int, device: torch.device, precision: torch.dtype
) -> Tensor:
    side = -(-imgsz // stride) * stride
    noise = torch.rand(batch_size, 3, side, side)
    return noise.to(device, precision, memory_format=torch.channels_last)
