"""Search inputs that a reader trips over, led by which of its lines they reach.

Needs atheris (pip install atheris), which the tests do without.

    python -m tests.fuzz_atheris labels -max_total_time=300

The first word is `labels`, `yaml` or `checkpoint`, the rest are flags of libFuzzer (a folder is a
corpus to begin with). An error that is not a complaint of one line ends it, and leaves the input as
`crash-*`. Unlike test_fuzz.py it checks no values and needs no test runner.
"""

from __future__ import annotations

import logging
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["utils", "models"]):
    from models import ModelSpec
    from utils.checkpoint import load_detector
    from utils.config import load_dataset_spec, load_hyperparameters, load_yaml
    from utils.scan import parse_labels

SEEDS = {
    "labels": [b"0 0.5 0.5 0.2 0.4\n1 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\r\n"],
    "yaml": [b"path: .\ntrain: a\nval: [b, c]\nnc: 2\nnames: {0: x, 1: 'y'}\n", b"lr0: 1e-3\n"],
    "checkpoint": [],
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


READERS = {"labels": read_labels, "yaml": read_yaml, "checkpoint": read_checkpoint}


def main() -> None:
    """Until an error, or as long as the flags say."""
    if len(sys.argv) < 2 or sys.argv[1] not in READERS:
        raise SystemExit(f"expected one of {', '.join(READERS)}, then flags of libFuzzer")
    kind = sys.argv.pop(1)
    logging.disable()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(SEEDS[kind]):
            (corpus / str(number)).write_bytes(seed)
        path = Path(folder) / ("x.pt" if kind == "checkpoint" else "x.yaml")
        atheris.Setup([*sys.argv, str(corpus)], lambda content: READERS[kind](content, path))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
