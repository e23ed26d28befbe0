"""Parameter groups, the learning-rate schedule with warm-up, and the weight average (EMA)."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from utils.choices import NOMINAL_BATCH, OPTIMIZERS

M = TypeVar("M", bound=nn.Module)

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.LayerNorm)


def group_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Sort every parameter into exactly one of `weights`, `norms`, `biases`, by module type.

    `norms` holds gamma alone; beta is a bias. Only `weights` should decay: decay on gamma would
    act beside the sparsity penalty and make its strength depend on the optimizer.
    """
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "norms": [], "biases": []}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                groups["biases"].append(parameter)
            elif isinstance(module, _NORMS):
                groups["norms"].append(parameter)
            else:
                groups["weights"].append(parameter)
    return groups


def build_optimizer(
    model: nn.Module, name: str, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD (Nesterov), Adam or AdamW over the groups of `group_parameters`, in one kernel if it can.

    Args:
        model: on the device it is trained on; its frozen parameters are left out.
        name: one of OPTIMIZERS.
        lr: learning rate after warm-up.
        momentum: momentum of SGD, beta1 of Adam and AdamW.
        weight_decay: acts on the group `weights` alone.
    """
    groups = []
    for kind, parameters in group_parameters(model).items():
        trained = [p for p in parameters if p.requires_grad]
        decay = weight_decay if kind == "weights" else 0.0
        groups.append({"params": trained, "weight_decay": decay, "kind": kind})
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    if name == "SGD":
        nesterov = momentum > 0
        sgd = torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=fused)
        if nesterov:
            # A fused first step that is left out, as its gradients are not finite, would else go
            # on from memory that nothing was written to. From 0 the first step is the same.
            for parameter in model.parameters():
                if parameter.requires_grad:
                    sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    if name == "Adam":
        return torch.optim.Adam(groups, lr=lr, betas=(momentum, 0.999), fused=fused)
    if name == "AdamW":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), fused=fused)
    raise ValueError(f"unknown optimizer {name!r}; known are {', '.join(OPTIMIZERS)}")


def restore_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Go on from its `state_dict`, with the settings that it is built with here.

    Raises:
        ValueError: a part of the state does not fit; torch says more of what does not.
    """
    built = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, settings in zip(optimizer.param_groups, built, strict=True):
        group.update(settings)  # one may be fused or not, on another machine or version
    is_sgd = isinstance(optimizer, torch.optim.SGD)
    names = {"momentum_buffer"} if is_sgd else {"step", "exp_avg", "exp_avg_sq"}
    for parameter, moments in optimizer.state.items():
        shapes = {n: getattr(m, "shape", None) for n, m in moments.items() if m is not None}
        if not names >= shapes.keys() or (shapes.keys() != names and not is_sgd):
            raise ValueError(f"the optimizer holds {', '.join(map(str, shapes))}")
        if any(shape != (() if n == "step" else parameter.shape) for n, shape in shapes.items()):
            raise ValueError("the optimizer holds moments of another shape")


class StepSettings(NamedTuple):
    """What an optimizer step uses."""

    lr: float
    bias_lr: float
    momentum: float


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rate and momentum over a run: linear warm-up by step, then decay by epoch."""

    lr0: float
    lrf: float  # last learning rate as a share of lr0
    epochs: int
    momentum: float
    cosine: bool = False
    nominal_batch: int = NOMINAL_BATCH  # images
    warmup_steps: int = 0  # batches
    warmup_momentum: float = 0.8
    warmup_bias_lr: float = 0.1
    factor: float = 1.0  # of all learning rates, lowered where they proved too high

    def decay(self, epoch: int) -> float:
        """Share of lr0 in this epoch, from 1 down to lrf; see `at` for warm-up."""
        progress = epoch / max(self.epochs, 1)
        if self.cosine:
            progress = (1 - math.cos(math.pi * progress)) / 2
        return 1 + progress * (self.lrf - 1)

    def at(self, step: int, epoch: int) -> StepSettings:
        """Settings for batch number `step` (from 0, counted over the whole run)."""
        lr = self.lr0 * self.decay(epoch) * self.factor
        if step >= self.warmup_steps:
            return StepSettings(lr, lr, self.momentum)
        share = step / self.warmup_steps
        bias_lr = self.warmup_bias_lr * self.factor
        return StepSettings(
            lr * share,
            bias_lr + (lr - bias_lr) * share,
            self.warmup_momentum + (self.momentum - self.warmup_momentum) * share,
        )

    def accumulation(self, step: int, batch_size: int) -> int:
        """Batches per optimizer step; grows from 1 to the nominal batch during warm-up."""
        full = max(round(self.nominal_batch / batch_size), 1)
        if step >= self.warmup_steps:
            return full
        return max(round(1 + (full - 1) * step / self.warmup_steps), 1)


def num_warmup_steps(warmup_epochs: float, steps_per_epoch: int, epochs: int) -> int:
    """Warm-up in batches: as many epochs as asked for, but at most half of the run.

    There is no lower bound in steps: with one, a data set of a few batches an epoch would never
    leave the warm-up.
    """
    return min(round(warmup_epochs * steps_per_epoch), epochs * steps_per_epoch // 2)


def set_step(optimizer: torch.optim.Optimizer, settings: StepSettings) -> None:
    """Write learning rates and momentum into the parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = settings.bias_lr if group["kind"] == "biases" else settings.lr
        if "momentum" in group:
            group["momentum"] = settings.momentum
        else:
            group["betas"] = (settings.momentum, group["betas"][1])


class ModelEma(Generic[M]):
    """Moving average of all weights and statistics; it is what is validated, saved and pruned."""

    def __init__(self, model: M, decay: float = 0.9999, tau: float = 2000) -> None:
        """The decay grows as decay * (1 - exp(-updates / tau)), so that early averages follow."""
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.tau = decay, tau
        self.updates = 0
        self._source: nn.Module | None = None  # whose tensors are paired with the own ones below
        self._averaged: list[Tensor] = []
        self._latest: list[Tensor] = []
        self._counts: list[Tensor] = []  # whole numbers are taken over
        self._latest_counts: list[Tensor] = []

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after an optimizer step."""
        self.updates += 1
        share = 1 - self.decay * (1 - math.exp(-self.updates / self.tau))
        if self._source is not model:
            self._pair_tensors(model)
        torch._foreach_lerp_(self._averaged, self._latest, share)
        if self._counts:
            torch._foreach_copy_(self._counts, self._latest_counts)

    def _pair_tensors(self, model: nn.Module) -> None:
        """Find what belongs together, once: walking through the modules is the slower part.

        Parameters themselves, not what `state_dict` gives: they stay when their data are laid out
        anew, and copies of this object point to their own.
        """
        self._source = model
        mine, theirs = (
            dict(m.named_parameters()) | dict(m.named_buffers()) for m in (self.model, model)
        )
        pairs = [(mine[name], theirs[name]) for name in model.state_dict()]
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self._averaged, self._latest = (list(column) for column in zip(*floats, strict=True))
        counts = [pair for pair in pairs if not pair[0].is_floating_point()]
        self._counts, self._latest_counts = [a for a, _ in counts], [b for _, b in counts]

    def state_dict(self) -> dict[str, Any]:
        """Weights and number of updates."""
        return {"model": self.model.state_dict(), "updates": self.updates}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.updates = state["updates"]


def frozen_rows(values: list[int], num_rows: int) -> set[int]:
    """Rows that `--freeze` means: one number is a count from the front, several are row numbers.

    Raises:
        ValueError: a row does not exist, or none would be left to train.
    """
    rows = set(range(values[0])) if len(values) == 1 else set(values)
    if min(values) < 0 or any(row >= num_rows for row in rows) or len(rows) == num_rows:
        text = " ".join(map(str, values))
        raise ValueError(
            f"--freeze {text}: expected a count below {num_rows}, or several row numbers from 0 to "
            f"{num_rows - 1} that leave a row to train"
        )
    return rows


def freeze(model: nn.Sequential, rows: set[int]) -> list[nn.Module]:
    """Stop training these rows; returns their BN layers, which must be kept in eval mode."""
    norms: list[nn.Module] = []
    for row in rows:
        model[row].requires_grad_(False)
        norms += [m for m in model[row].modules() if isinstance(m, _NORMS)]
    return norms
