"""Scanning, caching, loading, batching."""

import dataclasses
import itertools
import json
import logging
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from utils import image_cache
from utils.boxes import to_letterbox, xyxy_from_cxcywh
from utils.config import load_dataset_spec, load_hyperparameters
from utils.dataset import (
    DetectionDataset,
    build_loader,
    class_counts,
    image_weights_from_map,
    label_sizes_px,
    rect_shape_hw,
    scan_split,
)
from utils.image_files import image_hw, is_image_name, read_image
from utils.scan import RaggedRows, find_images, label_path, parse_labels

ROOT = Path(__file__).resolve().parents[1]
LOW = load_hyperparameters(ROOT / "data" / "hyps" / "hyp.scratch-low.yaml")
HIGH = load_hyperparameters(ROOT / "data" / "hyps" / "hyp.scratch-high.yaml")
NAMES = ("disc", "box", "bar")


@pytest.fixture
def split(tiny_dataset):
    return scan_split([tiny_dataset.images], tiny_dataset.names)


def picture(height: int = 40, width: int = 60) -> np.ndarray:
    """A smooth BGR picture that tells all its sides apart."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 250, width, dtype=np.uint8)
    image[..., 1] = np.linspace(250, 0, height, dtype=np.uint8)[:, None]
    image[: height // 2, : width // 2, 2] = 200
    return image


def save(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ok, content = cv2.imencode(path.suffix, image)
    assert ok
    path.write_bytes(content.tobytes())
    return path


# ------------------------------------------------------------------------------------ image files
@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.jpg", True), ("a.JPEG", True), ("a.Png", True), ("a.bmp", True), ("a.webp", True),
     ("a.tif", True), ("a.TIFF", True), ("a.b.jpg", True), ("._a.jpg", False), ("a.txt", False),
     ("jpg", False), ("a.gif", False), (".jpg", False)],
)  # fmt: skip
def test_is_image_name(name, expected):
    assert is_image_name(name) == expected


def with_exif(jpeg: bytes, orientation: int, order: str = "<") -> bytes:
    """Put an EXIF block with an orientation behind the start marker."""
    pack = {"<": "little", ">": "big"}[order]

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, pack)

    entry = number(0x0112, 2) + number(3, 2) + number(1, 4) + number(orientation, 2) + b"\0\0"
    tiff = {"<": b"II", ">": b"MM"}[order] + number(42, 2) + number(8, 4) + number(1, 2) + entry
    block = b"Exif\0\0" + tiff + b"\0\0\0\0"
    return jpeg[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + jpeg[2:]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_jpeg_orientation_is_applied_and_known_from_the_header(tmp_path, orientation, order):
    path = save(tmp_path / "a.jpg", picture())
    path.write_bytes(with_exif(path.read_bytes(), orientation, order))
    expected = (60, 40) if 5 <= orientation <= 8 else (40, 60)
    assert image_hw(path) == expected
    image = read_image(path)
    assert image.shape == (*expected, 3)
    # The red corner of the stored picture is upper left; this is where it goes.
    corner = {2: (0, -1), 3: (-1, -1), 4: (-1, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    row, column = corner.get(orientation, (0, 0))
    assert image[row, column, 2] > 150


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".png", ".bmp", ".webp", ".tif", ".tiff"])
def test_formats(tmp_path, suffix):
    path = save(tmp_path / f"größe 'a' {suffix.lower()}", picture()).rename(tmp_path / f"ä{suffix}")
    assert image_hw(path) == (40, 60)
    image = read_image(path)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - picture()).mean() < 8


GREY_PICTURE = picture()[..., 0]


@pytest.mark.parametrize(
    ("suffix", "stored", "expected"),
    [
        pytest.param(".png", GREY_PICTURE, GREY_PICTURE[..., None], id="grey"),
        pytest.param(".jpg", GREY_PICTURE, GREY_PICTURE[..., None], id="grey jpeg"),
        pytest.param(
            ".png", np.dstack([picture(), GREY_PICTURE]), picture(), id="alpha is dropped"
        ),
        pytest.param(".png", picture().astype(np.uint16) * 257, picture(), id="16 bit"),
        pytest.param(".tif", picture().astype(np.uint16) * 257, picture(), id="16 bit tiff"),
        pytest.param(
            ".png", GREY_PICTURE.astype(np.uint16) * 257, GREY_PICTURE[..., None], id="16 bit grey"
        ),
    ],
)
def test_kinds_of_pixels(tmp_path, suffix, stored, expected):
    path = save(tmp_path / f"a{suffix}", stored)
    image = read_image(path)
    assert image.shape == (40, 60, 3)
    assert np.abs(image.astype(int) - expected).max() <= 6
    assert image_hw(path) == (40, 60)


def test_palette_png(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.png"
    image_module.fromarray(picture()[..., ::-1]).convert("P").save(path)
    image = read_image(path)
    assert image.shape == (40, 60, 3)
    assert np.abs(image.astype(int) - picture()).mean() < 25
    assert image_hw(path) == (40, 60)


def test_jpeg_with_a_long_profile_before_its_header(tmp_path):
    path = save(tmp_path / "a.jpg", picture())
    content = path.read_bytes()
    block = b"\xff\xe2" + (60000).to_bytes(2, "big") + bytes(59998)
    path.write_bytes(content[:2] + block * 3 + content[2:])
    assert image_hw(path) == read_image(path).shape[:2] == (40, 60)


def test_jpeg_with_bytes_behind_its_end(tmp_path):
    path = save(tmp_path / "a.jpg", picture())
    path.write_bytes(path.read_bytes() + b"made by a phone")
    assert image_hw(path) == (40, 60)


BAD_CONTENT = [
    pytest.param(".jpg", lambda content: b"", id="zero bytes"),
    pytest.param(".png", lambda content: b"", id="zero bytes png"),
    pytest.param(".jpg", lambda content: b"not an image at all", id="text"),
    pytest.param(".jpg", lambda content: content[: len(content) // 2], id="half a jpeg"),
    pytest.param(".jpg", lambda content: content[:-2], id="jpeg without end"),
    pytest.param(".jpg", lambda content: content[:30], id="jpeg of its start"),
    pytest.param(".png", lambda content: content[: len(content) // 2], id="half a png"),
    pytest.param(".bmp", lambda content: content[: len(content) // 2], id="half a bmp"),
    pytest.param(".webp", lambda content: content[: len(content) // 2], id="half a webp"),
    pytest.param(".tif", lambda content: content[: len(content) // 2], id="half a tiff"),
]


@pytest.mark.parametrize(("suffix", "damage"), BAD_CONTENT)
def test_damaged_images_are_told(tmp_path, suffix, damage):
    path = save(tmp_path / f"a{suffix}", picture(200, 300))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError, match=rf"a\{suffix}"):
        image_hw(path)


def test_missing_image(tmp_path):
    for function in (image_hw, read_image):
        with pytest.raises(FileNotFoundError):
            function(tmp_path / "a.jpg")


# ------------------------------------------------------------------------------------ label lines
@pytest.mark.parametrize(
    ("text", "rows"),
    [
        pytest.param("", [], id="empty"),
        pytest.param("\n  \n", [], id="blank"),
        pytest.param("1 0.5 0.5 0.2 0.4", [[1, 0.5, 0.5, 0.2, 0.4]], id="box"),
        pytest.param("1\t0.5  0.5 0.2 0.4 \r\n", [[1, 0.5, 0.5, 0.2, 0.4]], id="white space"),
        pytest.param("1.0 5e-1 .5 0.2 0.4", [[1, 0.5, 0.5, 0.2, 0.4]], id="number formats"),
        pytest.param("0 0.1 0.2 0.5 0.2 0.3 0.8", [[0, 0.3, 0.5, 0.4, 0.6]], id="polygon"),
        pytest.param("0 0.9 0.5 0.4 0.2", [[0, 0.85, 0.5, 0.3, 0.2]], id="over the border"),
        pytest.param("0 0.5 0.5 1.0005 1", [[0, 0.5, 0.5, 1, 1]], id="rounding"),
        pytest.param("0 -0.0005 0.5 0.1 0.1", [[0, 0.02475, 0.5, 0.0495, 0.1]], id="just outside"),
    ],
)
def test_good_lines(text, rows):
    parsed = parse_labels(text, "a.txt", 3)
    assert parsed.problems == []
    assert parsed.labels.dtype == np.float32
    np.testing.assert_allclose(parsed.labels, np.array(rows).reshape(-1, 5), atol=1e-6)
    assert len(parsed.segments) == len(rows)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        pytest.param("1 0.5 0.5 0.2", "4 values", id="too few"),
        pytest.param("1 0.5 0.5 0.2 0.4 0.9", "6 values", id="with confidence"),
        pytest.param("1 0.1 0.2 0.5 0.2 0.3 0.8 0.4", "8 values", id="odd polygon"),
        pytest.param("1 0.5 0.5 0.2 wide", "'wide' is not a number", id="text"),
        pytest.param("car 0.5 0.5 0.2 0.2", "'car' is not a number", id="class name"),
        pytest.param("1 nan 0.5 0.2 0.4", "'nan' is not a finite number", id="nan"),
        pytest.param("1 0.5 0.5 inf 0.4", "'inf' is not a finite number", id="infinity"),
        pytest.param("nan 0.5 0.5 0.1 0.4", "'nan' is not a finite number", id="nan class"),
        pytest.param("3 0.5 0.5 0.2 0.4", "class 3, but the data set names 3 classes", id="class"),
        pytest.param("-1 0.5 0.5 0.2 0.4", "class -1; expected a whole number", id="class -1"),
        pytest.param("1.5 0.5 0.5 0.2 0.4", "class 1.5; expected a whole", id="class 1.5"),
        pytest.param("1 50 50 20 40", "coordinate 50 lies outside", id="pixels"),
        pytest.param("1 0.5 -0.2 0.2 0.4", "coordinate -0.2 lies outside", id="negative"),
        pytest.param("1 0.5 0.5 0 0.4", "box of size 0 x 0.4", id="no width"),
        pytest.param("1 0.5 0.5 0.1 -0.0001", "box of size 0.1 x -0.0001", id="negative height"),
        pytest.param("1 0.2 0.2 0.2 0.2 0.2 0.2", "no area", id="polygon of one point"),
        pytest.param("1 0.2 0.2 0.2 0.4 0.2 0.6", "no area", id="polygon of a line"),
        pytest.param("1 1.0009 0.5 0.0001 0.1", "no area", id="all outside"),
    ],
)
def test_bad_lines_are_reported_and_the_others_stay(line, complaint):
    good = "2 0.5 0.5 0.2 0.4"
    parsed = parse_labels(f"{good}\n{line}\n0 0.5 0.5 0.1 0.1\n", "dir/a.txt", 3)
    assert len(parsed.problems) == 1
    assert parsed.problems[0].startswith("dir/a.txt:2: ")
    assert complaint in parsed.problems[0]
    assert parsed.labels[:, 0].tolist() == [2, 0]


def test_polygons_and_boxes_in_one_file():
    text = "0 0.5 0.5 0.2 0.2\n1 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\n0 0.50 0.5 0.20 0.2\n"
    parsed = parse_labels(text, "a.txt", 2)
    assert parsed.num_duplicates == 1
    assert [len(points) for points in parsed.segments] == [0, 4]
    np.testing.assert_allclose(parsed.labels[1], [1, 0.3, 0.3, 0.4, 0.4], atol=1e-6)


# --------------------------------------------------------------------------------- finding files
@pytest.mark.parametrize(
    ("image", "labels"),
    [
        ("/d/images/a.jpg", "/d/labels/a.txt"),
        ("/d/images/train/x/a.b.JPG", "/d/labels/train/x/a.b.txt"),
        ("/images/d/images/a.png", "/images/d/labels/a.txt"),
        ("/d/train/images/a.png", "/d/train/labels/a.txt"),
        ("/d/my_images/a.png", "/d/my_images/a.txt"),
    ],
)
def test_label_path(image, labels):
    if os.sep != "/":
        pytest.skip("written for POSIX paths")
    assert label_path(image) == labels


def test_find_images_in_folders(tmp_path):
    for name in ("b.jpg", "sub/a.PNG", "sub/deep/c.tiff", "notes.txt", ".hidden.jpg", "d.gif"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    (tmp_path / "images" / "folder.jpg").mkdir()
    (tmp_path / "images" / "loop").symlink_to(tmp_path / "images")
    found, problems = find_images(tmp_path / "images")
    names = [Path(path).relative_to(tmp_path / "images").as_posix() for path in found]
    assert names == ["b.jpg", "sub/a.PNG", "sub/deep/c.tiff"]
    assert problems == []


def test_find_images_in_lists(tmp_path, monkeypatch):
    (tmp_path / "cwd" / "here").mkdir(parents=True)
    (tmp_path / "cwd" / "here" / "c.jpg").write_bytes(b"")
    monkeypatch.chdir(tmp_path / "cwd")
    absolute = tmp_path / "x" / "a.jpg"
    text = f"\ufeff./images/b.jpg\n\n{absolute}\r\nhere/c.jpg\n../up.png\n./labels/b.txt\n"
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.txt").write_text(text, encoding="utf-8")
    found, problems = find_images(tmp_path / "set" / "train.txt")
    assert found == [
        str(tmp_path / "set" / "images" / "b.jpg"),
        str(absolute),
        str(tmp_path / "cwd" / "here" / "c.jpg"),
        str(tmp_path / "up.png"),
    ]
    assert len(problems) == 1
    assert "train.txt:6: './labels/b.txt'" in problems[0]


def test_find_images_complains(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        find_images(tmp_path / "absent")
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a folder of images or a \.txt list"):
        find_images(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="not a text file"):
        find_images(tmp_path / "a.txt")


# --------------------------------------------------------------------------------------- scanning
def test_scan_of_the_tiny_data_set(tiny_dataset, split):
    assert [Path(path).name for path in split.paths] == ["a.jpg", "b.png", "c.jpg", "d.jpg"]
    assert split.shapes_hw.tolist() == [[96, 128], [128, 96], [96, 96], [64, 96]]
    assert [len(rows) for rows in split.labels] == [2, 1, 3, 0]
    assert [len(rows) for rows in split.segments] == [2, 1, 3, 0]
    assert split.labels[-1].shape == (0, 5)
    report = split.report
    assert (report.num_images, report.num_boxes, report.num_backgrounds) == (4, 6, 1)
    assert report.problems == ()
    with pytest.raises(IndexError):
        split.labels[4]


def test_scan_reports_counts_and_skips(tiny_dataset, caplog):
    (tiny_dataset.images / "bad.jpg").write_bytes(b"")
    (tiny_dataset.labels / "bad.txt").write_text("0 0.5 0.5 0.1 0.1")
    shutil.copy(tiny_dataset.images / "a.jpg", tiny_dataset.images / "e.jpg")
    shutil.copy(tiny_dataset.images / "a.jpg", tiny_dataset.images / "f.jpg")
    (tiny_dataset.labels / "f.txt").write_bytes(b"\xff\xfe\x00")
    with (tiny_dataset.labels / "b.txt").open("a") as file:
        file.write("\n9 0.5 0.5 0.1 0.1\n1 0.25 0.25 0.1 0.1\n1 0.25 0.25 0.1 0.1\n")
    sources = [tiny_dataset.images, tiny_dataset.images]
    with caplog.at_level(logging.INFO):
        split = scan_split(sources, tiny_dataset.names)
    report = split.report
    assert report.num_found == 7
    assert report.num_images == len(split) == 5
    assert report.num_bad_images == 2
    assert report.num_bad_lines == 1
    assert report.num_duplicate_boxes == 1
    assert report.num_duplicate_images == 7
    assert report.num_boxes == 7
    assert report.num_backgrounds == 2
    assert report.num_missing_labels == 1
    assert f"{tiny_dataset.labels / 'b.txt'}:2: class 9" in "\n".join(report.problems)
    assert "bad.jpg: the file is empty" in caplog.text
    assert "f.txt: labels cannot be read" in caplog.text
    assert "5 images, 7 boxes, 2 images without objects (1 have no label file)" in caplog.text


def test_many_problems_are_cut_short(tiny_dataset, caplog):
    (tiny_dataset.labels / "a.txt").write_text("0 0.5\n" * 500 + "0 0.5 0.5 0.1 0.1")
    with caplog.at_level(logging.WARNING):
        split = scan_split([tiny_dataset.images], tiny_dataset.names)
    assert split.report.num_bad_lines == 500
    assert len(split.report.problems) == 100
    assert "... and 490 more problems" in caplog.text


def test_single_class(tiny_dataset):
    split = scan_split([tiny_dataset.images], ["thing"], single_cls=True)
    assert split.report.num_bad_lines == 0
    assert set(split.labels.flat[:, 0].tolist()) == {0}
    again = scan_split([tiny_dataset.images], tiny_dataset.names)
    assert set(again.labels.flat[:, 0].tolist()) == {0, 1, 2}


def test_data_sets_that_cannot_be_used(tiny_dataset, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no images in"):
        scan_split([tmp_path / "empty"], NAMES)
    (tmp_path / "empty" / "a.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"none of the 1 images.*first problem.*a\.jpg"):
        scan_split([tmp_path / "empty"], NAMES)
    shutil.rmtree(tiny_dataset.labels)
    with pytest.raises(ValueError, match="no labels at all for the 4 images") as caught:
        scan_split([tiny_dataset.images], NAMES)
    assert str(tiny_dataset.labels / "a.txt") in str(caught.value)
    split = scan_split([tiny_dataset.images], NAMES, require_labels=False)
    assert split.report.num_missing_labels == 4


def test_all_lines_bad_stops_with_the_first_of_them(tiny_dataset):
    for path in tiny_dataset.labels.glob("*.txt"):
        path.write_text("5 0.5 0.5 0.1 0.1")
    with pytest.raises(ValueError, match=r"no labels at all.*a\.txt:1: class 5"):
        scan_split([tiny_dataset.images], NAMES)


# ------------------------------------------------------------------------------------- scan cache
def cache_file(tiny_dataset) -> Path:
    return tiny_dataset.labels.parent / "train.scan.npz"


def is_from_cache(tiny_dataset, caplog) -> bool:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        scan_split([tiny_dataset.images], tiny_dataset.names)
    return "(cached scan, " in caplog.text


def test_cache_gives_the_same_split(tiny_dataset, caplog):
    (tiny_dataset.labels / "d.txt").write_text("1 0.1 0.1 0.5 0.1 0.5 0.5\n0 0.5\n")
    fresh = scan_split([tiny_dataset.images], tiny_dataset.names)
    assert cache_file(tiny_dataset).is_file()
    assert is_from_cache(tiny_dataset, caplog)
    assert "d.txt:2: 2 values" in caplog.text, "problems are reported every time"
    cached = scan_split([tiny_dataset.images], tiny_dataset.names)
    assert cached.paths == fresh.paths
    assert cached.report == fresh.report
    np.testing.assert_array_equal(cached.shapes_hw, fresh.shapes_hw)
    for ours, theirs in zip(cached.labels, fresh.labels, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert [len(points) for points in cached.segments[3]] == [3]
    assert not list(cache_file(tiny_dataset).parent.glob("*.tmp"))


def change_label(data):
    (data.labels / "a.txt").write_text("0 0.5 0.5 0.1 0.1")


def touch_image(data):
    path = data.images / "a.jpg"
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))


def add_image(data):
    shutil.copy(data.images / "a.jpg", data.images / "z.jpg")


def add_label(data):
    (data.labels / "d.txt").unlink()
    scan_split([data.images], data.names)
    (data.labels / "d.txt").write_text("")


@pytest.mark.parametrize(
    "change",
    [
        change_label,
        touch_image,
        add_image,
        add_label,
        pytest.param(lambda data: (data.images / "a.jpg").unlink(), id="remove_image"),
        pytest.param(lambda data: (data.labels / "a.txt").unlink(), id="remove_label"),
        pytest.param(
            lambda data: (data.images / "a.jpg").rename(data.images / "0.jpg"), id="rename"
        ),
    ],
)
def test_cache_notices_changes(tiny_dataset, caplog, change):
    scan_split([tiny_dataset.images], tiny_dataset.names)
    assert is_from_cache(tiny_dataset, caplog)
    change(tiny_dataset)
    assert not is_from_cache(tiny_dataset, caplog)
    assert is_from_cache(tiny_dataset, caplog)


def test_cache_notices_another_number_of_classes(tiny_dataset):
    assert scan_split([tiny_dataset.images], NAMES).report.num_bad_lines == 0
    assert scan_split([tiny_dataset.images], NAMES[:2]).report.num_bad_lines == 2


def rewrite_cache(path: Path, **changes) -> None:
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files} | changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})


DAMAGE = [
    pytest.param(lambda path: path.write_bytes(b""), id="empty"),
    pytest.param(lambda path: path.write_bytes(b"PK\x03\x04 nonsense"), id="nonsense"),
    pytest.param(lambda path: path.write_bytes(path.read_bytes()[:500]), id="truncated"),
    pytest.param(lambda path: rewrite_cache(path, labels=None), id="part missing"),
    pytest.param(lambda path: rewrite_cache(path, labels=np.zeros((3, 5))), id="short labels"),
    pytest.param(
        lambda path: rewrite_cache(path, label_offsets=np.array([0, 99, 3, 3, 6])), id="offsets"
    ),
    pytest.param(lambda path: rewrite_cache(path, report=np.zeros(5, np.uint8)), id="report"),
    pytest.param(lambda path: rewrite_cache(path, usable=np.array([0, 1, 2, 99])), id="index"),
    pytest.param(
        lambda path: rewrite_cache(path, header=np.array([{"format": 1}], object)), id="pickle"
    ),
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_caches_are_built_anew(tiny_dataset, caplog, damage):
    scan_split([tiny_dataset.images], tiny_dataset.names)
    damage(cache_file(tiny_dataset))
    assert not is_from_cache(tiny_dataset, caplog)
    assert "a damaged cache is built anew" in caplog.text
    assert is_from_cache(tiny_dataset, caplog)


def test_cache_of_another_format_is_built_anew(tiny_dataset, caplog):
    scan_split([tiny_dataset.images], tiny_dataset.names)
    header = np.frombuffer(json.dumps({"format": 0, "num_classes": 3}).encode(), np.uint8)
    rewrite_cache(cache_file(tiny_dataset), header=header)
    assert not is_from_cache(tiny_dataset, caplog)


def test_read_only_places_get_no_cache(tiny_dataset, caplog):
    folder = cache_file(tiny_dataset).parent
    folder.chmod(0o555)
    try:
        assert not is_from_cache(tiny_dataset, caplog)
        assert "the scan cannot be kept" in caplog.text
        assert not is_from_cache(tiny_dataset, caplog)
    finally:
        folder.chmod(0o755)
    assert sorted(path.name for path in folder.iterdir()) == ["train"]


def test_cache_can_be_switched_off(tiny_dataset):
    scan_split([tiny_dataset.images], tiny_dataset.names, cache=False)
    assert not cache_file(tiny_dataset).exists()


def test_lists_have_their_cache_beside_them(tiny_dataset):
    path = tiny_dataset.root / "train.txt"
    path.write_text("./images/train/c.jpg\n./images/train/a.jpg\n./images/train/c.jpg\n")
    split = scan_split([path], tiny_dataset.names)
    assert [Path(image).name for image in split.paths] == ["c.jpg", "a.jpg"]
    assert split.report.num_duplicate_images == 1
    assert (tiny_dataset.root / "train.scan.npz").is_file()


# ------------------------------------------------------------------------------------ plain loading
def pixels_of_class(image: torch.Tensor, cls: int) -> np.ndarray:
    """xyxy of a class's colour in a uint8 RGB image [3, H, W] of the tiny data set."""
    colour = torch.tensor([(220, 60, 60), (80, 200, 80), (60, 120, 220)][cls])
    is_near = (image.int() - colour[:, None, None]).abs().amax(0) < 60
    ys, xs = is_near.nonzero(as_tuple=True)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


@pytest.mark.parametrize("rect", [False, True])
@pytest.mark.parametrize("imgsz", [64, 96, 128, 256])
def test_plain_items_are_letterboxed_rgb_with_boxes_on_their_objects(split, imgsz, rect):
    dataset = DetectionDataset(split, imgsz, rect=rect, batch_size=2, pad=0.5)
    for index in range(len(split)):
        image, targets, path, letterbox = dataset[index]
        assert image.dtype == torch.uint8
        assert path == split.paths[index]
        height, width = image.shape[1:]
        assert letterbox.original_hw == tuple(split.shapes_hw[index])
        boxes_px = xyxy_from_cxcywh(targets[:, 1:]) * torch.tensor([width, height] * 2)
        for cls, box in zip(targets[:, 0].int().tolist(), boxes_px.numpy(), strict=True):
            np.testing.assert_allclose(box, pixels_of_class(image, cls), atol=2 + imgsz / 96)
        original_h, original_w = letterbox.original_hw
        original = xyxy_from_cxcywh(split.labels[index][:, 1:]) * ([original_w, original_h] * 2)
        np.testing.assert_allclose(to_letterbox(original, letterbox), boxes_px, atol=1e-3)


def test_plain_items_of_the_right_size_keep_every_pixel(split):
    image, _, path, letterbox = DetectionDataset(split, 96)[2]
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy()[..., ::-1], read_image(path))
    assert letterbox == ((96, 96), (1.0, 1.0), (0.0, 0.0))


def test_images_are_not_enlarged_beyond_imgsz_and_padded_with_grey(split):
    image, _, _, letterbox = DetectionDataset(split, 192)[3]  # 64 x 96 -> 128 x 192
    assert letterbox == ((64, 96), (2.0, 2.0), (0.0, 32.0))
    assert (image[:, :32] == 114).all()
    assert (image[:, -32:] == 114).all()


@pytest.mark.parametrize(
    ("shapes_hw", "imgsz", "pad", "expected"),
    [
        pytest.param([(480, 640), (240, 640)], 640, 0.5, (512, 672), id="wide"),
        pytest.param([(640, 480), (640, 320)], 640, 0.5, (672, 512), id="tall"),
        pytest.param([(480, 640), (640, 480)], 640, 0.5, (672, 672), id="mixed"),
        pytest.param([(640, 640)], 640, 0.0, (640, 640), id="square"),
        pytest.param([(480, 640)], 320, 0.0, (256, 320), id="no pad"),
        pytest.param([(427, 640)], 640, 0.5, (448, 672), id="rounded up"),
    ],
)
def test_rect_shape(shapes_hw, imgsz, pad, expected):
    assert rect_shape_hw(np.array(shapes_hw), imgsz, 32, pad) == expected


def test_rect_batches_are_sorted_by_aspect_ratio(split):
    loader = build_loader(DetectionDataset(split, 128, rect=True, batch_size=2), 2)
    batches = list(loader)
    names = [[Path(path).name for path in batch.paths] for batch in batches]
    assert names == [["d.jpg", "a.jpg"], ["c.jpg", "b.png"]]
    assert [tuple(batch.images.shape) for batch in batches] == [(2, 3, 96, 128), (2, 3, 128, 128)]


def test_batches_hold_targets_with_their_image(split):
    (batch,) = build_loader(DetectionDataset(split, 64), 8)
    assert batch.images.shape == (4, 3, 64, 64)
    assert batch.images.dtype == torch.uint8
    assert batch.targets.shape == (6, 6)
    assert batch.targets.dtype == torch.float32
    assert batch.targets[:, 0].tolist() == [0, 0, 1, 2, 2, 2]
    assert batch.targets[:, 1].tolist() == [0, 1, 2, 0, 1, 2]
    assert len(batch.paths) == len(batch.letterboxes) == 4


def test_a_batch_without_objects(split):
    batch = list(build_loader(DetectionDataset(split, 64), 1))[3]
    assert batch.targets.shape == (0, 6)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"imgsz": 100}, "imgsz 100 is no multiple"),
        ({"imgsz": 0}, "imgsz 0 is no multiple"),
        ({"seed": -1}, "seed -1"),
        ({"batch_size": 0}, "batch size 0"),
        ({"cache": "tape"}, "cache 'tape'"),
    ],
)
def test_dataset_complains(split, arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        DetectionDataset(split, **({"imgsz": 64} | arguments))


def test_loader_complains(split):
    square, rect = DetectionDataset(split, 64), DetectionDataset(split, 64, rect=True)
    for arguments in ({"batch_size": 0}, {"batch_size": 1, "workers": -1}):
        with pytest.raises(ValueError, match="too small"):
            build_loader(square, **arguments)
    with pytest.raises(ValueError, match="made for batch size 16, not 4"):
        build_loader(rect, 4)
    with pytest.raises(ValueError, match="image weights cannot act"):
        build_loader(rect, 16, image_weights=np.ones(4))
    with pytest.raises(ValueError, match="image weights must be 4"):
        list(build_loader(square, 4, image_weights=np.array([1, 1, np.nan, 1])))
    with pytest.raises(IndexError):
        square[4]


def test_an_image_damaged_after_the_scan_becomes_an_empty_picture(split, caplog):
    path = Path(split.paths[1])
    path.write_bytes(path.read_bytes()[:300])
    image, targets, *_ = DetectionDataset(split, 64)[1]
    assert (image == 114).all()
    assert len(targets) == 0
    assert "used as an empty picture" in caplog.text
    path.unlink()
    with pytest.raises(OSError, match=r"b\.png"):
        DetectionDataset(split, 64)[1]


# ------------------------------------------------------------------------------ augmented loading
def collect(loader, epoch: int) -> list[torch.Tensor]:
    loader.set_epoch(epoch)
    return [part for batch in loader for part in (batch.images, batch.targets)]


def are_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("rect", [False, True])
def test_batches_depend_on_seed_and_epoch_alone(split, rect):
    def loader(seed=3, workers=0):
        dataset = DetectionDataset(split, 64, hyp=HIGH, rect=rect, batch_size=2, seed=seed)
        return build_loader(dataset, 2, workers=workers, shuffle=True, seed=seed)

    first = loader()
    epochs = [collect(first, epoch) for epoch in range(3)]
    assert not are_equal(epochs[0], epochs[1])
    assert are_equal(collect(first, 1), epochs[1])
    assert are_equal(collect(loader(), 2), epochs[2])
    assert not are_equal(collect(loader(seed=4), 0), epochs[0])
    with_workers = loader(workers=2)
    assert with_workers.num_workers >= 1
    for epoch in (0, 1):
        assert are_equal(collect(with_workers, epoch), epochs[epoch])


@pytest.mark.parametrize("workers", [0, 1])
def test_augmented_batches_are_well_formed(split, workers):
    dataset = DetectionDataset(split, 96, hyp=HIGH, seed=1)
    loader = build_loader(dataset, 3, workers=workers, shuffle=True)
    assert len(loader) == 2
    sizes = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        for batch in loader:
            sizes.append(len(batch.images))
            assert batch.images.shape[1:] == (3, 96, 96)
            cx, cy, w, h = batch.targets[:, 2:].T
            assert (w > 0).all()
            assert (h > 0).all()
            for low, high in ((cx - w / 2, cx + w / 2), (cy - h / 2, cy + h / 2)):
                assert (low >= -1e-6).all()
                assert (high <= 1 + 1e-6).all()
            assert (batch.targets[:, 0] < len(batch.images)).all()
    assert sizes == [3, 1] * 3


@pytest.mark.parametrize(
    "key",
    ["hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale", "shear", "perspective", "flipud",
     "fliplr", "mosaic", "mixup", "copy_paste"],
)  # fmt: skip
@pytest.mark.parametrize("rect", [False, True])
def test_every_augmentation_key_acts(tiny_dataset, key, rect):
    polygons = "0 0.05 0.1 0.4 0.1 0.4 0.7 0.05 0.7\n1 0.1 0.75 0.3 0.75 0.3 0.95\n"
    for name in "abcd":
        (tiny_dataset.labels / f"{name}.txt").write_text(polygons)
    split = scan_split([tiny_dataset.images], NAMES)
    keys = [field.name for field in dataclasses.fields(LOW)]
    start = keys.index("hsv_h")
    still = dict.fromkeys(keys[start : keys.index("copy_paste") + 1], 0.0)
    strength = {"degrees": 10.0, "shear": 10.0, "perspective": 0.001, "scale": 0.5}.get(key, 1.0)
    strength = 0.3 if key in ("translate", "hsv_h") else strength
    without = dataclasses.replace(LOW, **still)
    with_key = dataclasses.replace(LOW, **(still | {key: strength}))
    pictures = []
    for hyp in (without, with_key):
        dataset = DetectionDataset(split, 96, hyp=hyp, rect=rect, batch_size=4)
        pictures.append(torch.stack([dataset[(0, index)].image for index in range(4)]))
    changes = not torch.equal(*pictures)
    assert changes == (key != "mosaic" or not rect), "only mosaic is left out of rectangles"


def test_without_strengths_training_images_are_the_plain_ones(tiny_dataset):
    split = scan_split([tiny_dataset.images], NAMES)
    keys = [field.name for field in dataclasses.fields(LOW)]
    still = dict.fromkeys(keys[keys.index("hsv_h") : keys.index("copy_paste") + 1], 0.0)
    train = DetectionDataset(split, 128, hyp=dataclasses.replace(LOW, **still))
    plain = DetectionDataset(split, 128)
    for index in range(4):
        assert torch.equal(train[index].image, plain[index].image)
        torch.testing.assert_close(train[index].targets, plain[index].targets)


def test_boxes_of_augmented_images_lie_on_their_objects(split):
    hyp = dataclasses.replace(LOW, hsv_h=0, hsv_s=0, hsv_v=0, mixup=0, mosaic=0, scale=0.2)
    dataset = DetectionDataset(split, 96, hyp=hyp)
    compared = 0
    for epoch in range(5):
        for index in range(3):
            image, targets, *_ = dataset[(epoch, index)]
            for cls, *box in targets.tolist():
                seen = pixels_of_class(image, int(cls))
                box = xyxy_from_cxcywh(np.array(box)) * 96
                np.testing.assert_allclose(box, seen, atol=2.5)
                compared += 1
    assert compared > 20


# ----------------------------------------------------------------------------------- order, weights
def order(loader, epoch: int = 0) -> list[str]:
    loader.set_epoch(epoch)
    return [Path(path).stem for batch in loader for path in batch.paths]


@pytest.mark.parametrize("rect", [False, True])
def test_without_shuffling_every_image_comes_once(split, rect):
    dataset = DetectionDataset(split, 64, rect=rect, batch_size=3)
    seen = order(build_loader(dataset, 3))
    assert sorted(seen) == ["a", "b", "c", "d"]
    assert seen == (["d", "a", "c", "b"] if rect else ["a", "b", "c", "d"])


@pytest.mark.parametrize("rect", [False, True])
def test_shuffling_visits_every_image_in_another_order_each_epoch(split, rect):
    loader = build_loader(DetectionDataset(split, 64, rect=rect, batch_size=1), 1, shuffle=True)
    orders = [order(loader, epoch) for epoch in range(8)]
    assert all(sorted(names) == ["a", "b", "c", "d"] for names in orders)
    assert len({tuple(names) for names in orders}) > 3


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("rect", [False, True])
def test_ranks_share_what_one_process_would_see(split, world_size, rect):
    def loaders(shuffle):
        dataset = DetectionDataset(split, 64, rect=rect, batch_size=1)
        return [
            build_loader(dataset, 1, shuffle=shuffle, seed=1, rank=rank, world_size=world_size)
            for rank in range(world_size)
        ]

    parts = [order(loader) for loader in loaders(shuffle=False)]
    assert sorted(itertools.chain(*parts)) == ["a", "b", "c", "d"], (
        "evaluation sees each image once"
    )
    trained = loaders(shuffle=True)
    parts = [order(loader) for loader in trained]
    assert len({len(part) for part in parts}) == 1, "all ranks make as many steps"
    assert [len(loader) for loader in trained] == [len(part) for part in parts]
    assert set(itertools.chain(*parts)) == {"a", "b", "c", "d"}
    alone = order(build_loader(DetectionDataset(split, 64, rect=rect, batch_size=1), 1,
                               shuffle=True, seed=1))  # fmt: skip
    dealt = [name for step in zip(*parts, strict=True) for name in step]
    assert dealt[: len(alone)] == alone


def test_image_weights_draw_with_replacement(split):
    dataset = DetectionDataset(split, 64, hyp=LOW)
    loader = build_loader(dataset, 2, shuffle=True, image_weights=np.array([0, 1, 0, 0]))
    loader.set_epoch(0)
    batches = list(loader)
    assert [Path(path).stem for batch in batches for path in batch.paths] == ["b"] * 4
    images = torch.cat([batch.images for batch in batches])
    assert not torch.equal(images[0], images[1]), "each repeat is augmented in its own way"
    loader.set_image_weights(np.array([0, 0, 1, 0]))
    assert set(order(loader)) == {"c"}
    loader.set_image_weights(np.zeros(4))
    assert len(order(loader)) == 4
    loader.set_image_weights(None)
    assert sorted(order(loader)) == ["a", "b", "c", "d"]
    asked = build_loader(dataset, 2, image_weights=lambda: np.array([1, 0, 0, 0]))
    assert set(order(asked)) == {"a"}


def test_image_weights_from_map(split):
    # a: disc, box; b: bar; c: disc, box, bar; d: nothing. Two boxes of each class.
    even = image_weights_from_map(split, np.zeros(3))
    np.testing.assert_allclose(even, [1.0, 0.5, 1.5, 0.0])
    learnt = image_weights_from_map(split, np.array([1.0, 0.5, 0.0]))
    np.testing.assert_allclose(learnt, [0.125, 0.5, 0.625, 0.0])


def test_label_statistics(split):
    assert class_counts(split, 5).tolist() == [2, 2, 2, 0, 0]
    sizes = label_sizes_px(split, 64)
    assert sizes.shape == (6, 2)
    np.testing.assert_allclose(sizes[:3], [[20, 20], [18, 24], [30, 8]], atol=1e-3)
    assert label_sizes_px(scan_subset(split, 0), 64).shape == (0, 2)


def scan_subset(split, count: int):
    labels = RaggedRows.pack([np.zeros((0, 5), np.float32)] * count, 5)
    return dataclasses.replace(
        split, paths=split.paths[:count], labels=labels, shapes_hw=split.shapes_hw[:count]
    )


# ------------------------------------------------------------------------------------- pixel caches
@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("hyp", [None, HIGH])
@pytest.mark.parametrize("workers", [0, 1])
def test_pixel_caches_give_the_same_images(split, kind, hyp, workers, caplog):
    plain = build_loader(DetectionDataset(split, 64, hyp=hyp), 2)
    with caplog.at_level(logging.INFO):
        dataset = DetectionDataset(split, 64, hyp=hyp, cache=kind)
    assert "4 images need 0.00 GiB" in caplog.text
    cached = build_loader(dataset, 2, workers=workers)
    expected = collect(plain, 0)
    for path in split.paths:
        Path(path).write_bytes(b"gone")  # whoever still reads the files gets grey
    assert are_equal(collect(cached, 0), expected)
    assert are_equal(collect(cached, 0), expected), "the cache is not written to"


def test_ram_cache_is_refused_where_it_does_not_fit(split, monkeypatch, caplog):
    monkeypatch.setattr(image_cache, "available_memory", lambda: 40_000)
    expected = DetectionDataset(split, 64)[0].image
    dataset = DetectionDataset(split, 64, cache="ram")
    assert "no image cache: 4 images need 0.00 GiB of memory, only" in caplog.text
    assert torch.equal(dataset[0].image, expected)


def test_available_memory_is_plausible():
    available = image_cache.available_memory()
    assert available is None or 2**20 < available < 2**50


def disk_files(tiny_dataset) -> list[Path]:
    return sorted((tiny_dataset.root / "image_cache" / "train").glob("*"))


def test_disk_cache_is_kept_and_notices_changed_images(tiny_dataset, split, caplog):
    DetectionDataset(split, 64, cache="disk")
    files = disk_files(tiny_dataset)
    assert len(files) == 4
    assert all(file.suffix == ".npy" for file in files)
    times = [file.stat().st_mtime_ns for file in files]
    DetectionDataset(split, 64, cache="disk")
    assert [file.stat().st_mtime_ns for file in disk_files(tiny_dataset)] == times

    save(tiny_dataset.images / "a.jpg", np.full((96, 128, 3), 255, np.uint8))
    split = scan_split([tiny_dataset.images], NAMES)
    dataset = DetectionDataset(split, 64, cache="disk")
    assert len(disk_files(tiny_dataset)) == 4, "the file of the old state has gone"
    assert dataset[0].image[:, 32, 32].min() > 250

    DetectionDataset(split, 96, cache="disk")
    DetectionDataset(split, 64, hyp=LOW, cache="disk")  # resized in another way
    assert len(disk_files(tiny_dataset)) == 12


def test_damaged_disk_cache_is_passed_over(tiny_dataset, split):
    dataset = DetectionDataset(split, 64, cache="disk")
    expected = dataset[0].image
    first = disk_files(tiny_dataset)[0]
    for content in (b"", first.read_bytes()[:200], b"nonsense"):
        first.write_bytes(content)
        assert torch.equal(dataset[0].image, expected)
    np.save(first, np.zeros((3, 3)))
    assert torch.equal(dataset[0].image, expected)


def test_disk_cache_in_a_read_only_place(tiny_dataset, split, caplog):
    tiny_dataset.root.chmod(0o555)
    try:
        dataset = DetectionDataset(split, 64, cache="disk")
    finally:
        tiny_dataset.root.chmod(0o755)
    assert "no image cache" in caplog.text
    assert len(dataset[0].targets) == 2


def test_disk_cache_on_a_full_disk(tiny_dataset, split, monkeypatch, caplog):
    usage = shutil.disk_usage(tiny_dataset.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    dataset = DetectionDataset(split, 64, cache="disk")
    assert "are free" in caplog.text
    assert disk_files(tiny_dataset) == []
    assert len(dataset[0].targets) == 2


# ------------------------------------------------------------------------------ real photographs
@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("coco128", {"train": (128, 929)}),
        ("bccd", {"train": (205, 2804), "val": (87, 1137), "test": (72, 945)}),
    ],
)
def test_shared_data_sets(shared_dir, name, counts):
    folder = shared_dir / "data" / name
    spec = load_dataset_spec(folder / f"{name}.yaml", shared_dir.parent / "any")
    for part, (num_images, num_boxes) in counts.items():
        split = scan_split(getattr(spec, part), spec.names)
        report = split.report
        assert (report.num_images, report.num_boxes) == (num_images, num_boxes)
        assert report.problems == ()
        for path, hw in list(zip(split.paths, split.shapes_hw.tolist(), strict=True))[:20]:
            assert read_image(path).shape[:2] == tuple(hw)
