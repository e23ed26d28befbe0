import copy
import dataclasses
import json
import random

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import val
from benchmarks import plain
from models import Model, ModelSpec
from utils.checkpoint import build_checkpoint, save_checkpoint
from utils.config import load_hyperparameters
from utils.dataset import DetectionDataset, build_loader, scan_split
from utils.evaluate import evaluate
from utils.loss import DetectionLoss, LossSettings
from utils.metrics import match_detections
from utils.optim import ModelEma

CPU = torch.device("cpu")
SETTINGS = LossSettings(box=0.05, obj=1.0, cls=0.5, label_smoothing=0.1)
ANCHORS = torch.tensor([[[1.2, 1.6], [2.0, 3.8], [4.1, 2.9]], [[1.9, 3.8], [3.9, 2.8], [3.7, 7.4]]])


@pytest.fixture
def hyp():
    return load_hyperparameters("data/hyps/hyp.scratch-low.yaml")


@pytest.fixture
def tiny_split(tiny_dataset):
    return scan_split([tiny_dataset.images], tiny_dataset.names, cache=False)


@pytest.fixture
def white_split(tmp_path):
    """Dark images, each with one white rectangle, as PNG, so that the edges are sharp."""
    folder, label_folder = tmp_path / "images", tmp_path / "labels"
    folder.mkdir()
    label_folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(6):
        height, width = rng.integers(60, 140, 2).tolist()
        image = np.full((height, width, 3), 40, np.uint8)
        x1, y1 = rng.integers(8, 20, 2).tolist()
        x2, y2 = width - rng.integers(8, 30), height - rng.integers(8, 30)
        image[y1:y2, x1:x2] = 255
        cv2.imwrite(str(folder / f"{number}.png"), image)
        box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        line = "0 " + " ".join(map(str, box))
        (label_folder / f"{number}.txt").write_text(line, encoding="utf-8")
    return scan_split([folder], ["white"], cache=False)


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["single", "mosaic"])
def test_boxes_stay_on_their_objects(white_split, hyp, share):
    hyp = dataclasses.replace(hyp, mosaic=share, hsv_h=0, hsv_s=0, hsv_v=0)
    dataset = plain.PlainDataset(white_split, 128, hyp)
    random.seed(0)
    num_boxes = 0
    for index in range(len(dataset)):
        image, labels, _ = dataset[index]
        white = (image[0] > 184).astype(np.uint8)  # half way between grey and white
        found = cv2.connectedComponentsWithStats(white)[2][1:, :4].astype(float)
        found[:, 2:] += found[:, :2]  # x, y, w, h -> xyxy
        boxes = labels[:, 1:] * 128
        boxes = np.concatenate(
            [boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], 1
        )
        for box in boxes:
            assert np.abs(found - box).max(1).min() < 2
        num_boxes += len(boxes)
    assert num_boxes >= len(dataset)


def describe(image, boxes):
    """Numbers of one augmented sample: how many boxes, where, how large; colours; their squares."""
    pixels = image.reshape(3, -1) / 255.0
    sums = np.concatenate([[len(boxes)], boxes.sum(0), boxes[:, 2:].prod(1, keepdims=True).sum(0)])
    numbers = np.concatenate([sums, pixels.mean(1), pixels.std(1)])
    return np.concatenate([numbers, numbers**2])


def test_augmented_samples_are_distributed_as_ours(tiny_split, hyp):
    """Mosaic, zoom, shift, flip and colours: all means over 600 samples agree within chance."""
    theirs, ours = (
        kind(tiny_split, 64, hyp=hyp) for kind in (plain.PlainDataset, DetectionDataset)
    )
    random.seed(0)
    means, variances = [], []
    for dataset in (theirs, ours):
        keys = [(epoch, index) for epoch in range(150) for index in range(len(tiny_split))]
        items = [dataset[key if dataset is ours else key[1]] for key in keys]
        samples = np.stack([describe(np.asarray(item[0]), np.asarray(item[1])[:, 1:])
                            for item in items])  # fmt: skip
        means.append(samples.mean(0))
        variances.append(samples.var(0) / len(samples))
    off = (means[0] - means[1]) / np.sqrt(variances[0] + variances[1])
    assert np.abs(off).max() < 4, off.round(1)


def test_evaluation_items_are_those_of_val(tiny_split):
    ours = DetectionDataset(tiny_split, 64, rect=True, batch_size=2, pad=0.5)
    theirs = plain.build_loader(plain.PlainDataset(tiny_split, 64, None, 2), 2, 0)
    batches = zip(build_loader(ours, 2), theirs, strict=True)
    for batch, (images, targets, letterboxes) in batches:
        assert batch.letterboxes == letterboxes
        torch.testing.assert_close(batch.targets, targets)
        assert (batch.images.float() - images.float()).abs().mean() < 1


@pytest.mark.parametrize("num_targets", [0, 1, 60])
def test_the_loss_is_the_same(num_targets):
    torch.manual_seed(num_targets)
    shapes = [(2, 3, 12, 16, 8), (2, 3, 6, 8, 8)]
    answers = [[torch.randn(shape) for shape in shapes]] * 2
    targets = torch.rand(num_targets, 6)
    targets[:, :2] = torch.floor(targets[:, :2] * torch.tensor([2, 3]))
    results = []
    for loss_class in (plain.PlainLoss, DetectionLoss):
        logits = [level.clone().requires_grad_() for level in answers[0]]
        loss, parts = loss_class(ANCHORS, SETTINGS)(logits, targets)
        loss.sum().backward()
        results.append((loss.reshape(()), parts, *(level.grad for level in logits)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_the_matching_is_the_same():
    rng = np.random.default_rng(0)
    for _ in range(20):
        corners = rng.uniform(0, 50, (30, 2)).round()
        boxes = np.concatenate([corners, corners + rng.uniform(15, 40, (30, 2)).round()], 1)
        classes = rng.integers(0, 2, (30, 1))
        labels = np.concatenate([classes, boxes], 1)[:10]
        moved = boxes + rng.uniform(-4, 4, boxes.shape)
        detections = np.concatenate([moved, np.linspace(1, 0.1, 30)[:, None], classes], 1)
        iou = plain.box_iou(labels[:, 1:], moved)
        iou[labels[:, :1] != classes.T] = 0
        (correct,) = match_detections([detections], [labels])
        assert np.array_equal(plain.match(iou), correct)


class Oracle(nn.Module):
    """Answers batch after batch with boxes near the targets, some twice, some of a wrong class."""

    def __init__(self, batches):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answers = [self._answer(images, targets) for images, targets, _ in batches]
        self.calls = 0

    @staticmethod
    def _answer(images, targets):
        rng = np.random.default_rng(len(targets))
        height, width = images.shape[2:]
        predictions = np.zeros((len(images), 40, 8), np.float32)
        for row in range(40):
            for image in range(len(images)):
                mine = targets[targets[:, 0] == image].numpy()
                true = mine[row % len(mine)] if len(mine) else rng.uniform(0.3, 0.6, 6)
                box = true[2:] * (width, height, width, height) * rng.uniform(0.85, 1.15, 4)
                cls = int(true[1]) if rng.random() < 0.8 else 2
                predictions[image, row, :5] = *box, rng.uniform(0.01, 1)
                predictions[image, row, 5 + cls] = 0.9
        return torch.from_numpy(predictions)

    def forward(self, images):
        self.calls += 1
        return self.answers[self.calls - 1], [torch.zeros(1)]


def test_map_is_that_of_our_evaluation(tiny_split, tiny_dataset):
    loader = plain.build_loader(plain.PlainDataset(tiny_split, 64, None, 2), 2, 0)
    oracle = Oracle(loader)
    ours = DetectionDataset(tiny_split, 64, rect=True, batch_size=2, pad=0.5)
    result = evaluate(
        copy.deepcopy(oracle), build_loader(ours, 2), tiny_dataset.names, device=CPU, progress=False
    )
    score = plain.evaluate(oracle, loader, CPU)
    assert score == pytest.approx((result.map50, result.map50_95), abs=1e-3)
    assert 0.1 < score.map50_95 < score.map50


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_plain_training_learns_and_averages_as_ours(tiny_spec, hyp, optimizer):
    torch.manual_seed(0)
    model = Model(ModelSpec.from_dict(tiny_spec, "tiny"))
    training = plain.PlainTraining(model, SETTINGS, hyp, optimizer, CPU)
    average = ModelEma(model)
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.3], [1, 2, 0.3, 0.6, 0.2, 0.5]])
    losses = []
    for _ in range(8):
        losses.append(training.train_one_epoch([(images, targets)]))
        average.update(model)
    assert losses[-1] < losses[0]
    for name, value in average.model.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(training.average.state_dict()[name], value)


def test_images_in_memory_are_the_same(tiny_split, hyp):
    for kind in (None, hyp):
        read, kept = (plain.PlainDataset(tiny_split, 64, kind, cache=cache) for cache in (0, 1))
        for index in range(len(read)):
            random.seed(index)
            expected = read[index]
            random.seed(index)
            assert all(map(np.array_equal, kept[index], expected))


def test_validation_as_a_command(tiny_spec, tiny_dataset, tmp_path, capsys):
    """It finds what val.py finds, and draws."""
    weights = tmp_path / "weights.pt"
    torch.manual_seed(0)
    model = Model(ModelSpec.from_dict(tiny_spec))
    save_checkpoint(weights, build_checkpoint(model, tiny_dataset.names))
    flags = ["--data", str(tiny_dataset.yaml), "--weights", str(weights)]
    plain.main([*flags, "--img", "64", "--workers", "0", "--out", str(tmp_path / "plain")])
    loop = ["--img", "64", "--device", "cpu", "--noplots", "--project", str(tmp_path)]
    val.main([*flags, *loop, "--name", "ours"])
    score = json.loads((tmp_path / "ours/results.json").read_text())
    line = f"mAP@.5 {score['map50']:.4f}, mAP@.5:.95 {score['map50_95']:.4f}"
    assert line in capsys.readouterr().out
    pictures = sorted((tmp_path / "plain").iterdir())
    assert len(pictures) == 7
    assert all(cv2.imread(str(picture)).std() > 0 for picture in pictures)
