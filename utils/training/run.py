"""What one training consists of, and how it is put together."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from models import Model
from utils import device as devices
from utils import ranks
from utils.config import Hyperparameters
from utils.distill import DistillationGains, DistillationLoss, have_same_anchors
from utils.loss import DetectionLoss, LossSettings
from utils.optim import ModelEma, Schedule, build_optimizer, num_warmup_steps
from utils.pruning.forecast import SparsityPlan, choose_auto_rate, plan_steps
from utils.pruning.slimming import (
    GammaStatistics,
    SparsityPenalty,
    median_gamma,
    prunable_batchnorms,
)
from utils.pruning.verdict import NOT_KNOWN, Best
from utils.resume import command_to_resume
from utils.stopping import StopRequest
from utils.tensorboard import Board
from utils.training.inputs import Inputs

LOGGER = logging.getLogger(__name__)

LOSS_NAMES = ("box", "obj", "cls")


class BeforeStep(NamedTuple):
    """What batches change before the optimizer does, as it was before the first of them."""

    buffers: list[Tensor]  # of the network: statistics of batch norms
    loss_sums: Tensor


@dataclasses.dataclass
class Run:
    """What one training run consists of, and where it stands."""

    options: argparse.Namespace
    hyp: Hyperparameters
    model: Model
    network: nn.Module  # the model, wrapped if several processes train together
    names: tuple[str, ...]
    imgsz: int
    device: torch.device
    precision: torch.dtype
    loss: DetectionLoss
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    ema: ModelEma[Model]
    plan: SparsityPlan  # of the whole run
    penalty: SparsityPenalty | None
    class_maps: np.ndarray  # [K] mAP@.5:.95 of each class after the last validation
    dir: Path = Path()  # made, or found, when the rest is ready
    frozen_norms: list[nn.Module] = dataclasses.field(default_factory=list)
    first_epoch: int = 0
    best_fitness: float = -1.0
    best_epoch: int = 0
    best: Best = NOT_KNOWN  # mAP@.5, that of an older run on the same data included
    gammas: dict[int, GammaStatistics] = dataclasses.field(default_factory=dict)  # by epoch
    teacher: Model | None = None
    distillation: DistillationLoss | None = None  # there if the teacher is
    data: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)  # to see changes
    stop: StopRequest = dataclasses.field(default_factory=lambda: StopRequest(devices.rank() > 0))
    batches: int = 0  # of the current epoch, that the network has learnt from
    loss_sums: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(0))  # over these
    before: BeforeStep | None = None  # there while batches wait for the step that they belong to
    saved_at: float = dataclasses.field(default_factory=time.monotonic)
    validation_seconds: float = 0.0  # that the last one has taken
    overflows_float16: bool = False  # seen in a validation: the next ones compute in float32
    board: Board | None = None  # TensorBoard

    @property
    def loss_names(self) -> tuple[str, ...]:
        """The parts of the training loss."""
        return LOSS_NAMES if self.distillation is None else (*LOSS_NAMES, "distill")

    def command_to_resume(self, *flags: str) -> str:
        """What to type to go on with this run, and with these flags."""
        return command_to_resume(self.dir.absolute(), self.options.device, *flags)

    def go_alone(self) -> None:
        """From here on this process must not wait for others: they may be elsewhere."""
        self.network = self.model
        ranks.go_alone()


def build_run(
    options: argparse.Namespace,
    inputs: Inputs,
    model: Model,
    imgsz: int,
    device: torch.device,
    precision: torch.dtype,
    steps_per_epoch: int,
) -> Run:
    """Loss, optimizer, schedule and average for the network, on the device."""
    hyp = inputs.hyp
    model.to(device).to(memory_format=torch.channels_last)
    nominal = options.nominal_batch
    full_batch = options.batch_size * max(round(nominal / options.batch_size), 1)
    optimizer = build_optimizer(
        model,
        options.optimizer,
        hyp.lr0,
        hyp.momentum,
        hyp.weight_decay * full_batch / nominal,
    )
    schedule = Schedule(
        lr0=hyp.lr0,
        lrf=hyp.lrf,
        epochs=options.epochs,
        momentum=hyp.momentum,
        cosine=options.cos_lr,
        nominal_batch=nominal,
        warmup_steps=num_warmup_steps(hyp.warmup_epochs, steps_per_epoch, options.epochs),
        warmup_momentum=hyp.warmup_momentum,
        # Adam normalises its steps: the bias rate meant for SGD would throw biases about.
        warmup_bias_lr=hyp.warmup_bias_lr if options.optimizer == "SGD" else 0.0,
    )
    plan = SparsityPlan(
        plan_steps(schedule, steps_per_epoch, options.batch_size),
        options.epochs,
        options.optimizer,
        options.sparsity_mode,
        options.sparsity_schedule,
    )
    network: nn.Module = model
    if devices.world_size() > 1:
        ids = [device.index] if device.type == "cuda" else None
        network = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    return Run(
        options=options,
        hyp=hyp,
        model=model,
        network=network,
        names=inputs.data.names,
        imgsz=imgsz,
        device=device,
        precision=precision,
        loss=build_loss(model, loss_settings(hyp, model, imgsz)),
        optimizer=optimizer,
        schedule=schedule,
        scaler=torch.amp.GradScaler(device.type, enabled=precision == torch.float16),
        ema=ModelEma(model),
        plan=plan,
        penalty=build_penalty(options, model, plan),
        class_maps=np.zeros(inputs.data.num_classes),
    )


def build_loss(model: Model, settings: LossSettings) -> DetectionLoss:
    """The loss of the labels; it keeps a copy of the anchors."""
    return DetectionLoss(model.head.anchors, settings, ranks.add_up)


def loss_settings(hyp: Hyperparameters, model: Model, imgsz: int) -> LossSettings:
    """Gains of the hyperparameter file, which are for 3 levels, 80 classes and 640 pixels."""
    levels = 3 / len(model.head.strides)
    return LossSettings(
        box=hyp.box * levels,
        obj=hyp.obj * levels * (imgsz / 640) ** 2,
        cls=hyp.cls * levels * model.head.num_classes / 80,
        cls_pw=hyp.cls_pw,
        obj_pw=hyp.obj_pw,
        anchor_t=hyp.anchor_t,
        fl_gamma=hyp.fl_gamma,
        label_smoothing=hyp.label_smoothing,
    )


def build_penalty(
    options: argparse.Namespace, model: Model, plan: SparsityPlan
) -> SparsityPenalty | None:
    """The L1 term on the gammas that prune.py can remove; None in other stages."""
    if not options.bn_sparsity:
        return None
    batchnorms = prunable_batchnorms(model, options.shortcut)
    frozen = [path for path, bn in batchnorms.items() if not bn.weight.requires_grad]
    if frozen:
        LOGGER.warning("--freeze: no penalty on %d frozen layers, from %s", len(frozen), frozen[0])
    rate = options.sparsity_rate
    if rate == "auto":
        teacher_gain = options.distill_gain if options.teacher else 0.0
        rate = choose_auto_rate(plan, median_gamma(batchnorms.values()), teacher_gain)
    return SparsityPenalty(
        model,
        rate,
        options.epochs,
        options.shortcut,
        options.sparsity_mode,
        options.sparsity_schedule,
        options.sparsity_cost,
        options.sparsity_share,
    )


def add_teacher(run: Run, teacher: Model | None) -> None:
    """Let the run learn from the teacher, if there is one, with the gains that the labels have."""
    if teacher is None:
        return
    if not have_same_anchors(teacher, run.model):
        LOGGER.warning(
            "warning: the anchors of the teacher are others; boxes are compared as they are, but "
            "which anchor sees an object may be taught against the labels"
        )
    run.teacher = teacher.to(run.device).to(memory_format=torch.channels_last)
    labels, gain = loss_settings(run.hyp, run.model, run.imgsz), run.options.distill_gain
    gains = DistillationGains(box=gain * labels.box, obj=gain * labels.obj, cls=gain * labels.cls)
    run.distillation = DistillationLoss(
        run.model.head.anchors, teacher.head.anchors, gains, ranks.add_up
    )
