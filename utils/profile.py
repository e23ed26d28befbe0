"""Size and speed of a network: parameters, multiply-accumulates (thop), latency."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence

import thop
import torch
from torch import Tensor, nn

from models.yolo import Model


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


def measure_latency(
    model: Model,
    imgsz: int,
    device: torch.device,
    batch_size: int = 1,
    precision: torch.dtype = torch.float32,
    num_rounds: int = 25,
) -> float:
    """Milliseconds that one forward pass takes; see `compare_latency`."""
    return compare_latency([model], imgsz, device, batch_size, precision, num_rounds)[0]


@torch.inference_mode()
def compare_latency(
    models: Sequence[Model],
    imgsz: int,
    device: torch.device,
    batch_size: int = 1,
    precision: torch.dtype = torch.float32,
    num_rounds: int = 25,
) -> list[float]:
    """Milliseconds of one forward pass (decoding included, NMS not) of each network.

    The networks take turns, so that what else the machine does hits all of them alike: the ratios
    are steadier than the numbers. BN is folded, on copies.

    Args:
        models: any number, left as they are.
        imgsz: side of the square input, rounded up to a multiple of each network's stride.
        device: where to measure; the copies are moved there.
        batch_size: images in one pass; the result is for the whole batch.
        precision: type of weights and input.
        num_rounds: passes of each network after the warm-up; at least 1.

    Returns:
        Per network the median of its passes.
    """
    prepared = [_for_inference(model, device, precision) for model in models]
    inputs = [_noise(model.max_stride, imgsz, batch_size, device, precision) for model in prepared]
    for _ in range(3):  # the first passes pay for memory and kernel selection
        for model, x in zip(prepared, inputs, strict=True):
            model(x)
    milliseconds: list[list[float]] = [[] for _ in prepared]
    for _ in range(num_rounds):
        for times, model, x in zip(milliseconds, prepared, inputs, strict=True):
            synchronize(device)
            start = time.perf_counter()
            model(x)
            synchronize(device)
            times.append((time.perf_counter() - start) * 1e3)
    return [statistics.median(times) for times in milliseconds]


def _for_inference(model: Model, device: torch.device, precision: torch.dtype) -> Model:
    """A copy in eval mode with BN folded; folded before the cast, in full precision."""
    return copy.deepcopy(model).float().eval().fuse().to(device, precision)


def _noise(
    stride: int, imgsz: int, batch_size: int, device: torch.device, precision: torch.dtype
) -> Tensor:
    side = -(-imgsz // stride) * stride
    return torch.rand(batch_size, 3, side, side).to(device, precision)
