"""The L1 term on gamma and what it does to gamma; which channels are tied is not known here.

Reference: Liu et al. 2017, Network Slimming, arXiv:1708.06519, section 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from models.yolo import Model
from utils.pruning.channel_groups import ChannelGroups, conv_block, find_channel_groups
from utils.pruning.keep_masks import suggested_percent

RATE_DECAY = 0.9  # of the rate on gamma over the run; the last epoch has about a tenth
BETA_FACTOR = 10.0  # beta is pushed harder, so that a channel with gamma 0 is also silent
QUANTILES = (0, 5, 25, 50, 75, 95, 100)  # percentiles that go into results.csv


def prunable_batchnorms(model: Model, shortcut: str = "keep") -> dict[str, nn.BatchNorm2d]:
    """The batch norms whose channels the rule may remove, by path of their Conv block.

    Raises:
        ValueError: the network has none, or they have been folded into the convolutions.
    """
    return _batchnorms(model, find_channel_groups(model, shortcut))


def _batchnorms(model: Model, channel_groups: ChannelGroups) -> dict[str, nn.BatchNorm2d]:
    paths = [path for path in channel_groups.outputs if channel_groups.is_prunable(path)]
    found = {path: conv_block(model, path).bn for path in paths}
    if not found:
        raise ValueError("no channel can be removed: the network has no prunable layer")
    for path, bn in found.items():
        if not isinstance(bn, nn.BatchNorm2d):
            raise ValueError(f"{path}: has no batch norm (a fused network cannot be slimmed)")
    return found


def scheduled_rate(sparsity_rate: float, epoch: int, epochs: int) -> float:
    """The rate on gamma in `epoch`, counted from 0: it falls linearly by `RATE_DECAY`."""
    return sparsity_rate * (1 - RATE_DECAY * epoch / epochs)


@torch.no_grad()
def add_l1_subgradient(
    batchnorms: Iterable[nn.BatchNorm2d], gamma_rate: float, beta_rate: float
) -> None:
    """Add `gamma_rate * sign(gamma)` to the gradients of gamma, 10 x `beta_rate` to those of beta.

    To be called once per optimizer step, when the gradients are unscaled and complete: then lambda
    means the same with any loss scale, accumulation and number of GPUs. Never waits for the device.
    Parameters without a gradient (frozen ones) are passed over.

    Args:
        batchnorms: as `prunable_batchnorms` gives them.
        gamma_rate: lambda_l1 now, as `scheduled_rate` gives it.
        beta_rate: the sparsity rate itself, which does not decay for beta.
    """
    layers = list(batchnorms)
    _add_sign([bn.weight for bn in layers], gamma_rate)
    _add_sign([bn.bias for bn in layers], BETA_FACTOR * beta_rate)


def _add_sign(parameters: list[nn.Parameter], rate: float) -> None:
    grads = [p.grad for p in parameters if p.grad is not None]
    if grads:
        signs = torch._foreach_sign([p.detach() for p in parameters if p.grad is not None])
        torch._foreach_add_(grads, signs, alpha=rate)


class SparsityPenalty:
    """The L1 term of one training run: which batch norms, how strong in which epoch."""

    def __init__(
        self, model: Model, sparsity_rate: float, epochs: int, shortcut: str = "keep"
    ) -> None:
        """`epochs` is the length of the whole run, a resumed part included.

        Raises:
            ValueError: a negative rate, or a network without prunable batch norms.
        """
        if not 0 <= sparsity_rate < float("inf"):
            raise ValueError(f"sparsity_rate is {sparsity_rate}, expected a number from 0")
        self.batchnorms = prunable_batchnorms(model, shortcut)
        self.sparsity_rate = sparsity_rate
        self.epochs = epochs

    def rate(self, epoch: int) -> float:
        """The rate on gamma in `epoch`, counted from 0."""
        return scheduled_rate(self.sparsity_rate, epoch, self.epochs)

    def add_to_gradients(self, epoch: int) -> None:
        """Add the term of `epoch`; when, `add_l1_subgradient` says."""
        add_l1_subgradient(self.batchnorms.values(), self.rate(epoch), self.sparsity_rate)


def gamma_importance(model: Model, channel_groups: ChannelGroups) -> dict[str, Tensor]:
    """Per prunable channel group the mean |gamma| over the batch norms tied in it.

    Returns:
        By name of the group float32 `[C]` on the CPU, the form `select_keep_masks` takes.

    Raises:
        ValueError: as `prunable_batchnorms`.
    """
    batchnorms = _batchnorms(model, channel_groups)
    return _mean_by_group({path: bn.weight for path, bn in batchnorms.items()}, channel_groups)


def beta_magnitude(model: Model, channel_groups: ChannelGroups) -> dict[str, Tensor]:
    """The same for |beta|: how far from silent a channel with gamma 0 is."""
    batchnorms = _batchnorms(model, channel_groups)
    return _mean_by_group({path: bn.bias for path, bn in batchnorms.items()}, channel_groups)


def _mean_by_group(
    parameters: dict[str, nn.Parameter], channel_groups: ChannelGroups
) -> dict[str, Tensor]:
    """Mean absolute values over what is tied; parameters `[C]` by path of the Conv block."""
    sizes = [len(parameter) for parameter in parameters.values()]
    together = torch.cat([parameter.detach() for parameter in parameters.values()])
    absolute = together.abs().float().cpu()  # one wait for the device, not one a layer
    parts: dict[str, list[Tensor]] = {name: [] for name in channel_groups.prunable}
    for path, values in zip(parameters, absolute.split(sizes), strict=True):
        layout = channel_groups.outputs[path]
        for segment, part in zip(layout, values.split([s.size for s in layout]), strict=True):
            parts[segment.group].append(part)
    return {name: torch.stack(values).mean(0) for name, values in parts.items()}


@dataclasses.dataclass(frozen=True)
class GammaStatistics:
    """How sparse a network is: plain numbers about |gamma| of what may be pruned."""

    percentiles: tuple[float, ...]  # 0, 1, ... 100 %, over all channels
    share_below_1e2: float  # share of channels with |gamma| < 1e-2
    share_below_1e3: float
    suggested_percent: float  # largest --percent that leaves every layer a channel
    layers: dict[str, tuple[float, ...]]  # 0, 5, ... 100 % by name of the channel group

    def as_row(self) -> dict[str, float]:
        """The columns of `results.csv`."""
        row = {f"gamma/q{level:02d}": self.percentiles[level] for level in QUANTILES}
        row["gamma/below_1e-2"] = self.share_below_1e2
        row["gamma/below_1e-3"] = self.share_below_1e3
        row["gamma/suggested_percent"] = self.suggested_percent
        return row


def gamma_statistics(model: Model, shortcut: str = "keep") -> GammaStatistics:
    """Take the statistics of `model`: pass the averaged one (EMA), which is what is pruned.

    Raises:
        ValueError: no prunable batch norms, or a gamma that is no number.
    """
    return summarize_importance(gamma_importance(model, find_channel_groups(model, shortcut)))


def summarize_importance(importance: dict[str, Tensor]) -> GammaStatistics:
    """The statistics of what `gamma_importance` gives."""
    suggested = suggested_percent(importance)
    layers = {name: values.numpy() for name, values in importance.items()}
    values = np.concatenate(list(layers.values()))
    return GammaStatistics(
        percentiles=_quantiles(values, 101),
        share_below_1e2=float((values < 1e-2).mean()),
        share_below_1e3=float((values < 1e-3).mean()),
        suggested_percent=suggested,
        layers={name: _quantiles(part, 21) for name, part in layers.items()},
    )


def _quantiles(values: np.ndarray, number: int) -> tuple[float, ...]:
    """`number` evenly spaced quantiles, from the smallest value to the largest."""
    return tuple(np.quantile(values, np.linspace(0, 1, number)).tolist())
