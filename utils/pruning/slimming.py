"""The L1 term on gamma and what it does to gamma; which channels are tied is not known here.

The classic way is the subgradient: lambda * sign(gamma) joins the gradients. Adam then divides it
by the rms of what it meets, and no gamma ever is exactly 0. The proximal way takes the optimizer's
step first and then moves every gamma by lr * lambda towards 0, where it stays if it arrives: that
depends on nothing else, and the zeros are exact.

Tied channels (`find_channel_groups`) are treated as equals: each gamma is penalised by itself. All
gammas of a channel that is not used are driven to 0 alike, and it is the mean that is ranked.

Channels that cost more operations are penalised more (`cost_weights`): a plain L1 term empties the
deep layers, where channels are many and cheap, and leaves the first ones, where the time goes.

When enough gammas are down the others can be let go (`SparsityPenalty.release`): the pull has told
them apart, and from then on only biases what the network keeps.

References: Liu et al. 2017, Network Slimming, arXiv:1708.06519, section 3; Ye et al. 2018,
arXiv:1802.00124, for the proximal step; Gordon et al. 2018, MorphNet, arXiv:1711.06798, for the
weights by cost; Meinshausen 2007, Relaxed Lasso, doi:10.1016/j.csda.2006.12.019, for the release.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from models.blocks import BATCH_NORMS
from models.yolo import Model
from utils import ranks
from utils.choices import MODES, SCHEDULES
from utils.pruning.channel_groups import ChannelGroups, conv_block, find_channel_groups
from utils.pruning.costs import NetworkCost
from utils.pruning.keep_masks import suggested_percent

RATE_DECAY = 0.9  # "linear": of the rate on gamma over the run; the last epoch has about a tenth
HOLD_UNTIL, ZERO_FROM = 0.5, 0.9  # "hold": shares of the run
BETA_FACTOR = 10.0  # beta is pushed harder, so that a channel with gamma 0 is also silent
NEAR_ZERO = 0.01  # |gamma| of a channel that is down
NOISE_MEMORY = 0.999  # of the running mean of squared gradients, as Adam's second moment
QUANTILES = (0, 5, 25, 50, 75, 95, 100)  # percentiles that go into results.csv

# A rate: a number, or where it follows the gradients a tensor without dimensions on their device.
Rate = TypeVar("Rate", float, Tensor, float | Tensor)


def prunable_batchnorms(model: Model, shortcut: str = "group") -> dict[str, nn.BatchNorm2d]:
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
        if not isinstance(bn, BATCH_NORMS):
            raise ValueError(f"{path}: has no batch norm (a fused network cannot be slimmed)")
    return found


def cost_weights(model: Model, channel_groups: ChannelGroups, power: float) -> dict[str, Tensor]:
    """The share of the rate that each channel gets.

    It grows with a power of the multiply-accumulates that the removal of the channel saves in all
    its producers and consumers; the median channel gets 1.

    Args:
        model: the network.
        channel_groups: of `model`.
        power: 0 for all alike.

    Returns:
        By path of the Conv blocks of `prunable_batchnorms` float32 `[C]` on the CPU.
    """
    paths = [path for path in channel_groups.outputs if channel_groups.is_prunable(path)]
    macs = NetworkCost(model, channel_groups, model.max_stride).macs_per_channel()
    costs = {
        path: torch.cat(
            [torch.full((s.size,), macs[s.group]) for s in channel_groups.outputs[path]]
        )
        for path in paths
    }
    median = torch.cat(list(costs.values())).median()
    return {path: (cost / median) ** power for path, cost in costs.items()}


def median_gamma(batchnorms: Iterable[nn.BatchNorm2d]) -> float:
    """The median of |gamma| over the channels that are trained.

    Raises:
        ValueError: all of them are frozen.
    """
    gammas = [bn.weight.detach() for bn in batchnorms if bn.weight.requires_grad]
    if not gammas:
        raise ValueError("all batch norms that could become sparse are frozen")
    return float(torch.cat(gammas).abs().median())


def scheduled_rate(sparsity_rate: Rate, epoch: int, epochs: int, schedule: str = "linear") -> Rate:
    """The rate on gamma in `epoch`, counted from 0; `schedule` is one of `SCHEDULES`."""
    done = epoch / epochs
    if schedule == "linear":
        return sparsity_rate * (1 - RATE_DECAY * done)
    return sparsity_rate * min(max((ZERO_FROM - done) / (ZERO_FROM - HOLD_UNTIL), 0.0), 1.0)


@torch.no_grad()
def add_l1_subgradient(
    batchnorms: Iterable[nn.BatchNorm2d],
    gamma_rate: float | Tensor,
    beta_rate: float | Tensor,
    weights: Iterable[Tensor] | None = None,
) -> None:
    """Add `gamma_rate * sign(gamma)` to the gradients of gamma, 10 x `beta_rate` to those of beta.

    To be called once per optimizer step, when the gradients are unscaled and complete: then lambda
    means the same with any loss scale, accumulation and number of GPUs. Never waits for the device.
    Parameters without a gradient (frozen ones) are passed over.

    Args:
        batchnorms: as `prunable_batchnorms` gives them.
        gamma_rate: lambda_l1 now, as `scheduled_rate` gives it.
        beta_rate: the sparsity rate itself, which does not decay for beta.
        weights: factors of the rates of each channel, `[C]` a batch norm, on its device.
    """
    layers = list(batchnorms)
    factors = _ones(layers) if weights is None else list(weights)
    _add_sign([bn.weight for bn in layers], gamma_rate, factors)
    _add_sign([bn.bias for bn in layers], BETA_FACTOR * beta_rate, factors)


def _ones(batchnorms: Iterable[nn.BatchNorm2d]) -> list[Tensor]:
    return [torch.ones_like(bn.weight) for bn in batchnorms]


def _add_sign(parameters: list[nn.Parameter], rate: float | Tensor, factors: list[Tensor]) -> None:
    pushed = [
        (p.grad, p.detach(), factor)
        for p, factor in zip(parameters, factors, strict=True)
        if p.grad is not None
    ]
    if pushed:
        grads, values, factors = (list(column) for column in zip(*pushed, strict=True))
        terms = torch._foreach_mul(torch._foreach_sign(values), factors)
        torch._foreach_add_(grads, torch._foreach_mul(terms, rate))


@torch.no_grad()
def shrink_gamma(
    batchnorms: Iterable[nn.BatchNorm2d],
    threshold: float | Tensor,
    weights: Iterable[Tensor] | None = None,
) -> None:
    """The proximal step: gamma becomes sign(gamma) * max(|gamma| - threshold, 0).

    To be called after the optimizer's step, with its learning rate times lambda_l1; what is closer
    to 0 than that becomes exactly 0. Frozen parameters stay. Never waits for the device. With
    `weights` the threshold is a multiple for each channel, as for `add_l1_subgradient`.
    """
    layers = list(batchnorms)
    factors = _ones(layers) if weights is None else list(weights)
    trained = [
        (bn.weight.detach(), factor)
        for bn, factor in zip(layers, factors, strict=True)
        if bn.weight.requires_grad
    ]
    if trained:
        gammas, factors = (list(column) for column in zip(*trained, strict=True))
        together = torch.cat(gammas)
        limit = torch.cat(factors) * threshold
        lost = torch.clamp(together, -limit, limit)  # all of it where |gamma| <= threshold
        torch._foreach_sub_(gammas, lost.split([len(gamma) for gamma in gammas]))


@torch.no_grad()
def zero_average(averaged: Iterable[nn.BatchNorm2d], batchnorms: Iterable[nn.BatchNorm2d]) -> None:
    """Let the average (EMA) of a gamma be exactly 0 where the gamma itself is exactly 0.

    By itself it would only decay, by 1e-4 a step on a long run, and keep a channel half alive that
    the network has done without for thousands of steps; what is validated, saved and pruned is the
    average. The others of the averaged weights have followed a network in which that channel is
    silent. One that comes back is averaged from 0 on.
    """
    pairs = [(a.weight, bn.weight.detach()) for a, bn in zip(averaged, batchnorms, strict=True)]
    is_alive = torch._foreach_abs(torch._foreach_sign([gamma for _, gamma in pairs]))
    torch._foreach_mul_([average for average, _ in pairs], is_alive)


class GradientNoise:
    """How large the gradients of gamma are that the loss gives: their running rms per channel.

    Measured over the first epoch and then left: as gammas shrink their gradients grow, and a rate
    that followed would drive itself up.

    The rms is nearly all noise: the mean gradient of a channel at rest is about 0. A penalty well
    below it is lost in it, one well above it is stronger than what any channel is worth. State and
    result are tensors on the device of the parameters; nothing here waits for it.
    """

    def __init__(self, gammas: Iterable[nn.Parameter]) -> None:
        self._gammas = [gamma for gamma in gammas if gamma.requires_grad]
        device = self._gammas[0].device if self._gammas else None
        self._squares = torch.zeros(sum(map(len, self._gammas)), device=device)
        self._steps = torch.zeros((), device=device)

    @torch.no_grad()
    def take_in(self, is_usable: Tensor) -> None:
        """Take in the gradients of one step, unless they are those of a step not to be taken."""
        if not self._gammas:
            return
        grads = [torch.zeros_like(g) if g.grad is None else g.grad for g in self._gammas]
        squares = self._squares.lerp(torch.cat(grads).square(), 1 - NOISE_MEMORY)
        self._squares = torch.where(is_usable, squares, self._squares)
        self._steps = self._steps + is_usable

    def sigma(self) -> Tensor:
        """The median over the channels; without dimensions, 0 before the first step."""
        if not self._gammas:
            return self._steps
        weight = -torch.expm1(self._steps * math.log(NOISE_MEMORY))  # the average started at 0
        return (self._squares.median() / weight.clamp(min=1e-12)).sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        """What was taken in so far."""
        return {"squares": self._squares, "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from `state_dict`."""
        self._squares = state["squares"].to(self._squares, copy=True)
        self._steps = state["steps"].to(self._steps, copy=True)


@dataclasses.dataclass(frozen=True)
class AutoRate:
    """A rate in units of the gradient noise: strength times it, or `least` if that is more.

    But `least` counts only up to `limit` times the noise, where that is known.

    The noise is given in the units of the rate: sigma of `GradientNoise` times `noise_gain`. Where
    the optimizer divides the gradients by their rms before the rate comes in (the proximal step
    under Adam) it is 1, whatever sigma is: then `noise_gain` is None.
    """

    strength: float
    least: float = 0.0
    noise_gain: float | None = 1.0
    limit: float = math.inf

    def at(self, sigma: Tensor) -> float | Tensor:
        """The rate before its decay over the epochs."""
        if self.noise_gain is None:
            return max(self.strength, self.least)
        noise = sigma * self.noise_gain
        cap = torch.where(noise > 0, noise * self.limit, self.least)
        return torch.maximum(noise * self.strength, cap.clamp(max=self.least))


class SparsityPenalty:
    """The L1 term of one training run: which batch norms, how strong in which epoch.

    `before_step` and `after_step` enclose every optimizer step. They do the same in all processes,
    as the gradients they see are those of all.
    """

    def __init__(
        self,
        model: Model,
        sparsity_rate: float | AutoRate,
        epochs: int,
        shortcut: str = "group",
        mode: str = "subgradient",
        schedule: str = "linear",
        cost_power: float = 0.0,
        release_share: float = 1.0,
    ) -> None:
        """Find what is to be penalised.

        Args:
            model: on its device, as it is trained.
            sparsity_rate: lambda at the start of the run, of a channel of median cost.
            epochs: length of the whole run, a resumed part included.
            shortcut: one of `SHORTCUT_RULES`.
            mode: one of `MODES`.
            schedule: one of `SCHEDULES`.
            cost_power: of `cost_weights`.
            release_share: of the channels, 0 to 1; see `release`. 1: never.

        Raises:
            ValueError: a negative rate, an unknown mode or schedule, or a network without prunable
                batch norms.
        """
        if isinstance(sparsity_rate, float | int) and not 0 <= sparsity_rate < float("inf"):
            raise ValueError(f"sparsity_rate is {sparsity_rate}, expected a number from 0")
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}, expected one of {', '.join(MODES)}")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}, expected one of {', '.join(SCHEDULES)}")
        self._channel_groups = find_channel_groups(model, shortcut)
        self.batchnorms = _batchnorms(model, self._channel_groups)
        weights = cost_weights(model, self._channel_groups, cost_power)
        self._full_weights = [weights[path].to(bn.weight) for path, bn in self.batchnorms.items()]
        self.weights = self._full_weights
        self.sparsity_rate = sparsity_rate
        self.epochs = epochs
        self.shortcut = shortcut
        self.mode = mode
        self.schedule = schedule
        self.release_share = release_share
        self.is_released = False
        self.noise = GradientNoise(bn.weight for bn in self.batchnorms.values())

    @property
    def num_channels(self) -> int:
        """How many gammas the rule lets go."""
        return sum(bn.num_features for bn in self.batchnorms.values())

    @property
    def share_let_go(self) -> float:
        """How many of these gammas are not pulled at any more, as a share."""
        return float((torch.cat(self.weights) == 0).float().mean())

    def rate(self, epoch: int) -> float:
        """The rate on gamma in `epoch`, counted from 0; waits for the device where it is auto."""
        return float(self._scheduled(self._full_rate(), epoch))

    def before_step(self, epoch: int, gradient_norm: Tensor) -> None:
        """Look at the gradients and, as subgradient, join them; when, `add_l1_subgradient` says.

        Args:
            epoch: the current one, from 0.
            gradient_norm: of all gradients. Where it is not finite a loss scaler leaves the step
                out, so the gradients are not looked at.
        """
        if epoch == 0:
            self.noise.take_in(gradient_norm.isfinite())
        if self.mode == "subgradient":
            full = self._full_rate()
            rate = self._scheduled(full, epoch)
            add_l1_subgradient(self.batchnorms.values(), rate, full, self.weights)

    def after_step(
        self, epoch: int, gradient_norm: Tensor, optimizer: torch.optim.Optimizer, averaged: Model
    ) -> None:
        """Proximal mode: move gamma towards 0, unless the step was left out.

        Args:
            epoch: the current one, from 0.
            gradient_norm: as for `before_step`; here it also says without waiting for the device
                whether the loss scaler left the step out.
            optimizer: its learning rate for gammas counts (parameter groups of `build_optimizer`).
            averaged: the network of averaged weights, before it takes in this step.
        """
        if self.mode != "proximal":
            return
        lr = next(group["lr"] for group in optimizer.param_groups if group["kind"] == "norms")
        rate = self._scheduled(self._full_rate(), epoch)
        threshold = gradient_norm.isfinite() * (lr * rate)
        shrink_gamma(self.batchnorms.values(), threshold, self.weights)
        averages = [conv_block(averaged, path).bn for path in self.batchnorms]
        zero_average(averages, self.batchnorms.values())

    @torch.no_grad()
    def release(self, averaged: Model) -> float | None:
        """Once `release_share` of the channels are down, pull at those alone from now on.

        The others, and their betas, are what the loss has defended; they recover what the pull has
        cost them. Tied channels are down, or let go, together. To be called between epochs, by all
        processes; the first one decides. Waits for the device.

        Args:
            averaged: the network of averaged weights, which is what is pruned.

        Returns:
            The share that was down, if this has happened now. Frozen channels do not count.
        """
        if self.is_released or self.release_share >= 1:
            return None
        are_down = self._find_down(averaged)
        trained = [are_down[name] for name in are_down if self._is_trained(name)]
        num_down, num_trained = int(torch.cat(trained).sum()), sum(map(len, trained))
        if num_down < self.release_share * num_trained:
            return None
        layouts = [self._channel_groups.outputs[path] for path in self.batchnorms]
        pulled = [torch.cat([are_down[segment.group] for segment in layout]) for layout in layouts]
        self.weights = [w * p.to(w) for w, p in zip(self._full_weights, pulled, strict=True)]
        self.is_released = True
        return num_down / num_trained

    def _find_down(self, averaged: Model) -> dict[str, Tensor]:
        """By channel group which channels are near 0, bool `[C]`: what the first process finds."""
        importance = gamma_importance(averaged, self._channel_groups)
        together = torch.cat(list(importance.values())) < NEAR_ZERO
        together = together.to(self.weights[0].device)
        ranks.take_from_first([together])
        parts = together.split([len(values) for values in importance.values()])
        return dict(zip(importance, parts, strict=True))

    def _is_trained(self, group: str) -> bool:
        producers = self._channel_groups.groups[group].producers
        return any(self.batchnorms[path].weight.requires_grad for path in producers)

    def describe_largest_gamma(self, epoch: int) -> str:
        """Which layer has the largest |gamma|, or one that is no number."""
        largest = {
            path: float(bn.weight.detach().abs().max()) for path, bn in self.batchnorms.items()
        }
        path = max(largest, key=lambda path: (math.isnan(largest[path]), largest[path]))
        rate = self.rate(epoch)
        return f"largest |gamma| {largest[path]:.3g}, in {path}, at sparsity rate {rate:.3g}"

    def _scheduled(self, full_rate: float | Tensor, epoch: int) -> float | Tensor:
        return scheduled_rate(full_rate, epoch, self.epochs, self.schedule)

    def _full_rate(self) -> float | Tensor:
        """The rate before its decay; it is what beta gets."""
        if isinstance(self.sparsity_rate, AutoRate):
            return self.sparsity_rate.at(self.noise.sigma())
        return self.sparsity_rate

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run cannot find out again."""
        rate = self.sparsity_rate
        auto = dataclasses.asdict(rate) if isinstance(rate, AutoRate) else None
        weights = self.weights if self.is_released else None
        return {"noise": self.noise.state_dict(), "auto": auto, "released_weights": weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.noise.load_state_dict(state["noise"])
        if state["auto"] is not None:
            self.sparsity_rate = AutoRate(**state["auto"])
        released = state.get("released_weights")  # versions before had no release
        self.is_released = released is not None
        self.weights = self._full_weights
        if released is not None:
            self.weights = [new.to(old) for new, old in zip(released, self.weights, strict=True)]


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
    share_below_1e2: float  # share of channels with |gamma| < NEAR_ZERO
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


def gamma_statistics(model: Model, shortcut: str = "group") -> GammaStatistics:
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
        share_below_1e2=float((values < NEAR_ZERO).mean()),
        share_below_1e3=float((values < 1e-3).mean()),
        suggested_percent=suggested,
        layers={name: _quantiles(part, 21) for name, part in layers.items()},
    )


def _quantiles(values: np.ndarray, number: int) -> tuple[float, ...]:
    """`number` evenly spaced quantiles, from the smallest value to the largest."""
    return tuple(np.quantile(values, np.linspace(0, 1, number)).tolist())
