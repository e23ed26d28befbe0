import json

import numpy as np
import pytest
import torch
from torch import nn

from models import Model, ModelSpec
from utils.boxes import Letterbox, cxcywh_from_xyxy
from utils.checkpoint import load_detector
from utils.config import load_dataset_spec
from utils.dataset import Batch, DetectionDataset, build_loader, scan_split
from utils.evaluate import evaluate
from utils.loss import DetectionLoss, LossSettings, Measured

CPU = torch.device("cpu")
NAMES = ("cat", "dog", "fox")
INPUT_HW = (64, 96)
# Original 100 x 160 pixels, halved, with 8 pixels of padding on the left and 7 at the top.
LETTERBOX = Letterbox((100, 160), (0.5, 0.5), (8.0, 7.0))


class Oracle(nn.Module):
    """Answers batch after batch with prepared predictions; row: xyxy on the input, conf, class."""

    def __init__(self, answers, num_classes=3):
        super().__init__()
        self.answers, self.num_classes, self.seen = list(answers), num_classes, []
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        self.seen.append((images.dtype, float(images.max()), self.training))
        rows = torch.tensor(self.answers[len(self.seen) - 1], dtype=torch.float32)
        rows = rows.reshape(len(images), -1, 6)
        scores = torch.nn.functional.one_hot(rows[..., 5].long(), self.num_classes)
        predictions = torch.cat(
            (cxcywh_from_xyxy(rows[..., :4]), rows[..., 4:5], scores.float()), -1
        )
        return predictions, [torch.full((len(images), 1), float(len(self.seen)))]


def batch_of(*images):
    """An image is a list of labels (class, xyxy on the input)."""
    height, width = INPUT_HW
    targets = [
        (index, cls, *(cxcywh_from_xyxy(np.array(box, float)) / (width, height, width, height)))
        for index, labels in enumerate(images)
        for cls, *box in labels
    ]
    return Batch(
        images=torch.full((len(images), 3, *INPUT_HW), 255, dtype=torch.uint8),
        targets=torch.tensor(targets, dtype=torch.float32).reshape(-1, 6),
        paths=[f"{index}.jpg" for index in range(len(images))],
        letterboxes=[LETTERBOX] * len(images),
    )


def run(model, batches, names=NAMES, **options):
    return evaluate(model, batches, names, device=CPU, progress=False, **options)


class CountingLoss:
    """Box: number of the batch, from 1; objectness: ten times that; class: number of labels."""

    def measure(self, logits, targets):
        number = logits[0][0, 0]
        terms = torch.stack((number, number * 10, torch.tensor(len(targets)).float()))
        counts = torch.full((3, 1), float(len(logits[0])))
        return Measured(terms[:, None] * counts, counts)

    def parts(self, measured):
        return (measured.sums / measured.counts)[:, 0]


BOX = (10, 10, 40, 40)
EMPTY_ROWS = [
    pytest.param([], [], 0, 0, id="no images"),
    pytest.param([batch_of([], [])], [[]], 2, 0, id="neither labels nor detections"),
    pytest.param([batch_of([(1, *BOX)])], [[]], 1, 1, id="no detections"),
    pytest.param([batch_of([])], [[(*BOX, 0.9, 1)]], 1, 0, id="no labels"),
]


@pytest.mark.parametrize(("batches", "answers", "num_images", "num_labels"), EMPTY_ROWS)
def test_empty_cases_are_defined(batches, answers, num_images, num_labels):
    loss = CountingLoss() if answers else None
    result = run(Oracle(answers), batches, loss_fn=loss)
    assert (result.num_images, result.num_labels) == (num_images, num_labels)
    for value in (result.precision, result.recall, result.map50, result.map50_95, result.fitness):
        assert value == 0
    assert all(np.isfinite(result.speed_ms))
    assert result.confusion.matrix.sum() == num_labels + sum(map(len, answers))


def test_perfect_detector():
    labels = [[(1, *BOX), (0, 50, 10, 70, 60)], [(1, 30, 20, 90, 50)]]
    answers = [[[(*box, 0.9, cls) for cls, *box in image] for image in labels]]
    answers[0][1].append((0, 0, 1, 1, 0.0, 0))  # the images need equally many rows
    result = run(Oracle(answers), [batch_of(*labels)])
    assert result.num_labels_per_class.tolist() == [1, 2, 0]
    assert result.num_images_per_class.tolist() == [1, 2, 0]
    assert (result.map50, result.map50_95) == pytest.approx((1, 1), abs=0.01)
    assert (result.precision, result.recall) == (1, 1)
    assert result.fitness == pytest.approx(1, abs=0.01)
    assert np.diag(result.confusion.matrix).tolist() == [1, 2, 0, 0]
    assert result.losses is None


def test_hook_gets_original_pixels():
    calls = []
    batch = batch_of([(1, *BOX)])
    run(Oracle([[(*BOX, 0.9, 1)]]), [batch], on_batch=lambda *args: calls.append(args))
    ((same, (rows,)),) = calls
    assert same is batch
    # (10 - 8) / 0.5 = 4, (10 - 7) / 0.5 = 6, ...
    assert rows.tolist() == [[4, 6, 64, 66, pytest.approx(0.9), 1]]


def test_detections_are_clipped_to_the_image():
    calls = []
    answers = [[(-50, -50, 500, 500, 0.9, 1)]]
    run(Oracle(answers), [batch_of([])], on_batch=lambda _, rows: calls.append(rows[0]))
    assert calls[0][:, :4].tolist() == [[0, 0, 160, 100]]


def test_input_is_scaled_to_one_in_the_asked_precision():
    for precision in (torch.float32, torch.bfloat16):
        model = Oracle([[], []])
        run(model, [batch_of([])], precision=precision)
        assert model.weight.dtype == torch.float32  # a copy was cast, not the network
        assert len(model.seen) == (1 if precision == torch.float32 else 0)
        if model.seen:
            assert model.seen == [(torch.float32, 1.0, False)]


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept(training):
    model = Oracle([[], []]).train(training)
    run(model, [batch_of([])])
    assert model.training == training

    def fail(batch, detections):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run(model, [batch_of([])], on_batch=fail)
    assert model.training == training


def test_losses_are_means_over_images():
    batches = [batch_of([(0, *BOX)], [], []), batch_of([])]
    result = run(Oracle([[], []]), batches, loss_fn=CountingLoss())
    assert result.losses == pytest.approx((5 / 4, 50 / 4, 3 / 4))


@pytest.mark.parametrize("num_shares", [2, 3])
def test_shares_of_the_images_add_up_to_the_same_figures(num_shares):
    """To the last bit, also where detections are equally sure; the last batch lacks some shares."""
    rng = np.random.default_rng(0)
    labels, answers = [], []
    for _ in range(7):
        corners = rng.integers(0, 40, (3, 2))
        boxes = np.concatenate((corners, corners + rng.integers(10, 50, (3, 2))), 1)
        classes = rng.integers(0, 3, 3)
        labels.append([(cls, *box) for cls, box in zip(classes, boxes, strict=True)])
        moved = boxes + rng.integers(-4, 5, boxes.shape)
        sure = rng.choice([0.3, 0.5, 0.9], 3)
        answers.append([(*b, s, c) for b, s, c in zip(moved, sure, classes, strict=True)])

    def figures(of_batches, gather=None):
        batches = [batch_of(*(labels[i] for i in images)) for images in of_batches]
        model = Oracle([[answers[i] for i in images] for images in of_batches])
        settings = {} if gather is None else {"gather": gather}
        return run(model, batches, loss_fn=CountingLoss(), **settings)

    size, tallies = 2 * num_shares, []
    whole = [range(start, min(start + size, 7)) for start in range(0, 7, size)]
    alone = figures(whole)
    for share in range(num_shares):
        mine = [batch[share::num_shares] for batch in whole if len(batch) > share]
        figures(mine, lambda tally: tallies.append(tally) or [tally])
    together = figures(mine, lambda _: tallies)
    assert 0 < alone.map50_95 < alone.map50 < 1
    assert together.losses[:2] == alone.losses[:2]
    for name in ("precision", "recall", "map50", "map50_95", "num_images"):
        assert getattr(together, name) == getattr(alone, name), name
    for name in ("num_labels_per_class", "num_images_per_class"):
        assert (getattr(together, name) == getattr(alone, name)).all()
    assert (together.confusion.matrix == alone.confusion.matrix).all()
    assert (together.ap_result.precision_curve == alone.ap_result.precision_curve).all()


def test_single_cls():
    labels, answers = [(2, *BOX)], [[(*BOX, 0.9, 1), (*BOX, 0.8, 0)]]
    model = Oracle(answers)
    result = run(model, [batch_of(labels)], single_cls=True)
    assert result.names == ("cat",)
    assert result.map50 == pytest.approx(1, abs=0.01)
    assert result.confusion.matrix.tolist() == [[1, 0], [0, 0]]  # classes suppress each other


def test_wrong_number_of_classes():
    with pytest.raises(ValueError, match="detects 3 classes, the data set names 2 \\(a, b\\)"):
        run(Oracle([[]]), [batch_of([])], names=("a", "b"))


@pytest.fixture
def tiny_split(tiny_dataset):
    spec = load_dataset_spec(tiny_dataset.yaml, tiny_dataset.root)
    return scan_split(spec.val, spec.names, cache=False, workers=1)


def test_real_network_and_loader(tiny_spec, tiny_split, tiny_dataset):
    torch.manual_seed(0)
    model = Model(ModelSpec.from_dict(tiny_spec)).train()
    results = []
    for batch_size in (1, 3):
        dataset = DetectionDataset(tiny_split, 96, rect=False, stride=16)
        loader = build_loader(dataset, batch_size, workers=0)
        results.append(run(model, loader, tiny_dataset.names))
    first, second = results
    assert model.training
    assert first.num_images == 4
    assert first.num_labels == tiny_dataset.num_boxes
    assert first.map50 == pytest.approx(second.map50, abs=1e-6)
    assert first.confusion.matrix.sum() >= tiny_dataset.num_boxes


def test_a_cpu_takes_a_batch_in_parts(tiny_spec, tiny_split, tiny_dataset, monkeypatch):
    torch.manual_seed(0)
    model = Model(ModelSpec.from_dict(tiny_spec))
    loss_fn = DetectionLoss(model.head.anchors, LossSettings(box=0.05, obj=1, cls=0.5))
    loader = build_loader(DetectionDataset(tiny_split, 96, stride=16), 4)
    results, seen = [], []
    for pixels in (96 * 96 * 4, 96 * 96 * 3, 1):
        monkeypatch.setattr("utils.evaluate.CPU_CHUNK_PIXELS", pixels)
        hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
        results.append(run(model, loader, tiny_dataset.names, loss_fn=loss_fn))
        hook.remove()
    assert seen == [4, 3, 1, 1, 1, 1, 1]
    for result in results[1:]:
        assert result.map50 == pytest.approx(results[0].map50, abs=1e-6)
        assert result.losses == pytest.approx(results[0].losses, rel=1e-5)


def coco128_results(shared_dir, imgsz):
    facts = json.loads((shared_dir / "facts/validation.json").read_text())["results"]
    expected = next(row for row in facts if row["imgsz"] == imgsz)
    spec = load_dataset_spec(shared_dir / "data/coco128/coco128.yaml", shared_dir)
    split = scan_split(spec.val, spec.names, cache=False)
    model = load_detector(shared_dir / "weights/yolov5n.pt").model.fuse()
    dataset = DetectionDataset(split, imgsz, rect=True, batch_size=16, stride=32, pad=0.5)
    return run(model, build_loader(dataset, 16, workers=0), spec.names), expected


@pytest.mark.data
@pytest.mark.parametrize("imgsz", [320, pytest.param(640, marks=pytest.mark.slow)])
def test_public_weights_on_coco128(shared_dir, imgsz):
    """mAP agrees with the facts.

    Precision and recall belong to one point of a curve that is flat where its maximum lies: which
    of the images with equal aspect ratio meet in a batch (four of them change shape) moves that
    point, and with it precision by 0.1. Their F1 hardly moves.
    """
    result, expected = coco128_results(shared_dir, imgsz)
    assert result.num_labels == 929
    assert result.map50 == pytest.approx(expected["map50"], abs=0.005)
    assert result.map50_95 == pytest.approx(expected["map50_95"], abs=0.005)
    f1, expected_f1 = (
        2 * p * r / (p + r)
        for p, r in ((result.precision, result.recall), (expected["precision"], expected["recall"]))
    )
    assert f1 == pytest.approx(expected_f1, abs=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_gpu_equals_cpu(tiny_spec, tiny_split, tiny_dataset, precision):
    torch.manual_seed(0)
    model = Model(ModelSpec.from_dict(tiny_spec))
    loader = build_loader(DetectionDataset(tiny_split, 96, stride=16), 2, workers=0)
    on_cpu = run(model, loader, tiny_dataset.names)
    cuda = torch.device("cuda")
    on_gpu = evaluate(
        model.to(cuda), loader, tiny_dataset.names, device=cuda, precision=precision, progress=False
    )
    assert on_gpu.map50 == pytest.approx(on_cpu.map50, abs=0.02)
    assert on_gpu.speed_ms[1] > 0
