"""Remove the weakest channels of a sparse-trained YOLOv5 detector (network slimming).

    python prune.py --weights sparse.pt --data data/bccd.yaml --img 320 --percent 0.5
    python prune.py --weights sparse.pt --data data/bccd.yaml --img 320 --sweep
    python prune.py --weights sparse.pt --data data/bccd.yaml --img 320 --max-drop 0.01
    python prune.py --weights sparse.pt --target-gflops 40% --dry-run

All prunable channels are ranked, the weakest go, and what they contributed on average is folded
into the layers that read them. With --data training images are looked at for that, and mAP is
measured before and after. The classic rule: --shortcut keep --importance gamma --compensate none.

Results are in runs/val/exp*: pruned_model.pt (fine-tune it: train.py --ft_pruned_model
--weights ...), pruned_model.yaml (train the slim network from scratch: train.py --cfg ...),
report.html, report.json, pictures; of a sweep sweep.csv and sweep.png.
"""

from __future__ import annotations

from utils.stopping import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()  # from here on, as an import can lose it

from utils.flags.answer import answer_early
from utils.flags.prune import AMOUNTS, DEFAULT_RECALIBRATION, parse_args

if __name__ == "__main__":
    answer_early(parse_args, __doc__)  # help and mistakes, before torch is loaded

import argparse
import contextlib
import dataclasses
import functools
import json
import logging
import math
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import nn

from models import Model, ModelSpec
from models.blocks import Bottleneck
from utils.checkpoint import Detector, build_checkpoint, load_detector, save_final
from utils.command import run_command
from utils.config import Hyperparameters, load_yaml
from utils.dataset import round_imgsz
from utils.device import count_loader_processes, describe_device, select_device
from utils.downloads import find_weights, open_dataset
from utils.evaluate import EvaluationResult, check_class_names
from utils.flags.checks import flag_of
from utils.image_files import read_image
from utils.lookup import find_config
from utils.plots.figures import draw
from utils.plots.images import plot_detections_pair
from utils.plots.pruning import plot_importance_threshold, plot_layer_widths, plot_sweep
from utils.profile import Latency, compare_latency, count_gflops, count_parameters
from utils.pruning.channel_groups import find_channel_groups
from utils.pruning.keep_masks import KeepMasks, suggested_percent
from utils.pruning.report import (
    ClassRow,
    Figures,
    LayerRow,
    Pictures,
    Report,
    SpeedRow,
    SweepReport,
    comparison_rows,
    describe_speed,
    format_layers,
    write_report,
    write_sweep_report,
)
from utils.pruning.rewrite import CUT_TOLERANCE, check_cut, mask_model, prune_model
from utils.pruning.search import (
    Pruner,
    build_pruner,
    count_removed,
    describe_removal,
    ratio_for_cost,
    ratio_for_drop,
    ratio_for_latency,
    removed_share,
    why_nothing_goes,
)
from utils.pruning.slimming import gamma_importance
from utils.pruning.sweep import MAX_DROP, SweepRow, find_knee, format_sweep, is_borne, sweep_csv
from utils.pruning.targets import Target
from utils.pruning.trials import Measured, Trials, TrialSettings
from utils.pruning.verdict import (
    History,
    Readiness,
    describe_readiness,
    doubt_from_gamma,
    measure_readiness,
    read_history,
)
from utils.run_dir import open_run_dir, save_options, write_text_atomic

ROOT = Path(__file__).resolve().parent
LOGGER = logging.getLogger("prune")

SWEEP_PERCENTS = tuple(step / 20 for step in range(2, 19))  # 10 % to 90 %
LATENCY_SECONDS = 1.0  # per network


def main(argv: Sequence[str] | None = None) -> None:
    """Prune one network, from its options to its files."""
    options = parse_args(argv, __doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    device = select_device(options.device)
    with collect_warnings() as warnings:
        if options.dry_run:
            prune(options, device, None, warnings)
            LOGGER.info("dry run: nothing was written")
            return
        with open_run_dir(options.project, options.name, options.exist_ok) as run_dir:
            prune(options, device, run_dir, warnings)


@contextlib.contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """A list that every warning logged meanwhile is added to, for the report."""
    messages: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if text.startswith("warning: "):  # not what is said elsewhere in the report
                messages.append(text.removeprefix("warning: "))

    collector = Collector(logging.WARNING)
    logging.getLogger().addHandler(collector)
    try:
        yield messages
    finally:
        logging.getLogger().removeHandler(collector)


def prune(
    options: argparse.Namespace, device: torch.device, run_dir: Path | None, warnings: list[str]
) -> None:
    """Choose how much, cut, compare; save into the run folder if there is one."""
    detector = load_detector(find_weights(options.weights, ROOT))
    if options.cfg:
        check_is_network(detector.model, load_cfg(options.cfg), options)
    imgsz = round_imgsz(options.imgsz, detector.model.max_stride)
    shortcut = choose_shortcut(options, detector)
    trials = open_trials(options, detector, imgsz, device) if options.data else None
    pruner = rank_channels(options, detector, imgsz, shortcut, trials)
    clock = functools.partial(compare_latency, imgsz=imgsz, device=device, seconds=LATENCY_SECONDS)

    training = read_history(detector.checkpoint)
    readiness = judge(pruner, training, trials)
    verdict = "" if readiness is None else describe_readiness(readiness, training)
    sweep = run_sweep(options, pruner, trials, clock, run_dir)
    percent = choose_percent(options, pruner, trials, clock, sweep)
    if percent is None:
        if run_dir is not None:
            save_sweep_report(run_dir, options, sweep, verdict, warnings)
        return
    cut = make_cut(options, pruner, percent)
    if trials is None:
        doubt(pruner, cut.keep)
    promised = MAX_DROP if sweep else options.max_drop
    compared = compare(options, pruner.model, cut.model, trials, promised)
    speeds = measure_speeds(options, pruner.model, compared.slim, clock)
    before = describe_network(pruner.model, compared.before, speeds[0].before_ms, detector, imgsz)
    after = describe_network(compared.slim, compared.after, speeds[0].after_ms, detector, imgsz)
    print_comparison(before, after, device, imgsz)
    print_speeds(options, speeds, before.gflops / after.gflops, device)
    if run_dir is None:
        return
    report = Report(
        command=tell_command(),
        weights=str(options.weights),
        data=str(options.data),
        imgsz=imgsz,
        device=describe_device(device),
        percent=percent,
        target=describe_target(options),
        shortcut=shortcut,
        importance=options.importance,
        compensate=pruner.compensation,
        recalibrate=compared.recalibrated,
        min_channels=options.min_channels,
        round_to=options.round_to,
        suggested_percent=suggested_percent(pruner.importance, options.min_channels),
        threshold=cut.keep.threshold,
        cut_difference=cut.difference,
        removed=removed_share(cut.keep),
        before=before,
        after=after,
        speed_up=(speeds[0].speed_up, speeds[0].speed_up_low, speeds[0].speed_up_high),
        layers=layer_rows(pruner, cut),
        widths=compared.slim.widths(),
        speeds=speeds,
        classes=class_rows(compared),
        sweep=sweep,
        knee=find_knee(sweep),
        verdict=verdict,
        readiness=None if readiness is None else dataclasses.asdict(readiness),
        warnings=tuple(warnings),
    )
    pictures = draw_pictures(run_dir, pruner, cut, compared, report)
    save_results(run_dir, options, percent, compared.slim, detector)
    save_report(run_dir, report, pictures)


def tell_command() -> str:
    """What was typed."""
    return shlex.join(["python", "prune.py", *sys.argv[1:]])


def describe_target(options: argparse.Namespace) -> str:
    """What led to the percent, if it was not given: `target-gflops 50%`."""
    for name in AMOUNTS[1:]:
        value = getattr(options, name)
        if value not in (None, False):
            return flag_of(name)[2:] + ("" if value is True else f" {plain_text(value)}")
    return ""


def plain_text(value: Any) -> Any:
    """An option as it was typed."""
    return value.text if isinstance(value, Target) else value


def load_cfg(name: str) -> ModelSpec:
    """The model yaml that `--cfg` means."""
    path = find_config(name, ["models"], ROOT)
    return ModelSpec.from_dict(load_yaml(path), str(path))


def check_is_network(model: Model, spec: ModelSpec, options: argparse.Namespace) -> None:
    """Stop if `model` is not of the architecture of `spec`, whatever its widths and classes are.

    Raises:
        ValueError: names the first row that differs.
    """
    expected = Model(spec.with_widths({}).with_num_classes(model.head.num_classes))
    dense = Model(model.spec.with_widths({}))
    ours, theirs = (
        [_describe_row(row, route) for row, route in zip(net.model, net.routes, strict=True)]
        for net in (dense, expected)
    )
    if ours != theirs:
        longest = max(len(ours), len(theirs))
        first = next(n for n in range(longest) if ours[n : n + 1] != theirs[n : n + 1])
        raise ValueError(
            f"{options.weights} is not the network of --cfg {options.cfg}: they differ from row "
            f"{first} on; give the yaml it was trained with, or leave out --cfg"
        )


def _describe_row(row: nn.Module, sources: tuple[int, ...]) -> tuple[Any, ...]:
    """All that makes a row what it is, weights aside."""
    shortcuts = [part.add for part in row.modules() if isinstance(part, Bottleneck)]
    return sources, repr(row), shortcuts


def choose_shortcut(options: argparse.Namespace, detector: Detector) -> str:
    """The rule for tied channels: as demanded, else as the sparse training had it."""
    trained = read_history(detector.checkpoint).options
    rule = trained.get("shortcut") or "keep" if trained.get("bn_sparsity") else None
    if options.shortcut is None:
        LOGGER.info(
            "--shortcut %s, as %s",
            rule or "group",
            "in the sparse training" if rule else "no sparse training says otherwise",
        )
        return rule or "group"
    if rule == "keep" and options.shortcut == "group":
        LOGGER.warning(
            "warning: the sparse training left the shortcuts alone (--shortcut keep), but now "
            "their channels may go as well"
        )
    return options.shortcut


def open_trials(
    options: argparse.Namespace, detector: Detector, imgsz: int, device: torch.device
) -> Trials:
    """Open the data set; gets it if it is not there yet.

    Raises:
        ValueError: the data set has other classes than the network.
    """
    num_recalibration = options.recalibrate
    if num_recalibration is None:
        num_recalibration = DEFAULT_RECALIBRATION
    num_calibration = options.calibration_images if needs_statistics(options) else 0
    data = open_dataset(
        options.data,
        splits=("train", "val") if num_calibration or num_recalibration else ("val",),
        allow_scripts=options.allow_download_scripts,
    )
    if not options.single_cls:
        check_class_names(detector.names, data.names, options.weights, str(data.source))
    settings = TrialSettings(
        imgsz=imgsz,
        stride=detector.model.max_stride,
        device=device,
        batch_size=options.batch_size,
        conf_thres=options.conf_thres,
        iou_thres=options.iou_thres,
        single_cls=options.single_cls,
        workers=count_loader_processes(options.workers, device),
        keeps_scan=not options.dry_run,
    )
    trials = Trials(
        data,
        detector.names,
        settings,
        num_calibration=num_calibration,
        num_recalibration=num_recalibration,
        hyp=augmentation(detector),
    )
    if trials.num_recalibration < (options.recalibrate or 0):
        LOGGER.warning(
            "warning: --recalibrate %d: the training images make %d batches; these are taken",
            options.recalibrate,
            trials.num_recalibration,
        )
    return trials


def augmentation(detector: Detector) -> Hyperparameters | None:
    """How the images looked that the BN statistics of the checkpoint come from, if it says."""
    hyp = detector.checkpoint.get("hyp")
    try:
        return Hyperparameters(**hyp) if isinstance(hyp, dict) else None
    except (TypeError, ValueError) as error:
        LOGGER.warning("warning: the checkpoint's hyperparameters cannot be used: %s", error)
        return None


def needs_statistics(options: argparse.Namespace) -> bool:
    """Whether activations play a part."""
    return options.importance != "gamma" or options.compensate not in ("none", "constant")


def rank_channels(
    options: argparse.Namespace,
    detector: Detector,
    imgsz: int,
    shortcut: str,
    trials: Trials | None,
) -> Pruner:
    """Everything that decides what goes first, and how it is made up for."""
    statistics = None
    if trials is not None and needs_statistics(options):
        channel_groups = find_channel_groups(detector.model, shortcut)
        statistics = trials.input_statistics(detector.model, channel_groups)
    return build_pruner(
        detector.model,
        imgsz,
        shortcut=shortcut,
        importance=options.importance,
        compensation=options.compensate or ("mean" if trials is None else "linear"),
        statistics=statistics,
        min_channels=options.min_channels,
        round_to=options.round_to,
    )


def judge(pruner: Pruner, training: History, trials: Trials | None) -> Readiness | None:
    """Measure and say whether the network is ready; None without images."""
    if trials is None:
        return None
    readiness = measure_readiness(pruner, trials.quick_map50)
    text = describe_readiness(readiness, training)
    is_ready = readiness.is_ready and not training.is_spoilt
    LOGGER.log(logging.INFO if is_ready else logging.WARNING, "\n%s", text)
    LOGGER.info("(measured on %d validation images)\n", trials.num_few)
    return readiness


def run_sweep(
    options: argparse.Namespace,
    pruner: Pruner,
    trials: Trials | None,
    clock: Callable[..., list[Latency]],
    run_dir: Path | None,
) -> tuple[SweepRow, ...]:
    """Cut by each percent, measure, print and save the table; empty if there is one percent."""
    if not options.sweep and len(options.percent or []) < 2:
        return ()
    percents = sorted({0.0, *(options.percent or SWEEP_PERCENTS)})
    keeps = [pruner.select(percent) for percent in percents]
    slim = [cut_as_saved(options, pruner, trials, keep) for keep in keeps[1:]]
    networks = [pruner.model, *slim]
    rows = []
    for percent, keep, network, latency in zip(
        percents, keeps, networks, clock(networks), strict=True
    ):
        result = trials.measure(network).result if trials else None
        row = SweepRow(
            percent=percent,
            removed=removed_share(keep),
            parameters=count_parameters(network),
            gflops=pruner.gflops(keep),
            latency_ms=latency.milliseconds,
            speed_up=latency.speed_up,
            map50=result.map50 if result else None,
            map50_95=result.map50_95 if result else None,
        )
        rows.append(row)
    for line in (*format_sweep(rows, find_knee(rows)).split("\n"), ""):
        LOGGER.info("%s", line)
    if run_dir is not None:
        save_plain_options(run_dir, options)
        write_text_atomic(run_dir / "sweep.csv", sweep_csv(rows))
        table = [dataclasses.asdict(row) for row in rows]
        draw(plot_sweep, table, find_knee(rows), run_dir / "sweep.png")
        LOGGER.info("saved %s and sweep.png", run_dir / "sweep.csv")
    return tuple(rows)


def cut_as_saved(
    options: argparse.Namespace, pruner: Pruner, trials: Trials | None, keep: KeepMasks
) -> Model:
    """A candidate as it would be saved: re-calibrated if that is demanded."""
    slim = pruner.cut(keep)
    return trials.recalibrated(slim) if trials and options.recalibrate else slim


def choose_percent(
    options: argparse.Namespace,
    pruner: Pruner,
    trials: Trials | None,
    clock: Callable[..., list[Latency]],
    sweep: Sequence[SweepRow],
) -> float | None:
    """The share of channels to ask for; None where a sweep found none worth saving.

    Raises:
        ValueError: a target is out of reach.
    """
    if sweep:
        return choose_knee(sweep)
    if options.percent:
        return options.percent[0]
    if options.max_drop is not None:
        assert trials is not None
        percent = search_drop(options, pruner, trials)
    elif options.target_latency is not None:
        percent = search_latency(options.target_latency, pruner, clock)
    elif options.target_gflops is not None:
        percent = ratio_for_cost(pruner, pruner.gflops, options.target_gflops, "GFLOPs")
    else:
        percent = ratio_for_cost(pruner, pruner.parameters, options.target_params, "parameters")
    LOGGER.info("--%s is met by --percent %g", describe_target(options), percent)
    return percent


def choose_knee(sweep: Sequence[SweepRow]) -> float | None:
    """The percent at the knee, if anything goes there."""
    knee = find_knee(sweep)
    if knee is not None and sweep[knee].removed:
        LOGGER.info("the network at the knee, --percent %g, is saved", sweep[knee].percent)
        return sweep[knee].percent
    LOGGER.warning(
        "warning: no network of the sweep is saved: %s; choose one with --percent",
        why_no_knee(sweep),
    )
    return None


def why_no_knee(sweep: Sequence[SweepRow]) -> str:
    """What keeps a sweep from having a network that is worth saving."""
    if sweep[0].map50 is None:
        return "without mAP there is no knee (give --data)"
    if find_knee(sweep) is None:
        return "the network detects nothing that could be lost"
    return "every percent costs more than a point of mAP@.5"


def search_drop(options: argparse.Namespace, pruner: Pruner, trials: Trials) -> float:
    """The largest cut that costs at most --max-drop of mAP@.5 on all validation images."""

    def score(percent: float) -> float:
        keep = pruner.select(percent)
        network = cut_as_saved(options, pruner, trials, keep) if percent else pruner.model
        map50 = trials.measure(network).result.map50
        LOGGER.info("--percent %.2f: mAP@.5 %.4f", percent, map50)
        return map50

    return ratio_for_drop(score, options.max_drop)


def search_latency(target: Target, pruner: Pruner, clock: Callable[..., list[Latency]]) -> float:
    """The smallest cut that is measured to be as fast as wanted."""

    def measure(percent: float) -> tuple[float, float]:
        dense, slim = clock([pruner.model, pruner.cut(pruner.select(percent))])
        left = dense.milliseconds / slim.speed_up
        LOGGER.info("--percent %.2f: %.2f of %.2f ms", percent, left, dense.milliseconds)
        return dense.milliseconds, left

    return ratio_for_latency(pruner, measure, target)


class Cut(NamedTuple):
    """A network cut and proved, not yet measured."""

    keep: KeepMasks
    model: Model
    difference: float  # relative, of the proof


def make_cut(options: argparse.Namespace, pruner: Pruner, percent: float) -> Cut:
    """Cut by a percent, say what goes, and prove that the cut is right."""
    keep = pruner.select(percent)
    compensated = pruner.compensated(keep)
    cut = Cut(keep, prune_model(compensated, pruner.channel_groups, keep.masks), 0.0)
    for line in format_layers(layer_rows(pruner, cut)).split("\n"):
        LOGGER.info("%s", line)
    print_choice(options, pruner, keep)
    check_is_smaller(pruner, keep, percent, options)
    masked = mask_model(compensated, pruner.channel_groups, keep.masks)
    return cut._replace(difference=verify_cut(cut.model, masked))


def layer_rows(pruner: Pruner, cut: Cut) -> tuple[LayerRow, ...]:
    """Per convolution block: channels before and after, and why they are as they are."""
    widths, added = cut.model.widths(), cut.keep.added
    channel_groups = pruner.channel_groups
    return tuple(
        LayerRow(
            layer=path,
            before=width,
            after=widths[path],
            prunable=channel_groups.is_prunable(path),
            added=sum(added.get(s.group, 0) for s in channel_groups.outputs[path]),
        )
        for path, width in pruner.model.widths().items()
    )


def print_choice(options: argparse.Namespace, pruner: Pruner, keep: KeepMasks) -> None:
    """Threshold and suggestion, and a word where the masks are not what was asked for."""
    ranking = "|gamma|" if options.importance == "gamma" else f"importance ({options.importance})"
    LOGGER.info("threshold: %s >= %.4g stays; %s", ranking, keep.threshold, describe_removal(keep))
    LOGGER.info(
        "suggested percent: %.4f (the most that leaves every layer %s; it says nothing about mAP)",
        math.floor(suggested_percent(pruner.importance, options.min_channels) * 1e4) / 1e4,
        "a channel" if options.min_channels == 1 else f"{options.min_channels} channels",
    )
    if keep.floored:
        LOGGER.warning(
            "warning: fewer than %d channel(s) of %s reach the threshold; the strongest stay",
            options.min_channels,
            ", ".join(keep.floored),
        )
    if options.round_to > 1 and keep.added:
        LOGGER.info(
            "%d channels stay for --round-to %d and --min-channels %d alone",
            sum(keep.added.values()),
            options.round_to,
            options.min_channels,
        )


def check_is_smaller(
    pruner: Pruner, keep: KeepMasks, percent: float, options: argparse.Namespace
) -> None:
    """Stop before a network is measured and saved as pruned that is not; a dry run goes on.

    Raises:
        ValueError: nothing is removed.
    """
    if count_removed(keep) or percent == 0:
        return
    reason = f"nothing is removed: {why_nothing_goes(pruner, keep)}"
    if not options.dry_run:
        raise ValueError(f"{reason}. Nothing was saved")
    LOGGER.warning("warning: %s", reason)


def verify_cut(pruned: Model, masked: Model) -> float:
    """Compare the cut network with the masked dense one; returns the relative difference.

    The image is noise of a few cells: every channel is read and the cut does not depend on the
    size, so a larger or a real image would only take longer.

    Raises:
        ValueError: they differ; nothing may be saved.
    """
    side = 2 * pruned.max_stride
    image = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    difference = check_cut(pruned, masked, image)
    if not difference <= CUT_TOLERANCE:  # NaN too
        raise ValueError(
            f"the pruned network differs from the masked dense one by {difference:.2g} (at most "
            f"{CUT_TOLERANCE:g} can be rounding); nothing was saved. Please report this, it is a "
            "fault of the toolkit or of the weights (NaN)"
        )
    LOGGER.info("cut verified: differs from the masked dense network by %.1g", difference)
    return difference


def doubt(pruner: Pruner, keep: KeepMasks) -> None:
    """Where nothing is measured, one line if gamma says that mAP will fall."""
    text = doubt_from_gamma(pruner, keep)
    if text:
        LOGGER.warning("warning: %s", text)


class Compared(NamedTuple):
    """The slim network as it is saved, and what both detect; None without images."""

    slim: Model
    recalibrated: int  # batches
    before: Measured | None
    after: Measured | None


def compare(
    options: argparse.Namespace,
    model: Model,
    pruned: Model,
    trials: Trials | None,
    promised: float | None,
) -> Compared:
    """Measure before and after.

    Re-calibration, unless a number of batches was demanded, is kept only where it measures better
    and mAP@.5 does not fall by more than was promised, if anything was.
    """
    if trials is None:
        return Compared(pruned, 0, None, None)
    before = trials.measure(model)
    if not trials.num_recalibration:
        return Compared(pruned, 0, before, trials.measure(pruned))
    again = trials.recalibrated(pruned)
    if options.recalibrate:
        return Compared(again, trials.num_recalibration, before, trials.measure(again))
    with_it, without = trials.measure(again).result, trials.measure(pruned).result
    is_kept = with_it.map50_95 > without.map50_95
    if promised is not None:
        is_kept &= is_borne(with_it.map50, before.result.map50, promised)
    LOGGER.info(
        "BN re-calibration: mAP@.5:.95 %.4f with it, %.4f without: %s",
        with_it.map50_95,
        without.map50_95,
        "kept" if is_kept else "left out",
    )
    if is_kept:
        return Compared(again, trials.num_recalibration, before, trials.measure(again))
    return Compared(pruned, 0, before, trials.measure(pruned))


def measure_speeds(
    options: argparse.Namespace, model: Model, slim: Model, clock: Callable[..., list[Latency]]
) -> tuple[SpeedRow, ...]:
    """Per batch size the times of both networks."""
    rows = []
    for size in options.latency_batch or ([1, 16] if options.data else [1]):
        before, after = clock([model, slim], batch_size=size)
        rows.append(SpeedRow(size, before.milliseconds, *after))
    return tuple(rows)


def describe_network(
    model: Model,
    measured: Measured | None,
    latency_ms: float,
    detector: Detector,
    imgsz: int,
) -> Figures:
    """Accuracy, time, and sizes."""
    result = measured.result if measured else None
    return Figures(
        precision=result.precision if result else None,
        recall=result.recall if result else None,
        map50=result.map50 if result else None,
        map50_95=result.map50_95 if result else None,
        channels=sum(model.widths().values()),
        parameters=count_parameters(model),
        gflops=count_gflops(model, imgsz),
        file_mb=file_size(model, detector.names) / 1e6,
        latency_ms=latency_ms,
    )


def file_size(model: Model, names: Sequence[str]) -> int:
    """Bytes of the stripped checkpoint in half precision."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        save_final(path, build_checkpoint(model, names), model.state_dict())
        return path.stat().st_size


def print_comparison(before: Figures, after: Figures, device: torch.device, imgsz: int) -> None:
    """The table before/after."""
    LOGGER.info("\n%-24s %12s %12s %12s", "", "before", "after", "change")
    for row in comparison_rows(before, after, imgsz, str(device)):
        LOGGER.info("%-24s %12s %12s %12s", *row)
    if before.map50 is None:
        LOGGER.info("mAP was not measured: give --data to compare it")


def print_speeds(
    options: argparse.Namespace,
    speeds: Sequence[SpeedRow],
    flops_ratio: float,
    device: torch.device,
) -> None:
    """Per batch size how much faster; a warning where that is not sure, or less than was wanted."""
    for row in speeds:
        text = describe_speed(row, flops_ratio, str(device))
        is_faster = row.speed_up_low > 1
        LOGGER.log(
            logging.INFO if is_faster else logging.WARNING,
            "%s: %s",
            "speed" if is_faster else "warning",
            text,
        )
        if options.target_latency is None or row.batch_size != 1:
            continue
        wanted = options.target_latency.of(row.before_ms)
        if row.before_ms / row.speed_up > wanted:
            LOGGER.warning(
                "warning: measured again, it takes %.2f ms, not the %.2f of --target-latency: the "
                "machine is busy; measure on an idle one, or aim lower",
                row.before_ms / row.speed_up,
                wanted,
            )


def class_rows(compared: Compared) -> tuple[ClassRow, ...]:
    """Accuracy per class that has labels."""
    if compared.before is None or compared.after is None:
        return ()
    before: EvaluationResult = compared.before.result
    old, new = before.ap_result, compared.after.result.ap_result
    columns = (old.classes, old.num_labels, old.ap50, new.ap50, old.ap.mean(1), new.ap.mean(1))
    return tuple(
        ClassRow(before.names[int(number)], int(count), *map(float, figures))
        for number, count, *figures in zip(*columns, strict=True)
    )


def draw_pictures(
    run_dir: Path, pruner: Pruner, cut: Cut, compared: Compared, report: Report
) -> Pictures:
    """Draw what the report shows; what cannot be drawn is a warning."""
    draw(
        plot_layer_widths,
        [row.layer for row in report.layers],
        [row.before for row in report.layers],
        [row.after for row in report.layers],
        run_dir / "layers.png",
    )
    gamma = gamma_importance(pruner.model, pruner.channel_groups)
    draw(
        plot_importance_threshold,
        torch.cat(list(gamma.values())),
        torch.cat([cut.keep.masks[name] for name in gamma]),
        report.threshold if report.importance == "gamma" else None,
        run_dir / "gamma.png",
    )
    sweep = run_dir / "sweep.png" if report.sweep else None
    detections = draw_detections(run_dir, compared)
    return Pictures(run_dir / "layers.png", run_dir / "gamma.png", sweep, detections)


def draw_detections(run_dir: Path, compared: Compared) -> dict[str, Path]:
    """Some validation images with what both networks find; the files by name of the image."""
    if compared.before is None or compared.after is None:
        return {}
    pictures = {}
    for number, (path, found) in enumerate(sorted(compared.before.detections.items())):
        pictures[f"{number + 1}: {Path(path).name}"] = out = run_dir / f"detections{number}.jpg"
        draw(
            plot_detections_pair,
            read_image(path)[..., ::-1],
            found,
            compared.after.detections[path],
            compared.before.result.names,
            ("before", "after, not fine-tuned"),
            out,
        )
    return pictures


def save_results(
    run_dir: Path,
    options: argparse.Namespace,
    percent: float,
    pruned: Model,
    detector: Detector,
) -> None:
    """Write the options, the checkpoint and its yaml.

    The checkpoint says how its parent was trained: pruning it again then takes the same rule.
    """
    save_plain_options(run_dir, options)
    origin = {"weights": str(options.weights), "percent": percent}
    parent = {key: part for key, part in detector.checkpoint.items() if key in ("hyp", "options")}
    content = build_checkpoint(pruned, detector.names, pruned_from=origin, **parent)
    save_final(run_dir / "pruned_model.pt", content, pruned.state_dict())
    comment = f"{options.weights} pruned by {percent:g} of its prunable channels"
    write_text_atomic(run_dir / "pruned_model.yaml", format_spec(pruned.spec, comment))


def save_plain_options(run_dir: Path, options: argparse.Namespace) -> None:
    """Write the options as they were typed."""
    save_options(run_dir / "opt.yaml", {k: plain_text(v) for k, v in vars(options).items()})


def save_report(run_dir: Path, report: Report, pictures: Pictures) -> None:
    """Write the figures for programs and for people, and say where everything is."""
    text = json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"
    write_text_atomic(run_dir / "report.json", text)
    write_report(run_dir / "report.html", report, pictures)
    LOGGER.info("\nsaved %s (and report.html, report.json)", run_dir / "pruned_model.pt")
    LOGGER.info(
        "fine-tune it: python train.py --ft_pruned_model --hyp hyp.finetune_slim.yaml --weights %s",
        run_dir / "pruned_model.pt",
    )


def save_sweep_report(
    run_dir: Path,
    options: argparse.Namespace,
    sweep: tuple[SweepRow, ...],
    verdict: str,
    warnings: Sequence[str],
) -> None:
    """The page of a sweep after which there is no network to report on."""
    settings = (
        ("command", tell_command()),
        ("weights", str(options.weights)),
        ("data", str(options.data) or "none"),
        ("imgsz", f"{options.imgsz} px"),
    )
    reason = f"{why_no_knee(sweep)}; choose one with --percent"
    report = SweepReport(str(options.weights), reason, sweep, verdict, tuple(warnings), settings)
    write_sweep_report(run_dir / "report.html", report, run_dir / "sweep.png")
    LOGGER.info("saved %s", run_dir / "report.html")


def format_spec(spec: ModelSpec, comment: str) -> str:
    """The spec as a model yaml for people: one line a row, numbered."""

    def flow(value: Any) -> str:
        text = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
        return text.removesuffix("\n").removesuffix("\n...")

    lines = ["# " + " ".join(comment.split())]
    number = 0
    for key, value in spec.to_dict().items():
        if key in ("backbone", "head"):
            lines += [f"{key}:  # [from, number, module, arguments]"]
            lines += [f"  - {flow(row)}  # {number + n}" for n, row in enumerate(value)]
            number += len(value)
        elif isinstance(value, list):
            lines += [f"{key}:", *(f"  - {flow(item)}" for item in value)]
        elif isinstance(value, dict):
            lines += [f"{key}:  # output channels of each convolution"]
            lines += [f"  {flow(path)}: {width}" for path, width in value.items()]
        else:
            lines += [f"{key}: {flow(value)}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_command(main)
