"""Keep masks -> a new spec and a new network with the weights that stay; the old one stays intact.

The proof of a cut: the new network equals the old one with gamma = beta = 0 on the dropped channels
(`mask_model`), because such a channel carries silu(0) = 0 everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from models.blocks import Conv
from models.yolo import Model
from utils.pruning.channel_groups import ChannelGroups, Layout, conv_block

# Largest difference, relative to the largest output, that `check_cut` may find. Rounding in float64
# leaves 1e-14 (n) to 1e-10 (x, random weights); a channel cut wrongly leaves far more.
CUT_TOLERANCE = 1e-8


def prune_model(
    model: Model, channel_groups: ChannelGroups, keep_masks: Mapping[str, Tensor]
) -> Model:
    """Build the network that has only the kept channels, with their weights.

    Args:
        model: the network the groups were found in; it is not changed.
        channel_groups: what `find_channel_groups(model)` gave.
        keep_masks: bool `[C]` by name of the group; a group without a mask keeps everything.

    Returns:
        A network on the same device, of the same precision and mode. Its spec names the width of
        every convolution.

    Raises:
        ValueError: a mask for no prunable group, of the wrong size, or without any channel kept.
    """
    keep_idx = _keep_indices(channel_groups, keep_masks)
    outputs = {path: _select(layout, keep_idx) for path, layout in channel_groups.outputs.items()}
    inputs = {path: _select(layout, keep_idx) for path, layout in channel_groups.inputs.items()}
    widths = {path: len(kept) for path, kept in outputs.items()}
    parameter = next(model.parameters())
    pruned = Model(model.spec.with_widths(widths)).to(parameter.device, parameter.dtype)
    pruned.load_state_dict(_cut_state(model, inputs, outputs))
    for path in outputs:  # eps and momentum stand in no state dict
        bn, old_bn = conv_block(pruned, path).bn, conv_block(model, path).bn
        bn.eps, bn.momentum = old_bn.eps, old_bn.momentum
    return pruned.train(model.training)


def _keep_indices(
    channel_groups: ChannelGroups, keep_masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Per group the sorted positions of the channels that stay, int64."""
    for name, mask in keep_masks.items():
        group = channel_groups.prunable.get(name)
        if group is None:
            raise ValueError(f"{name} is no prunable channel group")
        if mask.shape != (group.num_channels,) or mask.dtype != torch.bool:
            raise ValueError(
                f"{name}: the keep mask is {mask.dtype} {list(mask.shape)}, "
                f"expected torch.bool [{group.num_channels}]"
            )
        if not mask.any():
            raise ValueError(f"{name}: no channel is kept; every layer needs one")
    everything = {
        name: torch.arange(group.num_channels) for name, group in channel_groups.groups.items()
    }
    # flatten, not squeeze: a single index must stay a vector
    kept = {name: mask.cpu().nonzero().flatten() for name, mask in keep_masks.items()}
    return everything | kept


def dropped_inputs(
    channel_groups: ChannelGroups, keep_masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Bool `[C]` by path of a consumer: which of its input channels go.

    Raises:
        ValueError: as `prune_model`.
    """
    keep_idx = _keep_indices(channel_groups, keep_masks)
    dropped = {}
    for path, layout in channel_groups.inputs.items():
        dropped[path] = torch.ones(sum(s.size for s in layout), dtype=torch.bool)
        dropped[path][_select(layout, keep_idx)] = False
    return dropped


def _select(layout: Layout, keep_idx: Mapping[str, Tensor]) -> Tensor:
    """Positions kept in a tensor that consists of these segments."""
    positions, first_channel = [], 0
    for segment in layout:
        positions.append(keep_idx[segment.group] + first_channel)
        first_channel += segment.size
    return torch.cat(positions)


def _cut_state(
    model: Model, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state dict of `model` without what is dropped, on the CPU."""
    state = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    for path, kept_inputs in inputs.items():
        is_block = isinstance(model.model.get_submodule(path), Conv)
        weight = f"model.{path}.conv.weight" if is_block else f"model.{path}.weight"
        state[weight] = state[weight].index_select(1, kept_inputs)  # [out, in, k, k]
    for path, kept_outputs in outputs.items():
        weight = f"model.{path}.conv.weight"
        state[weight] = state[weight].index_select(0, kept_outputs)
        for part in ("weight", "bias", "running_mean", "running_var"):
            name = f"model.{path}.bn.{part}"
            state[name] = state[name].index_select(0, kept_outputs)
    return state


@torch.no_grad()
def mask_model(
    model: Model, channel_groups: ChannelGroups, keep_masks: Mapping[str, Tensor]
) -> Model:
    """A copy at full width whose dropped channels are silent: gamma = beta = 0.

    Raises:
        ValueError: as `prune_model`.
    """
    keep_idx = _keep_indices(channel_groups, keep_masks)
    masked = copy.deepcopy(model)
    for path, layout in channel_groups.outputs.items():
        bn = conv_block(masked, path).bn
        is_dropped = torch.ones(bn.num_features, dtype=torch.bool)
        is_dropped[_select(layout, keep_idx)] = False
        is_dropped = is_dropped.to(bn.weight.device)
        bn.weight[is_dropped] = 0
        bn.bias[is_dropped] = 0
    return masked


@torch.no_grad()
def check_cut(pruned: Model, masked: Model, images: Tensor) -> float:
    """Largest difference between the outputs of two networks, relative to the largest value.

    Compared in float64 on the CPU, on copies: rounding then stays far below what any wrong channel
    would do, and devices without float64 (MPS) are served too. Once in eval mode, and once in
    training mode, where batch norm keeps the signal alive however weak the weights are.

    Args:
        pruned: the rewritten network.
        masked: what `mask_model` made from the old one.
        images: `[B, 3, H, W]`, any values; at least two cells of the largest stride. The cut does
            not depend on the size.

    Returns:
        The worst of the predictions and the logits of every level, to be held against
        `CUT_TOLERANCE`; NaN where an output is NaN.
    """
    networks = [copy.deepcopy(model).cpu().double() for model in (pruned, masked)]
    outputs: list[list[Tensor]] = []
    for network in networks:
        predictions, logits = network.eval()(images.cpu().double())
        logits_in_training = network.train()(images.cpu().double())
        outputs.append([predictions, *logits, *logits_in_training])
    differences = [
        (ours - expected).abs().max() / expected.abs().max().clamp(min=1e-12)
        for ours, expected in zip(*outputs, strict=True)
    ]
    return float(torch.stack(differences).max())
