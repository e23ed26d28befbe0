"""The data set that a network sees: loading, placing, augmenting, batching.

`scan_split` (utils.scan) finds and checks the files; `DetectionDataset` turns one image and its
labels into network input; `build_loader` batches them, in worker processes or threads. Every random
draw depends on (seed, epoch, index) alone, so batches do not depend on the number of workers and
any epoch can be repeated. What goes wrong in a worker process travels to the parent as data: only
there it becomes one warning or one error.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import math
import os
import signal
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from utils import heap
from utils.augment import (
    GREY,
    Collage,
    Sample,
    augment_colour_and_flip,
    copy_paste,
    draw_mosaic_centre,
    draw_warp,
    find_visible_tiles,
    letterbox,
    letterbox_sample,
    mixup,
    mosaic,
    resize,
    resize_long_side,
    snap,
    warp,
)
from utils.boxes import Letterbox
from utils.config import Hyperparameters
from utils.device import num_own_cores, num_usable_cores
from utils.image_cache import RamCache, build_image_cache
from utils.image_files import MAX_FILE_BYTES, REDUCTIONS, read_image
from utils.regular_file import open_regular
from utils.scan import ScanReport, Split, scan_split

__all__ = [
    "RECT_PAD",
    "Batch",
    "DetectionDataset",
    "Loader",
    "ScanReport",
    "Split",
    "build_loader",
    "class_counts",
    "image_weights_from_map",
    "label_sizes_px",
    "round_imgsz",
    "scan_split",
]

LOGGER = logging.getLogger(__name__)

# (epoch, index) of an image; a third number tells apart repeats of an image within an epoch.
Key = int | tuple[int, int] | tuple[int, int, int]

Problems = dict[int, str]  # by index: what is wrong with an image that is shown as grey

NUM_PROBES = 16  # images looked at to tell one lost image from a lost drive

# Sockets in it have names of up to 107 bytes. Beyond, workers lose every batch and are waited for.
LONGEST_TEMPDIR = 107 - len("/pymp-xxxxxxxx/listener-xxxxxxxx")
FORKS = sys.platform == "linux"  # a new process shares the memory of this one
WORKER_GRACE = 300  # seconds that a worker lives on after SIGTERM: longer than a step may take

RECT_PAD = 0.5  # of rectangular evaluation batches, in strides
SHARED_MEMORY_REMEDY = (
    "give it more (docker run --shm-size 8g), or take fewer --workers or a smaller --batch-size; "
    "--workers 0 needs none"
)

# First word of every seed, so that no two kinds of draws share a stream.
_ORDER_STREAM, _SAMPLE_STREAM = 1, 2


class Batch(NamedTuple):
    """One batch as the loader yields it."""

    images: Tensor  # uint8 RGB [B, 3, H, W], channels last in memory
    targets: Tensor  # float32 [T, 6]: image index, class, cx, cy, w, h normalised
    paths: list[str]
    letterboxes: list[Letterbox]
    is_extra: bool = False  # another process learns from these images


class Item(NamedTuple):
    """One image as the data set yields it."""

    image: Tensor  # uint8 RGB [3, H, W], channels last in memory
    targets: Tensor  # float32 [n, 5]: class, cx, cy, w, h normalised
    path: str
    letterbox: Letterbox
    problems: tuple[tuple[str, str], ...] = ()  # path and what is wrong, of images shown as grey


class DetectionDataset(Dataset[Item]):
    """Images of a split as network input, addressed by index or (epoch, index).

    With `hyp` the samples are augmented and their letterbox says nothing about the file; without,
    the image is scaled so that its long side is `imgsz` and padded with grey. An image that can no
    longer be read becomes a grey picture without objects, and the item says so in `problems`.

    Args:
        split: from `scan_split`.
        imgsz: network input side in pixels, a multiple of the stride.
        hyp: augmentation strengths; None for evaluation.
        rect: batches of images of like shape, padded to the smallest common shape instead of the
            square. Augmentation then leaves mosaic out.
        batch_size: of rectangular batches; must be that of the loaders of all ranks together.
        stride: rectangular shapes are multiples of this.
        pad: added to rectangular shapes, in strides (0.5 for evaluation).
        cache: keeps decoded images, see `build_image_cache`; None or `off` does not.
        seed: of all random draws, from 0.
        shape_hw: of evaluation inputs instead of the square; no side longer than `imgsz`.

    Raises:
        FileNotFoundError: on access, if the whole folder or drive of the image has gone.
        ValueError: `imgsz` is no multiple of the stride, or an argument is out of range.
    """

    def __init__(
        self,
        split: Split,
        imgsz: int,
        *,
        hyp: Hyperparameters | None = None,
        rect: bool = False,
        batch_size: int = 16,
        stride: int = 32,
        pad: float = 0.0,
        cache: Literal["auto", "ram", "disk", "off"] | None = None,
        seed: int = 0,
        shape_hw: tuple[int, int] | None = None,
    ) -> None:
        if imgsz < stride or imgsz % stride:
            raise ValueError(f"imgsz {imgsz} is no multiple of the stride {stride}")
        if seed < 0 or batch_size < 1:
            raise ValueError(f"seed {seed} must be 0 or more, batch size {batch_size} 1 or more")
        self.split, self.imgsz, self.hyp, self.seed = split, imgsz, hyp, seed
        self.rect, self.batch_size = rect, batch_size
        self.input_shapes_hw = np.full((len(split), 2), shape_hw or imgsz, np.int64)
        self.rect_batches: list[np.ndarray] = []
        if rect:
            order = np.argsort(split.shapes_hw[:, 0] / split.shapes_hw[:, 1], kind="stable")
            self.rect_batches = [
                order[start : start + batch_size] for start in range(0, len(order), batch_size)
            ]
            for members in self.rect_batches:
                shape_hw = rect_shape_hw(split.shapes_hw[members], imgsz, stride, pad)
                self.input_shapes_hw[members] = shape_hw
        self._resized_hw, self._reductions = self._plan_loading()
        self._cache = None
        if cache and cache != "off":
            self._cache = build_image_cache(
                cache, split.paths, self._resized_hw, self._load_whole, self._variant()
            )

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: Key) -> Item:
        epoch, index, repeat = _full_key(key)
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        problems: Problems = {}
        if self.hyp is None:
            sample, placement = self._plain(index, problems)
        else:
            rng = np.random.default_rng((_SAMPLE_STREAM, self.seed, epoch, index, repeat))
            sample = self._augmented(index, self.hyp, rng, problems)
            placement = Letterbox(sample.hw, (1.0, 1.0), (0.0, 0.0))
        rgb = cv2.cvtColor(sample.image, cv2.COLOR_BGR2RGB)
        return Item(
            image=torch.from_numpy(rgb).permute(2, 0, 1),
            targets=torch.from_numpy(_normalised_targets(sample)),
            path=self.split.paths[index],
            letterbox=placement,
            problems=tuple((self.split.paths[bad], what) for bad, what in problems.items()),
        )

    # ------------------------------------------------------------------------------ loading
    def _plan_loading(self) -> tuple[np.ndarray, np.ndarray]:
        """Shapes with the long side `imgsz`, int64 [N, 2], and how small images may be decoded [N].

        Training images only: so that after that they are only ever shrunk.
        """
        long_sides = self.split.shapes_hw.max(1, initial=1)
        resized_hw = np.rint(self.split.shapes_hw * self.imgsz / long_sides[:, None])
        reductions = np.ones(len(self), np.uint8)
        if self.hyp is not None:
            for reduction in REDUCTIONS:  # ascending
                reductions[long_sides >= reduction * self.imgsz] = reduction
        return np.maximum(resized_hw, 1).astype(np.int64), reductions

    def _variant(self) -> str:
        return f"{self.imgsz}-{'area' if self.hyp is None else 'reduced'}"

    def _load(self, index: int, problems: Problems) -> np.ndarray:
        """Decode and resize one image; long side = imgsz. Grey if it cannot be read."""
        path, reduction = self.split.paths[index], int(self._reductions[index])
        try:
            image = read_image(path, reduction)
        except OSError as error:
            # One damaged or deleted image must not end a long run, a lost drive must.
            self._check_others_are_there(path)
            problems[index] = _describe(error, path)
            return np.full((*self._resized_hw[index], 3), GREY, np.uint8)
        height, width = self.split.shapes_hw[index].tolist()
        if reduction > 1 and image.shape[:2] == (-(-height // reduction), -(-width // reduction)):
            # The sides were rounded up: the aspect ratio is that of the file, not of the image.
            height, width = self._resized_hw[index].tolist()
            return resize(image, (height, width), cv2.INTER_LINEAR)
        return resize_long_side(image, self.imgsz, smooth=self.hyp is None)

    def _check_others_are_there(self, path: str) -> None:
        folder, paths = Path(path).parent, self.split.paths
        probes = np.linspace(0, len(paths) - 1, NUM_PROBES).astype(int).tolist()
        if not folder.is_dir() or not any(_can_be_read(paths[probe]) for probe in probes):
            raise FileNotFoundError(
                f"{folder}: the images that the scan found there have gone, for example"
                f" {Path(path).name}; put the folder back or connect its drive, and run again"
            )

    def _load_whole(self, index: int) -> np.ndarray | None:
        """What may be cached: not the substitute for a damaged image."""
        problems: Problems = {}
        image = self._load(index, problems)
        return None if problems else image

    def _sample(self, index: int, problems: Problems) -> Sample:
        """One image, long side = imgsz, with its objects in pixels."""
        image = self._cache.get(index) if self._cache else None
        image = self._load(index, problems) if image is None else image
        height, width = image.shape[:2]
        rows = self.split.labels[index]
        segments = self.split.segments[index]
        if index in problems:
            rows, segments = rows[:0], []
        scale = np.array([width, height], np.float32)
        centres, halves = rows[:, 1:3] * scale, rows[:, 3:5] * scale / 2
        labels = rows.copy()
        labels[:, 1:3], labels[:, 3:5] = centres - halves, centres + halves
        if any(map(len, segments)):
            segments = [points * scale for points in segments]
        return Sample(image, labels, segments)

    # --------------------------------------------------------------------- with and without dice
    def _plain(self, index: int, problems: Problems) -> tuple[Sample, Letterbox]:
        sample = self._sample(index, problems)
        shape_hw = tuple(self.input_shapes_hw[index].tolist())
        image, ratio_wh, pad_wh = letterbox(sample.image, shape_hw)
        original_h, original_w = self.split.shapes_hw[index].tolist()
        placement = Letterbox(
            original_hw=(original_h, original_w),
            ratio_wh=(
                ratio_wh[0] * sample.hw[1] / original_w,
                ratio_wh[1] * sample.hw[0] / original_h,
            ),
            pad_wh=(float(pad_wh[0]), float(pad_wh[1])),
        )
        labels = sample.labels.copy()
        labels[:, 1:] = labels[:, 1:] * (ratio_wh * 2) + pad_wh * 2
        return Sample(image, labels, []), placement

    def _augmented(
        self, index: int, hyp: Hyperparameters, rng: np.random.Generator, problems: Problems
    ) -> Sample:
        shape_hw = tuple(self.input_shapes_hw[index].tolist())
        sample = self._composed(index, shape_hw, hyp, rng, problems)
        if rng.random() < hyp.mixup:
            partner = int(rng.integers(len(self)))
            sample = mixup(sample, self._composed(partner, shape_hw, hyp, rng, problems), rng)
        return augment_colour_and_flip(sample, hyp, rng)

    def _composed(
        self,
        index: int,
        shape_hw: tuple[int, int],
        hyp: Hyperparameters,
        rng: np.random.Generator,
        problems: Problems,
    ) -> Sample:
        """One image or a mosaic of four, with pasted objects, warped to the input shape."""
        canvas: Sample | Collage
        if not self.rect and rng.random() < hyp.mosaic:
            indices = [index, *rng.integers(len(self), size=3).tolist()]
            rng.shuffle(indices)
            centre_xy, canvas_hw = draw_mosaic_centre(self.imgsz, rng), (2 * self.imgsz,) * 2
            matrix = snap(draw_warp(canvas_hw, shape_hw, hyp, rng), centre_xy)
            # An image that the output does not show need not be decoded, but for its objects.
            shown = [True] * 4
            if not hyp.copy_paste:
                shown = find_visible_tiles(centre_xy, self.imgsz, matrix, shape_hw)
            tiles = [
                self._sample(member, problems) if is_shown else None
                for member, is_shown in zip(indices, shown, strict=True)
            ]
            canvas = mosaic(tiles, self.imgsz, centre_xy)
        else:
            canvas = letterbox_sample(self._sample(index, problems), shape_hw)
            matrix = draw_warp(canvas.hw, shape_hw, hyp, rng)
        if hyp.copy_paste and any(map(len, canvas.segments)):
            painted = canvas.paint() if isinstance(canvas, Collage) else canvas
            canvas = copy_paste(painted, hyp.copy_paste, rng)
        return warp(canvas, matrix, shape_hw)


def _can_be_read(path: str) -> bool:
    try:
        with open_regular(path, MAX_FILE_BYTES) as file:
            return bool(file.read(1))
    except OSError:
        return False


def _describe(error: OSError, path: str) -> str:
    return f"{path}: {error.strerror}" if error.strerror else str(error)


def round_imgsz(imgsz: int, stride: int) -> int:
    """The size rounded up to a multiple of the stride, both in pixels; says so if it changes."""
    rounded = math.ceil(imgsz / stride) * stride
    if rounded != imgsz:
        LOGGER.warning("--imgsz %d is not a multiple of %d; using %d", imgsz, stride, rounded)
    return rounded


def rect_shape_hw(shapes_hw: np.ndarray, imgsz: int, stride: int, pad: float) -> tuple[int, int]:
    """Input shape for a batch of images [n, 2]: the long side `imgsz`, plus `pad` strides."""
    aspects = shapes_hw[:, 0] / shapes_hw[:, 1]
    shape = (1.0, 1.0)
    if aspects.max() < 1:
        shape = (float(aspects.max()), 1.0)
    elif aspects.min() > 1:
        shape = (1.0, float(1 / aspects.min()))
    height, width = (math.ceil(side * imgsz / stride + pad) * stride for side in shape)
    return height, width


def _full_key(key: Key) -> tuple[int, int, int]:
    if isinstance(key, tuple):
        epoch, index, *repeat = key
        return int(epoch), int(index), int(repeat[0]) if repeat else 0
    return 0, int(key), 0


def _normalised_targets(sample: Sample) -> np.ndarray:
    """Labels in pixels -> float32 [n, 5]: class, cx, cy, w, h normalised and inside the image."""
    height, width = sample.hw
    x1, x2 = (sample.labels[:, column].clip(0, width) / width for column in (1, 3))
    y1, y2 = (sample.labels[:, column].clip(0, height) / height for column in (2, 4))
    columns = [sample.labels[:, 0], (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
    return np.stack(columns, 1).astype(np.float32)


# ------------------------------------------------------------------------------------------ loader
def collate(items: Sequence[Item]) -> Batch:
    """Stack items of one shape to a batch."""
    targets = [
        torch.cat([torch.full((len(item.targets), 1), float(position)), item.targets], 1)
        for position, item in enumerate(items)
    ]
    return Batch(
        # Stacked as they lie: a copy of whole images, and the layout that convolutions like.
        images=torch.stack([item.image.permute(1, 2, 0) for item in items]).permute(0, 3, 1, 2),
        targets=torch.cat(targets),
        paths=[item.path for item in items],
        letterboxes=[item.letterbox for item in items],
    )


class _Delivery(NamedTuple):
    """What a worker sends for one batch."""

    batch: Batch | None
    problems: dict[str, str]  # by path
    error: OSError | None  # why there is no batch


class _Courier(Dataset[Item | OSError]):
    """Hands out errors instead of raising them.

    An error raised in a worker would reach the user as two tracebacks within a message.
    """

    def __init__(self, dataset: DetectionDataset, num_threads: int) -> None:
        self.dataset, self.num_threads = dataset, num_threads

    def __getitems__(self, keys: Sequence[Key]) -> list[Item | OSError]:
        """A batch; in threads, OpenCV works beside Python."""
        if self.num_threads == 1:
            return [self[key] for key in keys]
        with ThreadPoolExecutor(self.num_threads) as pool:
            return list(pool.map(self.__getitem__, keys))

    def __getitem__(self, key: Key) -> Item | OSError:
        try:
            return self.dataset[key]
        except OSError as error:
            return error


def _pack(results: Sequence[Item | OSError]) -> _Delivery:
    items = [result for result in results if isinstance(result, Item)]
    problems = {path: what for item in items for path, what in item.problems}
    error = next((result for result in results if isinstance(result, OSError)), None)
    batch = None if error else collate(items)
    if batch is not None and get_worker_info() is not None:
        try:
            # Here, where it can be told: later a thread would fail, and the batch be waited for.
            for tensor in (batch.images, batch.targets):
                if tensor.numel():
                    tensor.share_memory_()
        except RuntimeError as reason:
            text = str(reason).partition("\n")[0]
            return _Delivery(None, problems, OSError(f"{text}; {SHARED_MEMORY_REMEDY}"))
    return _Delivery(batch, problems, error)


class EpochBatchSampler(Sampler[list[Key]]):
    """Batches of keys for one epoch, a function of (seed, epoch) alone.

    Over several ranks each batch is dealt out in turn, so that together they see what one process
    with `batch_size * world_size` would: the same batches, each image once. Where the last batch
    has fewer images than there are ranks, those without one get one that is extra in training, so
    that all make as many steps, and none in evaluation.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self.dataset, self.batch_size, self.shuffle, self.seed = dataset, batch_size, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.image_weights: np.ndarray | None = None
        self.epoch = 0
        self.first_batch = 0
        self.extra: set[int] = set()  # numbers of the batches of this epoch, so far, that are

    def __len__(self) -> int:
        size = self.batch_size * self.world_size
        whole, rest = divmod(len(self.dataset), size)
        return whole + (rest > (0 if self.shuffle else self.rank))

    def __iter__(self) -> Iterator[list[Key]]:
        self.extra.clear()
        for number, parts in enumerate(self.shared_batches()):
            if number < self.first_batch:
                continue
            if self.rank >= len(parts):
                if not self.shuffle:
                    continue
                self.extra.add(number)
            yield self._own(parts)

    def _own(self, parts: list[list[Key]]) -> list[Key]:
        """The part of this rank, or what is extra."""
        return parts[self.rank] if self.rank < len(parts) else parts[0][:1]

    def batch(self, number: int, *, of_all: bool = False) -> list[Key]:
        """The batch of this number of the epoch, as iterating gives it, or that of all ranks."""
        if of_all:
            return next(itertools.islice(self._batches(), number, None))
        return self._own(next(itertools.islice(self.shared_batches(), number, None)))

    def shared_batches(self) -> Iterator[list[list[Key]]]:
        """All batches of the epoch, as the parts of each rank that has one."""
        for batch in self._batches():
            yield [batch[rank :: self.world_size] for rank in range(self.world_size)][: len(batch)]

    def _batches(self) -> Iterator[list[Key]]:
        rng = np.random.default_rng((_ORDER_STREAM, self.seed, self.epoch))
        if self.dataset.rect:
            order = np.arange(len(self.dataset.rect_batches))
            for number in (rng.permutation(order) if self.shuffle else order).tolist():
                yield [(self.epoch, index) for index in self.dataset.rect_batches[number].tolist()]
            return
        keys, size = self._keys(rng), self.batch_size * self.world_size
        for start in range(0, len(keys), size):
            yield keys[start : start + size]

    def _keys(self, rng: np.random.Generator) -> list[Key]:
        """Keys of all ranks together, in order."""
        num_images = len(self.dataset)
        if self.image_weights is None:
            order = rng.permutation(num_images) if self.shuffle else np.arange(num_images)
            return [(self.epoch, index) for index in order.tolist()]
        probabilities = _probabilities(self.image_weights, num_images)
        drawn = rng.choice(num_images, num_images, p=probabilities).tolist()
        seen: dict[int, int] = {}
        keys: list[Key] = []
        for index in drawn:
            seen[index] = seen.get(index, -1) + 1
            keys.append((self.epoch, index, seen[index]))
        return keys


def _probabilities(weights: np.ndarray, num_images: int) -> np.ndarray:
    if not weights.sum():
        return np.full(num_images, 1 / num_images)
    return weights / weights.sum()


class Loader(DataLoader[Any]):
    """A loader that yields `Batch` and can be set to any epoch before it is iterated.

    Images that cannot be read are named in one warning each and kept in `unreadable`, over all
    epochs. An `OSError` of the data set is raised as it is, whatever process it comes from. That a
    worker was killed is a `ChildProcessError`, raised where its batch is asked for.
    """

    batch_sampler: EpochBatchSampler

    def __init__(self, dataset: DetectionDataset, num_threads: int = 1, **arguments: Any) -> None:
        # Of its own, so that iterating draws nothing from the generator that a run saves.
        generator = torch.Generator()
        super().__init__(
            _Courier(dataset, num_threads), collate_fn=_pack, generator=generator, **arguments
        )
        self.unreadable: dict[str, str] = {}  # path: what is wrong
        if self.num_workers:
            _WITH_WORKERS.add(self)

    def end_workers(self) -> None:
        """Tell the workers to go, and wait for them; another iteration would start new ones.

        It happens by itself when a loader is freed, and at the end of the program.
        """
        iterator: Any = self._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            self._iterator = None

    def _deliveries(self) -> Iterator[Any]:
        """What the workers send, or this process makes: each a `_Delivery`."""
        try:
            deliveries = super().__iter__()
            if self.num_workers and threading.current_thread() is threading.main_thread():
                _tell_of_lost_workers_when_asked()
            yield from deliveries
        except (RuntimeError, EOFError, OSError):
            workers = getattr(self._iterator, "_workers", ())
            if not wait([worker.sentinel for worker in workers], timeout=1):
                raise
            reason = _describe_lost(workers)
            for worker in workers:
                worker.kill()  # it may wait for what that one has held
            raise ChildProcessError(reason) from None

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        for number, delivery in enumerate(self._deliveries(), self.batch_sampler.first_batch):
            for path, problem in delivery.problems.items():
                if path not in self.unreadable:
                    self.unreadable[path] = problem
                    count = len(self.unreadable)
                    LOGGER.warning("used as an empty picture (%d so far): %s", count, problem)
            if delivery.error is not None:
                raise delivery.error
            yield delivery.batch._replace(is_extra=number in self.batch_sampler.extra)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """Choose order and augmentation of the next iterations, and how many batches they skip."""
        self.batch_sampler.epoch, self.batch_sampler.first_batch = epoch, first_batch

    def read_again(self, number: int, *, of_all: bool = False) -> Batch:
        """The batch of this number of the epoch, or that of all ranks: the same images.

        They are read in this process.
        """
        dataset = self.batch_sampler.dataset
        return collate([dataset[key] for key in self.batch_sampler.batch(number, of_all=of_all)])

    def set_image_weights(self, weights: np.ndarray | None) -> None:
        """Draw images in proportion to weights [N], from 0, with replacement; None: each once.

        Acts from the next iteration on.

        Raises:
            ValueError: the weights do not fit the images, or the batches are rectangular.
        """
        dataset = self.batch_sampler.dataset
        if weights is not None:
            if dataset.rect:
                raise ValueError("rectangular batches have fixed members: weights cannot act")
            weights = np.asarray(weights, np.float64)
            is_valid = weights.shape == (len(dataset),) and np.isfinite(weights).all()
            if not is_valid or (weights < 0).any():
                raise ValueError(f"image weights must be {len(dataset)} finite numbers from 0")
        self.batch_sampler.image_weights = weights


def _tell_of_lost_workers_when_asked() -> None:
    """Take back what torch does when a process ends: raise, whatever is being computed.

    In the midst of a step a network is neither what it was nor what it will be. Whoever waits for
    a batch of a worker that has ended hears of it as well.
    """
    if sys.platform != "win32":
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _describe_lost(workers: Sequence[BaseProcess]) -> str:
    """One line: how the first of them that has ended did so, and what to do."""
    code = next(worker.exitcode for worker in workers if worker.exitcode is not None)
    what = f"a loader process ended with status {code}"
    if code < 0:
        what = f"a loader process was killed ({signal.Signals(-code).name})"
    return (
        f"{what}, as happens where memory or shared memory (/dev/shm) runs out; use fewer "
        "--workers, or give it more, in Docker by --shm-size"
    )


_WITH_WORKERS: weakref.WeakSet[Loader] = weakref.WeakSet()


@atexit.register
def _end_all_workers() -> None:
    """Let those go that an error or Ctrl-C has left waiting for work.

    Python would end them by SIGTERM, which they outlive by `WORKER_GRACE`.
    """
    for loader in _WITH_WORKERS:
        loader.end_workers()


def build_loader(
    dataset: DetectionDataset,
    batch_size: int,
    *,
    workers: int = 0,
    shuffle: bool = False,
    seed: int = 0,
    rank: int = -1,
    world_size: int = 1,
    pin_memory: bool | None = None,
) -> Loader:
    """Batch a data set.

    Args:
        dataset: what to load.
        batch_size: images per batch of this rank. The last batch may be smaller.
        workers: processes that load, never more than CPU cores or batches. They live as long as the
            loader. With 0 this process loads when a batch is asked for, with all its cores: where
            the CPU computes as well, processes would only take them away from it. Processes that
            train together share the cores.
        shuffle: random order, another one each epoch. Rectangular batches are shuffled as wholes.
        seed: of the order.
        rank: this process among `world_size`; -1 means there is only one.
        world_size: number of processes.
        pin_memory: page-locked batches; None means where CUDA is available.

    Raises:
        ValueError: the arguments do not fit together, or workers could not send what they load.
    """
    if batch_size < 1 or workers < 0 or seed < 0:
        raise ValueError(f"batch size {batch_size}, workers {workers} or seed {seed} is too small")
    if dataset.rect and batch_size * world_size != dataset.batch_size:
        raise ValueError(
            f"rectangular batches were made for batch size {dataset.batch_size}, not "
            f"{batch_size * world_size}"
        )
    if workers and len(os.fsencode(tempfile.gettempdir())) > LONGEST_TEMPDIR:
        raise ValueError(
            f"{tempfile.gettempdir()}: the name of the folder for temporary files is too long for "
            f"the sockets of loader processes; set TMPDIR to one of up to {LONGEST_TEMPDIR} "
            "bytes, or give --workers 0"
        )
    sampler = EpochBatchSampler(
        dataset,
        batch_size,
        shuffle=shuffle,
        seed=seed,
        rank=max(rank, 0),
        world_size=world_size,
    )
    workers = min(workers, num_usable_cores(), len(sampler))
    if workers and not FORKS and isinstance(dataset._cache, RamCache):
        LOGGER.info("--cache ram: no loader processes, as each would hold a copy of all images")
        workers = 0
    if pin_memory is None:
        pin_memory = torch.cuda.is_available()
    return Loader(
        dataset,
        1 if workers else num_own_cores(),
        batch_sampler=sampler,
        num_workers=workers,
        pin_memory=pin_memory,
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        # Forked workers share the images cached in memory instead of copying them.
        multiprocessing_context="fork" if workers and FORKS else None,
    )


def sample_batches(loader: Loader, num_images: int) -> list[Batch]:
    """Some batches of a loader, evenly spread, read in this process.

    Args:
        loader: as `build_loader` gives it; its workers are not used.
        num_images: about so many images in all, from the parts of all ranks; all batches if there
            are fewer.
    """
    keys = list(itertools.chain(*loader.batch_sampler.shared_batches()))
    wanted = max(round(len(keys) * num_images / max(sum(map(len, keys)), 1)), 1)
    chosen = keys if wanted >= len(keys) else keys[:: -(-len(keys) // wanted)]
    dataset = loader.batch_sampler.dataset
    return [collate([dataset[key] for key in batch]) for batch in chosen]


def _start_worker(_: int) -> None:
    heap.give_large_blocks_back()
    cv2.setNumThreads(0)  # the workers are the parallelism; more threads would only fight
    # Ctrl-C and batch systems signal the workers too, but the parent may want to finish its step
    # and save. It ends them when it leaves; should it be stuck, they go by themselves.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform != "win32":
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_GRACE))


# -------------------------------------------------------------------------------------- statistics
def class_counts(split: Split, num_classes: int) -> np.ndarray:
    """Number of boxes per class, int64 [K]."""
    return np.bincount(split.labels.flat[:, 0].astype(np.int64), minlength=num_classes)


def label_sizes_px(split: Split, imgsz: int) -> np.ndarray:
    """Width and height of all boxes on images scaled to a long side of `imgsz`, float64 [n, 2]."""
    shapes_wh = split.shapes_hw[:, ::-1] * (imgsz / split.shapes_hw.max(1, keepdims=True))
    return split.labels.flat[:, 3:5] * np.repeat(shapes_wh, np.diff(split.labels.offsets), axis=0)


def image_weights_from_map(split: Split, map_per_class: np.ndarray) -> np.ndarray:
    """Weights of images for --image-weights: rare and badly detected classes count more.

    Args:
        split: the training split.
        map_per_class: AP [K] of the last evaluation, 0-1; zeros before the first.

    Returns:
        [N]: the sum over an image's boxes of (1 - AP)^2 / (number of boxes of the class).
    """
    map_per_class = np.asarray(map_per_class, np.float64)
    counts = class_counts(split, len(map_per_class))
    per_class = (1 - map_per_class) ** 2 / np.maximum(counts, 1)
    per_box = per_class[split.labels.flat[:, 0].astype(np.int64)]
    owners = np.repeat(np.arange(len(split)), np.diff(split.labels.offsets))
    return np.bincount(owners, weights=per_box, minlength=len(split))
