"""Where the files lie that a command line names.

No package is needed: what is not there is said before torch is loaded.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from utils.regular_file import why_no_file

WEIGHT_NAMES = tuple(f"yolov5{size}{suffix}.pt" for suffix in ("", "6") for size in "nsmlx")
SOURCES = (
    "an image, a video, a folder of these, a 'pattern*.jpg', a .txt list, a camera number or the "
    "address of a stream"
)


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?`, or nothing when no known name comes near."""
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def expand_home(path: str | Path) -> Path:
    """`~/x` and `~user/x` with the folder they stand for; an unknown user's is left as it is."""
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises RuntimeError)


def find_config(name: str | Path, folders: Sequence[str | Path], root: str | Path) -> Path:
    """Find a YAML file by path or by bare name.

    Args:
        name: path as typed by the user, or a bare name such as `coco` or `hyp.finetune.yaml`.
        folders: where bare names are looked up, relative to `root` or absolute.
        root: the project folder.

    Returns:
        The first that exists of: as typed (from the working directory), below `root`, below each
        folder; each time as it is and with `.yaml` appended.

    Raises:
        FileNotFoundError: lists everything tried and the nearest names there are.
    """
    root = Path(root)
    typed = expand_home(name)
    places = [root / folder for folder in folders]
    bases = [typed, root / typed, *(place / typed for place in places)]
    suffixes = [""] if typed.suffix in (".yaml", ".yml") else ["", ".yaml"]
    tried = list(dict.fromkeys(Path(f"{base}{suffix}") for base in bases for suffix in suffixes))
    for candidate in tried:
        if candidate.is_file() and str(name):
            return candidate
    known = sorted({file.name for place in places for file in place.glob("*.yaml")})
    looked = ", ".join(map(str, tried))
    target = typed.name if typed.suffix else f"{typed.name}.yaml"
    raise FileNotFoundError(f"{name}: {why_no_file(typed)}; tried {looked}{nearest(target, known)}")


def locate_weights(name: str | Path, root: Path) -> Path | None:
    """A weights file, or OpenVINO folder, by path or name; None where it is to be fetched.

    Looked up as typed, below `root`, and in `root/weights`.

    Raises:
        FileNotFoundError: lists what was tried and the names that can be fetched.
    """
    typed = expand_home(name)
    tried = list(dict.fromkeys([typed, root / typed, root / "weights" / typed]))
    for candidate in tried:
        is_openvino = candidate.name.endswith("_openvino_model") and candidate.is_dir()
        if candidate.is_file() or is_openvino:
            return candidate
    if typed.name in WEIGHT_NAMES and str(typed.parent) in (".", "weights"):
        return None
    raise FileNotFoundError(
        f"{name}: {why_no_file(typed)}; tried {', '.join(map(str, tried))};"
        f" names that can be fetched: {', '.join(WEIGHT_NAMES)}"
    )


def locate_checkpoint(path: Path, root: Path) -> Path:
    """The file that `--resume` means by a file or a run folder, as typed or below `root`.

    Raises:
        FileNotFoundError, ValueError: there is none; says what is there instead.
    """
    path = path if path.exists() else root / path
    pruned, has_trained = path / "pruned_model.pt", (path / "weights/last.pt").exists()
    if pruned.is_file() and not has_trained:
        raise ValueError(
            f"--resume {path}: a folder of prune.py, there is no training to resume; to fine-tune "
            f"the pruned model use --weights {pruned} --ft_pruned_model"
        )
    if (path / "opt.yaml").is_file() and not has_trained:
        raise FileNotFoundError(
            f"--resume {path}: the run ended before it had saved anything; start it anew, with the "
            f"options in {path / 'opt.yaml'}"
        )
    path = path / "weights/last.pt" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"--resume {path}: no such checkpoint")
    return path


def is_source(text: str) -> bool:
    """Whether `--source` may mean something: a number, an address, a pattern, or what is there."""
    has_meaning = text.isdecimal() or "://" in text or glob.has_magic(text)
    return has_meaning or expand_home(text).exists()


def no_such_source(text: str) -> FileNotFoundError:
    """What is said of a `--source` that is not there."""
    reason = why_no_file(expand_home(text), "no such file or folder")
    return FileNotFoundError(f"{text}: {reason}; expected {SOURCES}")
