"""The batch size that fits into the memory: found by training steps on grey images."""

from __future__ import annotations

import argparse
import copy
import logging
import math
import traceback

import torch
from torch import Tensor

from models import Model
from utils import device as devices
from utils.batch_size import CPU_BATCH, candidate_sizes, find_largest_fitting
from utils.training.inputs import Inputs
from utils.training.run import Run, add_teacher, build_run
from utils.training.step import clip_gradients, compute_loss, optimizer_step

LOGGER = logging.getLogger(__name__)

BATCH_MEMORY = 0.9  # of that of a GPU, for a batch size that is found by trying
REHEARSAL_BOXES = 20  # objects in each image of such a trial


def choose_batch_size(
    options: argparse.Namespace,
    inputs: Inputs,
    model: Model,
    teacher: Model | None,
    imgsz: int,
    device: torch.device,
    precision: torch.dtype,
) -> int:
    """For `--batch-size -1`: what fits on a GPU, at most the images that a step sums up anyway."""
    if device.type != "cuda":
        size = min(CPU_BATCH, options.nominal_batch)
        LOGGER.info("--batch-size -1: %d, as this device is not short of memory", size)
        return size
    trial_options = argparse.Namespace(**{**vars(options), "batch_size": 1})
    trial = build_run(trial_options, inputs, copy.deepcopy(model), imgsz, device, precision, 1)
    add_teacher(trial, teacher)
    with devices.limit_memory(device, BATCH_MEMORY):
        size = find_largest_fitting(
            candidate_sizes(options.nominal_batch), lambda size: rehearse(trial, size), device
        )
    if not size:
        raise ValueError(f"--batch-size -1: not even one image of {imgsz} px fits; lower --imgsz")
    LOGGER.info("--batch-size -1: %d, found by trying (at most --nominal-batch)", size)
    return size


def rehearse(run: Run, batch_size: int) -> None:
    """A training step and a batch of the validation, of the largest size that may come.

    It changes the network. The size is that of one process.
    """
    stride = run.model.max_stride
    largest = run.imgsz * 3 // 2 if run.options.multi_scale else run.imgsz
    side = math.ceil(largest / stride) * stride
    targets = torch.full((batch_size * REHEARSAL_BOXES, 6), 0.5)
    targets[:, 0] = torch.arange(batch_size).repeat_interleave(REHEARSAL_BOXES)
    targets[:, 1] = 0
    run.network.train()
    loss, _ = compute_loss(run, blank_images(run, batch_size, side), targets)
    run.scaler.scale(loss).backward()
    optimizer_step(run, 0, clip_gradients(run))
    with torch.no_grad():  # as `validate` does; its shapes are padded
        run.ema.model(blank_images(run, 2 * batch_size, run.imgsz + stride))


def blank_images(run: Run, number: int, side: int) -> Tensor:
    """Grey images [B, 3, side, side] on the device."""
    images = torch.full((number, 3, side, side), 0.5, device=run.device)
    return images.to(memory_format=torch.channels_last)


def advise_batch_size(run: Run, error: RuntimeError) -> str:
    """What happened, and the batch size that would fit; tries it out on the network, which ends."""
    traceback.clear_frames(error.__traceback__)  # they hold the tensors that filled the memory
    run.go_alone()
    run.optimizer.zero_grad(set_to_none=True)
    devices.free_memory(run.device)
    options, count = run.options, devices.world_size()
    sizes = candidate_sizes(options.batch_size // count)[:-1]
    with devices.limit_memory(run.device, BATCH_MEMORY):
        fits = count * find_largest_fitting(sizes, lambda size: rehearse(run, size), run.device)
    given = f"--batch-size {options.batch_size} at {run.imgsz} px"
    if not fits:
        return f"out of memory with {given}; no smaller one fits either, lower --imgsz"
    again = run.command_to_resume("--batch-size", str(fits))
    has_last = (run.dir / "weights/last.pt").is_file()
    return f"out of memory with {given}; {again if has_last else f'--batch-size {fits}'} fits"
