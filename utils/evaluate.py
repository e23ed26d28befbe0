"""The one evaluation loop, used by training, pruning and validation.

Protocol: NMS with several labels a box, detections and labels matched in pixels of the original
image, AP interpolated over 101 recalls.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.boxes import to_original, xyxy_from_cxcywh
from utils.dataset import Batch
from utils.loss import DetectionLoss, Measured
from utils.metrics import (
    IOU_THRESHOLDS,
    ApResult,
    ConfusionMatrix,
    average_precision_per_class,
    fitness,
    match_detections,
)
from utils.nms import non_max_suppression, split_detections
from utils.profile import Stopwatch, ms_per_image

LOGGER = logging.getLogger(__name__)

# Measured on two cores, YOLOv5n: 32 images of 640 x 480 take 27.8 ms each at once, 20.6 by eights.
CPU_CHUNK_PIXELS = 8 * 640 * 480

BatchHook = Callable[[Batch, list[Tensor]], None]


@dataclass(frozen=True)
class EvaluationResult:
    """What one pass over a data set gave; means are over the classes that have labels.

    All figures are 0 where there is nothing to measure: no image, no label, no detection.
    """

    names: tuple[str, ...]
    precision: float
    recall: float
    map50: float
    map50_95: float
    ap_result: ApResult  # per class, and the curves
    num_labels_per_class: np.ndarray  # [K]
    num_images_per_class: np.ndarray  # [K] images with at least one label of the class
    confusion: ConfusionMatrix
    losses: tuple[float, float, float] | None  # box, objectness, class; mean over images
    speed_ms: tuple[float, float, float]  # pre-processing, inference, NMS; per image
    num_images: int
    is_finite: bool  # all logits; looked at if there is a loss. Else none of the figures counts

    @property
    def num_labels(self) -> int:
        """Labels of all classes."""
        return int(self.num_labels_per_class.sum())

    @property
    def fitness(self) -> float:
        """The figure by which epochs are compared."""
        return fitness(self.map50, self.map50_95)


def check_class_names(
    trained: Sequence[str], labelled: Sequence[str], weights: str, data: str
) -> None:
    """Stop if a network and a data set have not as many classes; warn if they name them otherwise.

    Args:
        trained: class names of the network.
        labelled: class names of the data set.
        weights: where the network is from, for the messages.
        data: where the data set is from.

    Raises:
        ValueError: their numbers differ.
    """
    if len(trained) != len(labelled):
        raise ValueError(
            f"{weights} detects {len(trained)} classes, {data} names {len(labelled)}; give the "
            "data set it was trained for, or --single-cls"
        )
    for theirs, ours in zip(trained, labelled, strict=True):
        if theirs != ours:
            LOGGER.warning(
                "warning: %s and %s name their classes differently (%r, %r); the order counts, "
                "names do not",
                weights, data, theirs, ours,
            )  # fmt: skip
            return


class Tally:
    """Matches batch by batch and remembers what the metrics need."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        # Of each image:
        self.correct: list[np.ndarray] = []  # bool [M, I]
        self.conf_cls: list[np.ndarray] = []  # [M, 2]
        self.label_cls: list[np.ndarray] = []  # [T]
        self.num_images_per_class = np.zeros(num_classes, np.int64)
        self.confusion = ConfusionMatrix(num_classes)
        self.losses: list[Measured] = []  # of each batch
        self.seconds = [0.0, 0.0, 0.0]  # pre-processing, inference, NMS
        self.is_finite = torch.tensor(True)  # all logits

    @property
    def num_images(self) -> int:
        """How many were added."""
        return len(self.correct)

    @classmethod
    def combine(cls, shares: Sequence[Tally]) -> Tally:
        """What one process would have found, of which several took every nth image each."""
        if len(shares) == 1:
            return shares[0]
        whole = cls(shares[0].num_classes)
        for name in ("correct", "conf_cls", "label_cls"):
            turns = itertools.zip_longest(*(getattr(share, name) for share in shares))
            found = [entry for turn in turns for entry in turn if entry is not None]
            getattr(whole, name).extend(found)
        for share in shares:
            whole.is_finite &= share.is_finite
            whole.num_images_per_class += share.num_images_per_class
            whole.confusion.matrix += share.confusion.matrix
            whole.seconds = [a + b for a, b in zip(whole.seconds, share.seconds, strict=True)]
        for parts in itertools.zip_longest(*(share.losses for share in shares)):
            sums, counts = zip(*(part for part in parts if part is not None), strict=True)
            whole.losses.append(Measured(sum(sums), sum(counts)))
        return whole

    def add(self, detections: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> None:
        """Add a batch: per image [M, 6] and [T, 5] (class, xyxy), both in original pixels."""
        self.correct += match_detections(detections, labels)
        for rows, image_labels in zip(detections, labels, strict=True):
            label_cls = image_labels[:, 0].astype(np.int64)
            self.conf_cls.append(rows[:, 4:])
            self.label_cls.append(label_cls)
            self.num_images_per_class[np.unique(label_cls)] += 1
            self.confusion.update(rows, image_labels)

    def look_at(self, logits: Sequence[Tensor]) -> None:
        """Whether they are finite, per level of any shape; nothing waits for the device.

        A sigmoid makes a number of what is infinite, and NMS leaves out what is none.
        """
        for level in logits:
            self.is_finite = self.is_finite.to(level.device) & level.isfinite().all()

    def average_precision(self) -> tuple[ApResult, np.ndarray]:
        """Per-class result, and labels per class [K]."""
        conf, pred_cls = np.concatenate([_NO_SCORES, *self.conf_cls]).T
        label_cls = np.concatenate([_NO_CLASSES, *self.label_cls])
        correct = np.concatenate([_NO_MATCHES, *self.correct])
        result = average_precision_per_class(correct, conf, pred_cls, label_cls)
        return result, np.bincount(label_cls, minlength=self.num_classes)


_NO_MATCHES = np.zeros((0, len(IOU_THRESHOLDS)), bool)
_NO_SCORES = np.zeros((0, 2), np.float32)
_NO_CLASSES = np.zeros(0, np.int64)


def _alone(tally: Tally) -> list[Tally]:
    return [tally]


@torch.no_grad()  # not inference_mode: what a loss or a hook keeps must stay usable in training
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    names: tuple[str, ...],
    *,
    device: torch.device,
    precision: torch.dtype = torch.float32,
    conf_thres: float = 0.001,
    iou_thres: float = 0.6,
    max_det: int = 300,
    single_cls: bool = False,
    loss_fn: DetectionLoss | None = None,
    on_batch: BatchHook | None = None,
    progress: bool = True,
    gather: Callable[[Tally], list[Tally]] = _alone,
) -> EvaluationResult:
    """Detect in every image of the loader and compare with the labels.

    Args:
        model: network on `device`, in any mode, which it keeps; fold BN beforehand if wanted. Its
            weights are laid out channels last, the faster way for convolutions. Exported networks
            (`utils.backends`) do as well; with NMS inside, `iou_thres` has no effect.
        loader: any iterable of batches, in any order.
        names: of the classes; their number must be that of the network, unless `single_cls`.
        device: where the network is.
        precision: the network computes in this type; a copy is cast if it is held in another.
        conf_thres: least confidence of a detection. Near 0, or the AP loses its tail.
        iou_thres: of NMS.
        max_det: most detections per image.
        single_cls: all detections and labels count as class 0.
        loss_fn: adds the mean loss per image, and whether all logits are finite.
        on_batch: called with the batch and its detections, per image [M, 6] on the CPU, xyxy in
            pixels of the original image.
        progress: show a progress bar, if this is a terminal.
        gather: where several processes share the images, from what this one found to what all
            did, by rank; the result is that of what it gives.

    Raises:
        ValueError: the network does not have as many classes as there are names.
    """
    names = names[:1] if single_cls else names
    tally, watch = Tally(len(names)), Stopwatch(device)
    with _ready(model, precision) as network:
        has_nms = getattr(network, "has_nms", False)
        suppress = _suppression(has_nms, conf_thres, iou_thres, max_det, single_cls)
        _warm_up(network, device, precision)
        for batch in tqdm(loader, desc="evaluate", leave=False, disable=None if progress else True):
            watch.start()
            images = batch.images.to(device, non_blocking=True)
            images = images.to(precision, memory_format=torch.channels_last).div_(255)
            watch.lap(0)
            predictions, logits = _forward(network, images)
            watch.lap(1)
            if not has_nms:
                _check_num_classes(predictions.shape[2] - 5, names, single_cls)
            if loss_fn is not None:
                tally.look_at(logits)
                tally.losses.append(loss_fn.measure(logits, batch.targets))
                watch.start()
            detections = suppress(predictions)
            watch.lap(2)
            detections = _in_original_pixels(detections, batch, single_cls)
            rows = [image.numpy() for image in detections]
            tally.add(rows, _labels_in_original_pixels(batch, single_cls))
            if on_batch is not None:
                on_batch(batch, detections)

    tally.seconds, tally.is_finite = watch.seconds, tally.is_finite.cpu()
    tally.losses = [Measured(sums.cpu(), counts.cpu()) for sums, counts in tally.losses]
    return _summarise(Tally.combine(gather(tally)), names, loss_fn)


@contextmanager
def _ready(model: nn.Module, precision: torch.dtype) -> Iterator[nn.Module]:
    """The network, or a copy if its weights have another type; afterwards it is in its old mode."""
    was_training = model.training
    network = model.eval()
    if any(parameter.dtype != precision for parameter in itertools.islice(model.parameters(), 1)):
        network = copy.deepcopy(model).to(precision)
    try:
        yield network.to(memory_format=torch.channels_last)
    finally:
        model.train(was_training)


def _forward(network: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Predictions and logits of a batch; on a CPU in parts whose layers its cache holds."""
    pixels = images.shape[2] * images.shape[3]
    size = max(CPU_CHUNK_PIXELS // pixels, 1) if images.device.type == "cpu" else len(images)
    if len(images) <= size:
        return network(images)
    predictions, logits = zip(*map(network, images.split(size)), strict=True)
    return torch.cat(predictions), [torch.cat(level) for level in zip(*logits, strict=True)]


def _suppression(
    has_nms: bool, conf_thres: float, iou_thres: float, max_det: int, single_cls: bool
) -> Callable[[Tensor], list[Tensor]]:
    """How predictions become detections; a network with NMS inside has done most of it."""
    if has_nms:
        return functools.partial(split_detections, conf_thres=conf_thres, max_det=max_det)
    return functools.partial(
        non_max_suppression,
        conf_thres=conf_thres,
        iou_thres=iou_thres,
        multi_label=True,
        max_det=max_det,
        agnostic=single_cls,
    )


def _warm_up(network: nn.Module, device: torch.device, precision: torch.dtype) -> None:
    """Let an accelerator select its kernels, and NMS import its own, before the clock runs."""
    one_box = torch.ones(1, 1, 6, device=device)
    non_max_suppression(one_box)
    if device.type != "cpu" and getattr(network, "imgsz_hw", None) is None:
        network(torch.zeros(1, 3, 256, 256, device=device, dtype=precision))


def _check_num_classes(num_classes: int, names: tuple[str, ...], single_cls: bool) -> None:
    if num_classes != len(names) and not single_cls:
        raise ValueError(
            f"the network detects {num_classes} classes, the data set names {len(names)} "
            f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"
        )


def _in_original_pixels(detections: list[Tensor], batch: Batch, single_cls: bool) -> list[Tensor]:
    """Per image [M, 6] on the CPU, all in one transfer."""
    rows_per_image = torch.cat(detections).cpu().split([len(rows) for rows in detections])
    mapped = []
    for rows, letterbox in zip(rows_per_image, batch.letterboxes, strict=True):
        cls = torch.zeros_like(rows[:, 5:]) if single_cls else rows[:, 5:]
        mapped.append(torch.cat((to_original(rows[:, :4], letterbox), rows[:, 4:5], cls), 1))
    return mapped


def _labels_in_original_pixels(batch: Batch, single_cls: bool) -> list[np.ndarray]:
    """Per image [T, 5]: class, xyxy."""
    height, width = batch.images.shape[2:]
    targets = batch.targets.cpu().numpy().astype(np.float64)
    boxes_xyxy = xyxy_from_cxcywh(targets[:, 2:] * (width, height, width, height))
    classes = targets[:, 1:2] * (0 if single_cls else 1)
    labels = []
    for image, letterbox in enumerate(batch.letterboxes):
        of_image = targets[:, 0] == image
        boxes = to_original(boxes_xyxy[of_image], letterbox)
        labels.append(np.concatenate((classes[of_image], boxes), 1))
    return labels


def _summarise(
    tally: Tally,
    names: tuple[str, ...],
    loss_fn: DetectionLoss | None,
) -> EvaluationResult:
    ap_result, num_labels_per_class = tally.average_precision()
    losses = None
    if loss_fn is not None:
        parts = [loss_fn.parts(batch) * batch.counts[1, 0] for batch in tally.losses]
        box, obj, cls = (sum(parts, torch.zeros(3)) / max(tally.num_images, 1)).tolist()
        losses = (box, obj, cls)

    def mean(values: np.ndarray) -> float:
        return float(values.mean()) if values.size else 0.0

    return EvaluationResult(
        names=names,
        precision=mean(ap_result.precision),
        recall=mean(ap_result.recall),
        map50=mean(ap_result.ap50),
        map50_95=mean(ap_result.ap),
        ap_result=ap_result,
        num_labels_per_class=num_labels_per_class,
        num_images_per_class=tally.num_images_per_class,
        confusion=tally.confusion,
        losses=losses,
        speed_ms=ms_per_image(tally.seconds, tally.num_images),
        num_images=tally.num_images,
        is_finite=bool(tally.is_finite),
    )
