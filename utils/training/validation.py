"""The validation of an epoch, and what follows from it."""

from __future__ import annotations

import copy
import logging
import time

import numpy as np
import torch

from utils import device as devices
from utils import ranks
from utils.dataset import Loader
from utils.evaluate import EvaluationResult, Tally, evaluate
from utils.pruning.verdict import Best
from utils.stopping import Stopped
from utils.training.run import Run

LOGGER = logging.getLogger(__name__)


def validate(run: Run, loader: Loader, epoch: int) -> EvaluationResult | None:
    """Measure the averaged weights; None where `--noval` says so, and beside the first process.

    Raises:
        Stopped: the program was asked to end.
    """
    if run.options.noval and epoch < run.options.epochs - 1:
        return None
    # Statistics of batch norms are those of the images that a process has seen.
    ranks.take_from_first(list(run.ema.model.buffers()))

    def gather_unless_stopped(tally: Tally) -> list[Tally]:
        if ranks.is_true_anywhere(run.stop.signal is not None, run.device):
            raise Stopped
        return ranks.gather(tally)

    is_first, started = devices.rank() == 0, time.monotonic()

    def measure(precision: torch.dtype) -> EvaluationResult:
        return evaluate(
            copy.deepcopy(run.ema.model).fuse(),
            run.stop.watch(loader),
            run.names,
            device=run.device,
            precision=precision,
            single_cls=run.options.single_cls,
            loss_fn=run.loss,
            progress=is_first,
            gather=gather_unless_stopped,
        )

    precision = devices.select_validation_precision(run.precision, run.device)
    precision = torch.float32 if run.overflows_float16 else precision
    result = measure(precision)
    if precision == torch.float16:
        run.overflows_float16 = ranks.is_true_anywhere(not result.is_finite, run.device)
        if run.overflows_float16:
            LOGGER.warning(
                "warning: epoch %d: float16 is too small for this network, whose outputs are not "
                "all finite; this and all later validations compute in float32",
                epoch,
            )
            result = measure(torch.float32)
    run.validation_seconds = time.monotonic() - started
    return result if is_first else None


def judge_epoch(run: Run, epoch: int, result: EvaluationResult | None) -> tuple[bool, bool]:
    """Whether the epoch is the best so far, and the last; the same answer in all processes."""
    options, is_best = run.options, False
    if result is not None:
        run.class_maps = np.full(len(run.names), result.map50_95)
        run.class_maps[result.ap_result.classes] = result.ap_result.ap50_95
        is_best = result.fitness > run.best_fitness
        if is_best:
            run.best_fitness, run.best_epoch = result.fitness, epoch
        run.best = max(run.best, Best(result.map50, f"in epoch {epoch}"))
    stop = 0 < options.patience <= epoch - run.best_epoch and not options.noval
    if devices.world_size() > 1:
        shared = torch.tensor([float(stop), *run.class_maps], device=run.device)
        torch.distributed.broadcast(shared, 0)
        stop, run.class_maps = bool(shared[0]), shared[1:].double().cpu().numpy()
    if stop:
        LOGGER.info("no gain for %d epochs (best: %d): the end", options.patience, run.best_epoch)
    return is_best, stop or epoch == options.epochs - 1
