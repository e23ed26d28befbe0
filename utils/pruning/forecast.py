"""What a sparse run can reach, before it is made: how far the gamma of an unused channel can fall.

A channel that the loss does not need has no gradient but noise, so the penalty alone moves its
gamma: by what the learning rates of all steps add up to. Where that is less than the typical
|gamma|, no patience with the result helps, as nothing can have arrived at 0. Where the penalty is
far above the gradient noise, it moves what is used just as well. `--sparsity_rate auto` puts the
rate in between.

Nothing is probed: under SGD and in proximal mode the fall does not depend on the gradients and is
known before the run. Under Adam it depends on the ratio of rate and gradient noise; the noise is
taken from the steps of the first epoch, with the batches, processes and precision of the run.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import torch

from utils.optim import Schedule
from utils.pruning.slimming import AutoRate, scheduled_rate

# `auto` in units of the gradient noise: the mean gradient up to which a channel has to give way.
# Measured on BCCD (yolov5n, AdamW, 60 epochs, noise 0.0015): see benchmarks/slimming.md.
AUTO_STRENGTH = {"subgradient": 0.65, "proximal": 0.3}
# How far `auto` goes in a run so short that its rate would not bring an unused channel to 0.
# On shapes 3.0 was borne (30 epochs); of proximal rates (45 epochs) 0.3 made nothing sparse at
# mAP@.5 0.743, and 0.5 left 0.060.
AUTO_LIMIT = {"subgradient": 3.0, "proximal": 0.3}
# The distance that `auto` wants an unused channel to be able to fall, in medians of |gamma|: more
# than one, as an average (EMA) and what was learnt in between have to follow.
AUTO_REACH = 1.25

# No network is known to have borne a rate of more than this many times the noise (shapes, 30
# epochs, bore 3.0). Below it the ratio does not tell ruin from health, as the noise says nothing of
# what channels are worth: 0.65 ruined COCO128. Only mAP tells, so the verdict does.
RISKY_NOISE_RATIO = 3.0
# Under Adam a step is at most about lr, of which the proximal step takes this share back.
DEADLY_SHARE, RISKY_SHARE = 1.0, 0.4

_ROUNDING = 1 + 1e-6  # a rate of auto comes from float32
MAX_TIMES = 1e6  # as long a run, or as high a rate, is no advice beyond this
_PIECES_PER_EPOCH = 100  # an epoch of the warm-up, where every step differs, is cut in so many
_ADAM_SQUARES, _ADAM_EPS = 0.999, 1e-8  # beta2 and eps, as `build_optimizer` leaves them


class Piece(NamedTuple):
    """Optimizer steps in a row with the same settings."""

    epoch: int
    num_steps: int
    lr: float
    momentum: float  # of SGD, or beta1 of Adam


def plan_steps(schedule: Schedule, steps_per_epoch: int, batch_size: int) -> tuple[Piece, ...]:
    """The optimizer steps of a run, as `Schedule` and the training loop make them.

    Args:
        schedule: of the whole run.
        steps_per_epoch: batches, not optimizer steps.
        batch_size: images, over all processes.
    """
    pieces: list[Piece] = []
    for epoch in range(schedule.epochs):
        first = epoch * steps_per_epoch
        if first >= schedule.warmup_steps:
            settings = schedule.at(first, epoch)
            count = math.ceil(steps_per_epoch / schedule.accumulation(first, batch_size))
            pieces.append(Piece(epoch, count, settings.lr, settings.momentum))
        else:
            pieces += _plan_warmup(schedule, epoch, first, steps_per_epoch, batch_size)
    return tuple(pieces)


def _plan_warmup(
    schedule: Schedule, epoch: int, first: int, steps_per_epoch: int, batch_size: int
) -> list[Piece]:
    """An epoch in which settings change with every step; neighbours are averaged if many."""
    last = first + steps_per_epoch - 1
    steps, pending = [], 0
    for step in range(first, last + 1):
        pending += 1
        if pending >= schedule.accumulation(step, batch_size) or step == last:
            settings = schedule.at(step, epoch)
            steps.append((settings.lr, settings.momentum))
            pending = 0
    parts = np.array_split(np.array(steps), min(len(steps), _PIECES_PER_EPOCH))
    return [Piece(epoch, len(part), *part.mean(0).tolist()) for part in parts]


@dataclasses.dataclass(frozen=True)
class SparsityPlan:
    """A sparse run, or the rest of one, without its rate."""

    pieces: tuple[Piece, ...]
    epochs: int  # of the whole run
    optimizer: str
    mode: str  # one of choices.MODES
    schedule: str = "linear"  # one of choices.SCHEDULES

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return sum(piece.num_steps for piece in self.pieces)

    @property
    def needs_noise(self) -> bool:
        """Whether the fall depends on the gradient noise."""
        return self.mode == "subgradient" and self.is_adam

    @property
    def is_adam(self) -> bool:
        """Whether the optimizer divides gradients by their rms."""
        return self.optimizer != "SGD"

    @property
    def noise_gain(self) -> float:
        """Gradient noise in the units of the rate: SGD's steps are lr * g / (1 - momentum)."""
        if self.mode == "subgradient" or self.is_adam:
            return 1.0
        return 1 / (1 - self.pieces[-1].momentum)

    def rate_in(self, piece: Piece, sparsity_rate: float) -> float:
        """The rate of a piece, where it is `sparsity_rate` before its decay."""
        return scheduled_rate(sparsity_rate, piece.epoch, self.epochs, self.schedule)

    def rest(self, first_epoch: int) -> SparsityPlan:
        """What is left from this epoch on."""
        left = tuple(piece for piece in self.pieces if piece.epoch >= first_epoch)
        return dataclasses.replace(self, pieces=left)

    def fall(self, sparsity_rate: float, noise: float = 0.0) -> float:
        """How far the gamma of an unused channel can fall.

        Args:
            sparsity_rate: before its decay over the epochs.
            noise: the rms of its gradients; it counts under Adam in subgradient mode alone, where
                0 gives an upper bound.
        """
        if self.mode == "proximal":
            return sum(p.num_steps * p.lr * self.rate_in(p, sparsity_rate) for p in self.pieces)
        if self.is_adam:
            return self._fall_adam(sparsity_rate, noise)
        return self._fall_sgd(sparsity_rate)

    def _fall_sgd(self, sparsity_rate: float) -> float:
        """Steps of lr * (rate + momentum * buffer); the buffer nears rate / (1 - momentum)."""
        total = buffer = 0.0
        for piece in self.pieces:
            _, count, lr, momentum = piece
            rate = self.rate_in(piece, sparsity_rate)
            limit = rate / (1 - momentum)
            left = momentum**count  # of what the buffer lacks to its limit
            lacking = (buffer - limit) * momentum * (1 - left) / (1 - momentum)  # sum over steps
            total += lr * (count * (rate + momentum * limit) + momentum * lacking)
            buffer = limit + (buffer - limit) * left
        return total

    def _fall_adam(self, sparsity_rate: float, noise: float) -> float:
        """Steps of lr * first / sqrt(second), the running means of gradient and square.

        In a steady state that is lr * rate / sqrt(rate^2 + noise^2). But the rate falls over the
        run, and the second moment remembers 1,000 steps.
        """
        total = first = second = 0.0
        done = 0
        for piece in self.pieces:
            _, count, lr, momentum = piece
            steps = np.arange(1, count + 1)
            rate = self.rate_in(piece, sparsity_rate)
            square = rate**2 + noise**2
            firsts = rate + (first - rate) * momentum**steps
            seconds = square + (second - square) * _ADAM_SQUARES**steps
            first, second = float(firsts[-1]), float(seconds[-1])
            firsts = firsts / (1 - momentum ** (done + steps))
            seconds = seconds / (1 - _ADAM_SQUARES ** (done + steps))
            total += lr * float((firsts / (np.sqrt(seconds) + _ADAM_EPS)).sum())
            done += count
        return total

    def rate_to_fall(self, distance: float, noise: float = 0.0) -> float | None:
        """The rate at which an unused channel falls so far; None if none does, or all do."""
        if not self.needs_noise:
            unit = self.fall(1.0)
            return distance / unit if unit > 0 else None
        low, high = noise * 1e-4, noise * 1e4
        if noise <= 0 or self.fall(high, noise) < distance:
            return None
        for _ in range(30):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.fall(middle, noise) >= distance else (middle, high)
        return high


def choose_auto_rate(plan: SparsityPlan, median: float, teacher_gain: float = 0.0) -> AutoRate:
    """What `--sparsity_rate auto` means for a run.

    A multiple of the gradient noise; more where that is not enough to bring the gamma of an unused
    channel from the median to 0 (`AUTO_REACH`), but at most `AUTO_LIMIT`: beyond it the penalty
    moves what is used as well, and the run is too short to become sparse.

    Args:
        plan: of the whole run.
        median: of |gamma| of the penalised channels at its start.
        teacher_gain: of a distillation loss beside that of the labels, 0 for none. It adds to the
            gradients, and to their noise, but nothing to what a channel is worth; measured on BCCD
            (gain 1) the noise grows by 2.2, and 0.65 times that, 0.0021, destroyed the network.
    """
    is_share_of_lr = plan.mode == "proximal" and plan.is_adam  # whatever the noise is
    scale = 1.0 if is_share_of_lr else 1 / (1 + teacher_gain)
    strength = AUTO_STRENGTH[plan.mode] * scale
    needed = plan.rate_to_fall(AUTO_REACH * median, noise=1.0)
    if not plan.is_adam:
        limit = AUTO_LIMIT["subgradient"] * scale
        return AutoRate(strength, needed or 0.0, plan.noise_gain, limit)
    limit = max(strength, AUTO_LIMIT[plan.mode] * scale)
    strength = limit if needed is None else min(max(strength, needed), limit)
    return AutoRate(strength, noise_gain=1.0 if plan.mode == "subgradient" else None)


class Remark(NamedTuple):
    """One line for the log."""

    text: str
    is_warning: bool = False


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Whether a run, or what is left of one, can become sparse and will spare what is used."""

    plan: SparsityPlan
    sparsity_rate: float | AutoRate  # before its decay
    median: float  # of |gamma| of the penalised channels now
    noise: float | None  # the gradient noise, `GradientNoise.sigma`; None before the first step

    def remarks(self) -> list[Remark]:
        """What to tell the user."""
        if not any(self.plan.rate_in(piece, 1.0) for piece in self.plan.pieces):
            return []  # the penalty has done its work
        found = [self._describe_auto(), self._describe_fall(), self._describe_danger(self.rate)]
        return [remark for remark in found if remark is not None]

    @property
    def rate(self) -> float:
        """The rate, of `auto` as far as it is known."""
        if isinstance(self.sparsity_rate, AutoRate):
            return float(self.sparsity_rate.at(torch.tensor(self._assumed_noise)))
        return self.sparsity_rate

    @property
    def fall(self) -> float:
        """How far an unused channel can fall; with `is_bound` at most."""
        return self.plan.fall(self.rate, self._assumed_noise)

    @property
    def is_bound(self) -> bool:
        """Whether the noise would be needed and is not known yet."""
        if isinstance(self.sparsity_rate, AutoRate):
            return self.noise is None and self.sparsity_rate.limit < math.inf
        return self.plan.needs_noise and self.noise is None

    @property
    def _assumed_noise(self) -> float:
        if self.noise is not None:
            return self.noise
        # Under Adam the fall is the same for a noise of 1 and a rate in units of it.
        is_auto = isinstance(self.sparsity_rate, AutoRate)
        return 1.0 if is_auto and self.plan.needs_noise else 0.0

    def _describe_auto(self) -> Remark | None:
        """What `auto` has chosen."""
        auto = self.sparsity_rate
        if not isinstance(auto, AutoRate):
            return None
        if auto.noise_gain is None:
            return Remark(f"auto: rate {self.rate:.3g}, a share of the learning rate")
        if self.noise is None:
            least = f", at least {auto.least:.3g}" if auto.least else ""
            return Remark(f"auto: rate {auto.strength:.3g} x the gradient noise{least}")
        noise = self.noise * auto.noise_gain
        if auto.strength * noise >= auto.least:
            times = f"{auto.strength:.3g} x the gradient noise {noise:.3g}"
            return Remark(f"auto: rate {self.rate:.3g} = {times}")
        if self.rate < auto.least * (1 - 1e-6):
            return Remark(
                f"auto: rate {self.rate:.3g}, the most that auto takes: {auto.limit:g} x "
                f"the gradient noise {noise:.3g}"
            )
        return Remark(
            f"auto: rate {self.rate:.3g}, what it takes to get an unused channel to 0; the "
            f"gradient noise is {noise:.3g}"
        )

    def _describe_fall(self) -> Remark:
        """How far an unused channel can fall, and what to do if that is too little."""
        is_enough = self.fall >= self.median * (1 - 1e-6)
        amount = "at most " if self.is_bound else "" if is_enough else "only "
        text = (
            f"forecast: an unused channel can lose {amount}{self.fall:.3g} of |gamma| in "
            f"{'the rest of this run' if self.plan.pieces[0].epoch else 'this run'} "
            f"({self.plan.num_steps} steps), the median is {self.median:.3g}: "
        )
        if not is_enough:
            remedies = self._find_remedies()
            advice = f"; give it {', or '.join(remedies)}" if remedies else ""
            return Remark(f"warning: {text}it cannot become sparse{advice}", True)
        if self.is_bound:
            return Remark(f"{text}the gradients of the first epoch will tell whether it gets there")
        return Remark(f"{text}it can become sparse")

    def _find_remedies(self) -> list[str]:
        """Each would do by itself; a rate is named only if it does not spoil what is used."""
        plan, remedies = self.plan, []
        needed = plan.rate_to_fall(self.median, self._assumed_noise)
        is_fixed = not isinstance(self.sparsity_rate, AutoRate)
        danger = None if needed is None else self._describe_danger(_round_up(needed))
        if is_fixed and needed is not None and not (danger and danger.is_warning):
            remedies.append(f"--sparsity_rate {_round_up(needed):g}")
        if self.fall * MAX_TIMES > self.median:
            times, first = self.median / self.fall, plan.pieces[0].epoch
            remedies.append(f"{first + math.ceil((plan.epochs - first) * times)} epochs")
            if plan.is_adam:
                remedies.append(f"a learning rate {_round_up(times):g} times as high")
        with_adam = dataclasses.replace(plan, optimizer="AdamW")
        could_adam = plan.mode == "subgradient" and not plan.is_adam
        if could_adam and with_adam.fall(self.rate, self._assumed_noise) >= self.median:
            remedies.append("--optimizer AdamW")
        return remedies

    def _describe_danger(self, rate: float) -> Remark | None:
        """What to expect where the penalty may be stronger than what channels are worth."""
        if self.plan.mode == "proximal" and self.plan.is_adam:
            if rate <= RISKY_SHARE:
                return None
            outcome = "every channel dies" if rate >= DEADLY_SHARE else "channels in use can die"
            return Remark(
                f"warning: {self.plan.optimizer} moves gamma by at most about the learning rate a "
                f"step, and the rate takes {rate:.0%} of that back: {outcome}; give it "
                f"--sparsity_rate {AUTO_STRENGTH['proximal']:g}, or auto",
                True,
            )
        if self.noise is None:
            return None
        noise, usual = self.noise * self.plan.noise_gain, AUTO_STRENGTH[self.plan.mode]
        text = f"the rate {rate:.3g} is {rate / noise:.3g} x the gradient noise {noise:.3g}"
        if rate <= usual * noise * _ROUNDING:
            return None
        if rate <= RISKY_NOISE_RATIO * noise * _ROUNDING:
            return Remark(f"{text}: some networks bear that, others do not; the verdict will tell")
        return Remark(
            f"warning: {text}, and none is known to have borne more than {RISKY_NOISE_RATIO:g} x: "
            "channels in use fall like the others; give it "
            f"--sparsity_rate {usual * noise:.2g}, or auto",
            True,
        )


def _round_up(value: float) -> float:
    """To two digits, so that what is advised is enough."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return math.ceil(value / unit * (1 - 1e-9)) * unit
