"""What a training is made from: found and checked before anything is written."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch

from models import ModelSpec
from models.yolo import MAX_WEIGHTS
from utils import device as devices
from utils.checkpoint import Detector, load_detector, most_weights
from utils.choices import AUTO_BATCH
from utils.config import DatasetSpec, Hyperparameters, load_hyperparameters, load_yaml
from utils.device_text import gpu_indices
from utils.downloads import PROJECT_ROOT, find_weights, open_dataset
from utils.lookup import find_config
from utils.resume import Resumed
from utils.tensorboard import load_writer


class Inputs(NamedTuple):
    """What a run is made from: found and checked before anything is written."""

    hyp: Hyperparameters
    spec: ModelSpec
    source: Detector | None  # where the weights come from
    max_weights: int  # that the network may have
    teacher: Path | None
    data: DatasetSpec


def find_inputs(options: argparse.Namespace, resumed: Resumed | None) -> Inputs:
    """Hyperparameters, network, weights, and last, as it may be a long download, the data."""
    if options.tensorboard:
        load_writer()  # if it can be
    if resumed:
        hyp = Hyperparameters(**resumed.content["hyp"])
        spec, source = ModelSpec.from_dict(resumed.content["spec"], str(resumed.path)), None
        max_weights = most_weights(resumed.content["model"])
    else:
        hyp = load_hyperparameters(find_config(options.hyp, ["data/hyps"], PROJECT_ROOT))
        if options.label_smoothing is not None:
            hyp = dataclasses.replace(hyp, label_smoothing=options.label_smoothing)
        source = load_detector(find_weights(options.weights)) if options.weights else None
        spec = choose_spec(options, hyp, source)
        max_weights = MAX_WEIGHTS
    teacher = find_teacher(options, resumed)
    try:
        data = load_data(options)
    except FileNotFoundError as error:
        if not resumed:
            raise
        raise FileNotFoundError(f"{error}; if it has moved, add --data and its yaml") from None
    if resumed and list(data.names) != resumed.content["names"]:
        raise ValueError(
            f"{data.source}: the classes are {', '.join(data.names)}, but the run to resume has "
            f"{', '.join(resumed.content['names'])}"
        )
    spec = spec.with_num_classes(data.num_classes)
    return Inputs(hyp, spec, source, max_weights, teacher, data)


def choose_spec(
    options: argparse.Namespace, hyp: Hyperparameters, source: Detector | None
) -> ModelSpec:
    """The network description: of the weights, or of `--cfg`; and which anchors it shall have."""
    given, own = None, source.model.spec if source is not None else None
    if options.cfg:
        path = find_config(options.cfg, ["models"], PROJECT_ROOT)
        given = ModelSpec.from_dict(load_yaml(path), str(path))
    if options.ft_pruned_model and own is not None:
        check_slim(options, hyp, given, own)
        return own
    spec = given or own
    assert spec is not None  # the flags ask for one of the two
    if own is not None and own.widths and own.widths != spec.widths:
        raise ValueError(
            f"{options.weights} is a pruned model of another shape than {options.cfg}; add "
            "--ft_pruned_model to fine-tune it, or leave out --cfg"
        )
    if hyp.anchors is not None:
        spec = dataclasses.replace(spec, anchors=hyp.anchors)
    if isinstance(spec.anchors, int) and options.noautoanchor:
        raise ValueError(
            f"anchors: {spec.anchors} asks for new anchors, which --noautoanchor forbids"
        )
    return spec


def check_slim(
    options: argparse.Namespace, hyp: Hyperparameters, given: ModelSpec | None, slim: ModelSpec
) -> None:
    """Stop where `--ft_pruned_model` and other options contradict each other."""
    if not slim.is_pruned:
        raise ValueError(
            f"--ft_pruned_model: {options.weights} is not a pruned model; prune it with prune.py, "
            "or train it without this flag"
        )
    if given is not None and not given.is_same_network(slim):
        raise ValueError(
            f"--ft_pruned_model: {options.weights} was not pruned from the network of --cfg "
            f"{options.cfg}; give the yaml it was trained with, or leave out --cfg"
        )
    if hyp.anchors is not None:
        raise ValueError(
            f"{options.hyp}: anchors: {hyp.anchors} cannot be combined with --ft_pruned_model, "
            "which keeps the shape of the head"
        )


def find_teacher(options: argparse.Namespace, resumed: Resumed | None) -> Path | None:
    """The file of `--teacher`, which a resumed run needs as well."""
    if not options.teacher:
        return None
    try:
        return find_weights(options.teacher)
    except FileNotFoundError as error:
        again = (
            "; the run to resume learns from it, put it back there or add --teacher and its path"
        )
        raise FileNotFoundError(f"--teacher {error}{again if resumed else ''}") from None


def load_data(options: argparse.Namespace) -> DatasetSpec:
    """The data set, fetched if need be."""
    data = open_dataset(options.data, allow_scripts=options.allow_download_scripts)
    return dataclasses.replace(data, names=("object",)) if options.single_cls else data


def check_processes(options: argparse.Namespace, device: torch.device) -> None:
    """Stop where several processes cannot do what was asked for."""
    count = devices.world_size()
    if count == 1:
        return
    check_share(options, count)
    if options.evolve:
        raise ValueError("--evolve works in one process, which starts trainings; see --device 0,1")
    if options.sync_bn and device.type != "cuda":
        raise ValueError(f"--sync-bn needs CUDA GPUs, not {device.type}; leave it out")
    if device.type == "cuda":
        num_gpus = len(gpu_indices(options.device)) or torch.cuda.device_count()
        if devices.local_world_size() > num_gpus:
            raise ValueError(
                f"{devices.local_world_size()} processes for {num_gpus} GPUs; start as many as "
                "there are GPUs (--nproc_per_node)"
            )
        torch.cuda.set_device(device)


def check_share(options: argparse.Namespace, count: int) -> None:
    """Stop if the batch cannot be shared out evenly."""
    if options.batch_size == AUTO_BATCH:
        raise ValueError("--batch-size -1 finds what fits on one GPU; give a number for several")
    if options.batch_size % count:
        raise ValueError(
            f"--batch-size {options.batch_size} cannot be shared evenly by {count} processes"
        )


def check_smallest_batch(
    options: argparse.Namespace, imgsz: int, stride: int, num_images: int = 0
) -> None:
    """Stop if a batch norm would get a single number a channel: of one image, one cell large.

    Args:
        options: of the run.
        imgsz: side of the network input in pixels, a multiple of the stride.
        stride: of the coarsest level, in pixels.
        num_images: for training; 0 while it is not known.

    Raises:
        ValueError: it would; names a size of images that is large enough.
    """
    count = devices.world_size()
    is_one_cell = imgsz == stride or (options.multi_scale and round(imgsz // 2 / stride) <= 1)
    is_summed_up = options.sync_bn and count > 1
    if not is_one_cell or is_summed_up or options.batch_size == AUTO_BATCH:
        return
    each = f" for each of {count} processes" if count > 1 else ""
    if options.batch_size == count:
        what = f"is one image{each}"
    elif 0 < num_images % options.batch_size < 2 * count:
        what = f"leaves one of {num_images} images{each} in the last batch"
    else:
        return
    halved = ", which --multi-scale halves" if options.multi_scale else ""
    raise ValueError(
        f"--batch-size {options.batch_size} {what}; batch norms cannot learn from one at --imgsz "
        f"{imgsz}{halved}: give --imgsz {(4 if options.multi_scale else 2) * stride}, or another "
        "--batch-size"
    )
