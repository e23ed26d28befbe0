import json

import numpy as np
import pytest
import torch

from utils.coco_json import (
    COCO_CATEGORY_IDS,
    detections_as_coco,
    ground_truth_as_coco,
    number_for_coco,
    score_with_pycocotools,
    write_json,
)

PATHS = ["/data/images/val/b.jpg", "/data/images/val/a.jpg"]
LABELS = [np.array([[1, 0.5, 0.5, 0.2, 0.4]], np.float32), np.zeros((0, 5), np.float32)]
SHAPES_HW = np.array([[100, 200], [50, 50]])
NAMES = ("cat", "dog")


def test_category_ids():
    assert len(COCO_CATEGORY_IDS) == 80
    assert COCO_CATEGORY_IDS[:12] == (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13)
    assert COCO_CATEGORY_IDS[-1] == 90


def test_other_data_sets_count_from_one():
    ids = number_for_coco(PATHS, 2)
    assert ids.images == {PATHS[0]: 2, PATHS[1]: 1}
    assert ids.categories == (1, 2)
    assert ids.annotations is None


@pytest.mark.parametrize(
    ("name", "num_classes", "with_file", "is_coco"),
    [
        ("000000000139.jpg", 80, True, True),
        ("000000000139.jpg", 80, False, False),
        ("000000000139.jpg", 20, True, False),
        ("street.jpg", 80, True, False),
    ],
)
def test_coco_is_recognised_by_its_annotation_file(tmp_path, name, num_classes, with_file, is_coco):
    path = str(tmp_path / "images/val2017" / name)
    if with_file:
        (tmp_path / "annotations").mkdir()
        (tmp_path / "annotations/instances_val2017.json").write_text("{}")
    ids = number_for_coco([path], num_classes)
    assert (ids.annotations is not None) == is_coco
    assert ids.is_coco == is_coco
    assert ids.images[path] == (139 if is_coco else 1)
    assert ids.categories[11] == (13 if is_coco else 12)


@pytest.mark.parametrize(
    ("folder", "file", "is_coco"),
    [
        ("test2017", "image_info_test-dev2017.json", True),
        ("test2017", "image_info_test2017.json", True),
        ("test2017", "instances_val2017.json", True),
        ("test2017", "image_info_test2014.json", False),
        ("test2017", "captions_val2017.json", False),
        ("test", "instances_default.json", False),
        ("train", "instances_train.json", True),
    ],
)
def test_a_split_without_boxes_has_the_numbers_of_coco(tmp_path, folder, file, is_coco):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / file).write_text("{}")
    path = str(tmp_path / "images" / folder / "000000000001.jpg")
    other = str(tmp_path / "images" / folder / "000000000007.jpg")
    ids = number_for_coco([path, other], 80)
    assert ids.is_coco == is_coco
    assert ids.images == {path: 1, other: 7 if is_coco else 2}
    assert ids.categories[79] == (90 if is_coco else 80)
    has_boxes = file == f"instances_{folder}.json"
    assert (ids.annotations is not None) == has_boxes


def test_ground_truth_by_hand():
    ids = number_for_coco(PATHS, 2)
    content = ground_truth_as_coco(PATHS, LABELS, SHAPES_HW, NAMES, ids)
    assert content["images"][0] == {"id": 2, "file_name": "b.jpg", "width": 200, "height": 100}
    assert content["categories"] == [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    (annotation,) = content["annotations"]
    assert annotation["id"] == 1
    assert (annotation["image_id"], annotation["category_id"]) == (2, 2)
    assert annotation["bbox"] == pytest.approx([80, 30, 40, 40], abs=1e-4)
    assert annotation["area"] == pytest.approx(1600, abs=1e-2)


def test_detections_by_hand():
    ids = number_for_coco(PATHS, 2)
    assert detections_as_coco(torch.zeros(0, 6), PATHS[0], ids) == []
    (result,) = detections_as_coco(torch.tensor([[1, 2, 11, 22.0004, 0.5, 0]]), PATHS[1], ids)
    assert result == {"image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 20], "score": 0.5}


def score(tmp_path, detections, labels=LABELS):
    ids = number_for_coco(PATHS, 2)
    annotations, results = tmp_path / "annotations.json", tmp_path / "predictions.json"
    write_json(annotations, ground_truth_as_coco(PATHS, labels, SHAPES_HW, NAMES, ids))
    rows = [row for path, found in zip(PATHS, detections, strict=True)
            for row in detections_as_coco(found, path, ids)]  # fmt: skip
    write_json(results, rows)
    return score_with_pycocotools(annotations, results, list(ids.images.values()))


def test_perfect_detection_scores_one(tmp_path, capsys):
    found = torch.tensor([[80, 30, 120, 70, 0.9, 1]])
    result = score(tmp_path, [found, torch.zeros(0, 6)])
    assert (result.map50, result.map50_95) == pytest.approx((1, 1))
    assert result.summary.count("\n") == 12
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("labels", "expected"), [(LABELS, 0), ([LABELS[1], LABELS[1]], -1)], ids=["labels", "no labels"]
)
def test_no_detections(tmp_path, labels, expected):
    result = score(tmp_path, [torch.zeros(0, 6)] * 2, labels)
    assert result.map50 == result.map50_95 == expected


def test_unknown_image_is_an_error(tmp_path):
    annotations, results = tmp_path / "annotations.json", tmp_path / "predictions.json"
    write_json(annotations, {"images": [{"id": 1}], "annotations": [], "categories": []})
    write_json(results, [{"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1], "score": 1}])
    with pytest.raises(ValueError, match=r"annotations lack: \[7\]"):
        score_with_pycocotools(annotations, results, [1])


def test_json_is_valid(tmp_path):
    write_json(tmp_path / "x.json", [{"a": 1.5}])
    assert json.loads((tmp_path / "x.json").read_text()) == [{"a": 1.5}]
