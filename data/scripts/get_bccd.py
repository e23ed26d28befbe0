"""Fetch the BCCD blood cell data set and convert its annotations to YOLO labels.

python -m data.scripts.get_bccd                  # 8 MB, where data/bccd.yaml says

An interrupted run can be repeated.
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
DATA_YAML = PROJECT_ROOT / "data" / "bccd.yaml"
URL = "https://github.com/Shenggan/BCCD_Dataset/archive/refs/heads/master.zip"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Fetch BCCD and convert its annotations.")
    parser.add_argument("--out", type=Path, help="folder; default: the path in data/bccd.yaml")
    return parser.parse_args()


def main() -> None:
    """Fetch, unpack, convert the three splits of the author."""
    args = parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    spec = load_dataset_spec(DATA_YAML, PROJECT_ROOT)
    root = args.out or spec.root
    archive = download(URL, root / "BCCD.zip")
    unpack(archive, root / "unpacked")
    convert(root / "unpacked" / "BCCD_Dataset-master" / "BCCD", root, spec.names)
    shutil.rmtree(root / "unpacked")
    archive.unlink()


def convert(source: Path, root: Path, names: tuple[str, ...]) -> None:
    """Make `images` and `labels` with the splits train, val and test below `root`."""
    for split in ("train", "val", "test"):
        labels = root / "labels" / split
        counts = convert_image_set(
            source, split, root / "images" / split, labels, names, first_pixel=0
        )
        LOGGER.info("%s: %s", labels, counts)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
