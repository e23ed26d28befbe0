"""One step of a training: images to the device, loss, gradients, optimizer, average."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from utils.dataset import Batch
from utils.training.run import Run

MAX_GRADIENT_NORM = 10.0


def to_device(run: Run, batch: Batch, epoch: int, index: int) -> Tensor:
    """Images 0-1 `[B, 3, H, W]` on the device, channels last; resized if `--multi-scale`."""
    images = batch.images.to(run.device, non_blocking=True)
    # Whole numbers up to 255 are exact in bfloat16, in which mixed precision computes anyway.
    exact = run.precision == torch.bfloat16 and not run.options.multi_scale
    images = images.to(run.precision if exact else torch.float32, memory_format=torch.channels_last)
    images.div_(255)
    if run.options.multi_scale:
        rng = np.random.default_rng((run.options.seed, epoch, index))
        stride = run.model.max_stride
        side = int(rng.integers(run.imgsz // 2, run.imgsz * 3 // 2 + 1))
        factor = side / max(images.shape[2:])
        size = [max(round(length * factor / stride), 1) * stride for length in images.shape[2:]]
        images = F.interpolate(images, size, mode="bilinear", align_corners=False)
    return images


def compute_loss(
    run: Run, images: Tensor, targets: Tensor, *, is_extra: bool = False
) -> tuple[Tensor, Tensor]:
    """The loss of a batch to minimise (scalar), and its parts in the order of `run.loss_names`.

    Of several processes each gets its share; one whose images are extra gets 0.
    """
    weight = 0.0 if is_extra else 1.0
    mixed = run.precision != torch.float32
    with torch.autocast(run.device.type, run.precision, enabled=mixed):
        logits = run.network(images)
    loss, parts = run.loss(logits, targets, weight)
    if run.teacher is None or run.distillation is None:
        return loss, parts
    with torch.no_grad(), torch.autocast(run.device.type, run.precision, enabled=mixed):
        _, wanted = run.teacher(images)
    distillation, terms = run.distillation(logits, wanted, weight)
    return loss + distillation, torch.cat((parts, terms.sum(0, keepdim=True)))


def clip_gradients(run: Run) -> Tensor:
    """Unscale the gradients and shorten them to `MAX_GRADIENT_NORM`; returns their norm before."""
    run.scaler.unscale_(run.optimizer)
    return torch.nn.utils.clip_grad_norm_(run.model.parameters(), MAX_GRADIENT_NORM)


def optimizer_step(run: Run, epoch: int, norm: Tensor) -> None:
    """Add the sparsity term, step, average.

    The term follows unscaling and clipping and comes once per step, so that the rate means the
    same with any precision, accumulation and gradient norm. Its proximal form follows the step.

    Args:
        run: with gradients as `clip_gradients` leaves them.
        epoch: the current one.
        norm: what `clip_gradients` gave.
    """
    if run.penalty is not None:
        run.penalty.before_step(epoch, norm)
    if run.optimizer.defaults["fused"] and not run.scaler.is_enabled():
        # It leaves a step out that is not finite, and nothing has to wait for the device.
        run.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if run.penalty is not None:
        run.penalty.after_step(epoch, norm, run.optimizer, run.ema.model)
    run.optimizer.zero_grad(set_to_none=True)
    run.ema.update(run.model)
