"""The network to train, the one it learns from, and how good they are known to be."""

from __future__ import annotations

import argparse
import logging

import torch
from torch import nn

from models import Model
from utils import device as devices
from utils import ranks
from utils.anchors import check_anchors, fit_anchors
from utils.checkpoint import load_detector, transfer_weights
from utils.dataset import Split, label_sizes_px
from utils.distill import check_teacher
from utils.optim import freeze, frozen_rows
from utils.profile import count_parameters
from utils.pruning.slimming import prunable_batchnorms
from utils.pruning.verdict import NOT_KNOWN, Best, known_map50
from utils.training.inputs import Inputs

LOGGER = logging.getLogger(__name__)


def build_network(inputs: Inputs, options: argparse.Namespace) -> Model:
    """The network to train, with whatever weights fit from its source."""
    model = Model(inputs.spec, inputs.max_weights)
    if inputs.source is not None:
        # With --cfg, and where new anchors are asked for, those of the weights do not count.
        own_anchors = isinstance(inputs.spec.anchors, int) or bool(
            options.cfg and not options.ft_pruned_model
        )
        transfer_weights(model, inputs.source.model.state_dict(), keep_anchors=own_anchors)
    if options.sync_bn and devices.world_size() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if model.spec.is_pruned:
        LOGGER.info(
            "slim network: %d channels, %s parameters; %d channels in the dense one",
            sum(model.widths().values()),
            f"{count_parameters(model):,}",
            sum(Model(model.spec.with_widths({})).widths().values()),
        )
    return model


def load_teacher(
    inputs: Inputs, options: argparse.Namespace, model: Model
) -> tuple[Model | None, Best]:
    """The network of `--teacher`, folded and frozen, and what it is known to have reached.

    It must answer what `model` answers. Loaded after `model` is built, whose fresh weights are
    thus the same with and without it.
    """
    path = inputs.teacher
    if path is None:
        return None, NOT_KNOWN
    teacher, names, checkpoint = ranks.from_first(lambda: load_detector(path))
    check_teacher(teacher, names, model, inputs.data.names, f"--teacher {options.teacher}")
    LOGGER.info(
        "teacher: %s, %s parameters; gain %g",
        path,
        f"{count_parameters(teacher):,}",
        options.distill_gain,
    )
    best = Best(known_map50(checkpoint, inputs.data.names, vars(options)), "of the teacher")
    return teacher.fuse().requires_grad_(False), best


def best_of_source(inputs: Inputs, options: argparse.Namespace) -> Best:
    """What the starting weights are known to have reached."""
    if inputs.source is None:
        return NOT_KNOWN
    known = known_map50(inputs.source.checkpoint, inputs.data.names, vars(options))
    return Best(known, "of the starting weights")


def freeze_rows(model: Model, options: argparse.Namespace) -> list[nn.Module]:
    """Apply `--freeze`; returns the BN layers to keep in eval mode.

    Raises:
        ValueError: there are no such rows, or nothing is left for `--bn_sparsity`.
    """
    frozen = freeze(model.model, frozen_rows(options.freeze, len(model.model)))
    if options.bn_sparsity:  # now, not when there is a run folder
        prunable = prunable_batchnorms(model, options.shortcut).values()
        if not any(bn.weight.requires_grad for bn in prunable):
            raise ValueError("--freeze leaves no layer that --bn_sparsity could make sparse")
    return frozen


def choose_anchors(
    model: Model, inputs: Inputs, split: Split, imgsz: int, options: argparse.Namespace
) -> None:
    """Fit the anchors to the training boxes where they are asked for or do not fit."""
    sizes = label_sizes_px(split, imgsz)
    fitted, current = None, model.head.anchors_px.numpy()
    if isinstance(inputs.spec.anchors, int):
        fitted = fit_anchors(sizes, current.shape[:2], inputs.hyp.anchor_t, options.seed)
    elif not options.noautoanchor:
        fitted = check_anchors(current, sizes, inputs.hyp.anchor_t, options.seed)
    if fitted is not None:
        model.set_anchors(torch.tensor(fitted, dtype=torch.float32))
