"""How much a channel matters: importances that rank the channels of all groups together.

- "gamma": |gamma|, the classic one. It knows neither the scale of the layers that read a channel
  nor what it costs.
- "error": what the network loses at once if the channel is replaced by its mean: the deviation of
  the channel times the weights that read it, in units of the deviation of what they compute
  (gamma of the batch norm behind them included), added up over all that read it as squares.
- "error-per-cost": the same over the square root of the multiply-accumulates that removing the
  channel saves.

Reference: Liu et al. 2017, Network Slimming, arXiv:1708.06519, for |gamma|.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.yolo import Model
from utils.choices import IMPORTANCES
from utils.pruning.activations import InputStatistics, consumer
from utils.pruning.channel_groups import ChannelGroups
from utils.pruning.slimming import gamma_importance


def channel_importance(
    kind: str,
    model: Model,
    channel_groups: ChannelGroups,
    statistics: Mapping[str, InputStatistics],
    macs_per_channel: Mapping[str, float],
) -> dict[str, Tensor]:
    """The importance of every channel that may go.

    Args:
        kind: one of `IMPORTANCES`.
        model: a network with batch norms.
        channel_groups: of `model`.
        statistics: of its inputs, measured or expected (`activations.py`).
        macs_per_channel: multiply-accumulates that one channel of a group less saves, by its name.

    Returns:
        By name of the prunable group float32 `[C]` on the CPU, >= 0, the form `select_keep_masks`
        takes.

    Raises:
        ValueError: unknown kind, or no prunable batch norms.
    """
    if kind == "gamma":
        return gamma_importance(model, channel_groups)
    if kind not in IMPORTANCES:
        raise ValueError(f"importance {kind!r}, expected one of {', '.join(IMPORTANCES)}")
    errors = output_errors(model, channel_groups, statistics)
    if kind == "error":
        return errors
    return {name: error / macs_per_channel[name] ** 0.5 for name, error in errors.items()}


@torch.no_grad()
def output_errors(
    model: Model, channel_groups: ChannelGroups, statistics: Mapping[str, InputStatistics]
) -> dict[str, Tensor]:
    """The importance "error", by name of the prunable group."""
    squares = {
        name: torch.zeros(group.num_channels, dtype=torch.float64)
        for name, group in channel_groups.prunable.items()
    }
    for path, layout in channel_groups.inputs.items():
        conv, bn = consumer(model, path)
        gain = conv.weight.cpu().double().square().sum((2, 3))  # [out, in]
        if bn is not None:
            assert bn.running_var is not None
            gamma, variance = bn.weight.cpu().double(), bn.running_var.cpu().double()
            gain *= (gamma.square() / (variance + bn.eps))[:, None]
        error = gain.sum(0) * statistics[path].variance
        for segment, part in zip(layout, error.split([s.size for s in layout]), strict=True):
            if segment.group in squares:
                squares[segment.group] += part
    return {name: square.sqrt().float() for name, square in squares.items()}
