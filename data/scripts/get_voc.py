"""Fetch Pascal VOC 2007 and 2012 and convert the annotations to YOLO labels.

    python -m data.scripts.get_voc                   # 2.8 GB, where data/VOC.yaml says

What is there already is not fetched again, so an interrupted run can be repeated.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path

from data.scripts.voc_annotations import convert_image_set
from utils.config import load_dataset_spec
from utils.downloads import download, unpack

LOGGER = logging.getLogger(__name__)

PROJECT_ROOT = Path(__file__).resolve().parents[2]
DATA_YAML = PROJECT_ROOT / "data" / "VOC.yaml"
URL = "http://host.robots.ox.ac.uk/pascal/VOC"
# archive, and the (year, image set) pairs in it
ARCHIVES = (
    ("voc2007/VOCtrainval_06-Nov-2007.tar", (("2007", "train"), ("2007", "val"))),
    ("voc2007/VOCtest_06-Nov-2007.tar", (("2007", "test"),)),
    ("voc2012/VOCtrainval_11-May-2012.tar", (("2012", "train"), ("2012", "val"))),
)


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Fetch Pascal VOC and convert its annotations.")
    parser.add_argument("--out", type=Path, help="folder; default: the path in data/VOC.yaml")
    parser.add_argument("--keep-archives", action="store_true", help="do not delete the archives")
    return parser.parse_args()


def main() -> None:
    """Fetch and convert one archive after the other."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    spec = load_dataset_spec(DATA_YAML, PROJECT_ROOT)
    root = args.out or spec.root
    for path, image_sets in ARCHIVES:
        if all((root / "images" / f".{s}{year}.complete").exists() for year, s in image_sets):
            continue
        archive = download(f"{URL}/{path}", root / Path(path).name)
        unpack(archive, root / "unpacked")
        for year, image_set in image_sets:
            convert(root, year, image_set, spec.names)
        shutil.rmtree(root / "unpacked")
        if not args.keep_archives:
            archive.unlink()


def convert(root: Path, year: str, image_set: str, names: tuple[str, ...]) -> None:
    """Make `images/train2007` and `labels/train2007`, or another set, of the unpacked archive."""
    split = f"{image_set}{year}"
    counts = convert_image_set(
        root / "unpacked" / "VOCdevkit" / f"VOC{year}",
        image_set,
        root / "images" / split,
        root / "labels" / split,
        names,
        first_pixel=1,
    )
    (root / "images" / f".{split}.complete").touch()
    LOGGER.info("%s: %s", root / "labels" / split, counts)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
