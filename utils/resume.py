"""Finding an interrupted training, and what has changed since it began."""

from __future__ import annotations

import argparse
import logging
import math
import os
import shlex
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from utils import device as devices
from utils import ranks
from utils.atomic import STAGING
from utils.checkpoint import load_checkpoint
from utils.claim import claim, find_claimed
from utils.command import is_out_of_memory
from utils.config import Hyperparameters, load_yaml
from utils.device_text import gpu_indices
from utils.flags.checks import ROOT, flag_of
from utils.flags.train import RESUME_FLAGS, parse_saved
from utils.lookup import expand_home, locate_checkpoint
from utils.run_dir import REPLACED, to_plain
from utils.scan import Split

LOGGER = logging.getLogger(__name__)

SCRIPT = "train.py"
PATHS = ("weights", "teacher", "cfg", "data", "hyp")  # options

# What every version has written for a run to go on from, and what it must be.
_STATE: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("model", "ema", "optimizer", "scaler"), dict),
    **dict.fromkeys(("epoch", "best_epoch"), int),
    **dict.fromkeys(("class_maps", "torch_rng"), Tensor),
    "best_fitness": (float, int),
    "is_last": bool,
    "gammas": list,
}


class Resumed(NamedTuple):
    """An interrupted run."""

    path: Path  # its last.pt
    content: dict[str, Any]  # of that
    run_dir: Path
    options: argparse.Namespace  # those of the run, with the device and workers given now


def command_to_resume(run_dir: Path, device: str, *flags: str) -> str:
    """What to type in a shell, where this was, to go on with as many processes as there are now.

    Args:
        run_dir: of the run, as it is to be typed.
        device: its `--device`; one process is started for each of several GPUs.
        flags: added to the command.
    """
    count, local = devices.world_size(), devices.local_world_size()
    typed, is_ours = sys.argv[0], "TORCHELASTIC_RUN_ID" not in os.environ
    script = typed if Path(typed).name == SCRIPT else str(ROOT / SCRIPT)  # of another program
    start = ["python", script]
    if is_ours and count == len(gpu_indices(device)) > 1:
        start += ["--device", device]
    elif count == local > 1:
        start = ["torchrun", "--standalone", "--nproc_per_node", str(local), script]
    elif count > 1:
        nodes = ["--nnodes", str(count // local), "--nproc_per_node", str(local)]
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:PORT"]
        start = ["torchrun", *nodes, *meeting, script]
    command = [*start, "--resume", str(run_dir), *flags]
    return subprocess.list2cmdline(command) if sys.platform == "win32" else shlex.join(command)


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
    make_paths_absolute(options)
    if options.resume is False:
        path = find_own_checkpoint(options)
    elif options.resume is True:
        path = newest_unfinished(root / "runs/train")
    else:
        path = locate_checkpoint(expand_home(options.resume), root)
    if path is None:
        return None
    run_dir = path.resolve().parent.parent
    in_place = path.resolve().parts[-2:] == ("weights", "last.pt")
    in_place = in_place and (run_dir / "opt.yaml").is_file()
    if in_place:
        claim(run_dir, ranks.job())
    content = load_checkpoint(path)
    if "training" not in content:
        raise ValueError(
            f"--resume {path}: not the last.pt of an unfinished run, there is nothing to resume; "
            f"to train on from its weights use --weights {path}"
        )
    if not in_place:
        raise ValueError(
            f"--resume {path}: the file is not in its run folder (<run>/weights/last.pt with "
            "<run>/opt.yaml); put it back there"
        )
    check_training_state(content, path)
    # A run of an older version does not know the newer flags, and goes on as it began.
    older = {"sparsity_cost": 0.0, "sparsity_share": 1.0}
    with naming_damage(path):
        merged = parse_saved(older | content["options"])
        check_progress(content["training"], merged.epochs)
    # The file may be a stranger's; only who types it allows it.
    merged.allow_download_scripts = False
    make_paths_absolute(merged)
    if "teacher" in given and bool(options.teacher) != bool(merged.teacher):
        has = "learns from one" if merged.teacher else "has none"
        raise ValueError(f"--teacher {options.teacher or repr('')}: the run to resume {has}")
    typed = {name: getattr(options, name) for name in given}
    refuse_changes(path, vars(merged), without_own_folder(typed, run_dir))
    for name in sorted(given & RESUME_FLAGS - {"resume"}):
        before, now = getattr(merged, name), getattr(options, name)
        if before != now:
            LOGGER.info("%s: %s now, %s when the run was saved", flag_of(name), now, before)
        setattr(merged, name, now)
    warn_of_edits(run_dir, content)
    for folder in (run_dir, path.parent):
        for left_over in folder.glob(".*.tmp"):  # of a killed writer
            left_over.unlink(missing_ok=True)
    state = content["training"]
    batches = f", after {state['batches']} of its batches" if state.get("batches") else ""
    LOGGER.info("resuming %s in epoch %d%s", run_dir, state["epoch"] + 1, batches)
    return Resumed(path, content, run_dir, merged)


def without_own_folder(typed: Mapping[str, Any], run_dir: Path) -> dict[str, Any]:
    """Less the options that lead to the folder of the run, wherever it was when the run began."""
    place = expand_home(typed.get("project", run_dir.parent)) / typed.get("name", run_dir.name)
    harmless = {"exist_ok", *(("project", "name") if place.resolve() == run_dir else ())}
    return {name: value for name, value in typed.items() if name not in harmless}


def refuse_changes(path: Path, before: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Stop if options were typed that the run has not, and that cannot be given it now.

    Raises:
        ValueError: names them, with both values.
    """
    changed = [
        name
        for name in sorted(given.keys() - RESUME_FLAGS)
        if _plain(name, given[name]) != _plain(name, before[name])
    ]
    if changed:
        texts = [f"{flag_of(n)} is {given[n]!r}, but the run has {before[n]!r}" for n in changed]
        raise ValueError(
            f"--resume {path}: {'; '.join(texts)}; a run goes on with its own options. Leave that "
            f"out, or train on from its weights in a new run: python train.py --weights {path} "
            "with all options that it shall have"
        )


def make_paths_absolute(options: argparse.Namespace) -> None:
    """Paths from the working folder, so that the run can be resumed from any other.

    What is found in the project stays a name: the project may be moved.
    """
    for name in PATHS:
        typed = getattr(options, name)
        if typed and expand_home(typed).is_file():
            setattr(options, name, str(expand_home(typed).absolute()))


def check_training_state(content: Mapping[str, Any], path: Path) -> None:
    """Stop if a part is missing that a resumed run needs, or is something else.

    Raises:
        ValueError: names the parts.
    """
    state = content["training"]
    if not isinstance(state, dict):
        wrong = ["training"]
    else:
        wrong = [name for name, kind in _STATE.items() if not isinstance(state.get(name), kind)]
    wrong += [name for name in ("options", "hyp") if not isinstance(content.get(name), dict)]
    if "options" not in wrong:
        wrong += [name for name, value in content["options"].items() if not _is_option(value)]
    if wrong:
        raise damaged(path, f"{', '.join(wrong)} missing, or of the wrong kind")
    with naming_damage(path):
        Hyperparameters(**content["hyp"])


def _is_option(value: Any) -> bool:
    """Whether it could have been typed."""
    parts = value if isinstance(value, list) else [value]
    return all(part is None or isinstance(part, str | bool | int | float) for part in parts)


def check_progress(state: Mapping[str, Any], epochs: int) -> None:
    """Stop if the run cannot have come as far as its state says.

    Raises:
        ValueError: names the number.
    """
    for name, low, high in (
        ("epoch", -1, epochs - 1),
        ("best_epoch", 0, epochs - 1),
        ("batches", 0, math.inf),
        ("batch_size", 1, math.inf),
        ("lr_factor", 0, 1),
        ("best_fitness", -1, 1),
    ):
        value = state.get(name, low)
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}, expected {low} to {high}")
    sums = state.get("loss_sums", [])
    if not all(math.isfinite(value) for value in sums):
        raise ValueError(f"loss_sums is {sums}")


def check_alike(saved: Any, fresh: Any, where: str) -> None:
    """Stop if a part of a saved state is of another kind or shape than in a fresh run.

    What one of the two lacks is left to who restores it; lists may have any length.

    Raises:
        ValueError: names the part.
    """
    if isinstance(fresh, Tensor):
        is_good = isinstance(saved, Tensor) and (saved.shape, saved.dtype) == (
            fresh.shape,
            fresh.dtype,
        )
    elif isinstance(fresh, Mapping):
        is_good = isinstance(saved, Mapping)
        for key in (key for key in fresh if is_good and key in saved):
            check_alike(saved[key], fresh[key], f"{where}.{key}")
    elif isinstance(fresh, list | tuple):
        is_good = isinstance(saved, list | tuple)
        for pair in zip(saved, fresh, strict=False) if is_good else ():
            check_alike(*pair, f"one of {where}")
    elif isinstance(fresh, float):
        is_good = type(saved) in (int, float)
        is_good = is_good and (math.isfinite(saved) or not math.isfinite(fresh))
    else:
        is_good = fresh is None or type(saved) is type(fresh)
    if not is_good:
        raise ValueError(f"{where} is not what it must be")


@contextmanager
def naming_damage(path: Path) -> Iterator[None]:
    """What the parts of a training state do not fit within the block becomes one line.

    Raises:
        ValueError: names the file and what is wrong in it.
    """
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        lines = [line.strip() for line in str(error).splitlines()]
        reason = lines[1] if len(lines) > 1 else lines[0] if lines else ""
        raise damaged(path, f"{type(error).__name__}, {reason[:200]}") from error


def damaged(path: Path, reason: str) -> ValueError:
    """The error for a checkpoint that cannot be resumed."""
    return ValueError(
        f"--resume {path}: its training state is damaged ({reason}); to train on from its weights "
        f"use --weights {path}"
    )


def find_own_checkpoint(options: argparse.Namespace) -> Path | None:
    """The last.pt of this very training, where torchrun has started it anew; None at first.

    Raises:
        ValueError: it had reached its end, and a process failed afterwards.
    """
    first = expand_home(options.project) / options.name
    run_dir = find_claimed(first.parent, ranks.job()) if ranks.job() else None
    if run_dir is None or not (run_dir / "weights/last.pt").is_file():
        return None
    before = load_yaml(run_dir / "opt.yaml")
    if not is_same_training(vars(options), before):
        return None
    path = run_dir / "weights/last.pt"
    if "training" in load_checkpoint(path):
        return path
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        raise ValueError(f"{run_dir}: this training has reached its end; nothing is left to do")
    return None


def is_same_training(options: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    """Whether options ask for the training that began with others."""
    may_differ = RESUME_FLAGS - {"data", "teacher"} | {"resume", "project", "name", "exist_ok"}
    names = options.keys() & before.keys() - may_differ
    return all(_plain(name, options[name]) == _plain(name, before[name]) for name in names)


def _plain(name: str, value: Any) -> Any:
    """What two values of an option are compared by."""
    is_path = name in (*PATHS, "project") and value
    return str(expand_home(value).absolute()) if is_path else to_plain(value)


def warn_of_edits(run_dir: Path, content: Mapping[str, Any]) -> None:
    """The yaml files of a run are for people: what is changed in them has no effect."""
    for file, held in (("opt.yaml", content["options"]), ("hyp.yaml", content["hyp"])):
        path = run_dir / file
        try:
            written = load_yaml(path) if path.is_file() else {}
        except (ValueError, OSError) as error:
            LOGGER.warning("warning: %s; the run goes on with what its checkpoint holds", error)
            written = {}
        for name in sorted((written.keys() & held.keys()) - RESUME_FLAGS):
            if to_plain(held[name]) != written[name]:
                LOGGER.warning(
                    "warning: %s: %s is %s, but the run has %s and goes on with it; to change it, "
                    "start a new run with --weights",
                    path, name, written[name], held[name],
                )  # fmt: skip


def summarize_data(split: Split) -> dict[str, int]:
    """What tells whether the images and labels of a split are those of an earlier day.

    Only names count, not folders: a data set may be moved.
    """
    names = "\n".join(Path(path).name for path in split.paths)
    return {
        "images": len(split.paths),
        "boxes": len(split.labels.flat),
        "names": zlib.crc32(names.encode("utf-8", "surrogateescape")),
        "labels": zlib.crc32(split.labels.flat.tobytes()),
    }


def summarize_teacher(path: Path | None) -> dict[str, dict[str, int]]:
    """What tells whether the file of the teacher is that of an earlier day, wherever it lies."""
    if path is None:
        return {}
    crc, size = 0, 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            crc, size = zlib.crc32(part, crc), size + len(part)
    return {"teacher": {"bytes": size, "content": crc}}


def describe_change(before: Mapping[str, int], now: Mapping[str, int]) -> str | None:
    """How two summaries, of data or of teachers, differ; None if they do not."""
    for word in ("bytes",) if "bytes" in now else ("images", "boxes"):
        if before[word] != now[word]:
            return f"{before[word]} {word} then, {now[word]} now"
    if "bytes" in now:
        return "other weights" if before["content"] != now["content"] else None
    if before["names"] != now["names"]:
        return f"{now['images']} images as then, but other file names"
    return "other labels" if before["labels"] != now["labels"] else None


def warn_of_other_data(
    before: Mapping[str, Mapping[str, int]], now: Mapping[str, Mapping[str, int]]
) -> None:
    """Say which splits, or whether the teacher, are no longer what they were in the saved run."""
    for split, summary in before.items():
        change = describe_change(summary, now[split])
        if change is not None:
            LOGGER.warning(
                "warning: the %s changed since the run was saved (%s); the run goes on, but "
                "not as it would have",
                "teacher has" if split == "teacher" else f"{split} data have", change,
            )  # fmt: skip


def newest_unfinished(project: Path) -> Path:
    """The newest last.pt below a folder whose run has not reached its end."""
    found = sorted(project.glob("**/weights/last.pt"), key=lambda path: -path.stat().st_mtime)
    for path in found:
        # Left by a process that was killed before it had a run folder, or by who began anew there.
        if STAGING in str(path) or REPLACED in path.relative_to(project).parts:
            continue
        try:
            if "training" in load_checkpoint(path):
                return path
        except ValueError as error:
            LOGGER.warning("warning: %s; passed over", error)
    raise FileNotFoundError(f"--resume: there is no unfinished run in {project}")
