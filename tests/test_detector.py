import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from models import Model, ModelSpec, load_model
from utils.backends import Network
from utils.checkpoint import build_checkpoint, save_checkpoint
from utils.detector import ImageDetector
from utils.image_files import read_image
from utils.pipeline import DetectionSettings, Pipeline


@pytest.fixture
def weights(tiny_spec, tmp_path):
    """A network that finds something in everything."""
    torch.manual_seed(0)
    model = Model(ModelSpec.from_dict(tiny_spec))
    for conv in model.head.m:
        torch.nn.init.normal_(conv.bias, std=1.0)
    path = tmp_path / "tiny.pt"
    save_checkpoint(path, build_checkpoint(model, ("disc", "box", "bar")))
    return path


@pytest.fixture
def model(weights):
    return load_model(weights, "cpu", imgsz=96, max_det=7)


class Probe(Network):
    """A box per image; its score is half of the red plus a third of the green in the middle."""

    names = ("x",)
    stride = 32
    imgsz_hw = batch_size = None
    precision = torch.float32
    format = "fake"

    def forward(self, images):
        height, width = images.shape[2:]
        middle = images[:, :, height // 3 : -height // 3, width // 3 : -width // 3].mean((2, 3))
        rows = torch.tensor([width / 2, height / 2, 40, 20, 1.0, 1.0]).repeat(len(images), 1, 1)
        rows[:, 0, 4] = middle[:, 0] / 2 + middle[:, 1] / 3
        return rows, []


@pytest.fixture
def probe():
    settings = DetectionSettings(96, conf_thres=0.01)
    return ImageDetector(Pipeline(Probe(), torch.device("cpu"), settings))


def same(one, other):
    assert len(one) > 0
    assert one.names == other.names
    np.testing.assert_allclose(one.boxes, other.boxes, atol=1e-3)
    np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)


def test_no_picture_and_no_detection(weights, tiny_dataset):
    assert load_model(weights, "cpu")([]) == []
    nothing = load_model(weights, "cpu", imgsz=96, conf_thres=1.0)(tiny_dataset.images / "a.jpg")
    assert (len(nothing), nothing.boxes.shape, nothing.names, nothing.table) == (0, (0, 4), [], [])


def test_what_is_returned(model, tiny_dataset):
    found = model(tiny_dataset.images / "a.jpg")
    assert model.names == ("disc", "box", "bar")
    assert len(found) == 7
    assert found.boxes.shape == (7, 4)
    assert found.boxes.dtype == found.scores.dtype == np.float32
    assert found.classes.dtype == np.int64
    assert found.names == [model.names[cls] for cls in found.classes]
    assert (np.diff(found.scores) <= 0).all()
    first = found.table[0]
    assert list(first) == ["name", "class", "score", "x1", "y1", "x2", "y2"]
    assert [first["x1"], first["y1"], first["x2"], first["y2"]] == found.boxes[0].tolist()
    assert {type(value) for value in first.values()} == {str, int, float}


def test_all_kinds_of_pictures_are_the_same(probe, tiny_dataset):
    path = tiny_dataset.images / "b.png"
    rgb = cv2.cvtColor(read_image(path), cv2.COLOR_BGR2RGB)
    expected = probe(str(path))
    for picture in (path, rgb, np.asfortranarray(rgb), Image.open(path)):
        same(probe(picture), expected)
        same(probe([picture])[0], expected)
    alpha = Image.fromarray(np.dstack([rgb, np.zeros_like(rgb[..., 0])]))
    same(probe(alpha), expected)
    swapped = probe(np.ascontiguousarray(rgb[..., ::-1]))
    assert not np.allclose(swapped.scores, expected.scores, atol=1e-3)


def test_grey_and_deep_pictures(probe):
    grey = np.random.default_rng(0).integers(0, 255, (60, 80), dtype=np.uint8)
    expected = probe(np.dstack([grey] * 3))
    same(probe(grey), expected)
    same(probe(Image.fromarray(grey)), expected)
    same(probe(Image.fromarray(grey.astype(np.uint16) << 8)), expected)


def test_orientation_is_applied(probe, tiny_dataset, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tiny_dataset.images / "b.png").save(tmp_path / "turned.png", exif=exif)
    picture = Image.open(tmp_path / "turned.png")
    upright = np.rot90(np.asarray(picture.convert("RGB")), -1)
    same(probe(picture), probe(upright.copy()))


def test_several_at_once(probe, tiny_dataset):
    paths = sorted(tiny_dataset.images.iterdir())
    found = probe(paths)
    assert len(found) == len(paths) == 4
    for path, one in zip(paths, found, strict=True):
        same(one, probe(path))
    same(probe(tuple(paths))[0], found[0])


@pytest.mark.parametrize(
    ("settings", "check"),
    [
        ({"max_det": 2}, lambda found: len(found) == 2),
        ({"classes": [1]}, lambda found: set(found.names) == {"box"}),
        ({"conf_thres": 0.3}, lambda found: found.scores.min() > 0.3),
    ],
)
def test_settings_act(weights, tiny_dataset, settings, check):
    assert check(load_model(weights, "cpu", imgsz=96, **settings)(tiny_dataset.images / "a.jpg"))


@pytest.mark.parametrize(
    ("picture", "error", "message"),
    [
        ("none.jpg", OSError, "none.jpg"),
        (3, TypeError, "int"),
        ([3], TypeError, "expected a path, an array or a PIL image, not int"),
        (np.zeros((4, 4, 3)), ValueError, "expected uint8 pixels, not float64"),
        (
            np.zeros((3, 4, 4), np.uint8),
            ValueError,
            r"RGB array \[H, W, 3\], not one of shape \(3, 4",
        ),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "expected uint8 pixels"),
    ],
)
def test_what_is_no_picture_is_said(model, picture, error, message):
    with pytest.raises(error, match=message):
        model(picture)


def test_bad_weights_and_settings(weights, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        load_model(tmp_path / "none.pt", "cpu")
    with pytest.raises(ValueError, match="conf_thres 2 lies outside"):
        load_model(weights, "cpu", conf_thres=2)
    with pytest.raises(ValueError, match="half needs a GPU"):
        load_model(weights, "cpu", half=True)
