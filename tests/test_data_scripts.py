"""Conversions of COCO and Pascal VOC annotations, on small hand-made inputs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.scripts import get_bccd, get_coco, get_voc
from data.scripts.coco_annotations import convert_instances, join_parts, write_image_list
from data.scripts.voc_annotations import convert_annotation, convert_image_set
from utils.config import load_dataset_spec, load_yaml
from utils.scan import parse_labels, scan_split

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("cat", "dog")


# -------------------------------------------------------------------------------------------- COCO
def annotation(image_id: int, category_id: int, bbox: list, **more) -> dict:
    return {"image_id": image_id, "category_id": category_id, "bbox": bbox, "iscrowd": 0} | more


def coco_file(path: Path, annotations: list[dict], **changes) -> Path:
    content = {
        "images": [
            {"id": 7, "file_name": "b.jpg", "width": 100, "height": 200},
            {"id": 3, "file_name": "a.jpg", "width": 50, "height": 50},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}],
        "annotations": annotations,
    }
    path.write_text(json.dumps(content | changes))
    return path


def rows_of(path: Path) -> list[list[float]]:
    return [[float(number) for number in line.split()] for line in path.read_text().splitlines()]


def test_convert_instances(tmp_path):
    triangle = [10, 20, 60, 20, 60, 120]
    path = coco_file(
        tmp_path / "instances.json",
        [
            annotation(7, 18, [10, 20, 50, 100], segmentation=[triangle]),
            annotation(7, 17, [0, 0, 100, 200], segmentation={"counts": [1], "size": [2, 2]}),
            annotation(7, 17, [10, 20, 50, 100], iscrowd=1),
            annotation(7, 17, [10, 20, 0, 100]),
            annotation(7, 17, [-10, 20, 30, 20], segmentation=[[1, 2]]),
        ],
    )
    counts = convert_instances(path, tmp_path / "labels", NAMES)
    assert counts == (2, 3, 1, 1)
    first, second, third = rows_of(tmp_path / "labels" / "b.txt")
    np.testing.assert_allclose(first, [1, 0.1, 0.1, 0.6, 0.1, 0.6, 0.6])
    np.testing.assert_allclose(second, [0, 0.5, 0.5, 1, 1])
    np.testing.assert_allclose(third, [0, 0.1, 0.15, 0.2, 0.1])
    assert (tmp_path / "labels" / "a.txt").read_text() == ""
    parsed = parse_labels((tmp_path / "labels" / "b.txt").read_text(), "b.txt", 2)
    assert parsed.problems == []
    np.testing.assert_allclose(parsed.labels[0], [1, 0.35, 0.35, 0.5, 0.5], atol=1e-6)


def test_convert_instances_to_boxes(tmp_path):
    outline = [[10, 20, 60, 20, 60, 120]]
    path = coco_file(
        tmp_path / "i.json", [annotation(7, 18, [10, 20, 50, 100], segmentation=outline)]
    )
    convert_instances(path, tmp_path / "labels", NAMES, polygons=False)
    np.testing.assert_allclose(rows_of(tmp_path / "labels" / "b.txt"), [[1, 0.35, 0.35, 0.5, 0.5]])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"categories": [{"id": 1, "name": "bird"}]}, "categories without a class: bird"),
        ({}, "without annotations"),
    ],
)
def test_convert_instances_complains(tmp_path, changes, complaint):
    path = coco_file(tmp_path / "i.json", [], **changes)
    if not changes:
        path.write_text(json.dumps({"images": [], "categories": []}))
    with pytest.raises(ValueError, match=complaint):
        convert_instances(path, tmp_path / "labels", NAMES)
    path.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        convert_instances(path, tmp_path / "labels", NAMES)


def test_parts_of_a_hidden_object_become_one_polygon_of_the_same_area():
    parts = [
        np.array([[0, 0], [20, 0], [20, 20], [0, 20]], float),
        np.array([[60, 10], [80, 10], [80, 30], [60, 30]], float),
        np.array([[30, 50], [50, 50], [50, 70], [30, 70]], float),
    ]
    joined = join_parts(parts)
    assert {tuple(point) for point in joined} == {tuple(p) for part in parts for p in part}
    assert cv2.contourArea(joined.astype(np.float32)) == pytest.approx(1200)
    filled = np.zeros((80, 90), np.uint8)
    cv2.fillPoly(filled, [joined.astype(np.int32)], 1)
    assert int(filled.sum()) == pytest.approx(3 * 21 * 21, rel=0.15)
    np.testing.assert_array_equal(join_parts(parts[:1]), parts[0])


def test_image_list(tmp_path):
    path = coco_file(tmp_path / "i.json", [])
    assert write_image_list(path, "images/val2017", tmp_path / "val2017.txt") == 2
    assert (
        tmp_path / "val2017.txt"
    ).read_text() == "./images/val2017/a.jpg\n./images/val2017/b.jpg\n"


# --------------------------------------------------------------------------------------------- VOC
def voc_xml(path: Path, objects: list[tuple], size: tuple[int, int] = (100, 200)) -> Path:
    parts = [
        f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{box[0]}"
        f"</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"
        for name, difficult, box in objects
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>"
        f"{''.join(parts)}</annotation>"
    )
    return path


@pytest.mark.parametrize(
    ("first_pixel", "box", "row"),
    [
        pytest.param(1, (1, 1, 100, 200), [0, 0.5, 0.5, 1, 1], id="whole image, from 1"),
        pytest.param(0, (0, 0, 100, 200), [0, 0.5, 0.5, 1, 1], id="whole image, from 0"),
        pytest.param(1, (11, 21, 30, 40), [0, 0.2, 0.15, 0.2, 0.1], id="inner, from 1"),
        pytest.param(0, (10, 20, 30, 40), [0, 0.2, 0.15, 0.2, 0.1], id="inner, from 0"),
        pytest.param(0, (80, 100, 120, 300), [0, 0.9, 0.75, 0.2, 0.5], id="over the border"),
        pytest.param(1, (1, 1, 1, 1), [0, 0.005, 0.0025, 0.01, 0.005], id="one pixel"),
    ],
)
def test_convert_annotation(tmp_path, first_pixel, box, row):
    path = voc_xml(tmp_path / "a.xml", [("cat", 0, box)])
    (line,) = convert_annotation(path, NAMES, first_pixel=first_pixel).lines
    np.testing.assert_allclose([float(number) for number in line.split()], row, atol=1e-6)


def test_difficult_and_empty_objects_are_left_out(tmp_path):
    objects = [("cat", 1, (1, 1, 5, 5)), ("dog", 0, (5, 5, 5, 9)), ("dog", 0, (1, 1, 5, 5))]
    result = convert_annotation(voc_xml(tmp_path / "a.xml", objects), NAMES, first_pixel=0)
    assert (len(result.lines), result.num_difficult, result.num_degenerate) == (1, 1, 1)
    assert result.lines[0].startswith("1 ")
    assert convert_annotation(voc_xml(tmp_path / "b.xml", []), NAMES, first_pixel=0).lines == []


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("<annotation>", "not a VOC annotation"),
        ("<annotation/>", "no <size/width>"),
        ("<annotation><size><width>0</width><height>5</height></size></annotation>", "size 0 x 5"),
        ("<annotation><size><width>5</width><height>5</height></size><object><name>cat</name>"
         "</object></annotation>", "no <bndbox/xmin>"),
    ],
)  # fmt: skip
def test_convert_annotation_complains(tmp_path, text, complaint):
    path = tmp_path / "a.xml"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        convert_annotation(path, NAMES, first_pixel=0)
    assert str(path) in str(caught.value)
    voc_xml(path, [("bird", 0, (1, 1, 5, 5))])
    with pytest.raises(ValueError, match="class 'bird' is none of cat, dog"):
        convert_annotation(path, NAMES, first_pixel=0)


def voc_tree(root: Path, image_sets: dict[str, list[str]]) -> Path:
    for name, identifiers in image_sets.items():
        (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
        (root / "ImageSets" / "Main" / f"{name}.txt").write_text("\n".join(identifiers))
        for identifier in identifiers:
            voc_xml(root / "Annotations" / f"{identifier}.xml", [("cat", 0, (1, 1, 50, 50))])
            (root / "JPEGImages").mkdir(exist_ok=True)
            _, content = cv2.imencode(".jpg", np.zeros((200, 100, 3), np.uint8))
            (root / "JPEGImages" / f"{identifier}.jpg").write_bytes(content.tobytes())
    return root


def test_convert_image_set_can_be_repeated(tmp_path):
    source = voc_tree(tmp_path / "VOC2007", {"train": ["000001", "000002"]})
    places = tmp_path / "images" / "train2007", tmp_path / "labels" / "train2007"
    for _ in range(2):
        counts = convert_image_set(source, "train", *places, NAMES, first_pixel=1)
        assert counts == (2, 2, 0, 0)
    split = scan_split([places[0]], NAMES)
    assert (split.report.num_images, split.report.num_boxes) == (2, 2)
    (places[0] / "000001.jpg").unlink()
    with pytest.raises(FileNotFoundError):
        convert_image_set(source, "train", *places, NAMES, first_pixel=1)


# ------------------------------------------------------------------------------- the three scripts
def test_get_bccd(tmp_path, monkeypatch):
    tree = tmp_path / "server" / "BCCD_Dataset-master" / "BCCD"
    voc_tree(tree, {"train": ["a", "b"], "val": ["c"], "test": ["d"]})
    for path in (tree / "Annotations").glob("*.xml"):
        path.write_text(path.read_text().replace("cat", "Platelets"))
    archive = shutil.make_archive(str(tmp_path / "master"), "zip", tmp_path / "server")
    monkeypatch.setattr(get_bccd, "download", lambda url, path: _copy(archive, path))
    monkeypatch.setattr("sys.argv", ["get_bccd", "--out", str(tmp_path / "bccd")])
    get_bccd.main()
    assert sorted(path.name for path in (tmp_path / "bccd").iterdir()) == ["images", "labels"]
    names = load_dataset_spec(get_bccd.DATA_YAML, get_bccd.PROJECT_ROOT).names
    split = scan_split([tmp_path / "bccd" / "images" / "train"], names)
    assert split.report.num_boxes == 2
    assert split.labels[0][0, 0] == 2


def test_get_voc(tmp_path, monkeypatch):
    for year, sets in {"2007": ["train", "val", "test"], "2012": ["train", "val"]}.items():
        tree = tmp_path / "server" / "VOCdevkit" / f"VOC{year}"
        voc_tree(tree, {name: [f"{year}{name}"] for name in sets})
    archive = shutil.make_archive(str(tmp_path / "all"), "tar", tmp_path / "server")
    fetched = []
    monkeypatch.setattr(
        get_voc, "download", lambda url, path: fetched.append(url) or _copy(archive, path)
    )
    monkeypatch.setattr("sys.argv", ["get_voc", "--out", str(tmp_path / "VOC")])
    for _ in range(2):
        get_voc.main()
        assert len(fetched) == 3, "nothing is fetched twice"
    spec = load_dataset_spec(get_voc.DATA_YAML, get_voc.PROJECT_ROOT)
    for part, num_images in (("train", 4), ("val", 1), ("test", 1)):
        sources = [tmp_path / "VOC" / path.relative_to(spec.root) for path in getattr(spec, part)]
        split = scan_split(sources, spec.names)
        assert split.report.num_images == split.report.num_boxes == num_images
    assert sorted(path.name for path in (tmp_path / "VOC").iterdir()) == ["images", "labels"]


def test_get_coco(tmp_path, monkeypatch):
    server = tmp_path / "server"
    _, jpeg = cv2.imencode(".jpg", np.zeros((50, 100, 3), np.uint8))
    for split in ("train2017", "val2017", "test2017"):
        (server / split / split).mkdir(parents=True)
        for name in "ab":
            (server / split / split / f"{name}.jpg").write_bytes(jpeg.tobytes())
        shutil.make_archive(str(server / split), "zip", server / split)
    (server / "all" / "annotations").mkdir(parents=True)
    categories = [{"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]
    for name in ("instances_train2017", "instances_val2017", "image_info_test-dev2017"):
        coco_file(
            server / "all" / "annotations" / f"{name}.json",
            [annotation(7, 90, [10, 10, 20, 20])],
            categories=categories,
        )
    for name in ("annotations_trainval2017", "image_info_test2017"):
        shutil.make_archive(str(server / name), "zip", server / "all")
    monkeypatch.setattr(
        get_coco, "download", lambda url, path: _copy(server / url.rsplit("/")[-1], path)
    )
    monkeypatch.setattr("sys.argv", ["get_coco", "--out", str(tmp_path / "coco"), "--test"])
    get_coco.main()
    spec = load_dataset_spec(get_coco.DATA_YAML, get_coco.PROJECT_ROOT)
    for part in ("train", "val"):
        sources = [tmp_path / "coco" / path.relative_to(spec.root) for path in getattr(spec, part)]
        split = scan_split(sources, spec.names)
        assert (split.report.num_images, split.report.num_boxes) == (2, 1)
        assert split.labels.flat[0, 0] == 79
    assert len((tmp_path / "coco" / "test-dev2017.txt").read_text().splitlines()) == 2
    assert not (tmp_path / "coco" / "train2017.zip").exists()


def test_get_coco_leaves_images_that_are_there(tmp_path, monkeypatch):
    listed = coco_file(tmp_path / "listed.json", [])  # a.jpg, b.jpg
    fetched = []
    monkeypatch.setattr(get_coco, "download", lambda url, path: fetched.append(path.name))
    monkeypatch.setattr(get_coco, "unpack", lambda archive, folder: None)
    folder = tmp_path / "images" / "val2017"
    folder.mkdir(parents=True)
    (folder / "a.jpg").touch()
    half = tmp_path / "val2017.zip"
    for present, has_archive, expected in (
        ("a.jpg", False, ["val2017.zip"]),  # one is missing
        ("b.jpg", True, ["val2017.zip"]),  # an interrupted run may have been writing b.jpg
        ("b.jpg", False, []),  # put there by hand
    ):
        (folder / present).touch()
        half.touch() if has_archive else half.unlink(missing_ok=True)
        get_coco.get_images(tmp_path, "val2017", listed, keep_archive=True)
        assert fetched == expected
        fetched.clear()
        if expected:
            (tmp_path / "images" / ".val2017.complete").unlink()


COMMANDS = {
    path.name: command
    for path in sorted((ROOT / "data").glob("*.yaml"))
    if not (command := load_yaml(path)["download"]).startswith("http")
}


@pytest.mark.parametrize("name", COMMANDS)
def test_shipped_commands_run_as_they_are_written(name):
    """In the project folder, as the yaml file, the script and docs/data.md have them."""
    words = COMMANDS[name].split()
    assert words[0] == "python"
    asked = subprocess.run(
        [sys.executable, *words[1:], "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert asked.returncode == 0, asked.stderr
    assert "--out" in asked.stdout
    page = (ROOT / "docs/data.md").read_text()
    row = next(row for row in page.splitlines() if f"`{name}`" in row)
    assert f"`{COMMANDS[name]}`" in row


@pytest.mark.parametrize("name", ["get_bccd", "get_coco", "get_voc"])
def test_without_a_connection_scripts_end_with_one_line(tmp_path, name):
    nowhere = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https")}  # refuses
    result = subprocess.run(
        [sys.executable, "-m", f"data.scripts.{name}", "--out", str(tmp_path / "new")],
        cwd=ROOT,
        env=os.environ | nowhere | {"no_proxy": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: cannot download http")
    assert "put the file at" in last


def _copy(source: str | Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(source, target))
