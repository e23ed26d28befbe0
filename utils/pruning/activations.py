"""What each convolution reads: mean and covariance of its input channels, measured or expected.

Both serve the choice of channels (`importance.py`) and making up for those that go
(`compensate.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models.blocks import Conv
from models.yolo import Model
from utils.pruning.channel_groups import ChannelGroups, conv_block

# Pixels per image and input that enter a covariance, at most. Four times as many changed nothing
# that stands out from chance (yolov5n, 64 images).
PIXELS_PER_IMAGE = 256
_QUADRATURE_NODES = 64


class InputStatistics(NamedTuple):
    """Of one convolution's input over images and pixels; float64 on the CPU."""

    mean: Tensor  # [C]
    variance: Tensor  # [C]
    covariance: Tensor | None  # [C, C]; None where nothing was measured


@torch.no_grad()
def measure_inputs(
    model: Model, channel_groups: ChannelGroups, batches: Iterable[Tensor], seed: int = 0
) -> dict[str, InputStatistics]:
    """Run images through a network and take the statistics of what every convolution reads.

    Args:
        model: left as it is; runs in eval mode.
        channel_groups: of `model`.
        batches: images 0-1 `[B, 3, H, W]` on the device of the model.
        seed: of the choice of pixels.

    Returns:
        By path of the consumer, as in `ChannelGroups.inputs`.

    Raises:
        ValueError: no images.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = {path: _Sums() for path in channel_groups.inputs}
    watched = copy.deepcopy(model).eval()
    for path, part in sums.items():
        reader = watched.model.get_submodule(path)
        reader.register_forward_pre_hook(_observer(part, generator))
    for images in batches:
        watched(images)
    if not all(part.number for part in sums.values()):
        raise ValueError("no images to measure activations on")
    return {path: part.result() for path, part in sums.items()}


def _observer(sums: _Sums, generator: torch.Generator) -> Callable[[nn.Module, tuple], None]:
    def observe(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        num_images, height, width = len(inputs[0]), *inputs[0].shape[2:]
        pixels = inputs[0].detach().transpose(0, 1).flatten(1)  # [C, B * H * W]
        wanted = PIXELS_PER_IMAGE * num_images
        if num_images * height * width > wanted:
            chosen = torch.randint(pixels.shape[1], (wanted,), generator=generator)
            pixels = pixels[:, chosen.to(pixels.device)]
        sums.add(pixels.float())

    return observe


class _Sums:
    """Running sums of one input, about a fixed point so that float32 products lose nothing."""

    def __init__(self) -> None:
        self.number = 0
        self.origin = torch.zeros(0)  # [C] mean of the first pixels
        self.first = torch.zeros(0)  # [C]
        self.second = torch.zeros(0)  # [C, C]

    def add(self, pixels: Tensor) -> None:
        """Add values `[C, N]`."""
        if not self.number:
            self.origin = pixels.mean(1, keepdim=True)
            self.first = torch.zeros(len(pixels), dtype=torch.float64)
            self.second = torch.zeros(len(pixels), len(pixels), dtype=torch.float64)
        centred = pixels - self.origin
        self.number += pixels.shape[1]
        self.first += centred.sum(1).cpu().double()
        self.second += (centred @ centred.T).cpu().double()

    def result(self) -> InputStatistics:
        shift = self.first / self.number
        covariance = self.second / self.number - torch.outer(shift, shift)
        variance = covariance.diagonal().clamp(min=0)
        return InputStatistics(self.origin[:, 0].cpu().double() + shift, variance, covariance)


@torch.no_grad()
def expected_inputs(model: Model, channel_groups: ChannelGroups) -> dict[str, InputStatistics]:
    """The same without images: what gamma and beta alone say.

    Batch norm makes the value before the activation one of mean beta and deviation |gamma|; taken
    as normally distributed, the mean and variance behind the activation follow. Exact for
    gamma = 0. What a shortcut adds counts as independent, and pooling as if it changed nothing.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(_QUADRATURE_NODES)
    z = torch.from_numpy(nodes)
    weight = torch.from_numpy(weights / weights.sum())
    outputs: dict[str, tuple[Tensor, Tensor]] = {}
    for path in channel_groups.outputs:
        block = conv_block(model, path)
        gamma, beta = block.bn.weight.cpu().double(), block.bn.bias.cpu().double()
        values = block.act(beta[:, None] + gamma[:, None] * z)  # [C, nodes]
        mean = values @ weight
        outputs[path] = mean, (values - mean[:, None]).square() @ weight
    statistics = {}
    for path, layout in channel_groups.inputs.items():
        num_channels = sum(segment.size for segment in layout)
        mean, variance = torch.zeros(2, num_channels, dtype=torch.float64)
        for term in channel_groups.terms[path]:
            span = slice(term.first_channel, term.first_channel + len(outputs[term.path][0]))
            mean[span] += outputs[term.path][0]
            variance[span] += outputs[term.path][1]
        statistics[path] = InputStatistics(mean, variance, None)
    return statistics


def constant_inputs(model: Model, channel_groups: ChannelGroups) -> dict[str, Tensor]:
    """What every input channel `[C]` is worth if all gammas are 0: the sums of act(beta)."""
    inputs = {}
    for path, layout in channel_groups.inputs.items():
        inputs[path] = torch.zeros(sum(segment.size for segment in layout), dtype=torch.float64)
        for term in channel_groups.terms[path]:
            block = conv_block(model, term.path)
            constant = block.act(block.bn.bias.detach().cpu().double())
            inputs[path][term.first_channel : term.first_channel + len(constant)] += constant
    return inputs


def consumer(model: Model, path: str) -> tuple[nn.Conv2d, nn.BatchNorm2d | None]:
    """The convolution at a path of `ChannelGroups.inputs` and its batch norm (none in the head)."""
    module = model.model.get_submodule(path)
    if isinstance(module, Conv):
        return module.conv, module.bn
    assert isinstance(module, nn.Conv2d)
    return module, None
