"""How much to cut: the share of channels that meets a target, or that mAP still bears.

A `Pruner` turns a share of channels into a slim network; the searches ask it for as few networks
as they can. All assume that cutting more costs less to run and more in accuracy, and check the
answer they give.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from models.yolo import Model
from utils.pruning.activations import InputStatistics, expected_inputs
from utils.pruning.channel_groups import ChannelGroups, find_channel_groups
from utils.pruning.compensate import compensate
from utils.pruning.costs import NetworkCost, kept_counts
from utils.pruning.importance import channel_importance
from utils.pruning.keep_masks import KeepMasks, select_keep_masks
from utils.pruning.rewrite import prune_model
from utils.pruning.sweep import is_borne
from utils.pruning.targets import Target

MAX_RATIO = 0.999  # beyond it the floor alone decides
PERCENT_GRID = tuple(step / 100 for step in range(100))  # for searches that measure networks
RATIO_STEPS = 10_000  # of a share that is searched, so that it can be typed as --percent


@dataclasses.dataclass(frozen=True)
class Pruner:
    """A network with all that decides how it is cut but the amount."""

    model: Model
    channel_groups: ChannelGroups
    importance: Mapping[str, Tensor]
    statistics: Mapping[str, InputStatistics]
    compensation: str
    cost: NetworkCost
    min_channels: int = 1
    round_to: int = 1

    def select(self, prune_ratio: float) -> KeepMasks:
        """The masks for a share of the prunable channels; see `select_keep_masks`."""
        return select_keep_masks(self.importance, prune_ratio, self.min_channels, self.round_to)

    def cut(self, keep: KeepMasks) -> Model:
        """The slim network, with what the dropped channels contributed made up for."""
        return prune_model(self.compensated(keep), self.channel_groups, keep.masks)

    def compensated(self, keep: KeepMasks) -> Model:
        """The network at full width, changed as it will be when cut."""
        return compensate(
            self.model, self.channel_groups, keep.masks, self.compensation, self.statistics
        )

    def limits(self) -> str:
        """Why no more than so much can go."""
        reasons = [f"every layer keeps {self.min_channels} (--min-channels)"]
        if self.round_to > 1:
            reasons.append(f"widths are multiples of {self.round_to} (--round-to)")
        if not all(map(self.channel_groups.is_prunable, self.channel_groups.outputs)):
            reasons.append("bottlenecks with a shortcut stay whole (--shortcut group frees them)")
        return "; ".join(reasons)

    def gflops(self, keep: KeepMasks) -> float:
        """Billions of floating point operations of the slim network."""
        return self.cost.gflops(kept_counts(keep.masks))

    def parameters(self, keep: KeepMasks) -> float:
        """Weights and biases of the slim network."""
        return self.cost.parameters(kept_counts(keep.masks))


def build_pruner(
    model: Model,
    imgsz: int,
    *,
    shortcut: str,
    importance: str,
    compensation: str,
    statistics: Mapping[str, InputStatistics] | None = None,
    min_channels: int = 1,
    round_to: int = 1,
) -> Pruner:
    """Rank the channels of a network.

    Args:
        model: the network; it is not changed.
        imgsz: side of the square input in pixels that costs are for.
        shortcut: one of `SHORTCUT_RULES`.
        importance: one of `IMPORTANCES`.
        compensation: one of `COMPENSATIONS`.
        statistics: what `measure_inputs` gave for the network; None takes what gamma and beta say.
        min_channels: as for `select_keep_masks`.
        round_to: as for `select_keep_masks`.

    Raises:
        ValueError: an unknown name, or a network in which nothing is prunable.
    """
    channel_groups = find_channel_groups(model, shortcut)
    statistics = statistics or expected_inputs(model, channel_groups)
    cost = NetworkCost(model, channel_groups, imgsz)
    ranking = channel_importance(
        importance, model, channel_groups, statistics, cost.macs_per_channel()
    )
    return Pruner(
        model, channel_groups, ranking, statistics, compensation, cost, min_channels, round_to
    )


def count_removed(keep: KeepMasks) -> int:
    """Channels that go."""
    return sum(int((~mask).sum()) for mask in keep.masks.values())


def removed_share(keep: KeepMasks) -> float:
    """Channels that go, as a share of the prunable ones."""
    return count_removed(keep) / sum(len(mask) for mask in keep.masks.values())


def describe_removal(keep: KeepMasks) -> str:
    """How many of how many channels go."""
    total = sum(len(mask) for mask in keep.masks.values())
    return (
        f"{count_removed(keep)} of {total} prunable channels go ({100 * removed_share(keep):.1f} %)"
    )


def why_nothing_goes(pruner: Pruner, keep: KeepMasks) -> str:
    """The reason that masks remove nothing, and what to do."""
    everything = torch.cat(list(pruner.importance.values()))
    num_tied = int((everything <= keep.threshold).sum())
    if num_tied == len(everything):
        return "all channels are alike; train with --bn_sparsity first"
    if keep.added:
        return f"{pruner.limits()}; give a larger --percent"
    if num_tied > 1:
        share = math.ceil(1e4 * num_tied / len(everything)) / 1e4
        return (
            f"{num_tied} channels are alike ({keep.threshold:.4g}) and go together or not at all; "
            f"give a --percent from {share:g} on"
        )
    return "the share is less than one channel; give a larger --percent"


def ratio_for_cost(
    pruner: Pruner, cost: Callable[[KeepMasks], float], target: Target, unit: str
) -> float:
    """The smallest share of channels, in steps of 0.0001, that brings a cost down to the target.

    Args:
        pruner: selects the channels.
        cost: of masks, falling as more goes: `pruner.gflops`, `pruner.parameters`.
        target: what may be left.
        unit: of the cost, for messages.

    Raises:
        ValueError: it is met already, or out of reach; the message says what is reachable and why.
    """
    now, least = cost(pruner.select(0.0)), cost(pruner.select(MAX_RATIO))
    wanted = target.of(now)
    if wanted >= now:
        raise ValueError(
            f"the network has {_number(now)} {unit}, no more than the target of {_number(wanted)}: "
            "there is nothing to remove"
        )
    if least > wanted:
        hint = "; a share is typed as 50%" if wanted < 1 < 0.01 * now else ""
        raise ValueError(
            f"{_number(wanted)} of {_number(now)} {unit} is out of reach: at least "
            f"{_number(least)} ({least / now:.2%}) is left when all goes that may go. What stops "
            f"it: {pruner.limits()}{hint}"
        )
    shares = [step / RATIO_STEPS for step in range(int(MAX_RATIO * RATIO_STEPS))]
    step = bisect.bisect_left(shares, True, key=lambda ratio: cost(pruner.select(ratio)) <= wanted)
    return shares[step] if step < len(shares) else MAX_RATIO


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def ratio_for_latency(
    pruner: Pruner, measure: Callable[[float], tuple[float, float]], target: Target
) -> float:
    """The smallest share of channels, in steps of 0.01, whose removal is fast enough.

    Args:
        pruner: for messages alone.
        measure: milliseconds of the network as it is and of what a share leaves, in one go.
        target: what may be left.

    Raises:
        ValueError: it is met already, or out of reach.
    """
    dense, least = measure(PERCENT_GRID[-1])
    wanted = target.of(dense)
    if wanted >= dense:
        raise ValueError(
            f"the network takes {dense:.2f} ms, no more than the target of {wanted:.2f}: there is "
            "nothing to remove"
        )
    if least > wanted:
        raise ValueError(
            f"{wanted:.2f} of {dense:.2f} ms is out of reach: {least:.2f} ms is left when nearly "
            "all goes. What stops it: the time of layers that hardly compute, and "
            f"{pruner.limits()}"
        )

    def is_too_slow(percent: float) -> bool:
        dense, slim = measure(percent)
        return slim > target.of(dense)

    slow = largest_bearable(is_too_slow, PERCENT_GRID[:-1])
    return PERCENT_GRID[0 if slow is None else PERCENT_GRID.index(slow) + 1]


def ratio_for_drop(score: Callable[[float], float], max_drop: float) -> float:
    """The largest share of channels, in steps of 0.01, that costs at most `max_drop` of accuracy.

    Args:
        score: mAP@.5 of what a share leaves; of 0 that of the network as it is.
        max_drop: the most that it may fall.

    Raises:
        ValueError: every cut costs more, or there is nothing to lose.
    """
    before = score(0.0)
    if before <= max_drop:
        raise ValueError(
            f"mAP@.5 is {before:.4f} before anything is cut, so a drop of {max_drop:g} means "
            "nothing: train the network on this data set first"
        )
    percent = largest_bearable(lambda percent: is_borne(score(percent), before, max_drop))
    if not percent:
        raise ValueError(
            f"every cut costs more than {max_drop:g} of mAP@.5; sparse-train the network first "
            "(train.py --bn_sparsity --sparsity_rate auto), or allow a larger --max-drop"
        )
    return percent


def largest_bearable(
    holds: Callable[[float], bool], percents: Sequence[float] = PERCENT_GRID
) -> float | None:
    """The largest share for which `holds` is true, found by halving; None if it never does.

    It is asked about log2 of their number many shares, and what is returned was asked about.
    """
    found, low, high = None, 0, len(percents)  # all below low hold, none from high on does
    while low < high:
        middle = (low + high) // 2
        if holds(percents[middle]):
            found, low = percents[middle], middle + 1
        else:
            high = middle
    return found
