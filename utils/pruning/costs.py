"""What a network costs, as a function of how many channels each group keeps, without building it.

A convolution that reads I channels and writes O, with k x k kernels and outputs of a cells, takes
a k^2 I O multiply-accumulates and holds k^2 I O weights; batch norm and upsampling cost the same
for each of their channels. I and O are sums of kept counts, so the cost of a candidate is two
matrix products, microseconds, where building and profiling the network takes seconds.

The numbers are those of `utils.profile` for the network that `prune_model` makes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from models.blocks import BATCH_NORMS, Bottleneck, Conv
from models.yolo import Model
from utils.pruning.channel_groups import ChannelGroups, Layout, conv_block

# Beside convolutions, thop counts these for each number they work on; all else is free.
_BATCHNORM_MACS = 4
_UPSAMPLE_MACS = {"nearest": 1, "bilinear": 11}


def kept_counts(keep_masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Channels that stay, by name of the group."""
    return {name: int(torch.count_nonzero(mask)) for name, mask in keep_masks.items()}


class NetworkCost:
    """The cost of one network for any choice of kept channels.

    Everywhere `counts` holds kept channels by name of a prunable group; a group that is not named
    keeps all. The methods raise ValueError for another name, and for a count that is not from 1 to
    the size of the group.
    """

    def __init__(self, model: Model, channel_groups: ChannelGroups, imgsz: int) -> None:
        """Look at the network once.

        Args:
            model: the network the groups were found in, pruned or not; it is not changed.
            channel_groups: what `find_channel_groups(model)` gave.
            imgsz: side of the square input in pixels that MACs and FLOPs are for.
        """
        groups = channel_groups.groups
        self._column = {name: column for column, name in enumerate(groups)}
        self._largest = {name: group.num_channels for name, group in groups.items()}
        self._prunable = frozenset(channel_groups.prunable)
        self._scale = (imgsz / model.max_stride) ** 2  # everything grows with the area
        convs = [_read_conv(model, path) for path in channel_groups.inputs]
        cells, upsampling = _probe(model, channel_groups, self._column)
        a = np.array([cells[path] for path in channel_groups.inputs])  # [convolutions]
        # How often each group stands in what a convolution reads and writes [convolutions, groups].
        self._reads = self._incidence(list(channel_groups.inputs.values()))
        writes = [channel_groups.outputs.get(path, ()) for path in channel_groups.inputs]
        self._writes = self._incidence(writes)
        self._fixed_outputs = np.array(
            [0 if layout else conv.out_channels for layout, conv in zip(writes, convs, strict=True)]
        )
        self._kernel = np.array([conv.kernel for conv in convs])
        self._kernel_cells = a * self._kernel
        self._macs_per_kept = (a * [conv.extra_macs for conv in convs]) @ self._writes + upsampling
        self._extra_parameters = np.array([conv.extra_parameters for conv in convs])

    def gflops(self, counts: Mapping[str, int]) -> float:
        """Billions of floating point operations for one image, as `count_gflops` counts them."""
        return 2 * self._macs(self._kept(counts)) / 1e9 * self._scale

    def parameters(self, counts: Mapping[str, int]) -> int:
        """Weights and biases, as `count_parameters` counts them."""
        inputs, outputs = self._widths(self._kept(counts))
        return int(outputs @ (self._kernel * inputs + self._extra_parameters))

    def macs_per_channel(self) -> dict[str, float]:
        """By prunable group the MACs that the loss of one channel saves at full width.

        In all its producers and all its consumers together, batch norm and upsampling included.
        """
        full = self._kept({})
        macs = self._macs(full)
        saved = {}
        for name in self._column:
            if name in self._prunable:
                one_less = full.copy()
                one_less[self._column[name]] -= 1
                saved[name] = (macs - self._macs(one_less)) * self._scale
        return saved

    def _incidence(self, layouts: Sequence[Layout]) -> np.ndarray:
        matrix = np.zeros((len(layouts), len(self._column)), np.int64)
        for row, layout in zip(matrix, layouts, strict=True):
            for segment in layout:
                row[self._column[segment.group]] += 1
        return matrix

    def _kept(self, counts: Mapping[str, int]) -> np.ndarray:
        """Kept channels of all groups, int64 [groups]."""
        for name, count in counts.items():
            if name not in self._prunable:
                raise ValueError(f"{name} is no prunable channel group")
            if not 1 <= count <= self._largest[name]:
                raise ValueError(
                    f"{name}: {count} channels are to be kept, expected 1 to {self._largest[name]}"
                )
        return np.array([counts.get(name, size) for name, size in self._largest.items()], np.int64)

    def _widths(self, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Input and output channels of every convolution."""
        return self._reads @ kept, self._writes @ kept + self._fixed_outputs

    def _macs(self, kept: np.ndarray) -> int:
        """MACs at the smallest input."""
        inputs, outputs = self._widths(kept)
        return int(self._kernel_cells @ (inputs * outputs) + self._macs_per_kept @ kept)


class _Convolution(NamedTuple):
    """What the cost of a convolution depends on besides its channels and cells."""

    out_channels: int
    kernel: int  # weights for each pair of an input and an output channel
    extra_parameters: int  # for each output channel: gamma and beta, or a bias
    extra_macs: int  # for each output channel and cell: batch norm


def _read_conv(model: Model, path: str) -> _Convolution:
    """Read the Conv block, or the convolution of the head, at a path of `ChannelGroups.inputs`."""
    module = model.model.get_submodule(path)
    conv = module.conv if isinstance(module, Conv) else cast(nn.Conv2d, module)
    has_bn = isinstance(module, Conv) and isinstance(module.bn, BATCH_NORMS)
    extra = sum(p.numel() for p in module.parameters()) - conv.weight.numel()
    return _Convolution(
        conv.out_channels,
        math.prod(conv.kernel_size),
        extra // conv.out_channels,
        _BATCHNORM_MACS if has_bn else 0,
    )


@torch.no_grad()
def _probe(
    model: Model, channel_groups: ChannelGroups, column: Mapping[str, int]
) -> tuple[dict[str, int], np.ndarray]:
    """Run a copy of the network once, at the smallest input.

    Every Conv block writes, instead of its output, the number of the group each channel belongs
    to. Pooling and concatenation keep these numbers, a shortcut adds two equal ones; so the numbers
    that arrive at an upsampling tell whose channels pass through it.

    Returns:
        Cells of the output of every convolution by path, and the MACs in upsampling for each
        channel a group keeps, int64 [groups].
    """
    probe = copy.deepcopy(model).float().cpu().eval()
    cells: dict[str, int] = {}
    upsampling = np.zeros(len(column), np.int64)
    sizes = np.array([group.num_channels for group in channel_groups.groups.values()])

    def count_cells(path: str, conv: nn.Module) -> None:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            cells[path] = output[0, 0].numel()

        conv.register_forward_hook(hook)

    def write_numbers(block: Conv, layout: Layout) -> None:
        numbers = [column[segment.group] for segment in layout for _ in range(segment.size)]

        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return torch.tensor(numbers, dtype=output.dtype).view(1, -1, 1, 1).expand_as(output)

        block.register_forward_hook(hook)

    def undo_shortcut(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output / 2

    def count_upsampling(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        numbers = inputs[0][0, :, 0, 0].round().long().numpy()
        times = np.bincount(numbers, minlength=len(column)) // sizes
        macs = _UPSAMPLE_MACS[str(cast(nn.Upsample, module).mode)]
        upsampling[:] += times * macs * output[0, 0].numel()

    for path in channel_groups.inputs:
        module = probe.model.get_submodule(path)
        count_cells(path, module.conv if isinstance(module, Conv) else module)
    for path, layout in channel_groups.outputs.items():
        write_numbers(conv_block(probe, path), layout)
    for module in probe.modules():
        if isinstance(module, Bottleneck) and module.add:
            module.register_forward_hook(undo_shortcut)
        elif isinstance(module, nn.Upsample):
            module.register_forward_hook(count_upsampling)
    probe(torch.zeros(1, 3, model.max_stride, model.max_stride))
    return cells, upsampling
