"""Finding an interrupted training, and what has changed since it began."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any, NamedTuple

from utils.checkpoint import load_checkpoint
from utils.flags.train import build_parser

LOGGER = logging.getLogger(__name__)


class Resumed(NamedTuple):
    """An interrupted run."""

    content: dict[str, Any]  # of its last.pt
    run_dir: Path
    options: argparse.Namespace  # those of the run, with the device and workers given now


def find_resumed(options: argparse.Namespace, given: set[str], root: Path) -> Resumed | None:
    """The run that `--resume` means, with the options given now; None for a new run.

    Args:
        options: of the command line.
        given: names of those that were typed.
        root: where paths and `runs/train` are looked for as well.

    Raises:
        FileNotFoundError: there is no such run.
        ValueError: there is nothing to resume in it.
    """
    if not options.resume:
        return None
    if options.resume is True:
        path = newest_unfinished(root / "runs/train")
    else:
        path = find_checkpoint(Path(options.resume).expanduser(), root)
    content = load_checkpoint(path)
    if "training" not in content:
        raise ValueError(
            f"--resume {path}: not the last.pt of an unfinished run, there is nothing to resume; "
            f"to train on from its weights use --weights {path}"
        )
    run_dir = path.resolve().parent.parent
    in_place = path.resolve().parts[-2:] == ("weights", "last.pt")
    if not in_place or not (run_dir / "opt.yaml").is_file():
        raise ValueError(
            f"--resume {path}: the file is not in its run folder (<run>/weights/last.pt with "
            "<run>/opt.yaml); put it back there"
        )
    # A run of an older version does not know the newer flags, and goes on as it began.
    defaults = vars(build_parser().parse_args([])) | {"sparsity_cost": 0.0, "sparsity_share": 1.0}
    merged = argparse.Namespace(**{**defaults, **content["options"]})
    for name in given - {"resume"}:
        setattr(merged, name, getattr(options, name))
    for folder in (run_dir, path.parent):
        for left_over in folder.glob(".*.tmp"):  # of a killed writer
            left_over.unlink(missing_ok=True)
    state = content["training"]
    batches = f", after {state['batches']} of its batches" if state.get("batches") else ""
    LOGGER.info("resuming %s in epoch %d%s", run_dir, state["epoch"] + 1, batches)
    return Resumed(content, run_dir, merged)


def find_checkpoint(path: Path, root: Path) -> Path:
    """The file that is meant by a file or a run folder."""
    path = path if path.exists() else root / path
    if (path / "opt.yaml").is_file() and not (path / "weights/last.pt").exists():
        raise FileNotFoundError(
            f"--resume {path}: the run ended before it had saved anything; start it anew, with the "
            f"options in {path / 'opt.yaml'}"
        )
    path = path / "weights/last.pt" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"--resume {path}: no such checkpoint")
    return path


def newest_unfinished(project: Path) -> Path:
    """The newest last.pt below a folder whose run has not reached its end."""
    found = sorted(project.glob("**/weights/last.pt"), key=lambda path: -path.stat().st_mtime)
    for path in found:
        try:
            if "training" in load_checkpoint(path):
                return path
        except ValueError as error:
            LOGGER.warning("warning: %s; passed over", error)
    raise FileNotFoundError(f"--resume: there is no unfinished run in {project}")
