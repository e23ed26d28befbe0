"""Importance -> one keep mask per channel group: pure functions on tensors.

Keys are names of channel groups; nothing here knows what they stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class KeepMasks(NamedTuple):
    """What is to stay."""

    masks: dict[str, Tensor]  # bool [C] per group; True keeps
    threshold: float  # importance a channel needs to stay
    floored: tuple[str, ...]  # groups that hold fewer than min_channels of that importance


def select_keep_masks(
    importance: Mapping[str, Tensor], prune_ratio: float, min_channels: int = 1
) -> KeepMasks:
    """Rank the channels of all groups together and keep the strongest (the classic rule).

    The threshold is the value at index `int(n * prune_ratio)` of all n values in ascending order;
    what is at least that large stays.

    Args:
        importance: per prunable channel group, mean |gamma| over the BNs tied in it; [C], >= 0.
        prune_ratio: share of channels (not of parameters) to remove, in [0, 1).
        min_channels: every group keeps at least this many, its strongest, whatever the ranking
            says; of equally strong ones the first.

    Returns:
        The masks, the threshold and the groups the floor acted on. Ties at the threshold are kept,
        so the achieved ratio can fall short of `prune_ratio`: where all values are equal nothing
        is removed.

    Raises:
        ValueError: `prune_ratio` outside [0, 1), no channels, or an importance that is no number.

    Reference: Liu et al. 2017, Network Slimming, arXiv:1708.06519, section 3.
    """
    if not 0 <= prune_ratio < 1:
        raise ValueError(f"prune_ratio is {prune_ratio}, expected a share from 0 to below 1")
    if min_channels < 1:
        raise ValueError(f"min_channels is {min_channels}, expected a whole number from 1")
    ranked = _ranked(importance)
    threshold = ranked[int(len(ranked) * prune_ratio)]
    masks, floored = {}, []
    for name, values in importance.items():
        masks[name] = values >= threshold
        if masks[name].sum() < min(min_channels, len(values)):
            strongest = values.argsort(descending=True, stable=True)[:min_channels]
            masks[name][strongest] = True
            floored.append(name)
    return KeepMasks(masks, float(threshold), tuple(floored))


def suggested_percent(importance: Mapping[str, Tensor]) -> float:
    """The highest share that leaves every group a channel without a floor.

    The smallest of the largest values per group, its rank among all n values divided by n. It
    speaks about channels that are left, not about accuracy: read it beside the quantiles.

    Raises:
        ValueError: no channels, or an importance that is no number.
    """
    ranked = _ranked(importance)
    smallest_maximum = torch.stack([values.max() for values in importance.values()]).min()
    return int(torch.searchsorted(ranked, smallest_maximum)) / len(ranked)


def _ranked(importance: Mapping[str, Tensor]) -> Tensor:
    """All values in ascending order."""
    if not importance:
        raise ValueError("no channel can be removed: the network has no prunable layer")
    for name, values in importance.items():
        if not values.isfinite().all():
            raise ValueError(f"{name}: gamma is NaN or infinite; the training has diverged")
    return torch.cat(list(importance.values())).sort().values
