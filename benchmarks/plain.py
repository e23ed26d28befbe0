"""The textbook YOLOv5: the baseline of the benchmarks, neither tuned nor crippled.

float32, NCHW, batch normalisation as it is, a loader that decodes at full size, an optimizer and a
weight average as the tutorials have them. It trains and validates the same network on the same
targets with the same loss as the product, so the time is the only difference. What the default
hyperparameters switch off is left out: shear, perspective, up-down flip, mixup, copy-paste, focal
loss, weights of positives. It must not change with the product: where that gets faster, this stays.

    python -m benchmarks.plain --data bccd.yaml --weights best.pt --img 640 --out runs/plain

validates as a command: it loads, detects in every image of the split `val`, prints mAP and draws.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from models import Model
from utils.boxes import Letterbox, box_iou, paired_iou, to_original, xyxy_from_cxcywh
from utils.checkpoint import load_detector
from utils.command import run_command
from utils.config import Hyperparameters, load_dataset_spec
from utils.loss import LEVEL_BALANCE, LEVEL_BALANCE_OTHER, LossSettings
from utils.metrics import (
    IOU_THRESHOLDS,
    ApResult,
    ConfusionMatrix,
    average_precision_per_class,
)
from utils.optim import group_parameters
from utils.scan import Split, scan_split

GREY = (114, 114, 114)
WARMUP_STEPS = 100
EMA_DECAY, EMA_TAU = 0.9999, 2000
MAX_CANDIDATES = 30_000
CLASS_OFFSET = 10_000.0  # px, further than any image reaches
PAD = 0.5  # of rectangular evaluation batches, in strides
NUM_PICTURES, NUM_TILES, TILE_WH = 3, 16, (480, 480)  # of a validation; of a picture
DRAWN_CONF = 0.25


# ------------------------------------------------------------------------------------------ loader
class PlainBatch(NamedTuple):
    """Images uint8 [B, 3, H, W], targets [T, 6] as everywhere, where the images were placed."""

    images: Tensor
    targets: Tensor
    letterboxes: list[Letterbox]


class PlainDataset(Dataset[tuple[np.ndarray, np.ndarray, Letterbox]]):
    """Mosaic, affine, HSV and flip with `hyp`; without, letterboxes in order of their aspect."""

    def __init__(
        self,
        split: Split,
        imgsz: int,
        hyp: Hyperparameters | None = None,
        batch_size: int = 16,
        stride: int = 32,
        cache: bool = False,
    ) -> None:
        """With `cache` all images are decoded and scaled now, and kept in memory."""
        self.split, self.imgsz, self.hyp = split, imgsz, hyp
        self.images = [self._read(index) for index in range(len(split))] if cache else None
        self.order = np.arange(len(split))
        self.shapes_hw = np.full((len(split), 2), imgsz)
        if hyp is None:
            aspects = split.shapes_hw[:, 0] / split.shapes_hw[:, 1]
            self.order = np.argsort(aspects, kind="stable")
            for start in range(0, len(split), batch_size):
                members = self.order[start : start + batch_size]
                height, width = (
                    min(1.0, aspects[members].max()),
                    min(1.0, 1 / aspects[members].min()),
                )
                for axis, share in enumerate((height, width)):
                    self.shapes_hw[members, axis] = math.ceil(share * imgsz / stride + PAD) * stride

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, position: int) -> tuple[np.ndarray, np.ndarray, Letterbox]:
        """Image RGB [3, H, W], labels [n, 5] (class, cxcywh normalised), its place."""
        index = int(self.order[position])
        if self.hyp is None:
            image, labels, place = self._letterboxed(index)
        else:
            image, labels = self.augmented(index, self.hyp)
            place = Letterbox(image.shape[:2], (1.0, 1.0), (0.0, 0.0))
        height, width = image.shape[:2]
        boxes = labels[:, 1:].reshape(-1, 2, 2).clip(0, (width, height)) / (width, height)
        centres, sizes = boxes.mean(1), boxes[:, 1] - boxes[:, 0]
        rows = np.concatenate([labels[:, :1], centres, sizes], 1).astype(np.float32)
        rgb = np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1))
        return rgb, rows, place

    def _read(self, index: int) -> np.ndarray:
        """Image with a long side of `imgsz`."""
        image = cv2.imread(self.split.paths[index])
        height, width = image.shape[:2]
        ratio = self.imgsz / max(height, width)
        if ratio != 1:
            average = ratio < 1 and self.hyp is None
            method = cv2.INTER_AREA if average else cv2.INTER_LINEAR
            size_wh = (round(width * ratio), round(height * ratio))
            image = cv2.resize(image, size_wh, interpolation=method)
        return image

    def _load(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Image with a long side of `imgsz`, labels [n, 5] (class, xyxy) in its pixels."""
        image = self._read(index) if self.images is None else self.images[index]
        height, width = image.shape[:2]
        labels = self.split.labels[index].copy()
        labels[:, 1:] = xyxy_from_cxcywh(labels[:, 1:]) * (width, height, width, height)
        return image, labels

    def _letterboxed(self, index: int) -> tuple[np.ndarray, np.ndarray, Letterbox]:
        image, labels = self._load(index)
        (height, width), (to_h, to_w) = image.shape[:2], self.shapes_hw[index].tolist()
        top, left = (to_h - height) // 2, (to_w - width) // 2
        bottom, right = to_h - height - top, to_w - width - left
        image = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=GREY)
        labels[:, 1:] += (left, top, left, top)
        full_h, full_w = self.split.shapes_hw[index].tolist()
        ratio_wh = (width / full_w, height / full_h)
        return image, labels, Letterbox((full_h, full_w), ratio_wh, (float(left), float(top)))

    def augmented(self, index: int, hyp: Hyperparameters) -> tuple[np.ndarray, np.ndarray]:
        """Image BGR and labels [n, 5] (class, xyxy) in pixels, from one image or four."""
        if random.random() < hyp.mosaic:
            image, labels = self._mosaic(index)
        else:
            image, labels, _ = self._letterboxed(index)
        image, labels = self._warp(image, labels, hyp)
        image = jitter_hsv(image, hyp)
        if random.random() < hyp.fliplr:
            image = np.fliplr(image)
            labels[:, [1, 3]] = self.imgsz - labels[:, [3, 1]]
        return image, labels

    def _mosaic(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Four images around a random point of a canvas of twice the side."""
        side = self.imgsz
        canvas = np.full((2 * side, 2 * side, 3), GREY, np.uint8)
        x, y = (random.randint(side // 2, 3 * side // 2) for _ in range(2))
        indices = [index, *random.choices(range(len(self)), k=3)]
        random.shuffle(indices)
        all_labels = []
        for corner, member in enumerate(indices):
            image, labels = self._load(member)
            height, width = image.shape[:2]
            left, top = x - width * (corner % 2 == 0), y - height * (corner < 2)
            x1, y1 = max(left, 0), max(top, 0)
            x2, y2 = min(left + width, 2 * side), min(top + height, 2 * side)
            canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]
            labels[:, 1:] += (left, top, left, top)
            all_labels.append(labels)
        labels = np.concatenate(all_labels)
        labels[:, 1:] = labels[:, 1:].clip(0, 2 * side)
        return canvas, labels

    def _warp(
        self, image: np.ndarray, labels: np.ndarray, hyp: Hyperparameters
    ) -> tuple[np.ndarray, np.ndarray]:
        """Turn and zoom around the middle, shift, cut to `imgsz`; drop what is hardly seen."""
        height, width = image.shape[:2]
        angle = random.uniform(-hyp.degrees, hyp.degrees)
        zoom = random.uniform(1 - hyp.scale, 1 + hyp.scale)
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), angle, zoom)
        for axis, length in enumerate((width, height)):
            middle = random.uniform(0.5 - hyp.translate, 0.5 + hyp.translate) * self.imgsz
            matrix[axis, 2] += middle - length / 2
        image = cv2.warpAffine(image, matrix, (self.imgsz, self.imgsz), borderValue=GREY)
        corners = labels[:, [1, 2, 3, 2, 3, 4, 1, 4]].reshape(-1, 4, 2)
        corners = corners @ matrix[:, :2].T + matrix[:, 2]
        boxes = np.concatenate([corners.min(1), corners.max(1)], 1).clip(0, self.imgsz)
        sides, before = boxes[:, 2:] - boxes[:, :2], labels[:, 3:] - labels[:, 1:3]
        short, long = sides.min(1, initial=np.inf), sides.max(1, initial=0)
        seen = sides.prod(1) > 0.1 * before.prod(1) * zoom**2
        keep = seen & (short > 2) & (long < 100 * short)
        return image, np.concatenate([labels[:, :1], boxes], 1)[keep]


def jitter_hsv(image: np.ndarray, hyp: Hyperparameters) -> np.ndarray:
    """Scale hue, saturation and brightness by random gains, with a table each."""
    gains = [1 + random.uniform(-1, 1) * reach for reach in (hyp.hsv_h, hyp.hsv_s, hyp.hsv_v)]
    levels = np.arange(256)
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_BGR2HSV))
    hue = cv2.LUT(hue, (levels * gains[0] % 180).astype(np.uint8))
    saturation = cv2.LUT(saturation, (levels * gains[1]).clip(0, 255).astype(np.uint8))
    value = cv2.LUT(value, (levels * gains[2]).clip(0, 255).astype(np.uint8))
    return cv2.cvtColor(cv2.merge((hue, saturation, value)), cv2.COLOR_HSV2BGR)


def collate(items: Sequence[tuple[np.ndarray, np.ndarray, Letterbox]]) -> PlainBatch:
    """Stack items of one shape."""
    images, labels, places = zip(*items, strict=True)
    targets = [np.insert(rows, 0, number, axis=1) for number, rows in enumerate(labels)]
    stacked = torch.stack([torch.from_numpy(image) for image in images])
    return PlainBatch(stacked, torch.from_numpy(np.concatenate(targets)), list(places))


def build_loader(dataset: PlainDataset, batch_size: int, workers: int) -> DataLoader[Any]:
    """The loader of torch; shuffled if the data set augments."""
    return DataLoader(
        dataset,
        batch_size,
        shuffle=dataset.hyp is not None,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
    )


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)


# ---------------------------------------------------------------------------------------- training
class PlainLoss:
    """The loss, level by level, with boolean masks; the same figures as `DetectionLoss`."""

    def __init__(self, anchors_grid: Tensor, settings: LossSettings) -> None:
        """`anchors_grid`: [L, A, 2] in cells."""
        self.anchors_grid, self.settings = anchors_grid, settings
        self.balance = LEVEL_BALANCE.get(len(anchors_grid), LEVEL_BALANCE_OTHER)

    def __call__(self, logits: Sequence[Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss to minimise, and its three terms [3], from logits per level and targets [T, 6]."""
        device, settings = targets.device, self.settings
        box, obj, cls = (torch.zeros(1, device=device) for _ in range(3))
        for level, answers in enumerate(logits):
            cells, boxes, anchors, classes = self.assign(targets, level, answers.shape[2:4])
            wanted = torch.zeros(answers.shape[:4], device=device)
            if len(classes):
                found = answers[cells]
                centres = found[:, :2].sigmoid() * 2 - 0.5
                sizes = (found[:, 2:4].sigmoid() * 2) ** 2 * anchors
                iou = paired_iou(torch.cat((centres, sizes), 1), boxes)
                box = box + (1 - iou).mean()
                rising = iou.detach().argsort()  # of several boxes in a cell the best comes last
                wanted[tuple(part[rising] for part in cells)] = iou.detach().clamp(0)[rising]
                if found.shape[1] > 6:
                    smooth = settings.label_smoothing / 2
                    one_hot = torch.full_like(found[:, 5:], smooth)
                    one_hot[torch.arange(len(classes), device=device), classes] = 1 - smooth
                    cls = cls + F.binary_cross_entropy_with_logits(found[:, 5:], one_hot)
            term = F.binary_cross_entropy_with_logits(answers[..., 4], wanted)
            obj = obj + term * self.balance[level]
        parts = torch.cat((box * settings.box, obj * settings.obj, cls * settings.cls))
        return parts.sum() * len(logits[0]), parts.detach()

    def assign(
        self, targets: Tensor, level: int, grid_hw: Sequence[int]
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
        """Which anchors of a level answer: cells (4 x [N]), boxes in them, anchors, classes."""
        height, width = grid_hw
        anchors = self.anchors_grid[level]
        grid = targets.new_tensor((width, height))
        numbers = torch.arange(len(anchors), device=targets.device)
        rows = targets.repeat(len(anchors), 1)  # [A * T, 6]
        number = numbers.repeat_interleave(len(targets))
        sides = rows[:, 4:] * grid / anchors[number]
        fits = torch.maximum(sides, 1 / sides).max(1).values < self.settings.anchor_t
        rows, number = rows[fits], number[fits]
        centres = rows[:, 2:4] * grid
        low = (centres % 1 < 0.5) & (centres > 1)
        high = ((grid - centres) % 1 < 0.5) & (grid - centres > 1)
        every = torch.ones_like(low[:, 0])
        chosen = torch.stack((every, low[:, 0], low[:, 1], high[:, 0], high[:, 1]))  # [5, N]
        steps = centres.new_tensor([[0, 0], [0.5, 0], [0, 0.5], [-0.5, 0], [0, -0.5]])
        corners = (centres - steps[:, None])[chosen].long()
        rows, number, centres = (
            values.expand(5, *values.shape)[chosen] for values in (rows, number, centres)
        )
        column, row = corners[:, 0].clamp(0, width - 1), corners[:, 1].clamp(0, height - 1)
        offsets = centres - torch.stack((column, row), 1)
        boxes = torch.cat((offsets, rows[:, 4:] * grid), 1)
        image, classes = rows[:, 0].long(), rows[:, 1].long()
        return (image, number, row, column), boxes, anchors[number], classes


class PlainTraining:
    """A network with what trains it, an optimizer step a batch."""

    def __init__(
        self,
        model: Model,
        settings: LossSettings,
        hyp: Hyperparameters,
        optimizer: str,
        device: torch.device,
    ) -> None:
        self.model, self.hyp, self.device = model.to(device), hyp, device
        self.loss = PlainLoss(model.head.anchors, settings)
        groups = group_parameters(model)
        weights = {"params": groups["weights"], "weight_decay": hyp.weight_decay}
        rest = {"params": groups["norms"] + groups["biases"], "weight_decay": 0}
        self.optimizer: torch.optim.Optimizer
        if optimizer == "SGD":
            self.optimizer = torch.optim.SGD([weights, rest], hyp.lr0, hyp.momentum, nesterov=True)
        else:
            self.optimizer = torch.optim.AdamW([weights, rest], hyp.lr0, (hyp.momentum, 0.999))
        self.average = copy.deepcopy(model).eval().requires_grad_(False)
        self.steps = 0

    def train_one_epoch(self, batches: Iterable[Any]) -> float:
        """One pass over the batches; returns the mean loss."""
        self.model.train()
        losses = []
        bar = tqdm(batches, desc="plain")
        for images, targets, *_ in bar:
            for group in self.optimizer.param_groups:
                group["lr"] = self.hyp.lr0 * min((self.steps + 1) / WARMUP_STEPS, 1)
            images = images.to(self.device, non_blocking=True).float() / 255
            loss, _ = self.loss(self.model(images), targets.to(self.device))
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.steps += 1
            self._update_average()
            losses.append(loss.item())
            bar.set_postfix(loss=losses[-1])
        return sum(losses) / max(len(losses), 1)

    @torch.no_grad()
    def _update_average(self) -> None:
        decay = EMA_DECAY * (1 - math.exp(-self.steps / EMA_TAU))
        latest = self.model.state_dict()
        for name, value in self.average.state_dict().items():
            if value.is_floating_point():
                value *= decay
                value += (1 - decay) * latest[name]


# -------------------------------------------------------------------------------------- validation
class Score(NamedTuple):
    """The two figures that say that two validations did the same."""

    map50: float
    map50_95: float


def main(argv: Sequence[str] | None = None) -> None:
    """Validate as a command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", required=True, help="data set yaml; its split val is taken")
    parser.add_argument("--weights", required=True, help="checkpoint")
    parser.add_argument("--img", type=int, default=640, help="pixels")
    parser.add_argument("--batch", type=int, default=32, help="images")
    parser.add_argument("--workers", type=int, default=2, help="loader processes")
    parser.add_argument("--device", default="cpu", help="as torch names it")
    parser.add_argument("--out", required=True, help="folder of the pictures")
    options = parser.parse_args(argv)
    device, folder = torch.device(options.device), Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    data = load_dataset_spec(options.data, Path.cwd())
    model = load_detector(Path(options.weights), device).model
    split = scan_split(data.val, data.names)
    dataset = PlainDataset(split, options.img, None, options.batch, model.max_stride)
    loader = build_loader(dataset, options.batch, options.workers)
    pictures = iter(range(NUM_PICTURES))

    def draw(batch: PlainBatch, found: Sequence[np.ndarray]) -> None:
        number = next(pictures, None)
        if number is not None:
            draw_batch(batch, found, data.names, folder / f"batch{number}.jpg")

    ap, confusion = detect_and_match(model, loader, device, data.num_classes, on_batch=draw)
    names = [data.names[cls] for cls in ap.classes]
    draw_curves(ap, names, folder)
    draw_confusion(confusion.matrix, [*data.names, "background"], folder / "confusion.png")
    print(f"mAP@.5 {ap.ap50.mean():.4f}, mAP@.5:.95 {ap.ap50_95.mean():.4f}")


def evaluate(model: nn.Module, loader: Iterable[PlainBatch], device: torch.device) -> Score:
    """Detect in every image and compare with the labels, image by image."""
    ap, _ = detect_and_match(model, loader, device)
    return Score(float(ap.ap50.mean()), float(ap.ap50_95.mean()))


@torch.no_grad()
def detect_and_match(
    model: nn.Module,
    loader: Iterable[PlainBatch],
    device: torch.device,
    num_classes: int = 0,
    conf_thres: float = 0.001,
    iou_thres: float = 0.6,
    max_det: int = 300,
    on_batch: Callable[[PlainBatch, Sequence[np.ndarray]], None] | None = None,
) -> tuple[ApResult, ConfusionMatrix]:
    """Average precision, and which classes are taken for which where their number is given.

    `on_batch` is called with each batch and its detections [M, 6], in pixels of the batch.
    """
    model.eval()
    confusion = ConfusionMatrix(num_classes)
    correct, conf, pred_cls, label_cls = [], [], [], []
    for batch in tqdm(loader, desc="plain"):
        predictions, _ = model(batch.images.to(device).float() / 255)
        height, width = batch.images.shape[2:]
        detections = []
        for number, place in enumerate(batch.letterboxes):
            rows = suppress(predictions[number], conf_thres, iou_thres)[:max_det].cpu()
            found = to_original(rows[:, :4], place).double().numpy()
            labels = batch.targets[batch.targets[:, 0] == number].double().numpy()
            boxes = xyxy_from_cxcywh(labels[:, 2:]) * (width, height, width, height)
            boxes = to_original(boxes, place)
            classes = rows[:, 5].numpy()
            correct.append(match(np.where(labels[:, 1:2] == classes, box_iou(boxes, found), 0)))
            conf.append(rows[:, 4].numpy())
            pred_cls.append(classes)
            label_cls.append(labels[:, 1])
            detections.append(rows.numpy())
            if num_classes:
                confusion.update(
                    np.concatenate([found, rows[:, 4:].numpy()], 1),
                    np.concatenate([labels[:, 1:2], boxes], 1),
                )
        if on_batch is not None:
            on_batch(batch, detections)
    ap = average_precision_per_class(*map(np.concatenate, (correct, conf, pred_cls, label_cls)))
    return ap, confusion


def suppress(predictions: Tensor, conf_thres: float, iou_thres: float) -> Tensor:
    """Detections [M, 6] of one image, best first; boxes of other classes are moved out of reach."""
    rows = predictions[predictions[:, 4] > conf_thres]
    scores = rows[:, 5:] * rows[:, 4:5]
    row, cls = (scores > conf_thres).nonzero(as_tuple=True)
    conf = scores[row, cls]
    best = conf.argsort(descending=True)[:MAX_CANDIDATES]
    boxes, conf, cls = xyxy_from_cxcywh(rows[row[best], :4]), conf[best], cls[best].float()
    keep = torchvision.ops.nms(boxes + cls[:, None] * CLASS_OFFSET, conf, iou_thres)
    return torch.cat((boxes, conf[:, None], cls[:, None]), 1)[keep]


def match(iou: np.ndarray) -> np.ndarray:
    """Which detections are right, bool [M, I], from the IoU [T, M] with labels of their class.

    At each threshold the detections choose in order, each the free label it overlaps most.
    """
    correct = np.zeros((iou.shape[1], len(IOU_THRESHOLDS)), bool)
    for column, threshold in enumerate(IOU_THRESHOLDS):
        free = np.ones(len(iou), bool)
        for detection in np.flatnonzero((iou >= threshold).any(0)):
            offers = np.where(free, iou[:, detection], 0)
            label = offers.argmax()
            if offers[label] >= threshold:
                correct[detection, column] = True
                free[label] = False
    return correct


def draw_batch(
    batch: PlainBatch, detections: Sequence[np.ndarray], names: Sequence[str], out: Path
) -> None:
    """The first images of a batch twice: with their labels, and with what was found."""
    height, width = batch.images.shape[2:]
    rows = batch.targets.numpy()
    boxes = xyxy_from_cxcywh(rows[:, 2:]) * (width, height, width, height)
    labels = [
        np.concatenate([boxes[mine], np.ones((mine.sum(), 1)), rows[mine, 1:2]], 1)
        for mine in (rows[:, 0] == number for number in range(len(batch.images)))
    ]
    for kind, per_image in (("labels", labels), ("found", detections)):
        tiles = []
        for pixels, found in zip(batch.images[:NUM_TILES], per_image, strict=False):
            tile = np.ascontiguousarray(pixels.numpy().transpose(1, 2, 0)[:, :, ::-1])
            for x1, y1, x2, y2, conf, cls in found[found[:, 4] >= DRAWN_CONF].tolist():
                corner = (round(x1), round(y1))
                cv2.rectangle(tile, corner, (round(x2), round(y2)), (0, 0, 255), 2)
                text = f"{names[int(cls)]} {conf:.1f}"
                cv2.putText(tile, text, corner, cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 255))
            tiles.append(cv2.resize(tile, TILE_WH))
        columns = math.ceil(math.sqrt(len(tiles)))
        tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
        strips = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles), columns)]
        cv2.imwrite(str(out.with_stem(f"{out.stem}_{kind}")), np.vstack(strips))


def draw_curves(ap: ApResult, names: Sequence[str], folder: Path) -> None:
    """Precision over recall, and precision, recall and F1 over confidence."""
    from matplotlib import pyplot as plt

    for name, x, curves in (
        ("PR", ap.recalls, ap.precision_at_recall),
        ("P", ap.confidences, ap.precision_curve),
        ("R", ap.confidences, ap.recall_curve),
        ("F1", ap.confidences, ap.f1_curve),
    ):
        figure, axis = plt.subplots(figsize=(8.5, 5.6), tight_layout=True)
        for label, curve in zip(names, curves, strict=True):
            axis.plot(x, curve, label=label)
        axis.plot(x, curves.mean(0), linewidth=3, label="all classes")
        axis.set(title=name, xlim=(0, 1), ylim=(0, 1))
        axis.legend()
        figure.savefig(folder / f"{name}_curve.png", dpi=110)
        plt.close(figure)


def draw_confusion(matrix: np.ndarray, names: Sequence[str], out: Path) -> None:
    """Shares of each labelled class."""
    from matplotlib import pyplot as plt

    shares = matrix / np.maximum(matrix.sum(0), 1)
    figure, axis = plt.subplots(figsize=(8, 6.7), tight_layout=True)
    figure.colorbar(axis.imshow(shares, cmap="Blues", vmin=0, vmax=1))
    for (row, column), share in np.ndenumerate(shares):
        axis.text(column, row, f"{share:.2f}", ha="center", va="center")
    axis.set_xticks(range(len(names)), names)
    axis.set_yticks(range(len(names)), names)
    figure.savefig(out, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run_command(main)
