"""Is a network ready to be pruned? Measured by cutting it, not read off a histogram.

Where there are no images to measure on, gamma and beta can only raise a doubt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch

from models.yolo import Model
from utils.pruning.keep_masks import KeepMasks
from utils.pruning.search import Pruner, largest_bearable, removed_share
from utils.pruning.slimming import beta_magnitude, gamma_importance
from utils.pruning.sweep import MAX_DROP, is_borne

# Less than this share of the channels for a point of mAP is what any network has to spare.
READY_SHARE = 0.3
LEAST_MAP50 = 0.1  # a network that detects next to nothing has nothing to lose
# A channel is near 0 when its |gamma| is below this share of the 90 % quantile of those that stay.
# Measured on a sparse yolov5n (BCCD): up to a share of 0.05 the cut cost less than half a point of
# mAP@.5, at 0.15 it cost 7.5. The median will not do: most of what stays may be near 0 as well.
NEAR_ZERO = 0.1
_PERCENTS = tuple(step / 20 for step in range(20))


@dataclasses.dataclass(frozen=True)
class Readiness:
    """How much of a network can go for less than `max_drop`."""

    percent: float  # share of the prunable channels asked for
    removed: float  # share of the prunable channels that goes then
    gflops_saved: float  # share
    map50_before: float
    map50_after: float
    max_drop: float

    @property
    def is_ready(self) -> bool:
        """Whether pruning pays before any (further) sparse training."""
        return self.removed >= READY_SHARE and self.map50_before >= LEAST_MAP50


def measure_readiness(
    pruner: Pruner, score: Callable[[Model], float], max_drop: float = MAX_DROP
) -> Readiness:
    """Cut by several shares and measure each cut network: about five of them.

    Args:
        pruner: of the network in question; what it cuts is compensated as in a real run.
        score: mAP@.5 of a network, the same images each time.
        max_drop: the most that the score may fall.
    """
    before = score(pruner.model)
    after = {0.0: before}

    def holds(percent: float) -> bool:
        if percent not in after:
            after[percent] = score(pruner.cut(pruner.select(percent)))
        return is_borne(after[percent], before, max_drop)

    percent = largest_bearable(holds, _PERCENTS) or 0.0
    keep = pruner.select(percent)
    saved = 1 - pruner.gflops(keep) / pruner.gflops(pruner.select(0.0))
    return Readiness(percent, removed_share(keep), saved, before, after[percent], max_drop)


def describe_readiness(
    readiness: Readiness, options: Mapping[str, Any], epochs_done: int | None = None
) -> str:
    """One or two sentences: the verdict, and what to change if it is not good.

    Args:
        readiness: what was measured.
        options: of the training run the checkpoint comes from; empty if unknown.
        epochs_done: of that run, while it goes on.
    """
    figures = (
        f"{readiness.removed:.0%} of the channels, {readiness.gflops_saved:.0%} of the FLOPs can "
        f"go with less than {describe_points(readiness.max_drop)} of mAP@.5 lost "
        f"({readiness.map50_before:.3f} -> {readiness.map50_after:.3f}, before fine-tuning)"
    )
    if readiness.is_ready:
        return f"ready to prune: {figures}"
    if readiness.map50_before < LEAST_MAP50:
        return (
            f"not ready to prune: mAP@.5 of {readiness.map50_before:.3f} is too little to judge "
            "by. Train the network on this data set first"
        )
    if epochs_done is not None and epochs_done < options["epochs"]:
        advice = f"{epochs_done} of {options['epochs']} epochs are done"
    else:
        advice = _advice(options)
    return f"not ready to prune: only {figures}. {advice}"


def describe_points(drop: float) -> str:
    """A drop of 0.01 is 1 point."""
    return f"{100 * drop:g} point{'s' * (abs(drop - 0.01) > 1e-9)}"


def _advice(options: Mapping[str, Any]) -> str:
    if not options.get("bn_sparsity"):
        return "It was not sparse-trained: train.py --bn_sparsity --sparsity_rate auto comes first"
    rate, epochs = options.get("sparsity_rate", "?"), options.get("epochs", "?")
    larger = (
        "a number above the rate that auto chose" if rate == "auto" else "a larger one, or auto"
    )
    return (
        f"The sparse training (rate {rate}, {epochs} epochs) was too weak or too short: give it "
        f"more epochs, or as --sparsity_rate {larger}, and watch its verdict"
    )


def doubt_from_gamma(pruner: Pruner, keep: KeepMasks) -> str:
    """Without images: one sentence if what goes is not near silent, against what stays; else ""."""
    network = pruner.model, pruner.channel_groups
    importance, betas = gamma_importance(*network), beta_magnitude(*network)
    gamma_kept = torch.cat([importance[name][mask] for name, mask in keep.masks.items()])
    gamma_cut = torch.cat([importance[name][~mask] for name, mask in keep.masks.items()])
    beta_cut = torch.cat([betas[name][~mask] for name, mask in keep.masks.items()])
    if not len(gamma_cut):
        return ""
    largest_gamma, typical = float(gamma_cut.max()), float(gamma_kept.quantile(0.9))
    large_beta = float(beta_cut.quantile(0.95))
    if largest_gamma > NEAR_ZERO * typical:
        return (
            f"channels with |gamma| up to {largest_gamma:.3g} go, against {typical:.3g} of strong "
            "ones that stay: they are not near 0, expect mAP to fall. Train longer with "
            "--bn_sparsity, with a larger --sparsity_rate, or remove less"
        )
    if pruner.compensation == "none" and large_beta > NEAR_ZERO * typical:
        return (
            f"gamma is near 0 in all channels that go, but |beta| is {large_beta:.3g} or more in "
            f"5 % of them (|gamma| of strong ones that stay: {typical:.3g}): they are constant, "
            "not silent, expect mAP to fall. Train longer with --bn_sparsity, or let --compensate "
            "make up for it"
        )
    return ""
