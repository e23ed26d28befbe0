"""Checkpoints: plain data, atomic, half precision, strict about what fits."""

import logging

import pytest
import torch

from models import Model, ModelSpec
from utils import checkpoint
from utils.checkpoint import (
    build_checkpoint,
    load_checkpoint,
    load_detector,
    save_checkpoint,
    save_final,
    to_half,
    transfer_weights,
)


@pytest.fixture
def model(tiny_spec):
    torch.manual_seed(0)
    return Model(ModelSpec.from_dict(tiny_spec)).eval()


NAMES = ("a", "b", "c")


def test_round_trip_gives_the_same_output(model, tmp_path):
    path = tmp_path / "m.pt"
    save_checkpoint(path, build_checkpoint(model, NAMES, epoch=3))
    detector = load_detector(path)
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(detector.model(images)[0], model(images)[0])
    assert detector.names == NAMES
    assert detector.checkpoint["epoch"] == 3


def test_slim_network_is_rebuilt_slim(model, tmp_path):
    widths = {p: max(w // 2, 1) for p, w in model.widths().items()}
    slim = Model(model.spec.with_widths(widths))
    save_checkpoint(tmp_path / "m.pt", build_checkpoint(slim, NAMES))
    assert load_detector(tmp_path / "m.pt").model.widths() == widths


def test_final_file_is_half_precision_without_training_state(model, tmp_path):
    path = tmp_path / "m.pt"
    content = build_checkpoint(model, NAMES) | {"training": {"optimizer": torch.zeros(10_000)}}
    save_final(path, content, model.state_dict())
    saved = load_checkpoint(path)
    assert "training" not in saved
    kinds = {t.dtype for t in saved["model"].values() if t.is_floating_point()}
    assert kinds == {torch.float16}
    for name, tensor in load_detector(path).model.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], rtol=1e-3, atol=1e-6)


def test_half_keeps_what_would_overflow():
    assert to_half(torch.tensor([1.0, 7e4])).dtype == torch.float32
    assert to_half(torch.tensor([1.0, 6e4])).dtype == torch.float16
    assert to_half(torch.tensor([1, 2])).dtype == torch.int64


def test_failed_write_leaves_the_old_file(model, tmp_path, monkeypatch):
    path = tmp_path / "m.pt"
    save_checkpoint(path, build_checkpoint(model, NAMES))
    before = path.read_bytes()

    def fail(content, file):
        file.write(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr(checkpoint.torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, {})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 99}, "version 99"),
        ({"format": "other"}, "not a checkpoint of this toolkit"),
        ({"names": ["a"]}, "1 class names for 3 classes"),
        ({"model": {}}, "do not fit"),
    ],
)
def test_wrong_content_is_named(model, tmp_path, change, words):
    path = tmp_path / "m.pt"
    save_checkpoint(path, build_checkpoint(model, NAMES) | change)
    with pytest.raises(ValueError, match=words) as caught:
        load_detector(path)
    assert "m.pt" in str(caught.value)


def test_transfer_skips_and_names_what_does_not_fit(model, caplog):
    other = Model(model.spec.with_num_classes(5))
    with caplog.at_level(logging.INFO):
        skipped = transfer_weights(other, model.state_dict())
    assert skipped == [f"model.14.m.{n}.{part}" for n in (0, 1) for part in ("weight", "bias")]
    assert "model.14.m.0.weight" in caplog.text
    assert torch.equal(other.model[0].conv.weight, model.model[0].conv.weight)


def test_transfer_can_leave_anchors_alone(model, tiny_spec):
    other = Model(ModelSpec.from_dict({**tiny_spec, "anchors": 3}))
    before = other.head.anchors.clone()
    transfer_weights(other, model.state_dict(), keep_anchors=True)
    assert torch.equal(other.head.anchors, before)
    transfer_weights(other, model.state_dict())
    assert torch.equal(other.head.anchors, model.head.anchors)


@pytest.mark.parametrize("spoilt", ["model", "training"])
def test_what_is_not_finite_is_not_saved(tiny_spec, tmp_path, spoilt):
    path = tmp_path / "last.pt"
    model = Model(ModelSpec.from_dict(tiny_spec))
    save_checkpoint(path, build_checkpoint(model, ("a", "b", "c")))
    before = path.read_bytes()
    content = build_checkpoint(model, ("a", "b", "c"), training={"ema": [torch.ones(1)]})
    bad = torch.tensor([1.0, float("inf")])
    if spoilt == "model":
        content["model"] = {**content["model"], "model.3.conv.weight": bad}
        name = "model.model.3.conv.weight"
    else:
        content["training"]["ema"].append(bad)
        name = "training.ema.1"
    with pytest.raises(FloatingPointError, match=f"last.pt: not saved, the values of {name} are"):
        save_checkpoint(path, content)
    assert path.read_bytes() == before


def test_a_full_disk_is_named_and_leaves_the_previous_file(model, tmp_path, full_disk):
    path = tmp_path / "last.pt"
    save_checkpoint(path, build_checkpoint(model, NAMES))
    before = path.read_bytes()
    with full_disk(), pytest.raises(OSError, match="too large") as caught:
        save_checkpoint(path, build_checkpoint(model, NAMES))  # torch says "unexpected pos 704"
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
