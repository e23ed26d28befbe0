"""A sparse training on its way: what is let go, how sparse it can become, what can be cut."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging

import torch

from models import Model
from utils.choices import DEFAULT_IMPORTANCE
from utils.dataset import Loader, sample_batches
from utils.evaluate import evaluate
from utils.pruning.activations import measure_inputs
from utils.pruning.channel_groups import find_channel_groups
from utils.pruning.forecast import Forecast
from utils.pruning.search import build_pruner
from utils.pruning.slimming import NEAR_ZERO, SparsityPenalty, median_gamma
from utils.pruning.verdict import History, describe_readiness, measure_readiness
from utils.stopping import Stopped
from utils.training.run import Run

LOGGER = logging.getLogger(__name__)

# Images that the verdict on a sparse network is learnt from and measured on.
VERDICT_TRAIN_IMAGES, VERDICT_IMAGES, VERDICT_BATCH = 64, 256, 16


def let_go(run: Run, penalty: SparsityPenalty, epoch: int) -> None:
    """Once enough of the averaged gammas are near 0, pull at the others no more, and say so."""
    share = penalty.release(run.ema.model)
    if share is not None:
        LOGGER.info(
            "epoch %d: %.1f%% of the gammas are below %g, --sparsity_share is %g%%; the others are "
            "let go from here on",
            epoch, 100 * share, NEAR_ZERO, 100 * penalty.release_share,
        )  # fmt: skip


def log_forecast(run: Run, penalty: SparsityPenalty, first_epoch: int) -> None:
    """Say how sparse the rest of the run can become; more is known after its first epoch."""
    if penalty.is_released:
        LOGGER.info("enough gammas are near 0; the others have been let go")
        return
    forecast = Forecast(
        run.plan.rest(first_epoch),
        penalty.sparsity_rate,
        median_gamma(penalty.batchnorms.values()),
        penalty.noise.sigma().item() or None,
    )
    for remark in forecast.remarks():
        LOGGER.log(logging.WARNING if remark.is_warning else logging.INFO, remark.text)


def is_verdict_due(options: argparse.Namespace, epoch: int, is_last: bool) -> bool:
    """After each quarter of a sparse run and at its end; it takes half a dozen evaluations."""
    quarters = [4 * done // options.epochs for done in (epoch, epoch + 1)]
    return is_last or (not options.noval and quarters[0] < quarters[1])


def give_verdict(
    run: Run,
    penalty: SparsityPenalty,
    train_loader: Loader,
    val_loader: Loader,
    epoch: int,
    history: History,
) -> None:
    """Say how much can go by now; no advice is worth a run."""
    train_loader.set_epoch(epoch)
    so_far = dataclasses.replace(history, epochs_done=epoch + 1)
    try:
        with torch.random.fork_rng([]):  # a run that is killed here is resumed without it
            LOGGER.info("%s", judge_network(run, penalty, train_loader, val_loader, so_far))
    except Stopped:  # all is saved, and the next batch sees the request
        LOGGER.warning("warning: no verdict on the sparse network: asked to stop")
    except (RuntimeError, ValueError) as error:
        LOGGER.warning("warning: no verdict on the sparse network: %s", error)


def judge_network(
    run: Run, penalty: SparsityPenalty, train_loader: Loader, val_loader: Loader, history: History
) -> str:
    """Cut the averaged network as prune.py would, and measure it.

    Raises:
        Stopped: the program was asked to end.
    """
    model = copy.deepcopy(run.ema.model)
    seen = (batch.images for batch in sample_batches(train_loader, VERDICT_TRAIN_IMAGES))
    parts = (part for images in seen for part in images.split(VERDICT_BATCH))
    batches = (part.to(run.device).float() / 255 for part in parts)
    groups = find_channel_groups(model, penalty.shortcut)
    statistics = measure_inputs(model, groups, run.stop.watch(batches))
    run.stop.check()
    pruner = build_pruner(
        model,
        run.imgsz,
        shortcut=penalty.shortcut,
        importance=DEFAULT_IMPORTANCE,
        compensation="linear",
        statistics=statistics,
    )
    sample = sample_batches(val_loader, VERDICT_IMAGES)

    def score(network: Model) -> float:
        fused = copy.deepcopy(network).eval().fuse()
        single_cls = run.options.single_cls
        watched = run.stop.watch(sample)
        result = evaluate(
            fused, watched, run.names, device=run.device, single_cls=single_cls, progress=False
        )
        run.stop.check()
        return result.map50

    verdict = describe_readiness(measure_readiness(pruner, score), history)
    return f"{verdict} (on {sum(len(batch.images) for batch in sample)} validation images)"
