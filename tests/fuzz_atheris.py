"""Search inputs that a reader trips over, led by which of its lines they reach.

Needs atheris (pip install atheris), which the tests do without.

    python -m tests.fuzz_atheris labels -max_total_time=300

The first word is `labels`, `yaml`, `checkpoint`, `pickle` (that of a checkpoint), `image`, `csv` or
`cache` (a cached picture), the rest are flags of libFuzzer (a folder is a corpus to begin with). An
error that is not a complaint of one line ends it, and leaves the input as `crash-*`. Unlike
test_fuzz.py it checks hardly any values and needs no test runner.
"""

from __future__ import annotations

import io
import logging
import sys
import tempfile
import warnings
import zipfile
import zlib
from pathlib import Path

import atheris
import cv2
import numpy as np
import torch

with atheris.instrument_imports(include=["utils", "models"]):
    from models import Model, ModelSpec
    from utils import image_files
    from utils.checkpoint import build_checkpoint, load_detector
    from utils.config import load_dataset_spec, load_hyperparameters, load_yaml
    from utils.evolve import read_history
    from utils.image_cache import DiskCache
    from utils.run_dir import read_results
    from utils.scan import parse_labels

PICTURE = np.arange(24 * 40 * 3, dtype=np.uint8).reshape(24, 40, 3)
SUFFIXES = (".jpg", ".png", ".bmp", ".webp", ".tif")
MAX_PIXELS = 1 << 20  # each decoded picture takes memory
SEEDS = {
    "labels": [b"0 0.5 0.5 0.2 0.4\n1 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\r\n"],
    "yaml": [b"path: .\ntrain: a\nval: [b, c]\nnc: 2\nnames: {0: x, 1: 'y'}\n", b"lr0: 1e-3\n"],
    "checkpoint": [],
    "pickle": [],
    "image": [cv2.imencode(suffix, PICTURE)[1].tobytes() for suffix in SUFFIXES],
    "csv": [
        b"epoch,a,b\n0,0.1,nan\n",
        b"generation,fitness,mAP_0.5,mAP_0.5:0.95,lr0\n0,1,1,1,.1\n",
    ],
    "cache": [],
}


def read_labels(content: bytes, path: Path) -> None:
    """Bad lines are told, none raises."""
    parsed = parse_labels(content.decode("utf-8", "replace"), path.name, 3)
    assert len(parsed.labels) == len(parsed.segments)
    assert not any("\n" in problem for problem in parsed.problems)


def read_yaml(content: bytes, path: Path) -> None:
    """As each of the three kinds of file."""
    path.write_bytes(content)
    for read in (
        lambda: load_dataset_spec(path, path.parent),
        lambda: load_hyperparameters(path),
        lambda: ModelSpec.from_dict(load_yaml(path), str(path)),
    ):
        complain_in_one_line(read, path)


def read_checkpoint(content: bytes, path: Path) -> None:
    """As weights."""
    path.write_bytes(content)
    complain_in_one_line(lambda: load_detector(path), path)


def read_pickle(content: bytes, path: Path) -> None:
    """As that in a checkpoint, whose other parts are whole."""
    whole = small_checkpoint()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    complain_in_one_line(lambda: load_detector(path), path)


def small_checkpoint() -> bytes:
    """That of a network of one layer and a head."""
    rows = [[-1, 1, "Conv", [8, 6, 8, 2]]]
    head = [[[0], 1, "Detect", ["nc", "anchors"]]]
    spec = {"nc": 1, "depth_multiple": 1.0, "width_multiple": 1.0, "anchors": [[10, 13, 16, 30]]}
    if not _CHECKPOINT:
        model = Model(ModelSpec.from_dict({**spec, "backbone": rows, "head": head}))
        content = io.BytesIO()
        torch.save(build_checkpoint(model, ["a"]), content)
        _CHECKPOINT.append(content.getvalue())
    return _CHECKPOINT[0]


_CHECKPOINT: list[bytes] = []


def read_image(content: bytes, path: Path) -> None:
    """Stated and decoded size are the same."""
    path.write_bytes(content)
    sizes = []
    with image_files.silent_decoder():
        for read in (image_files.image_hw, image_files.read_image):
            complain_in_one_line(lambda read=read: sizes.append(read(path)), path)
    if len(sizes) == 2:
        assert sizes[0] == sizes[1].shape[:2], (sizes[0], sizes[1].shape)


def read_csv(content: bytes, path: Path) -> None:
    """As the table of a training and as that of a search."""
    path.write_bytes(content)
    complain_in_one_line(lambda: read_results(path), path)
    complain_in_one_line(lambda: read_history(path), path)


def read_cache(content: bytes, path: Path) -> None:
    """As a cached picture."""
    path.write_bytes(content)
    image = DiskCache([str(path)], np.array([[2, 3]])).get(0)
    assert image is None or (image.shape, image.dtype) == ((2, 3, 3), np.uint8)


def complain_in_one_line(read, path: Path) -> None:
    """What is raised must be meant for users."""
    try:
        read()
    except (OSError, ValueError) as error:
        complaint = str(error)
    else:
        return
    assert path.name in complaint, complaint
    assert "\n" not in complaint, complaint


READERS = {
    "labels": read_labels,
    "yaml": read_yaml,
    "checkpoint": read_checkpoint,
    "pickle": read_pickle,
    "image": read_image,
    "csv": read_csv,
    "cache": read_cache,
}


def seeds_of(kind: str, path: Path) -> list[bytes]:
    """What the search begins with."""
    if kind == "checkpoint":
        return [small_checkpoint()]
    if kind == "pickle":
        with zipfile.ZipFile(io.BytesIO(small_checkpoint())) as archive:
            return [archive.read(name) for name in archive.namelist() if name.endswith(".pkl")]
    if kind == "cache":
        content = io.BytesIO()
        np.save(content, np.full((2, 3, 3), 7, np.uint8))
        return [content.getvalue() + zlib.crc32(bytes([7] * 18)).to_bytes(4, "little")]
    return SEEDS[kind]


def main() -> None:
    """Until an error, or as long as the flags say."""
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        raise SystemExit(f"expected one of {', '.join(READERS)}, then flags of libFuzzer")
    kind = sys.argv.pop(1)
    logging.disable()
    warnings.simplefilter("ignore")
    image_files.MAX_PIXELS = MAX_PIXELS
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        path = Path(folder) / ("x.pt" if kind in ("checkpoint", "pickle") else "x.yaml")
        for number, seed in enumerate(seeds_of(kind, path)):
            (corpus / str(number)).write_bytes(seed)
        atheris.Setup([*sys.argv, str(corpus)], lambda content: READERS[kind](content, path))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
