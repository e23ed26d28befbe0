import math

import cv2
import numpy as np
import pytest
import torch

from utils.backends import Network, load_network
from utils.checkpoint import load_detector
from utils.dataset import RECT_PAD, DetectionDataset, build_loader, scan_split
from utils.evaluate import evaluate
from utils.image_files import read_image
from utils.pipeline import DetectionSettings, Pipeline

CPU = torch.device("cpu")


class WhiteFinder(Network):
    """Finds the white rectangle in each image, exactly; class 1 of 3."""

    names = ("a", "b", "c")
    stride = 32
    imgsz_hw = batch_size = None
    precision = torch.float32
    format = "fake"

    def __init__(self, has_nms=False, imgsz_hw=None):
        super().__init__()
        self.has_nms, self.imgsz_hw, self.seen = has_nms, imgsz_hw, []

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        rows = []
        for image in images:
            y, x = (image[0] > 0.9).nonzero(as_tuple=True)
            x1, y1, x2, y2 = (float(v) for v in (x.min(), y.min(), x.max() + 1, y.max() + 1))
            if self.has_nms:
                box = [[x1, y1, x2, y2, 0.9, 2], [x1, y1, x2, y2, 0.6, 1], [0, 0, 0, 0, 0, 0]]
            else:
                box = [[(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, 0.9, 0.1, 0.8, 0.3]]
            rows.append(torch.tensor(box))
        return torch.stack(rows), []


class Scatter(WhiteFinder):
    """Random boxes of three classes; their scores depend on what the image shows."""

    def forward(self, images):
        rng = np.random.default_rng(0)
        height, width = images.shape[2:]
        boxes = rng.uniform(0.1, 0.9, (200, 8)) * [width, height, width / 2, height / 2, 1, 1, 1, 1]
        predictions = torch.tensor(boxes, dtype=torch.float32).repeat(len(images), 1, 1)
        shades = torch.stack([image[:, ::7, ::5].mean() for image in images])
        predictions[..., 4] *= 0.5 + 0.5 * shades[:, None]
        return predictions, []


def picture(hw=(200, 300), box=(40, 30, 120, 70)):
    image = np.zeros((*hw, 3), np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = 255
    return image


def slow_detect(model, image, imgsz, stride, conf_thres, iou_thres):
    """All by hand: scale, pad, network, best class, greedy suppression, back."""
    height, width = image.shape[:2]
    ratio = imgsz / max(height, width)
    new_h, new_w = round(height * ratio), round(width * ratio)
    method = cv2.INTER_AREA if ratio < 1 else cv2.INTER_LINEAR
    if ratio != 1:
        image = cv2.resize(image, (new_w, new_h), interpolation=method)
    in_h, in_w = (
        math.ceil(side / max(height, width) * imgsz / stride + 0.5) * stride
        for side in (height, width)
    )
    top, left = (in_h - new_h) // 2, (in_w - new_w) // 2
    canvas = np.full((in_h, in_w, 3), 114, np.uint8)
    canvas[top : top + new_h, left : left + new_w] = image
    x = torch.from_numpy(canvas[..., ::-1].transpose(2, 0, 1).copy())[None].float() / 255
    with torch.no_grad():
        rows = model(x)[0][0].numpy()
    boxes = []
    for cx, cy, w, h, obj, *scores in rows.tolist():
        cls = int(np.argmax(scores))
        conf = obj * scores[cls]
        if obj > conf_thres and conf > conf_thres:
            boxes.append((conf, cls, cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2))
    kept = []
    for candidate in sorted(boxes, reverse=True):
        _, cls, x1, y1, x2, y2 = candidate
        for _, other, u1, v1, u2, v2 in kept:
            overlap = max(min(x2, u2) - max(x1, u1), 0) * max(min(y2, v2) - max(y1, v1), 0)
            union = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - overlap
            if cls == other and overlap / union > iou_thres:
                break
        else:
            kept.append(candidate)
    return [
        (
            min(max((x1 - left) / new_w * width, 0), width),
            min(max((y1 - top) / new_h * height, 0), height),
            min(max((x2 - left) / new_w * width, 0), width),
            min(max((y2 - top) / new_h * height, 0), height),
            conf,
            cls,
        )
        for conf, cls, x1, y1, x2, y2 in kept
    ]


# ------------------------------------------------------------------------------ equal to the truth
def test_no_picture_gives_nothing():
    assert Pipeline(WhiteFinder(), CPU, DetectionSettings())([]) == []


@pytest.mark.parametrize("imgsz", [64, 96, 160])
def test_as_slowly_by_hand(tiny_dataset, imgsz):
    network = Scatter()
    pipeline = Pipeline(network, CPU, DetectionSettings(imgsz, conf_thres=0.2, iou_thres=0.5))
    num_found = 0
    for path in sorted(tiny_dataset.images.iterdir()):
        image = read_image(path)
        (found,) = pipeline([image])
        expected = slow_detect(network, image, imgsz, 32, 0.2, 0.5)
        assert found.tolist() == [pytest.approx(row, abs=2e-3) for row in expected]
        num_found += len(found)
    assert num_found > 80


@pytest.mark.data
@pytest.mark.parametrize("data", ["bccd", "coco128"])
def test_equal_to_what_is_evaluated(shared_dir, data):
    """The boxes behind the mAP of val.py; there a box may have further classes as well."""
    weights = shared_dir / "weights" / "yolov5n.pt"
    detector = load_detector(weights)
    split = scan_split([shared_dir / "data" / data / "images"], detector.names, cache=False)
    dataset = DetectionDataset(split, 320, rect=True, batch_size=1, stride=32, pad=RECT_PAD)
    loader = build_loader(dataset, 1)
    expected = {}

    def keep(batch, detections):
        expected[batch.paths[0]] = detections[0]

    batches = [batch for batch, _ in zip(loader, range(12), strict=False)]
    evaluate(
        detector.model.fuse(), batches, detector.names, device=CPU, conf_thres=0.25,
        iou_thres=0.45, max_det=1000, on_batch=keep, progress=False,
    )  # fmt: skip
    pipeline = Pipeline(load_network(weights, CPU), CPU, DetectionSettings(320))
    found = pipeline([read_image(path) for path in expected])
    for rows, others in zip(found, expected.values(), strict=True):
        seen = set()
        best = [o for o in others.tolist() if (k := tuple(o[:4])) not in seen and not seen.add(k)]
        assert rows.tolist() == [pytest.approx(row, abs=0.02) for row in best]
    assert sum(map(len, found)) > 5


def test_pictures_may_come_together_in_any_sizes():
    rng = np.random.default_rng(0)
    shapes = [(50, 80), (80, 50), (50, 80), (33, 200), (50, 80)]
    images = [rng.integers(0, 255, (*hw, 3), dtype=np.uint8) for hw in shapes]
    settings = DetectionSettings(96, conf_thres=0.3)
    pipeline = Pipeline(Scatter(), CPU, settings)
    together = pipeline(images)
    assert pipeline.num_images == 5
    assert all(ms > 0 for ms in pipeline.ms_per_image())
    for image, found in zip(images, together, strict=True):
        torch.testing.assert_close(found, pipeline([image])[0], atol=1e-3, rtol=0)


# -------------------------------------------------------------------------- what networks can take
@pytest.mark.parametrize("imgsz_hw", [None, (320, 320), (160, 320), (320, 96)])
@pytest.mark.parametrize("hw", [(200, 300), (300, 200), (640, 480)])
def test_boxes_return_to_their_place(imgsz_hw, hw):
    network = WhiteFinder(imgsz_hw=imgsz_hw)
    (found,) = Pipeline(network, CPU, DetectionSettings(imgsz_hw and max(imgsz_hw)))([picture(hw)])
    pixel = 1 if imgsz_hw is None else max(hw[0] / imgsz_hw[0], hw[1] / imgsz_hw[1], 1)
    assert found[0].tolist() == pytest.approx([40, 30, 120, 70, 0.72, 1], abs=1.01 * pixel)
    if imgsz_hw:
        assert network.seen == [(1, 3, *imgsz_hw)]


def test_the_input_is_a_rectangle_where_it_may():
    network = WhiteFinder()
    Pipeline(network, CPU, DetectionSettings(300))([picture()])
    assert network.seen == [(1, 3, 256, 352)]  # 320 px, as val.py pads it


@pytest.mark.parametrize("imgsz_hw", [None, (640, 640), (320, 640)])
def test_all_passes_of_augmentation_find_the_same(imgsz_hw):
    network = WhiteFinder(imgsz_hw=imgsz_hw)
    settings = DetectionSettings(augment=True, iou_thres=1.0)
    (found,) = Pipeline(network, CPU, settings)([picture((400, 600), (40, 30, 300, 200))])
    assert len(network.seen) == 3
    if imgsz_hw is None:
        assert [shape[3] for shape in network.seen] == [672, 576, 448]
    assert len(found) == 3
    for row in found.tolist():
        assert row == pytest.approx([40, 30, 300, 200, 0.72, 1], abs=1.6 if imgsz_hw is None else 3)
    settings = DetectionSettings(augment=True)
    assert len(Pipeline(network, CPU, settings)([picture()])[0]) == 1


def test_nms_inside_the_network():
    network = WhiteFinder(has_nms=True)
    (found,) = Pipeline(network, CPU, DetectionSettings())([picture()])
    assert found[:, 5].tolist() == [2, 1]  # by confidence; without the padding
    assert found[0, :4].tolist() == pytest.approx([40, 30, 120, 70], abs=1)
    for settings, classes in (
        (DetectionSettings(conf_thres=0.7), [2]),
        (DetectionSettings(classes=(1,)), [1]),
        (DetectionSettings(max_det=1), [2]),
    ):
        (found,) = Pipeline(network, CPU, settings)([picture()])
        assert found[:, 5].tolist() == classes


@pytest.mark.parametrize(
    ("network", "settings", "message"),
    [
        ({}, {"conf_thres": 1.5}, "conf_thres 1.5 lies outside 0 to 1"),
        ({}, {"iou_thres": -1}, "iou_thres -1 lies outside"),
        ({}, {"imgsz": 0}, "imgsz is 0, expected at least 1"),
        ({}, {"max_det": 0}, "max_det is 0"),
        ({}, {"classes": (0, 3)}, "there is no class 3; the network knows 0 a, 1 b, 2 c$"),
        ({"imgsz_hw": (320, 320)}, {"imgsz": 640}, "imgsz 640 cannot act: .* 320 x 320 pixels"),
        ({"has_nms": True}, {"iou_thres": 0.5}, "iou_thres cannot act: .* NMS inside"),
        ({"has_nms": True}, {"agnostic": True}, "agnostic NMS cannot act"),
        ({"has_nms": True}, {"augment": True}, "augment cannot act"),
    ],
)
def test_settings_that_cannot_act_are_refused(network, settings, message):
    with pytest.raises(ValueError, match=message):
        Pipeline(WhiteFinder(**network), CPU, DetectionSettings(**settings))


def test_as_many_names_as_classes():
    network = WhiteFinder()
    network.names = ("a", "b")
    with pytest.raises(ValueError, match="detects 3 classes, but 2 have names"):
        Pipeline(network, CPU, DetectionSettings())([picture()])
