"""Images to prune by: some of the training set to learn from, the validation set to measure on.

Whatever is measured here, before, after or in between, is measured alike: same images, thresholds
and precision (float32).
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterable
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from models.yolo import Model
from utils.config import DatasetSpec, Hyperparameters
from utils.dataset import (
    RECT_PAD,
    Batch,
    DetectionDataset,
    Loader,
    Split,
    build_loader,
    sample_batches,
    scan_split,
)
from utils.evaluate import BatchHook, EvaluationResult, evaluate
from utils.pruning.activations import InputStatistics, measure_inputs
from utils.pruning.channel_groups import ChannelGroups
from utils.pruning.recalibrate import recalibrate

TRAINING_BATCH = 16  # images
# Searches measure many networks: on at most so many validation images, which are kept in memory.
SEARCH_IMAGES = 256
NUM_SHOWN = 4  # images whose detections are kept


@dataclasses.dataclass(frozen=True)
class TrialSettings:
    """How images are read and detections judged."""

    imgsz: int  # pixels
    stride: int  # the largest of the network
    device: torch.device
    batch_size: int = 32  # of validation
    conf_thres: float = 0.001
    iou_thres: float = 0.6
    single_cls: bool = False
    workers: int = 0
    keeps_scan: bool = True  # whether the scan of the labels may be written beside them


class Measured(NamedTuple):
    """What a network detects in the validation images."""

    result: EvaluationResult
    detections: dict[str, Tensor]  # of some images, by path; xyxy in pixels of the original


class Trials:
    """Measures networks on one data set."""

    def __init__(
        self,
        data: DatasetSpec,
        names: tuple[str, ...],
        settings: TrialSettings,
        *,
        num_calibration: int,
        num_recalibration: int,
        hyp: Hyperparameters | None = None,
    ) -> None:
        """Open the data set and read what is to be learnt from.

        Args:
            data: with the splits train, unless nothing is to be read from it, and val.
            names: of the classes of the networks.
            settings: for all measurements.
            num_calibration: training images for `input_statistics`.
            num_recalibration: batches of training images for `recalibrated`.
            hyp: augmentation of those, as in the training whose statistics they stand in for;
                None for none.
        """
        self._names, self._settings = names, settings
        self._known: WeakKeyDictionary[Model, Measured] = WeakKeyDictionary()
        num_batches = -(-num_calibration // TRAINING_BATCH)
        training = None
        if num_batches or num_recalibration:
            training = _scan(data, "train", settings)
        plain = _training_images(training, settings, num_batches)
        self._calibration = _first_images(plain, num_calibration)
        self._recalibration = _training_images(training, settings, num_recalibration, hyp)
        self.num_recalibration = len(self._recalibration)  # as many as there are
        loader = _validation_loader(data, settings)
        paths = loader.batch_sampler.dataset.split.paths
        self._shown = frozenset(paths[:: max(len(paths) // NUM_SHOWN, 1)][:NUM_SHOWN])
        self._all: Iterable[Batch] = loader
        self._few: list[Batch] | None = None  # None: all are few enough
        self.num_few = len(paths)
        if len(paths) <= SEARCH_IMAGES:
            self._all = list(loader)
        else:
            self._few = sample_batches(loader, SEARCH_IMAGES)
            self.num_few = sum(len(batch.images) for batch in self._few)

    def measure(self, model: Model) -> Measured:
        """Detect in all validation images; a network that was measured before is not again."""
        if model not in self._known:
            detections: dict[str, Tensor] = {}

            def keep_shown(batch: Batch, found: list[Tensor]) -> None:
                pairs = zip(batch.paths, found, strict=True)
                detections.update((path, part) for path, part in pairs if path in self._shown)

            result = self._evaluate(model, self._all, keep_shown)
            self._known[model] = Measured(result, detections)
        return self._known[model]

    def quick_map50(self, model: Model) -> float:
        """mAP@.5 on `num_few` validation images, all of them where there are not more."""
        if self._few is None:
            return self.measure(model).result.map50
        return self._evaluate(model, self._few).map50

    def _evaluate(
        self, model: Model, batches: Iterable[Batch], on_batch: BatchHook | None = None
    ) -> EvaluationResult:
        settings = self._settings
        return evaluate(
            copy.deepcopy(model).eval().fuse().to(settings.device),
            batches,
            self._names,
            device=settings.device,
            conf_thres=settings.conf_thres,
            iou_thres=settings.iou_thres,
            single_cls=settings.single_cls,
            on_batch=on_batch,
        )

    def input_statistics(
        self, model: Model, channel_groups: ChannelGroups
    ) -> dict[str, InputStatistics]:
        """What `measure_inputs` says for the calibration images."""
        device = self._settings.device
        batches = (images.to(device).float() / 255 for images in self._calibration)
        return measure_inputs(copy.deepcopy(model).to(device), channel_groups, batches)

    def recalibrated(self, model: Model) -> Model:
        """What `recalibrate` makes of a network, on the CPU again."""
        device = self._settings.device
        batches = (images.to(device).float() / 255 for images in self._recalibration)
        return recalibrate(copy.deepcopy(model).to(device), batches).cpu()


def _first_images(batches: list[Tensor], number: int) -> list[Tensor]:
    """So many images and no more, in batches."""
    kept: list[Tensor] = []
    for batch in batches:
        if number > 0:
            kept.append(batch[:number])
        number -= len(batch)
    return kept


def _training_images(
    split: Split | None,
    settings: TrialSettings,
    num_batches: int,
    hyp: Hyperparameters | None = None,
) -> list[Tensor]:
    """Batches `[B, 3, H, W]`, uint8, in random order, squares."""
    if split is None or not num_batches:
        return []
    dataset = _make_dataset(split, settings, rect=False, batch_size=TRAINING_BATCH, hyp=hyp)
    loader = build_loader(dataset, TRAINING_BATCH, workers=0, shuffle=True, seed=0)
    return [batch.images for batch in itertools.islice(loader, num_batches)]


def _validation_loader(data: DatasetSpec, settings: TrialSettings) -> Loader:
    split = _scan(data, "val", settings)
    dataset = _make_dataset(split, settings, rect=True, batch_size=settings.batch_size)
    return build_loader(
        dataset, settings.batch_size, workers=settings.workers, shuffle=False, seed=0
    )


def _scan(data: DatasetSpec, name: str, settings: TrialSettings) -> Split:
    return scan_split(
        getattr(data, name),
        data.names,
        single_cls=settings.single_cls,
        cache=settings.keeps_scan,
    )


def _make_dataset(
    split: Split,
    settings: TrialSettings,
    rect: bool,
    batch_size: int,
    hyp: Hyperparameters | None = None,
) -> DetectionDataset:
    return DetectionDataset(
        split,
        settings.imgsz,
        hyp=hyp,
        rect=rect,
        batch_size=batch_size,
        stride=settings.stride,
        pad=RECT_PAD if rect else 0.0,
        cache=None,
        seed=0,
    )
