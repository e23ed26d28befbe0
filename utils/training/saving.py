"""What a training keeps: its folder, its checkpoints, and how it goes on from them."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from utils import device as devices
from utils import ranks
from utils.atomic import staging_folder
from utils.checkpoint import build_checkpoint, save_checkpoint, save_final
from utils.claim import claim, release
from utils.evaluate import EvaluationResult
from utils.optim import restore_optimizer
from utils.pruning.slimming import GammaStatistics, gamma_statistics
from utils.pruning.verdict import Best, History
from utils.resume import check_alike, warn_of_other_data
from utils.run_dir import REPLACED, forget_replaced, new_run_dir, replace_run, save_options
from utils.training.run import BeforeStep, Run, build_loss

LOGGER = logging.getLogger(__name__)

SAVE_SECONDS = 600  # between two checkpoints at most, though an epoch takes longer
LONG_VALIDATION = 60  # seconds; before one of these there is a checkpoint too


def open_run_dir(run: Run) -> Path:
    """A new folder for results, with the options and hyperparameters of this run in it.

    And with last.pt, as also what is killed in its first epoch can be resumed. Of another run that
    was in the folder (`--exist-ok`) nothing stays among these files.
    """
    options = run.options

    def fill(folder: Path) -> None:
        claim(folder, ranks.job())
        with staging_folder(folder) as new:  # on a full disk the old run stays as it was
            (new / "weights").mkdir()
            save_options(new / "opt.yaml", vars(options))
            save_options(new / "hyp.yaml", run.hyp.to_dict())
            if not options.nosave:
                save_resumable(run, new / "weights/last.pt", -1)
            replace_run(folder, new)
        release(folder)  # Windows renames no folder in which a file is open

    run_dir = new_run_dir(options.project, options.name, options.exist_ok, fill)
    claim(run_dir, ranks.job())
    if (run_dir / REPLACED).is_dir():
        LOGGER.info(
            "the run that was in %s is in %s until this one has trained and saved something",
            run_dir, run_dir / REPLACED,
        )  # fmt: skip
    return run_dir


def restore_run(run: Run, state: dict[str, Any]) -> None:
    """Continue from the training part of a checkpoint."""
    fresh = training_state(run, -1, is_last=False)
    check_alike(
        {k: v for k, v in state.items() if k != "optimizer"},
        {k: v for k, v in fresh.items() if k != "data"},
        "training",
    )
    run.model.load_state_dict(state["model"])
    run.loss = build_loss(run.model, run.loss.settings)
    run.ema.load_state_dict(state["ema"])
    restore_optimizer(run.optimizer, state["optimizer"])
    if state["scaler"]:  # empty where the run did without, in another precision
        run.scaler.load_state_dict(state["scaler"])
    # A run that stopped early and was killed before its last touches has nothing left to train.
    run.first_epoch = run.options.epochs if state["is_last"] else state["epoch"] + 1
    # Versions before saved between epochs alone. With another batch size it is as many images.
    ratio = state.get("batch_size", run.options.batch_size) / run.options.batch_size
    batches = state.get("batches", 0)
    run.batches = round(batches * ratio)
    sums = state.get("loss_sums", ())
    if len(sums) != len(run.loss_names) and (sums or run.batches):
        raise ValueError(f"{len(sums)} sums of {len(run.loss_names)} losses")
    # What is saved is the sum over all processes; means over the batches stay as they were.
    share = run.batches / max(batches, 1) / devices.world_size()
    run.loss_sums = torch.tensor(sums, device=run.device) * share
    run.best_fitness, run.best_epoch = state["best_fitness"], state["best_epoch"]
    run.best = Best(*state.get("best_map50", run.best))
    run.class_maps = state["class_maps"].numpy()
    run.validation_seconds = state.get("validation_seconds", 0.0)  # versions before kept none
    run.overflows_float16 |= state.get("overflows_float16", False)
    run.schedule = dataclasses.replace(run.schedule, factor=state.get("lr_factor", 1.0))
    warn_of_other_data(state.get("data", {}), run.data)
    for name in ("processes", "precision"):  # versions before kept neither
        if state.get(name, fresh[name]) != fresh[name]:
            LOGGER.info("%s: %s now, %s when the run was saved", name, fresh[name], state[name])
    if run.penalty is not None and "penalty" in state:  # versions before had none
        run.penalty.load_state_dict(state["penalty"])
    restore_gammas(run, state)
    torch.set_rng_state(state["torch_rng"])


def restore_gammas(run: Run, state: dict[str, Any]) -> None:
    """The rows by epoch; versions before kept those of all epochs, without a number."""
    for index, row in enumerate(state["gammas"]):
        epoch = row.get("epoch", index)
        if type(epoch) is not int or not 0 <= epoch <= state["epoch"]:
            raise ValueError(f"gammas of epoch {epoch!r}")
        run.gammas[epoch] = GammaStatistics(**{k: v for k, v in row.items() if k != "epoch"})
    if run.penalty is not None:
        wanted = gamma_statistics(run.ema.model, run.penalty.shortcut)
        for statistics in run.gammas.values():
            check_alike(dataclasses.asdict(statistics), dataclasses.asdict(wanted), "gammas")
            if statistics.layers.keys() != wanted.layers.keys():
                raise ValueError("gammas are those of another network")


def training_state(run: Run, epoch: int, is_last: bool) -> dict[str, Any]:
    """All that `restore_run` needs, as plain data; `epoch` is the last one that was finished."""
    return {
        "model": run.model.state_dict(),
        "ema": run.ema.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "penalty": None if run.penalty is None else run.penalty.state_dict(),
        "epoch": epoch,
        "is_last": is_last,
        "batches": run.batches,
        "loss_sums": run.loss_sums.tolist(),
        "batch_size": run.options.batch_size,
        "lr_factor": run.schedule.factor,
        "processes": devices.world_size(),
        "precision": str(run.precision).removeprefix("torch."),
        "data": run.data,
        "best_fitness": run.best_fitness,
        "best_epoch": run.best_epoch,
        "best_map50": tuple(run.best),
        "class_maps": torch.tensor(run.class_maps),
        "validation_seconds": run.validation_seconds,
        "overflows_float16": run.overflows_float16,
        "gammas": [{"epoch": number, **vars(row)} for number, row in run.gammas.items()],
        "torch_rng": torch.get_rng_state(),
    }


def is_saving_due(run: Run, *, before_validation: bool) -> bool:
    """Whether a kill would cost much by now, or is more likely in what comes next.

    That is a validation, which is expected to take as long as the one before. The answer is the
    same in all processes.
    """
    if run.options.nosave:
        return False
    is_late = time.monotonic() > run.saved_at + SAVE_SECONDS
    is_next_long = before_validation and run.validation_seconds > LONG_VALIDATION
    return ranks.is_true_anywhere((is_late or is_next_long) and devices.rank() == 0, run.device)


def save_epoch(
    run: Run, epoch: int, result: EvaluationResult | None, is_best: bool, is_last: bool
) -> None:
    """Write best.pt when it is, the kept epochs, and last, as it vouches for them, last.pt."""
    options = run.options
    if options.nosave and not is_last:
        return
    content = checkpoint_content(run, epoch, result)
    weights = run.ema.model.state_dict()
    folder = run.dir / "weights"
    if is_best:
        save_final(folder / "best.pt", content, weights)
    if options.save_period > 0 and (epoch + 1) % options.save_period == 0:
        save_final(folder / f"epoch{epoch}.pt", content, weights)
    save_checkpoint(
        folder / "last.pt", {**content, "training": training_state(run, epoch, is_last)}
    )
    forget_replaced(run.dir)
    run.saved_at = time.monotonic()


def save_position(run: Run, epoch: int) -> None:
    """Write last.pt in the middle of an epoch, as it was after the last optimizer step."""
    forget_pending(run)
    run.saved_at = time.monotonic()
    loss_sums = ranks.add_up(run.loss_sums)
    if devices.rank() == 0:
        save_resumable(run, run.dir / "weights/last.pt", epoch - 1, loss_sums.tolist())
        if epoch or run.batches:
            forget_replaced(run.dir)


def save_resumable(run: Run, path: Path, epoch: int, loss_sums: Sequence[float] = ()) -> None:
    """Write what a run goes on from, not validated; `epoch` is the last one that was finished."""
    content = checkpoint_content(run, epoch, None)
    state = training_state(run, epoch, is_last=False) | {"loss_sums": list(loss_sums)}
    save_checkpoint(path, {**content, "training": state})


def remember(run: Run) -> BeforeStep:
    """What `forget_pending` goes back to; nothing waits for the device."""
    buffers = list(run.model.buffers())
    copies = [torch.empty_like(buffer) for buffer in buffers]
    torch._foreach_copy_(copies, buffers)
    return BeforeStep(copies, run.loss_sums.clone())


def forget_pending(run: Run) -> None:
    """Leave the batches out that no optimizer step has followed yet: a resumed run repeats them."""
    if run.before is not None:
        torch._foreach_copy_(list(run.model.buffers()), run.before.buffers)
        run.loss_sums = run.before.loss_sums
        run.optimizer.zero_grad(set_to_none=True)
        run.before = None


def checkpoint_content(run: Run, epoch: int, result: EvaluationResult | None) -> dict[str, Any]:
    """The averaged network and where it comes from."""
    options = {k: str(v) if isinstance(v, Path) else v for k, v in vars(run.options).items()}
    return build_checkpoint(
        run.ema.model,
        run.names,
        epoch=epoch,
        fitness=None if result is None else result.fitness,
        history=tell_history(run, result).as_content(),
        options=options,
        hyp=run.hyp.to_dict(),
        imgsz=run.imgsz,
    )


def tell_history(run: Run, result: EvaluationResult | None) -> History:
    """What the verdict on the network must know of its training."""
    return History(
        vars(run.options),
        None if result is None else result.map50,
        run.best,
        run.penalty is not None and run.penalty.is_released,
    )
