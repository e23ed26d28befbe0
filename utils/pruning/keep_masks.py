"""Importance -> one keep mask per channel group: pure functions on tensors.

Keys are names of channel groups; nothing here knows what they stand for, nor what the importance
was made from. It may be of any scale, the same for all groups: larger is more important.
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
    # Channels that stay although they are below the threshold, by group where there are any: the
    # floor wants them in the groups of `floored`, and rounding there and in all others.
    added: dict[str, int]


def select_keep_masks(
    importance: Mapping[str, Tensor],
    prune_ratio: float,
    min_channels: int = 1,
    round_to: int = 1,
) -> KeepMasks:
    """Rank the channels of all groups together and keep the strongest (the classic rule).

    The threshold is the value at index `int(n * prune_ratio)` of all n values in ascending order;
    what is at least that large stays. A group that then holds too few, or a number that is not
    round, gets back the strongest of what it lost; of equally strong ones the first.

    Args:
        importance: per prunable channel group a score per channel, [C]; of any scale.
        prune_ratio: share of channels (not of parameters) to remove, in [0, 1).
        min_channels: every group keeps at least this many, whatever the ranking says.
        round_to: every group keeps a multiple of this many, rounded up after the floor. Neither
            asks for more channels than a group has.

    Returns:
        The masks, the threshold, and what floor and rounding added. Ties at the threshold are kept,
        but for an importance of exactly 0: of such channels as many go as were asked for.
        So the achieved ratio can fall short of `prune_ratio`: where all values are equal nothing is
        removed, and never more than `largest_prune_ratio`.

    Raises:
        ValueError: `prune_ratio` outside [0, 1), `min_channels` or `round_to` below 1, no channels,
            or an importance that is no number.

    Reference: Liu et al. 2017, Network Slimming, arXiv:1708.06519, section 3.
    """
    if not 0 <= prune_ratio < 1:
        raise ValueError(f"prune_ratio is {prune_ratio}, expected a share from 0 to below 1")
    _check_whole(min_channels=min_channels, round_to=round_to)
    everything = _together(importance)
    # A search tries many ratios: kthvalue, which counts from 1, is quicker than sorting.
    threshold = everything.kthvalue(int(len(everything) * prune_ratio) + 1).values
    num_free = int(len(everything) * prune_ratio) if threshold == 0 == everything.min() else 0
    masks, floored, added = {}, [], {}
    for name, values in importance.items():
        masks[name] = values >= threshold
        zeros = (values == 0).nonzero().flatten()
        free = zeros[max(len(zeros) - num_free, 0) :]  # the first ones stay, as below
        masks[name][free] = False
        num_free -= len(free)
        num_strong = int(masks[name].sum())
        if num_strong < min(min_channels, len(values)):
            floored.append(name)
        num_kept = _allowed(num_strong, len(values), min_channels, round_to)
        if num_kept > num_strong:
            # The strong ones come first in this order, so they are among these.
            masks[name][values.argsort(descending=True, stable=True)[:num_kept]] = True
            added[name] = num_kept - num_strong
    return KeepMasks(masks, float(threshold), tuple(floored), added)


def largest_prune_ratio(
    importance: Mapping[str, Tensor], min_channels: int = 1, round_to: int = 1
) -> float:
    """The largest share of channels that floor and rounding let go, whatever the ranking.

    Raises:
        ValueError: as `select_keep_masks`.
    """
    _check_whole(min_channels=min_channels, round_to=round_to)
    total = len(_together(importance))
    sizes = [len(values) for values in importance.values()]
    least = sum(_allowed(0, size, min_channels, round_to) for size in sizes)
    return (total - least) / total


def suggested_percent(importance: Mapping[str, Tensor], min_channels: int = 1) -> float:
    """The highest share that leaves every group `min_channels` without a floor.

    Of the `min_channels`-th largest values per group the smallest; its rank among all n values
    divided by n. Where a group has fewer channels than that, none of them may go. It speaks about
    channels that are left, not about accuracy: read it beside the quantiles.

    Raises:
        ValueError: `min_channels` below 1, no channels, or an importance that is no number.
    """
    _check_whole(min_channels=min_channels)
    everything = _together(importance)
    needed = [
        values.topk(min(min_channels, len(values))).values[-1] for values in importance.values()
    ]
    return int((everything < torch.stack(needed).min()).sum()) / len(everything)


def _allowed(num_strong: int, num_channels: int, min_channels: int, round_to: int) -> int:
    """How many of `num_channels` stay where `num_strong` deserve it."""
    at_least = max(num_strong, min_channels)
    return min(-(-at_least // round_to) * round_to, num_channels)


def _check_whole(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}, expected a whole number from 1")


def _together(importance: Mapping[str, Tensor]) -> Tensor:
    """The values of all groups in a row."""
    if not importance:
        raise ValueError("no channel can be removed: the network has no prunable layer")
    everything = torch.cat(list(importance.values()))
    if not everything.isfinite().all():
        name = next(name for name, values in importance.items() if not values.isfinite().all())
        raise ValueError(
            f"{name}: gamma is NaN or infinite, or the activations are; the training has diverged"
        )
    return everything
