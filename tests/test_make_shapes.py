import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from data.scripts import make_shapes

ROOT = Path(__file__).resolve().parents[1]


def _run(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data.scripts.make_shapes", *options]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def _files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_script_writes_yolo_layout_and_says_so(tmp_path):
    out = tmp_path / "new" / "shapes"
    result = _run("--out", str(out), "--train", "5", "--val", "3", "--size", "96")
    assert result.returncode == 0, result.stderr
    assert "5 training and 3 validation images of 96x96" in result.stdout
    assert [entry.name for entry in out.parent.iterdir()] == ["shapes"]
    for split, count in (("train", 5), ("val", 3)):
        images = sorted((out / "images" / split).glob("*.jpg"))
        labels = sorted((out / "labels" / split).glob("*.txt"))
        assert [path.stem for path in images] == [path.stem for path in labels]
        assert len(images) == count
        assert cv2.imread(str(images[0])).shape == (96, 96, 3)


def test_another_writer_of_the_same_process_number_is_left_alone(tmp_path):
    """As in two containers that share a drive."""
    others = tmp_path / f".shapes.{os.getpid()}.tmp/images/train"
    others.mkdir(parents=True)
    make_shapes.make_dataset(tmp_path / "shapes", 0, (1, 1), 64)
    assert others.is_dir()


def test_same_seed_same_files_and_more_images_begin_alike(tmp_path):
    make_shapes.make_dataset(tmp_path / "a", 3, (3, 1), 64)
    make_shapes.make_dataset(tmp_path / "b", 3, (4, 1), 64)
    make_shapes.make_dataset(tmp_path / "c", 4, (3, 1), 64)
    first, more, other = (_files(tmp_path / name) for name in "abc")
    assert first.items() <= more.items()
    assert set(more) - set(first) == {"images/train/00003.jpg", "labels/train/00003.txt"}
    assert all(first[name] != other[name] for name in first if name.endswith(".jpg"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param(["--train", "-1"], "0 or more", id="negative count"),
        pytest.param(["--size", "8"], "at least 32", id="too small"),
        pytest.param(["--out", "{tmp}"], "exists; delete it", id="folder exists"),
    ],
)
def test_errors_are_one_clear_line(tmp_path, options, message):
    result = _run(*[option.format(tmp=tmp_path) for option in options])
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    result = _run("--out", str(tmp_path / "file" / "shapes"), "--train", "1", "--val", "0")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_an_interrupted_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(make_shapes, "draw_image", fail)
    with pytest.raises(KeyboardInterrupt):
        make_shapes.make_dataset(tmp_path / "shapes", 0, (1, 1), 64)
    assert list(tmp_path.iterdir()) == []


def test_boxes_are_inside_and_of_all_sizes_and_classes():
    boxes = np.concatenate(
        [make_shapes.draw_image(np.random.default_rng(i), 160)[1] for i in range(60)]
    )
    assert set(boxes[:, 0]) == set(range(len(make_shapes.CLASS_NAMES)))
    low, high = boxes[:, 1:3] - boxes[:, 3:] / 2, boxes[:, 1:3] + boxes[:, 3:] / 2
    assert low.min() >= -1e-9
    assert high.max() <= 1 + 1e-9
    sides = np.sqrt(boxes[:, 3] * boxes[:, 4])
    assert sides.min() < 0.08
    assert sides.max() > 0.3


def test_a_box_encloses_the_visible_pixels():
    mask = np.zeros((10, 10), np.uint8)
    mask[2:5, 1:9] = 255
    mask[2:5, 6:] = 0  # hidden on the right
    box = make_shapes._box_of(make_shapes.Shape(2, mask, 24))
    assert box == pytest.approx((2, 0.35, 0.35, 0.5, 0.3))


@pytest.mark.parametrize("cls", range(len(make_shapes.CLASS_NAMES)))
def test_outlines_fill_what_they_should(cls):
    """Area of each shape in its own 200 pixel square, by hand; the outline itself adds a little."""
    rng = np.random.default_rng(0)
    outlines = [points * 100 + 100 for points in make_shapes._OUTLINES[cls](rng)]
    mask = make_shapes._mask_of(outlines, 200, margin=0)
    area = np.count_nonzero(mask > 127) / 200**2
    low, high = {
        "circle": (0.77, 0.80),
        "square": (0.71, 0.735),
        "triangle": (0.41, 0.44),
        "star": (0.2, 0.45),
        "ring": (0.38, 0.63),
        "cross": (0.37, 0.6),
    }[make_shapes.CLASS_NAMES[cls]]
    assert low < area < high
    assert (mask[100, 100] == 0) == (make_shapes.CLASS_NAMES[cls] == "ring")


def test_yaml_matches_the_script():
    spec = yaml.safe_load((ROOT / "data" / "shapes.yaml").read_text(encoding="utf-8"))
    assert tuple(spec["names"].values()) == make_shapes.CLASS_NAMES
    assert list(spec["names"]) == list(range(len(make_shapes.CLASS_NAMES)))
    assert spec["download"] == "python -m data.scripts.make_shapes"
    assert spec["path"] == "datasets/shapes"
