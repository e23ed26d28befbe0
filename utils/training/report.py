"""What a training says and shows: log, results.csv, pictures, TensorBoard."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from utils import device as devices
from utils.checkpoint import load_checkpoint, save_final
from utils.dataset import Batch, Loader, Split
from utils.evaluate import EvaluationResult
from utils.plots.figures import draw
from utils.plots.images import plot_batch
from utils.plots.training import plot_gamma_history, plot_labels, plot_results
from utils.profile import count_gflops, count_parameters
from utils.pruning.slimming import gamma_statistics, prunable_batchnorms
from utils.run_dir import ResultsCsv
from utils.tensorboard import Board
from utils.training.run import LOSS_NAMES, Run
from utils.training.sparsity import log_forecast

LOGGER = logging.getLogger(__name__)

GAMMA_PICTURE_EPOCHS = 10  # drawing takes a second
MOST_GAMMA_ROWS = 200

T = TypeVar("T")


@contextmanager
def closing_board(run: Run) -> Iterator[None]:
    """However the block ends, TensorBoard gets what it was given; a full disk hides no error."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            close_board(run)
        raise
    close_board(run)


def close_board(run: Run) -> None:
    """Write what is left for TensorBoard, if there is one."""
    if run.board is not None:
        run.board.close()
        run.board = None


def open_results(run: Run, train_split: Split, val_split: Split) -> ResultsCsv | None:
    """`results.csv`, new or continued, after saying what is about to happen."""
    if devices.rank() != 0:
        return None
    if run.options.tensorboard:
        run.board = Board(run.dir, run.first_epoch)
        run.board.add_graph(copy.deepcopy(run.ema.model).float(), run.imgsz)
    log_start(run, train_split, val_split)
    resume_epoch = run.first_epoch or None
    return ResultsCsv(run.dir / "results.csv", resume_epoch=resume_epoch)


def log_start(run: Run, train_split: Split, val_split: Split) -> None:
    """Say what is about to happen."""
    LOGGER.info(
        "%s, %s; %s parameters, %.2f GFLOPs at %d px",
        devices.describe_device(run.device),
        str(run.precision).removeprefix("torch."),
        f"{count_parameters(run.model):,}",
        count_gflops(run.ema.model, run.imgsz),
        run.imgsz,
    )
    if run.penalty is not None:
        weights = torch.cat(run.penalty.weights)
        pulled = weights[weights > 0]  # not those that were let go
        LOGGER.info(
            "sparse training (%s, shortcuts: %s): rate %s, by cost %.2g to %.2g times that, on "
            "%d gammas in %d layers",
            run.penalty.mode,
            run.penalty.shortcut,
            run.options.sparsity_rate,
            pulled.min().item(),
            pulled.max().item(),
            run.penalty.num_channels,
            len(run.penalty.batchnorms),
        )
        log_forecast(run, run.penalty, run.first_epoch)
    LOGGER.info(
        "%d training and %d validation images; epochs %d to %d; results in %s",
        len(train_split.paths),
        len(val_split.paths),
        run.first_epoch,
        run.options.epochs - 1,
        run.dir,
    )


def show_progress(bar: tqdm, run: Run, means: Tensor, lr: float) -> None:
    """Losses, learning rate and memory beside the bar; tqdm adds the time left."""
    losses = zip(run.loss_names, means.tolist(), strict=True)
    text = " ".join(f"{name} {value:.4f}" for name, value in losses)
    bar.set_postfix_str(f"{text} lr {lr:.2g} mem {devices.memory_text(run.device)}")


def draw_data(run: Run, loader: Loader, batch: Batch, epoch: int, index: int) -> None:
    """All labels and the first batches; after the first of them, as drawing takes a second."""
    if epoch > 0 or index > 2 or devices.rank() != 0:
        return
    if index == 0:
        labels = loader.batch_sampler.dataset.split.labels.flat
        draw(plot_labels, labels, run.names, run.dir / "labels.jpg")
    picture = run.dir / f"train_batch{index}.jpg"
    draw(plot_batch, batch.images, batch.targets, batch.paths, run.names, picture)


def log_epoch(
    run: Run,
    results: ResultsCsv,
    epoch: int,
    losses: Sequence[float],
    result: EvaluationResult | None,
) -> None:
    """One row of `results.csv`, one line of log, and the pictures of the curves."""
    row = {f"train/{name}_loss": loss for name, loss in zip(run.loss_names, losses, strict=True)}
    line = f"epoch {epoch}: loss {sum(losses):.4f}"
    if result is not None:
        row["metrics/precision"], row["metrics/recall"] = result.precision, result.recall
        row["metrics/mAP_0.5"], row["metrics/mAP_0.5:0.95"] = result.map50, result.map50_95
        assert result.losses is not None  # `validate` asks for them
        for name, value in zip(LOSS_NAMES, result.losses, strict=True):
            row[f"val/{name}_loss"] = value
        line += f", mAP@.5 {result.map50:.4f}, mAP@.5:.95 {result.map50_95:.4f}"
    for group in run.optimizer.param_groups:
        row[f"lr/{group['kind']}"] = group["lr"]
    if run.penalty is not None:
        statistics = gamma_statistics(run.ema.model, run.penalty.shortcut)
        run.gammas = thin_out(run.gammas | {epoch: statistics})
        row["sparsity_rate"] = run.penalty.rate(epoch)
        row.update(statistics.as_row())
        row["gamma/let_go"] = run.penalty.share_let_go
        line += (
            f", |gamma| median {row['gamma/q50']:.4f}, below 0.01 {row['gamma/below_1e-2']:.1%}, "
            f"suggested percent {row['gamma/suggested_percent']:.3f}"
        )
        if epoch % GAMMA_PICTURE_EPOCHS == 0:
            plot_gammas(run)
    results.append(epoch, row)
    if run.board is not None:
        show_on_board(run, run.board, epoch, row)
    LOGGER.info(line)
    if run.penalty is not None and epoch == run.first_epoch:
        log_forecast(run, run.penalty, epoch + 1)


def thin_out(history: dict[int, T]) -> dict[int, T]:
    """The last epoch, and before it all or at most `MOST_GAMMA_ROWS` evenly spaced ones.

    A row takes 50 KiB, in every checkpoint too: without a limit training grows with each epoch.
    """
    last = max(history)
    step = 1
    while last >= step * MOST_GAMMA_ROWS:
        step *= 2
    return {epoch: row for epoch, row in history.items() if epoch % step == 0 or epoch == last}


def show_on_board(run: Run, board: Board, epoch: int, row: Mapping[str, float]) -> None:
    """The row of an epoch, the gammas, and after the first epoch what the network sees."""
    board.add_figures(row, epoch)
    if run.penalty is not None:
        batchnorms = prunable_batchnorms(run.ema.model, run.penalty.shortcut)
        board.add_gammas({path: bn.weight for path, bn in batchnorms.items()}, epoch)
    if epoch == run.first_epoch:
        board.add_pictures(sorted(run.dir.glob("*.jpg")), epoch)


def plot_gammas(run: Run) -> None:
    """`bn_gamma.png`: the distribution of |gamma| over the epochs, overall and per layer."""
    rows = list(run.gammas.values())
    draw(
        plot_gamma_history,
        list(run.gammas),
        [row.percentiles for row in rows],
        {name: [row.layers[name] for row in rows] for name in rows[0].layers},
        run.dir / "bn_gamma.png",
    )


def finish(run: Run, seconds: float) -> None:
    """Strip last.pt, draw the curves, and say where things are."""
    last, best = run.dir / "weights/last.pt", run.dir / "weights/best.pt"
    content = load_checkpoint(last)
    save_final(last, content, content["model"])
    draw(plot_results, run.dir / "results.csv", run.dir / "results.png")
    if run.gammas:
        plot_gammas(run)
    if run.board is not None:
        run.board.add_pictures(sorted(run.dir.glob("*.png")), run.options.epochs)
    LOGGER.info("%.1f minutes; results in %s", seconds / 60, run.dir)
    for path in (best, last):
        if path.is_file():
            LOGGER.info("%s, %.1f MB", path, path.stat().st_size / 1e6)
