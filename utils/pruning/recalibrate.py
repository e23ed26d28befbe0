"""Re-estimate the running statistics of batch norm: what a cut network has is no longer true.

Forward passes alone, no gradients. Reference: Li et al. 2020, EagleEye, arXiv:2007.02491.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.yolo import Model


@torch.no_grad()
def recalibrate(model: Model, images: Iterable[Tensor]) -> Model:
    """A copy whose running mean and variance are plain averages over the given batches.

    Each batch counts the same, however many images it holds; the variance is the unbiased one, as
    in training. What the statistics were before has no influence: as in training, every layer
    normalises by the batch at hand while they are being estimated.

    Args:
        model: the network; it is not changed. All but the statistics and the counter of batches
            behind them (`num_batches_tracked`) is the same in the copy, its mode too.
        images: batches `[B, 3, H, W]`, float, RGB in 0-1, on the device and of the precision of
            the network. Take training images without augmentation; some hundreds are enough.

    Raises:
        ValueError: no batches, a network whose batch norm has been folded, or batches so small
            that a layer sees a single value per channel.
    """
    copied = copy.deepcopy(model)
    batchnorms = [module for module in copied.modules() if isinstance(module, nn.BatchNorm2d)]
    if not batchnorms:
        raise ValueError("the network has no batch norm (a fused one cannot be recalibrated)")
    modes = [(module, module.training) for module in copied.modules()]
    momenta = [bn.momentum for bn in batchnorms]
    copied.eval()
    for bn in batchnorms:
        bn.train()
        bn.reset_running_stats()
        bn.momentum = None  # the cumulative average
    for batch in images:
        copied(batch)
    if not batchnorms[0].num_batches_tracked:
        raise ValueError("no images to estimate the statistics of batch norm from")
    for bn, momentum in zip(batchnorms, momenta, strict=True):
        bn.momentum = momentum
    for module, training in modes:
        module.training = training
    return copied
