"""Fetch COCO 2017 and convert its annotations to YOLO labels.

    python -m data.scripts.get_coco                  # 19 GB, where data/coco.yaml says
    python -m data.scripts.get_coco --boxes          # boxes instead of outlines in the labels
    python -m data.scripts.get_coco --test           # the test images as well, 6 GB

What is there already is not fetched again, so an interrupted run can be repeated.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from data.scripts.coco_annotations import convert_instances, image_names, write_image_list
from utils.config import load_dataset_spec
from utils.downloads import download, unpack

LOGGER = logging.getLogger(__name__)

PROJECT_ROOT = Path(__file__).resolve().parents[2]
DATA_YAML = PROJECT_ROOT / "data" / "coco.yaml"
URL = "http://images.cocodataset.org"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Fetch COCO 2017 and convert its annotations.")
    parser.add_argument("--out", type=Path, help="folder; default: the path in data/coco.yaml")
    parser.add_argument("--boxes", action="store_true", help="labels of boxes, not of outlines")
    parser.add_argument("--test", action="store_true", help="fetch the test images too (no labels)")
    parser.add_argument("--keep-archives", action="store_true", help="do not delete the archives")
    return parser.parse_args()


def main() -> None:
    """Fetch, convert, list."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    spec = load_dataset_spec(DATA_YAML, PROJECT_ROOT)
    root = args.out or spec.root
    get_annotations(root, "annotations_trainval2017.zip", "instances_val2017.json")
    for split in ("train2017", "val2017"):
        instances = root / "annotations" / f"instances_{split}.json"
        get_images(root, split, instances, args.keep_archives)
        labels = root / "labels" / split
        counts = convert_instances(instances, labels, spec.names, polygons=not args.boxes)
        write_image_list(instances, f"images/{split}", root / f"{split}.txt")
        LOGGER.info("%s: %s", labels, counts)
    if args.test:
        get_annotations(root, "image_info_test2017.zip", "image_info_test-dev2017.json")
        listed = root / "annotations" / "image_info_test-dev2017.json"
        get_images(root, "test2017", listed, args.keep_archives)
        write_image_list(listed, "images/test2017", root / "test-dev2017.txt")


def get_annotations(root: Path, archive: str, member: str) -> None:
    """Fetch and unpack an archive of annotations unless `member` is there."""
    if not (root / "annotations" / member).exists():
        unpack(download(f"{URL}/annotations/{archive}", root / archive), root)


def get_images(root: Path, split: str, annotations: Path, keep_archive: bool) -> None:
    """Fetch and unpack the images of a split unless all that the annotations list are there."""
    done, archive = root / "images" / f".{split}.complete", root / f"{split}.zip"
    folder = root / "images" / split
    # An archive without the mark may be half unpacked: the last image may be incomplete.
    if not done.exists() and not archive.exists() and folder.is_dir():
        present = {path.name for path in folder.iterdir()}
        if present.issuperset(image_names(annotations)):
            done.touch()
    if done.exists():
        LOGGER.info("%s: the images are there already", folder)
        return
    download(f"{URL}/zips/{split}.zip", archive)
    unpack(archive, root / "images")
    done.touch()
    if not keep_archive:
        archive.unlink()


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
