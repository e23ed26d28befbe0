"""Train a YOLOv5 detector: dense, sparse (network slimming) or after pruning.

    python train.py --data data/bccd.yaml --weights yolov5n.pt --epochs 100
    python train.py --data data/bccd.yaml --weights '' --cfg yolov5n.yaml --epochs 300
    python train.py --data data/bccd.yaml --weights runs/train/exp/weights/best.pt \
        --bn_sparsity --sparsity_rate 0.0005 --optimizer AdamW --name sparse
    python train.py --data data/bccd.yaml --weights runs/val/exp/pruned_model.pt \
        --ft_pruned_model --hyp hyp.finetune_prune.yaml --name finetune
    python train.py --data data/bccd.yaml --weights runs/val/exp/pruned_model.pt \
        --ft_pruned_model --teacher runs/train/exp/weights/best.pt --name distilled
    python train.py --resume runs/train/exp/weights/last.pt

Results are in runs/train/exp*: weights/best.pt and last.pt, results.csv, pictures.
"""

from __future__ import annotations

from utils.stopping import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()  # from here on, as an import can lose it

from utils.flags.answer import answer_early
from utils.flags.train import parse_args

if __name__ == "__main__":
    answer_early(parse_args, __doc__)  # help and mistakes, before torch is loaded

import argparse
import logging
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from utils import device as devices
from utils import heap, ranks
from utils.choices import AUTO_BATCH
from utils.claim import release
from utils.command import run_command
from utils.dataset import Loader, image_weights_from_map, round_imgsz
from utils.device_text import gpu_indices
from utils.finite import Reading, check_finite
from utils.launch import launch
from utils.optim import set_step
from utils.resume import Resumed, find_resumed, naming_damage, summarize_data, summarize_teacher
from utils.run_dir import ResultsCsv, check_run_dir
from utils.stopping import Stopped
from utils.training.inputs import (
    check_processes,
    check_share,
    check_smallest_batch,
    find_inputs,
)
from utils.training.loaders import build_loaders, check_images_are_here, scan_splits
from utils.training.networks import (
    best_of_source,
    build_network,
    choose_anchors,
    freeze_rows,
    load_teacher,
)
from utils.training.rehearsal import choose_batch_size
from utils.training.report import (
    closing_board,
    draw_data,
    finish,
    log_epoch,
    open_results,
    show_progress,
)
from utils.training.run import Run, add_teacher, build_run
from utils.training.saving import (
    is_saving_due,
    open_run_dir,
    remember,
    restore_run,
    save_epoch,
    save_position,
    tell_history,
)
from utils.training.search import search_hyperparameters
from utils.training.sparsity import give_verdict, is_verdict_due, let_go
from utils.training.step import clip_gradients, compute_loss, optimizer_step, to_device
from utils.training.trouble import check_weights, explain_not_finite, go_back, saying_how_to_go_on
from utils.training.validation import judge_epoch, validate

ROOT = Path(__file__).resolve().parent
LOGGER = logging.getLogger("train")

PROGRESS_BATCHES = 10  # between two looks at what the device has computed


def main(argv: Sequence[str] | None = None) -> None:
    """Run one training from its options to its final files."""
    options, given = parse_args(argv, __doc__)
    start_logging()
    command = [sys.executable, str(Path(__file__)), *(sys.argv[1:] if argv is None else argv)]
    if options.evolve and devices.world_size() == 1:
        return search_hyperparameters(options, given, command)
    with ranks.connected():
        resumed = ranks.from_first(lambda: find_resumed(options, given, ROOT))
        options = resumed.options if resumed else options
        if not resumed:  # now, as it is made when all is ready
            ranks.from_first(lambda: check_run_dir(options.project, options.name, options.exist_ok))
        device = devices.select_device(options.device)
        if len(gpu_indices(options.device)) > devices.world_size() == 1:
            return launch_processes(options, resumed, command)
        return run_training(options, resumed, device)


def run_training(
    options: argparse.Namespace, resumed: Resumed | None, device: torch.device
) -> None:
    """One training, of this process or of all that are connected."""
    check_processes(options, device)
    precision = ranks.common_precision(devices.select_precision(options.amp, device))
    devices.seed_everything(options.seed + devices.rank())
    devices.forbid_chance(device, options.deterministic)
    if device.type == "cpu":
        heap.keep_large_blocks()
    inputs = ranks.from_first(lambda: find_inputs(options, resumed))
    model = build_network(inputs, options)
    teacher, best_of_teacher = load_teacher(inputs, options, model)
    frozen_norms = freeze_rows(model, options)
    imgsz = round_imgsz(options.imgsz, model.max_stride)
    check_smallest_batch(options, imgsz, model.max_stride)
    train_split, val_split = ranks.from_first(lambda: scan_splits(inputs.data, options))
    check_images_are_here(train_split, val_split)
    if not resumed:
        choose_anchors(model, inputs, train_split, imgsz, options)
    if options.batch_size == AUTO_BATCH:
        options.batch_size = choose_batch_size(
            options, inputs, model, teacher, imgsz, device, precision
        )
    check_smallest_batch(options, imgsz, model.max_stride, len(train_split))
    train_loader, val_loader = build_loaders(
        options, inputs.hyp, train_split, val_split, imgsz, model.max_stride
    )
    run = build_run(options, inputs, model, imgsz, device, precision, len(train_loader))
    run.frozen_norms = frozen_norms
    run.data = {"training": summarize_data(train_split), "validation": summarize_data(val_split)}
    run.data |= ranks.from_first(lambda: summarize_teacher(inputs.teacher))
    add_teacher(run, teacher)
    run.best = max(best_of_source(inputs, options), best_of_teacher)
    if resumed:
        run.dir = resumed.run_dir
        with naming_damage(resumed.path):
            restore_run(run, resumed.content["training"])
    else:
        run.dir = ranks.from_first(lambda: open_run_dir(run))
    with closing_board(run):
        results = open_results(run, train_split, val_split)
        started = time.perf_counter()
        with run.stop, saying_how_to_go_on(run), heap.settled():
            train_epochs(run, train_loader, val_loader, results)
            if results is not None:
                finish(run, time.perf_counter() - started)


def start_logging() -> None:
    """The first process speaks; the others only when something breaks."""
    level = logging.INFO if devices.rank() == 0 else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)


def launch_processes(
    options: argparse.Namespace, resumed: Resumed | None, command: Sequence[str]
) -> None:
    """Start one process for each GPU of `--device 0,1` and wait for them."""
    count = len(gpu_indices(options.device))
    check_share(options, count)
    find_inputs(options, resumed)  # complain, or download, before the others start
    if resumed:
        release(resumed.run_dir)
    code = launch(command, count)
    if code:
        raise SystemExit(code)


def train_epochs(
    run: Run, train_loader: Loader, val_loader: Loader, results: ResultsCsv | None
) -> None:
    """From where the run stands to its last epoch; a request to stop saves and ends the program."""
    options = run.options
    epoch, is_last = run.first_epoch, run.first_epoch == options.epochs
    while not is_last:
        heap.trim()
        if options.image_weights:
            split = train_loader.batch_sampler.dataset.split
            train_loader.set_image_weights(image_weights_from_map(split, run.class_maps))
        try:
            losses = train_one_epoch(run, train_loader, epoch)
            result = validate(run, val_loader, epoch)
        except Stopped:
            save_position(run, epoch)
            ranks.wait_for_all()
            raise SystemExit(say_goodbye(run, epoch, len(train_loader))) from None
        except OSError:  # of a loader, as a rule: its drive has gone, or a worker was killed
            if devices.world_size() == 1:
                with suppress(OSError, FloatingPointError):
                    check_weights(run, epoch)
                    save_position(run, epoch)
                    if run.stop.signal is not None:  # sent to a worker as well, at its first words
                        raise SystemExit(say_goodbye(run, epoch, len(train_loader))) from None
            raise
        except FloatingPointError as error:
            go_back(run, explain_not_finite(run, train_loader, error, epoch))
            epoch = run.first_epoch
            continue
        run.batches = 0
        is_best, is_last = judge_epoch(run, epoch, result)
        if run.penalty is not None and not is_last:
            let_go(run, run.penalty, epoch)
        if results is not None:
            log_epoch(run, results, epoch, losses, result)
            save_epoch(run, epoch, result, is_best, is_last)
            if run.penalty is not None and is_verdict_due(options, epoch, is_last):
                history = tell_history(run, result)
                give_verdict(run, run.penalty, train_loader, val_loader, epoch, history)
        epoch += 1


def say_goodbye(run: Run, epoch: int, num_batches: int) -> int:
    """After a request to stop; returns the exit status that shells know for the signal."""
    cause = run.stop.signal or signal.SIGTERM  # without one here, another process was told
    LOGGER.info(
        "stopped by %s, saved after batch %d of %d of epoch %d; %s goes on from there",
        cause.name, run.batches, num_batches, epoch, run.command_to_resume(),
    )  # fmt: skip
    return 128 + cause


def train_one_epoch(run: Run, loader: Loader, epoch: int) -> list[float]:
    """One pass over the training images; returns the mean of each of `run.loss_names`.

    It goes on after the first `run.batches`, and may end with `Stopped` after any of them.
    """
    begin_epoch(run, loader, epoch)
    pending, is_stopping, is_due = 0, False, False
    unread: list[Reading] = []
    title, is_quiet = f"epoch {epoch}/{run.options.epochs - 1}", devices.rank() != 0
    bar = tqdm(loader, desc=title, initial=run.batches, disable=is_quiet)
    for index, batch in enumerate(bar, run.batches):
        step = epoch * len(loader) + index
        settings = run.schedule.at(step, epoch)
        set_step(run.optimizer, settings)
        is_last = index == len(loader) - 1
        looks = is_look_due(run.device, index) or is_last
        # The last batch always steps, so that no gradient waits across a checkpoint.
        steps = is_last or pending + 1 >= run.schedule.accumulation(step, run.options.batch_size)
        if not pending and not steps:
            run.before = remember(run)
        images = to_device(run, batch, epoch, index)
        loss, parts = compute_loss(run, images, batch.targets, is_extra=batch.is_extra)
        unread.append(Reading("the loss", loss.detach(), index))
        if looks:
            check_finite(unread, epoch)
        if looks or devices.world_size() == 1:
            is_asked = run.stop.signal is not None or ranks.is_orphan()
            is_stopping = ranks.is_true_anywhere(is_asked, run.device)
        # Processes average their gradients; the loss is their sum.
        run.scaler.scale(loss * devices.world_size()).backward()
        run.loss_sums += parts
        pending += 1
        if steps:
            norm = clip_gradients(run)
            if not run.scaler.is_enabled():  # a scaler leaves steps out that are not finite
                unread.append(Reading("a gradient", norm, index))
            if looks:
                check_finite(unread, epoch)
            optimizer_step(run, epoch, norm)
            pending, run.batches, run.before = 0, index + 1, None
        if index % PROGRESS_BATCHES == 0 or is_last:
            means = run.loss_sums * devices.world_size() / (index + 1)
            show_progress(bar, run, means, settings.lr)
        draw_data(run, loader, batch, epoch, index)
        is_due = is_due or (looks and is_saving_due(run, before_validation=is_last))
        if is_stopping or (is_due and not pending):
            check_finite(unread, epoch)
            check_weights(run, epoch)
            if is_stopping:
                raise Stopped
            save_position(run, epoch)
            is_due = False
    check_weights(run, epoch)
    return (ranks.add_up(run.loss_sums) / max(len(loader), 1)).tolist()


def begin_epoch(run: Run, loader: Loader, epoch: int) -> None:
    """Set network, loader and sums to the start of the epoch, or to where it was interrupted."""
    run.before = None
    run.network.train()
    for norm in run.frozen_norms:
        norm.eval()
    if run.batches > len(loader):  # there are fewer images than before
        run.loss_sums = run.loss_sums * (len(loader) / run.batches)
        run.batches = len(loader)
    loader.set_epoch(epoch, run.batches)
    if not run.batches:
        run.loss_sums = torch.zeros(len(run.loss_names), device=run.device)
    else:  # for the log, if no batch is left
        last_step = epoch * len(loader) + run.batches - 1
        set_step(run.optimizer, run.schedule.at(last_step, epoch))


def is_look_due(device: torch.device, index: int) -> bool:
    """A GPU works on while nothing is read from it; what it did is looked at now and then."""
    return device.type == "cpu" or index % PROGRESS_BATCHES == 0


if __name__ == "__main__":
    run_command(
        main,
        "if the run has saved anything, train.py --resume <run folder> goes on from there",
    )
