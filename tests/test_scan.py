"""Finding images, reading labels, the scan and its cache."""

import json
import logging
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from utils.config import load_dataset_spec
from utils.image_files import read_image
from utils.regular_file import read_regular
from utils.scan import find_images, label_path, parse_labels, scan_split

NAMES = ("disc", "box", "bar")


@pytest.fixture
def split(tiny_dataset):
    return scan_split([tiny_dataset.images], tiny_dataset.names)


# -------------------------------------------------------------------------------------- label lines
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
        pytest.param("1_0 0.5 0.5 0.1 0.1", "'1_0' is not a number", id="underscore"),
        pytest.param(
            "1 0.5 0.5 0.2 \u0661", "'\u0661' is not a number", id="digits of other scripts"
        ),
        pytest.param("1 1e-60 0.5 1e-60 0.1", "no area", id="zero in float32"),
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


# ------------------------------------------------------------------------------------ finding files
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


def make_images(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found_below(source):
    return [Path(path).relative_to(source).as_posix() for path in find_images(source)[0]]


def test_folders_that_link_to_each_other_are_searched_once(tmp_path, caplog):
    """Four of them gave each image 16 times, and the effort grew ninefold with each more."""
    numbers = range(4)
    make_images(tmp_path, *(f"{n}/{n}.jpg" for n in numbers))
    for n in numbers:
        for other in set(numbers) - {n}:
            (tmp_path / f"{n}/to{other}").symlink_to(tmp_path / str(other))
    assert found_below(tmp_path) == [f"{n}/{n}.jpg" for n in numbers]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "0/to1 leads to a folder" in caplog.text
    assert "as are 11 others" in caplog.text


def test_a_link_up_does_not_bring_in_the_other_splits(tmp_path, caplog):
    train = tmp_path / "images/train"
    make_images(tmp_path / "images", "train/a.jpg", "val/b.jpg")
    (train / "again").symlink_to("../../images")
    assert found_below(train) == ["a.jpg"]
    assert f"{train / 'again'} leads" in caplog.text


def test_a_link_to_a_folder_elsewhere_is_followed(tmp_path, caplog):
    train, disk = tmp_path / "images/train", tmp_path / "disk/images"
    make_images(disk, "a.jpg", "sub/b.jpg")
    train.mkdir(parents=True)
    (train / "part").symlink_to(disk)
    assert found_below(train) == ["part/a.jpg", "part/sub/b.jpg"]
    assert not caplog.text
    make_images(tmp_path, "disk/c.jpg")
    (disk / "up").symlink_to(tmp_path / "disk")
    assert found_below(train) == ["part/a.jpg", "part/sub/b.jpg"]
    (train / "second").symlink_to(disk / "sub")  # part comes first
    assert found_below(train) == ["part/a.jpg", "part/sub/b.jpg"]


def test_a_link_that_a_list_of_sources_names_is_a_source_of_its_own(tiny_dataset):
    link = tiny_dataset.images.with_name("linked")
    link.symlink_to(tiny_dataset.images)
    split = scan_split([tiny_dataset.images, link], tiny_dataset.names, cache=False)
    assert split.report.num_found == 2 * len(find_images(link)[0])


def test_find_images_in_lists(tmp_path, monkeypatch):
    (tmp_path / "cwd" / "here").mkdir(parents=True)
    (tmp_path / "cwd" / "here" / "c.jpg").write_bytes(b"")
    monkeypatch.chdir(tmp_path / "cwd")
    absolute = tmp_path / "x" / "a.jpg"
    text = f"\ufeff./images/b.jpg\n\n{absolute}\r\nhere/c.jpg\n../up.png\n./labels/b.txt\na\0.jpg\n"
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.txt").write_text(text, encoding="utf-8")
    found, problems = find_images(tmp_path / "set" / "train.txt")
    assert found == [
        str(tmp_path / "set" / "images" / "b.jpg"),
        str(absolute),
        str(tmp_path / "cwd" / "here" / "c.jpg"),
        str(tmp_path / "up.png"),
    ]
    assert len(problems) == 2
    assert "train.txt:6: './labels/b.txt'" in problems[0]
    assert "train.txt:7: 'a\\x00.jpg' cannot be the name" in problems[1]


def test_folders_nested_beyond_the_depth_of_python(tmp_path):
    folder = tmp_path / "images" / "/".join("d" * 400)
    os.makedirs(folder)  # noqa: PTH103 (mkdir is recursive)
    (folder / "x.jpg").touch()
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(350)
    try:
        found, _ = find_images(tmp_path / "images")
    finally:
        sys.setrecursionlimit(limit)
    assert [Path(name).name for name in found] == ["x.jpg"]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "images" / "closed").mkdir(parents=True)
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(OSError, match=r"images/closed: the folder cannot be read \(Permission"):
        find_images(tmp_path / "images")


@pytest.mark.skipif(os.name != "posix", reason="pipes in folders")
def test_pipes_and_absurd_sizes_in_the_place_of_text(tiny_dataset):
    labels = tiny_dataset.labels
    (labels / "a.txt").unlink()
    os.mkfifo(labels / "a.txt")
    os.truncate(labels / "c.txt", 10**12)
    report = scan_split([tiny_dataset.images], NAMES).report
    assert report.num_bad_images == 2
    assert "a.txt: labels cannot be read" in report.problems[0]
    assert "not a regular file" in report.problems[0]
    assert "1000000000000 bytes" in report.problems[1]
    os.mkfifo(tiny_dataset.root / "list.txt")
    with pytest.raises(OSError, match=r"list.txt: not a regular file"):
        find_images(tiny_dataset.root / "list.txt")


def test_unreadable_labels_are_not_taken_for_background(tiny_dataset, monkeypatch):
    def refuse(path, max_bytes):
        if str(path).endswith("a.txt"):
            raise PermissionError(13, "Permission denied", str(path))
        return read_regular(path, max_bytes)

    monkeypatch.setattr("utils.scan.read_regular", refuse)
    split = scan_split([tiny_dataset.images], NAMES, cache=False)
    assert len(split) == 3
    assert "a.txt: labels cannot be read: " in split.report.problems[0]
    assert "Permission denied" in split.report.problems[0]


def test_a_link_to_labels_that_are_gone_is_not_taken_for_background(tiny_dataset):
    labels = tiny_dataset.labels / "a.txt"
    labels.rename(tiny_dataset.root / "share.txt")
    labels.symlink_to(tiny_dataset.root / "share.txt")
    assert len(scan_split([tiny_dataset.images], NAMES, cache=False)) == 4
    (tiny_dataset.root / "share.txt").unlink()
    split = scan_split([tiny_dataset.images], NAMES, cache=False)
    assert len(split) == 3
    assert f"{labels}: labels cannot be read: " in split.report.problems[0]


def test_line_ends_of_all_systems(tiny_dataset):
    lines = ["0 0.5 0.5 0.2 0.2", "1 0.5 0.5 0.2 0.2", "2 0.5 0.5 0.2 0.2"]
    (tiny_dataset.labels / "a.txt").write_bytes("\r".join(lines).encode())
    (tiny_dataset.labels / "b.txt").write_bytes("\r\n".join(lines).encode())
    split = scan_split([tiny_dataset.images], NAMES)
    assert [len(rows) for rows in split.labels[:2]] == [3, 3]


def test_find_images_complains(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        find_images(tmp_path / "absent")
    (tmp_path / "a.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a folder of images or a \.txt list"):
        find_images(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ValueError, match="not a text file"):
        find_images(tmp_path / "a.txt")


# ----------------------------------------------------------------------------------------- scanning
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
    assert len(parse_labels("x\n" * 5000, "a.txt", 3).problems) == 100, "or memory fills up"
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


# --------------------------------------------------------------------------------------- scan cache
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


def as_json(value) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def compress(path: Path) -> None:
    """An archive that unfolds: a gigabyte of zeros would be a megabyte."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    np.savez_compressed(path, **arrays)


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
    pytest.param(lambda path: rewrite_cache(path, labels=np.full((6, 5), 7, "f4")), id="class 7"),
    pytest.param(lambda path: rewrite_cache(path, labels=np.full((6, 5), np.nan, "f4")), id="nan"),
    pytest.param(lambda path: rewrite_cache(path, labels=np.ones((6, 5), "f4")), id="outside"),
    pytest.param(lambda path: rewrite_cache(path, usable=np.array([1, 0, 2, 3])), id="order"),
    pytest.param(lambda path: rewrite_cache(path, usable=np.array([-4, 1, 2, 3])), id="negative"),
    pytest.param(lambda path: rewrite_cache(path, shapes_hw=np.zeros((4, 2), int)), id="no size"),
    pytest.param(
        lambda path: rewrite_cache(path, report=as_json({"num_images": "4", "problems": []})),
        id="counts",
    ),
    pytest.param(lambda path: rewrite_cache(path, report=as_json([])), id="report list"),
    pytest.param(lambda path: compress(path), id="compressed"),
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


# --------------------------------------------------------------------------------- real photographs
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
