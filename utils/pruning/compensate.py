"""Make up for channels that are about to go: their part of every sum they enter is not lost.

A convolution that reads kept inputs x_k and dropped inputs x_d computes W_k x_k + W_d x_d. With a
prediction x_d = b + A' x_k (the prime transposes) this is (W_k + W_d A') x_k + W_d b: the first
part goes into the kept weights, the second into the running mean of the batch norm, or the bias of
a head convolution. `COMPENSATIONS` name the predictions:

- "none": x_d = 0, what cutting alone does.
- "constant": what a channel emits when its gamma is 0, act(beta); added up along shortcuts.
- "mean": its mean activation, measured, or expected from gamma and beta.
- "linear": least squares on the kept channels of the same pixel, from measured covariances.

For 1x1 convolutions this is exact as far as the prediction is; for padded 3x3 convolutions except
at the border, where the padding is zero and the constant is not.

Reference: the constants, Ye et al. 2018, arXiv:1802.00124; reconstruction by least squares, He et
al. 2017, Channel Pruning for Accelerating Very Deep Neural Networks, arXiv:1707.06168.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from models.yolo import Model
from utils.choices import COMPENSATIONS
from utils.pruning.activations import (
    InputStatistics,
    constant_inputs,
    consumer,
    expected_inputs,
)
from utils.pruning.channel_groups import ChannelGroups
from utils.pruning.rewrite import dropped_inputs

# Added to the variances before solving, as a share of their mean: covariances come from finitely
# many pixels, and channels that never vary make them singular.
RIDGE = 1e-3


@torch.no_grad()
def compensate(
    model: Model,
    channel_groups: ChannelGroups,
    keep_masks: Mapping[str, Tensor],
    kind: str,
    statistics: Mapping[str, InputStatistics] | None = None,
) -> Model:
    """A copy of `model` at full width, changed so that cutting it loses as little as possible.

    Args:
        model: the network that is to be cut; it is not changed.
        channel_groups: of `model`.
        keep_masks: as `prune_model` takes them.
        kind: one of `COMPENSATIONS`.
        statistics: of the inputs of `model`, for "mean" and "linear"; None takes the expected ones.

    Raises:
        ValueError: unknown kind, or "linear" without measured covariances; a mask as in
            `prune_model`.
    """
    if kind not in COMPENSATIONS:
        raise ValueError(f"compensation {kind!r}, expected one of {', '.join(COMPENSATIONS)}")
    dropped = dropped_inputs(channel_groups, keep_masks)
    compensated = copy.deepcopy(model)
    if kind == "none":
        return compensated
    if kind == "constant":
        means = constant_inputs(model, channel_groups)
    else:
        statistics = statistics or expected_inputs(model, channel_groups)
        means = {path: part.mean for path, part in statistics.items()}
    for path, is_dropped in dropped.items():
        if not is_dropped.any():
            continue
        constant = means[path][is_dropped]
        if kind == "linear":
            assert statistics is not None
            factors = _regress(path, statistics[path], is_dropped)
            constant = constant - factors.T @ means[path][~is_dropped]
            _fold_into_weights(compensated, path, is_dropped, factors)
        _fold_constant(compensated, path, is_dropped, constant)
    return compensated


def _regress(path: str, statistics: InputStatistics, is_dropped: Tensor) -> Tensor:
    """Least squares factors `[kept, dropped]` of the dropped channels on the kept ones."""
    if statistics.covariance is None:
        raise ValueError(f"{path}: the linear compensation needs images to measure covariances on")
    kept = statistics.covariance[~is_dropped]
    ridge = RIDGE * statistics.variance[~is_dropped].mean().clamp(min=1e-12)
    within = kept[:, ~is_dropped] + ridge * torch.eye(len(kept), dtype=kept.dtype)
    return torch.linalg.solve(within, kept[:, is_dropped])


def _fold_into_weights(model: Model, path: str, is_dropped: Tensor, factors: Tensor) -> None:
    weight = consumer(model, path)[0].weight  # [out, in, k, k]
    is_dropped = is_dropped.to(weight.device)
    gained = torch.einsum("odij,kd->okij", weight[:, is_dropped].cpu().double(), factors)
    weight[:, ~is_dropped] += gained.to(weight)


def _fold_constant(model: Model, path: str, is_dropped: Tensor, constant: Tensor) -> None:
    """Add what the dropped channels contribute when each is the given constant `[dropped]`."""
    conv, bn = consumer(model, path)
    weight = conv.weight[:, is_dropped.to(conv.weight.device)].cpu().double()
    contribution = weight.sum((2, 3)) @ constant
    if bn is not None:
        assert bn.running_mean is not None
        bn.running_mean -= contribution.to(bn.running_mean)
    else:
        assert conv.bias is not None
        conv.bias += contribution.to(conv.bias)
