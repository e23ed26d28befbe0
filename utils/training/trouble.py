"""When a training goes wrong: what is said, and how it goes on."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils import device as devices
from utils import ranks
from utils.checkpoint import load_checkpoint
from utils.command import describe_os_error, is_gpu_out_of_memory
from utils.dataset import Batch, Loader
from utils.finite import (
    NotFinite,
    are_of_one_colour,
    first_layer_not_finite,
    first_not_finite,
    save_for_a_look,
)
from utils.training.rehearsal import advise_batch_size
from utils.training.run import Run
from utils.training.saving import restore_run
from utils.training.step import compute_loss, to_device

LOGGER = logging.getLogger(__name__)

NAMED_FILES = 4  # of a batch, in a message
# Mean loss without its gains. A cross entropy of so much is of logits as large, which are 5 to 20.
FAR_TOO_LARGE = 1000.0
RECOVERY_FACTOR, LEAST_RECOVERY = 0.5, 0.5**5  # of the learning rate with --on-nan recover


@contextmanager
def saying_how_to_go_on(run: Run) -> Iterator[None]:
    """A full disk or a share that has gone ends the run, but costs little of it; so does memory."""
    try:
        yield
    except RuntimeError as error:
        if is_gpu_out_of_memory(error):
            raise MemoryError(advise_batch_size(run, error)) from None
        if not ranks.is_lost_connection(error):
            raise
        reason = ranks.describe_lost_connection(error)
        raise ConnectionError(
            f"{reason}; {run.command_to_resume()} goes on from what was saved last"
        ) from None
    except OSError as error:
        reason, last = describe_os_error(error), run.dir / "weights/last.pt"
        if devices.rank() != 0 or not last.is_file():
            raise
        raise OSError(
            f"{reason}; then {run.command_to_resume()} goes on from what was saved last"
        ) from error


def check_weights(run: Run, epoch: int) -> None:
    """Statistics of batch norms, and squares in the optimizer, can be spoilt by a finite loss.

    Of several processes all stop if one finds such a value.
    """
    kept = {
        f"{what} of {name}": value
        for name, parameter in run.model.named_parameters()
        for what, value in run.optimizer.state.get(parameter, {}).items()
    }
    states = (run.model.state_dict(), run.ema.model.state_dict(), kept)
    own = next(filter(None, map(first_not_finite, states)), None)
    name = next(filter(None, ranks.share(own)), None)
    if name is not None:
        number = max(run.batches - 1, 0)
        raise NotFinite(
            f"after epoch {epoch} the values of {name} are not all finite, its last batch was "
            f"{number}",
            number,
        )
    check_loss(run, epoch)


def check_loss(run: Run, epoch: int) -> None:
    """Stop where the mean loss of the epoch so far is beyond all measure: weights follow it.

    It is that of the batches the network has learnt from, not of those that wait for their step.

    Raises:
        FloatingPointError: it is; what was saved last is better than this.
    """
    sums = run.loss_sums if run.before is None else run.before.loss_sums
    mean = ranks.add_up(sums).sum().item() / max(run.batches, 1)
    gains = run.loss.settings
    obj, cls = gains.obj * max(gains.obj_pw, 1), gains.cls * max(gains.cls_pw, 1)
    scale = gains.box + obj + cls
    if run.distillation is not None:
        scale += sum(dataclasses.astuple(run.distillation.gains))
    if mean > FAR_TOO_LARGE * scale:
        raise FloatingPointError(f"the mean loss of epoch {epoch} is {mean:.2g}: it has run away")


def explain_not_finite(run: Run, loader: Loader, error: FloatingPointError, epoch: int) -> str:
    """What is not finite and where it began; all processes look for it, and say the same."""
    reasons = [str(error)]
    if isinstance(error, NotFinite):
        number = error.number
        files, *rest = ranks.from_first(lambda: keep_for_a_look(run, loader, epoch, number))
        origins = ranks.share(find_origin(run, loader.read_again(number), epoch, number))
        origin = next(filter(None, origins), None)
        reasons = [f"{error} ({files})", *rest, *([origin] if origin else [])]
    if run.penalty is not None:
        reasons.append(run.penalty.describe_largest_gamma(epoch))
    return "; ".join(reasons)


def keep_for_a_look(run: Run, loader: Loader, epoch: int, number: int) -> list[str]:
    """Save the batch of all processes; says which files it has, where it is, and what is odd.

    That it cannot be saved is a warning: the run may go on all the same.
    """
    batch = loader.read_again(number, of_all=True)
    names = [Path(path).name for path in batch.paths]
    files = ", ".join(names[:NAMED_FILES] + ["..."] * (len(names) > NAMED_FILES))
    said = [files]
    try:
        picture = save_for_a_look(run.dir, batch, epoch, number, run.names)
        said.append(f"the batch is in {picture} and .txt")
    except OSError as error:  # a full disk, for example
        reason = describe_os_error(error)
        LOGGER.warning("warning: the batch cannot be saved for a look: %s", reason)
    if are_of_one_colour(batch.images):
        said.append(
            "each of its images is of one colour, of which a fresh network can learn nothing: "
            "take such images out, raise --batch-size, or start from --weights"
        )
    return said


def find_origin(run: Run, batch: Batch, epoch: int, number: int) -> str | None:
    """Where the first number is that is not finite, with the part of the batch of this process."""
    images = to_device(run, batch, epoch, number)
    layer = first_layer_not_finite(run.model, lambda: compute_loss(run, images, batch.targets))
    if layer is not None:
        return f"the first layer with such an output is {layer}"
    grads = {n: p.grad for n, p in run.model.named_parameters() if p.grad is not None}
    gradient = first_not_finite(grads)
    return None if gradient is None else f"the first such gradient is that of {gradient}"


def go_back(run: Run, trouble: str) -> None:
    """Return to what was saved last, with a lower learning rate, or end where that is not wanted.

    Of several processes all do the same: all of them have stopped at the same batch.

    Raises:
        FloatingPointError: `--on-nan stop`, or the rate has been lowered as often as makes sense.
    """
    last = run.dir / "weights/last.pt"
    factor = run.schedule.factor * RECOVERY_FACTOR
    if run.options.on_nan == "stop":
        again = (
            f"{run.command_to_resume('--on-nan', 'recover')} goes on from what was saved last, and "
            "halves the learning rate when this comes again; or "
        )
        remedy = "lower lr0 in the hyperparameters or --sparsity_rate, or try --amp off"
        is_saved = ranks.from_first(last.is_file)
        raise FloatingPointError(f"{trouble}; {again if is_saved else ''}{remedy}")
    if factor < LEAST_RECOVERY:
        raise FloatingPointError(
            f"{trouble}; with a learning rate {1 / run.schedule.factor:.0f} times lower this still "
            "happens, so something else is wrong: look at the batch, or try --amp off"
        )
    restore_run(run, ranks.from_first(lambda: load_checkpoint(last)["training"]))
    run.optimizer.zero_grad(set_to_none=True)
    run.schedule = dataclasses.replace(run.schedule, factor=factor)
    LOGGER.warning(
        "warning: %s; back to epoch %d, batch %d, with the learning rate times %g",
        trouble, run.first_epoch, run.batches, factor,
    )  # fmt: skip
