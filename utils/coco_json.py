"""Ground truth and detections as COCO JSON, and their score by pycocotools.

Works for any data set: where there is no COCO annotation file, one is written from the labels.
Boxes are `[x, y, w, h]` here, with the left top corner, in pixels of the original image.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from utils.atomic import name_in_errors

# COCO numbers its 80 classes from 1 to 90 and leaves these numbers out.
_UNUSED_COCO_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_CATEGORY_IDS = tuple(i for i in range(1, 91) if i not in _UNUSED_COCO_IDS)


class CocoIds(NamedTuple):
    """How images and classes are numbered in the JSON files of one data set."""

    images: dict[str, int]  # by path
    categories: tuple[int, ...]  # by class
    annotations: Path | None  # the data set's own annotation file; None: made from the labels
    is_coco: bool  # numbered as COCO's server expects it


class CocoScore(NamedTuple):
    """What pycocotools says; -1 where there is nothing to score."""

    map50_95: float
    map50: float
    summary: str  # its table of twelve lines


def number_for_coco(paths: Sequence[str], num_classes: int) -> CocoIds:
    """Use COCO's own numbers if this is COCO with an annotation file, else count from 1.

    COCO's images lie in `.../images/<split>/<image id>.jpg` and its annotations in
    `.../annotations/instances_<split>.json`. The boxes of the test split are not public: instead
    there is a list of its images, `image_info_test-dev2017.json`.
    """
    folder = _find_coco(paths) if num_classes == len(COCO_CATEGORY_IDS) else None
    if folder is not None:
        images = {path: int(Path(path).stem) for path in paths}
        instances = folder / f"instances_{Path(paths[0]).parent.name}.json"
        own = instances if instances.is_file() else None
        return CocoIds(images, COCO_CATEGORY_IDS, own, is_coco=True)
    images = {path: number for number, path in enumerate(sorted(paths), start=1)}
    return CocoIds(images, tuple(range(1, num_classes + 1)), None, is_coco=False)


def _find_coco(paths: Sequence[str]) -> Path | None:
    """The folder of COCO's annotation files, if this is one of its splits and one is there."""
    folders = {Path(path).parent for path in paths}
    if len(folders) != 1 or not all(Path(path).stem.isdecimal() for path in paths):
        return None
    split = folders.pop()
    folder = split.parent.parent / "annotations"
    if (folder / f"instances_{split.name}.json").is_file():
        return folder
    year = re.search(r"20\d\d$", split.name)  # a folder `train` may be of any data set
    files = [file for kind in ("image_info", "instances") for file in folder.glob(f"{kind}_*.json")]
    return folder if year and any(file.stem.endswith(year[0]) for file in files) else None


def ground_truth_as_coco(
    paths: Sequence[str],
    labels: Sequence[np.ndarray],
    shapes_hw: np.ndarray,
    names: Sequence[str],
    ids: CocoIds,
) -> dict[str, Any]:
    """Write labels in the form of a COCO annotation file.

    Args:
        paths: [N] images.
        labels: per image [n, 5] class, cx, cy, w, h normalised to the original image.
        shapes_hw: [N, 2] sizes of the original images.
        names: class names.
        ids: from `number_for_coco`.
    """
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for path, rows, (height, width) in zip(paths, labels, np.asarray(shapes_hw), strict=True):
        image_id = ids.images[path]
        images.append(
            {
                "id": image_id,
                "file_name": Path(path).name,
                "width": int(width),
                "height": int(height),
            }
        )
        for cls, cx, cy, w, h in np.asarray(rows, np.float64).tolist():
            box_w, box_h = w * float(width), h * float(height)
            left, top = cx * float(width) - box_w / 2, cy * float(height) - box_h / 2
            annotations.append(
                {
                    "id": len(annotations) + 1,  # pycocotools takes 0 for "no match"
                    "image_id": image_id,
                    "category_id": ids.categories[int(cls)],
                    "bbox": [left, top, box_w, box_h],
                    "area": box_w * box_h,
                    "iscrowd": 0,
                }
            )
    categories = [{"id": i, "name": name} for i, name in zip(ids.categories, names, strict=True)]
    return {"images": images, "annotations": annotations, "categories": categories}


def detections_as_coco(detections: Tensor, path: str, ids: CocoIds) -> list[dict[str, Any]]:
    """Turn the detections of one image, [M, 6] in its original pixels, into COCO results."""
    image_id = ids.images[path]
    results = []
    for x1, y1, x2, y2, conf, cls in detections.tolist():
        results.append(
            {
                "image_id": image_id,
                "category_id": ids.categories[int(cls)],
                "bbox": [round(x1, 3), round(y1, 3), round(x2 - x1, 3), round(y2 - y1, 3)],
                "score": round(conf, 5),
            }
        )
    return results


def write_json(path: Path, content: Any) -> None:
    """Write compact JSON."""
    with name_in_errors(path):
        path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def score_with_pycocotools(annotations: Path, results: Path, image_ids: Sequence[int]) -> CocoScore:
    """Score a results file against an annotation file, both as COCO has them.

    Only the given images count. At most 100 detections per image are looked at, the COCO rule.

    Raises:
        ValueError: the files do not fit together.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        ground_truth = COCO(str(annotations))
        rows = json.loads(results.read_text(encoding="utf-8"))
        evaluation = COCOeval(ground_truth, _load_results(ground_truth, rows), "bbox")
        evaluation.params.imgIds = sorted(image_ids)
        evaluation.evaluate()
        evaluation.accumulate()
        printed.seek(0)
        printed.truncate()
        evaluation.summarize()
    return CocoScore(float(evaluation.stats[0]), float(evaluation.stats[1]), printed.getvalue())


def _load_results(ground_truth: COCO, rows: list[dict[str, Any]]) -> COCO:
    unknown = {row["image_id"] for row in rows} - set(ground_truth.getImgIds())
    if unknown:
        raise ValueError(f"detections in images that the annotations lack: {sorted(unknown)[:5]}")
    if rows:
        return ground_truth.loadRes(rows)
    nothing = COCO()  # loadRes fails on an empty list
    nothing.dataset = {**ground_truth.dataset, "annotations": []}
    nothing.createIndex()
    return nothing
