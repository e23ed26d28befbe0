"""Is a network ready to be pruned? Measured by cutting it, not read off a histogram.

Where there are no images to measure on, gamma and beta can only raise a doubt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from models.yolo import Model
from utils.pruning.keep_masks import KeepMasks
from utils.pruning.search import Pruner, largest_bearable, removed_share
from utils.pruning.slimming import beta_magnitude, gamma_importance
from utils.pruning.sweep import MAX_DROP, is_borne

# Less than this share of the channels for a point of mAP is what any network has to spare.
READY_SHARE = 0.3
LEAST_MAP50 = 0.1  # a network that detects next to nothing has nothing to lose
# A sparse training that has lost more mAP@.5 than this has spoilt the network, however much of it
# can go. Runs that went well ended within one point of their best epoch (BCCD, shapes), those that
# did not lost 14 points and more (COCO128).
MOST_LOST = 0.05
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


class Best(NamedTuple):
    """The highest mAP@.5 that is known on the data of a training."""

    map50: float
    source: str  # as "in epoch 3"


NOT_KNOWN = Best(0.0, "")


@dataclasses.dataclass(frozen=True)
class History:
    """The training that a network comes from, as far as its checkpoint says."""

    options: Mapping[str, Any]  # of the run; empty if unknown
    map50: float | None = None  # of the network, on all validation images of the run
    best: Best = NOT_KNOWN  # measured alike
    is_released: bool = False  # whether `SparsityPenalty.release` has happened
    epochs_done: int | None = None  # of the run, while it goes on

    @property
    def lost(self) -> float:
        """What the sparse training has cost in mAP@.5, 0 where that is not known."""
        if self.map50 is None or not self.options.get("bn_sparsity"):
            return 0.0
        return max(self.best.map50 - self.map50, 0.0)

    @property
    def is_spoilt(self) -> bool:
        """Whether that is too much, however many channels can go for nothing."""
        return self.lost > MOST_LOST

    def as_content(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the options."""
        best = {"best_map50": self.best.map50, "best_source": self.best.source}
        return {"map50": self.map50, **best, "is_released": self.is_released}


def read_history(checkpoint: Mapping[str, Any]) -> History:
    """What a checkpoint says; those of versions before, and of others, say less."""
    options = checkpoint.get("options") or {}
    content = checkpoint.get("history")
    kinds = {"best_map50": float, "best_source": str, "is_released": bool}
    if not isinstance(content, dict) or not isinstance(content.get("map50"), float | None):
        return History(options)
    if any(not isinstance(content.get(name), kind) for name, kind in kinds.items()):
        return History(options)
    best = Best(content["best_map50"], content["best_source"])
    return History(options, content.get("map50"), best, content["is_released"])


def known_map50(
    checkpoint: Mapping[str, Any], names: Sequence[str], options: Mapping[str, Any]
) -> float:
    """The best mAP@.5 of a network or its training; 0 if none was measured as in another run.

    Args:
        checkpoint: of the network.
        names: of the classes of the other run.
        options: of the other run.
    """
    history = read_history(checkpoint)
    if list(checkpoint.get("names", ())) != list(names) or any(
        _as_measured(history.options, name) != _as_measured(options, name)
        for name in ("data", "imgsz", "single_cls")
    ):
        return 0.0
    return max(history.map50 or 0.0, history.best.map50)


def _as_measured(options: Mapping[str, Any], name: str) -> Any:
    value = options.get(name)
    return Path(value).name if name == "data" and isinstance(value, str) else value


def describe_readiness(readiness: Readiness, history: History) -> str:
    """One or two sentences: the verdict, and what to change if it is not good."""
    if history.is_spoilt:
        return _describe_loss(history)
    figures = (
        f"{readiness.removed:.0%} of the channels, {readiness.gflops_saved:.0%} of the FLOPs can "
        f"go with less than {describe_points(readiness.max_drop)} of mAP@.5 lost "
        f"({readiness.map50_before:.3f} -> {readiness.map50_after:.3f}, before fine-tuning"
        f"{_describe_best(history)})"
    )
    if readiness.is_ready:
        return f"ready to prune: {figures}"
    if readiness.map50_before < LEAST_MAP50:
        return (
            f"not ready to prune: mAP@.5 of {readiness.map50_before:.3f} is too little to judge "
            "by. Train the network on this data set first"
        )
    return f"not ready to prune: only {figures}. {_progress(history) or _advice(history)}"


def _describe_best(history: History) -> str:
    """What the sparse training has to be measured by, if anything is known."""
    is_known = history.options.get("bn_sparsity") and history.best.map50 > 0
    return f"; at best {history.best.map50:.3f} {history.best.source}" if is_known else ""


def _describe_loss(history: History) -> str:
    """Of a network that the penalty has spoilt."""
    assert history.map50 is not None
    options, best = history.options, history.best
    advice = (
        f"Give it a smaller --sparsity_rate (it was {options.get('sparsity_rate', '?')}), a "
        f"smaller --sparsity_share (it was {options.get('sparsity_share', 1.0)}), or more epochs"
    )
    return (
        f"not ready to prune: the sparse training itself has lost {100 * history.lost:.0f} points "
        f"of mAP@.5 ({history.map50:.3f}, against {best.map50:.3f} {best.source}). "
        f"{_progress(history) or advice}"
    )


def _progress(history: History) -> str:
    """How far the run is, while it goes on: what is not yet good may become so."""
    done = history.epochs_done
    if done is None or done >= history.options["epochs"]:
        return ""
    return f"{done} of {history.options['epochs']} epochs are done"


def describe_points(drop: float) -> str:
    """A drop of 0.01 is 1 point."""
    return f"{100 * drop:g} point{'s' * (abs(drop - 0.01) > 1e-9)}"


def _advice(history: History) -> str:
    """How to come to a sparser network."""
    options = history.options
    if not options.get("bn_sparsity"):
        return "It was not sparse-trained: train.py --bn_sparsity --sparsity_rate auto comes first"
    rate, epochs = options.get("sparsity_rate", "?"), options.get("epochs", "?")
    if history.is_released:
        return (
            "Enough gammas were down, and the sparse training has let the others go; more epochs "
            f"would not help: give it a larger --sparsity_share (it was "
            f"{options.get('sparsity_share', '?')}), and watch its verdict"
        )
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
