"""Run folders `runs/<task>/<name>`: making them, saved options, `results.csv`.

Everything written here is first written under a temporary name and then renamed, so a killed
run leaves the previous content or the new one, never half of it.
"""

import csv
import errno
import io
import itertools
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from utils.atomic import atomic_write, staging_folder
from utils.lookup import expand_home

OPTIONS = "opt.yaml"
REPLACED = "replaced"  # folder in a run folder: the run that was there before
# What a training makes, those first that a run goes on from; what else is there is not ours.
MADE_BY_TRAINING = (
    *("weights/*.pt", "weights/.*.tmp", ".*.tmp", "results.csv", "results.png", "bn_gamma.png"),
    *("labels.jpg", "train_batch*.jpg", "nan_batch_*", "events.out.tfevents.*", "hyp.yaml"),
)


@contextmanager
def open_run_dir(project: str | Path, name: str = "exp", exist_ok: bool = False) -> Iterator[Path]:
    """Yield a new run folder; if a run ends without results, nothing of it is left.

    Made before the long work, so that it is seen whether it can be. What goes, and only if it is
    new, are empty folders, and saved options where an error has left nothing beside them.

    Raises:
        ValueError, OSError: as `new_run_dir` does.
    """
    place = expand_home(project) / name
    absent = [folder for folder in place.parents if not folder.exists()]
    is_reused = exist_ok and place.exists()
    run_dir = new_run_dir(project, name, exist_ok)
    is_done = False
    try:
        yield run_dir
        is_done = True
    finally:
        if not is_reused:
            _tidy(run_dir, is_done)
        for folder in absent:
            with suppress(OSError):  # not empty, or gone
                folder.rmdir()


def _tidy(run_dir: Path, is_done: bool) -> None:
    """Remove a folder in which no run has left anything."""
    with suppress(OSError):  # not empty, or gone
        if not is_done:
            for entry in [entry for entry in run_dir.iterdir() if entry.is_dir()]:
                entry.rmdir()
            if [entry.name for entry in run_dir.iterdir()] == [OPTIONS]:
                (run_dir / OPTIONS).unlink()
        run_dir.rmdir()


def new_run_dir(
    project: str | Path,
    name: str = "exp",
    exist_ok: bool = False,
    fill: Callable[[Path], None] | None = None,
) -> Path:
    """Make and return the next free folder of `name`, `name2`, `name3` ... below `project`.

    The number is one above the highest in use, so that the newest run also has the highest number.
    Two processes that ask at the same time get two folders.

    Args:
        project: parent folder; made if missing.
        name: folder name of the first run.
        exist_ok: reuse `project/name` instead of counting up.
        fill: writes what the folder shall hold from the moment it has its name; a process killed
            before leaves none. What is reused has its name already, and where the file system
            renames no folders, `fill` is called again for one that has.

    Raises:
        ValueError: `name` is empty, or names no folder of its own.
        OSError: the folder cannot be made or written to (no permission, a file is in the way), or
            `fill` says why it does not.
    """
    first = _first_run_dir(project, name)
    with _naming(first):
        if fill is not None and not (exist_ok and first.exists()):
            return _fill_run_dir(first, exist_ok, fill)
        run_dir = _make_run_dir(first, exist_ok)
        _try_to_write(run_dir)  # now, not after hours of work
        if fill is not None:
            fill(run_dir)
        return run_dir


def check_run_dir(project: str | Path, name: str = "exp", exist_ok: bool = False) -> None:
    """See whether `new_run_dir` could make a folder, as far as that shows without making one.

    Raises:
        ValueError, OSError: as `new_run_dir` does.
    """
    first = _first_run_dir(project, name)
    with _naming(first):
        parts = (first, *first.parents) if exist_ok else first.parents
        _try_to_write(next(part for part in parts if part.exists()))


def _first_run_dir(project: str | Path, name: str) -> Path:
    if not name.strip():
        raise ValueError("a run needs a name; --name is empty")
    if Path(name).name in ("", ".."):
        raise ValueError(f"--name {name}: expected the name of a folder to make in {project}")
    return expand_home(project) / name


def _try_to_write(folder: Path) -> None:
    with tempfile.TemporaryFile(dir=folder):
        pass


@contextmanager
def _naming(first: Path) -> Iterator[None]:
    """An error within the block says which folder cannot be written to."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # another run is at work there: it is all said
            raise
        reason = error.strerror
        if isinstance(error, FileExistsError | NotADirectoryError):
            reason = f"{_first_file(first)} is no folder"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"{reason}; free some space"
        raise OSError(f"cannot write to {first}: {reason}; see --project, --name") from None


def _first_file(path: Path) -> Path:
    """What is in the way of a folder."""
    return next(part for part in (*reversed(path.parents), path) if not part.is_dir())


def _make_run_dir(first: Path, exist_ok: bool) -> Path:
    first.parent.mkdir(parents=True, exist_ok=True)
    if exist_ok:
        first.mkdir(exist_ok=True)
        return first
    candidates = _candidates(first)
    while True:
        candidate = next(candidates)
        with suppress(FileExistsError):  # another process was faster
            candidate.mkdir()
            return candidate


def _fill_run_dir(first: Path, exist_ok: bool, fill: Callable[[Path], None]) -> Path:
    first.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(first.parent) as staging:
        folder = staging / first.name
        folder.mkdir()
        fill(folder)
        for candidate in [first] if exist_ok else _candidates(first):
            try:
                return folder.rename(candidate)
            except OSError:
                if not candidate.exists():
                    break
    # Some shares rename no folder, nor does Windows while another program looks into it.
    run_dir = _make_run_dir(first, exist_ok)
    with ExitStack() as undo:
        if not exist_ok:  # else it may be another's
            undo.callback(shutil.rmtree, run_dir, ignore_errors=True)
        fill(run_dir)
        undo.pop_all()
    return run_dir


def _candidates(first: Path) -> Iterator[Path]:
    """Folders to try, from the number above the highest in use."""
    for number in itertools.count(_highest_run_number(first) + 1):
        yield first if number == 1 else first.with_name(f"{first.name}{number}")


def _highest_run_number(first: Path) -> int:
    """Highest number in use: 0 = none, 1 = `exp` alone, 3 = `exp3`."""
    pattern = re.compile(re.escape(first.name) + r"([1-9]\d*)?")
    matches = (pattern.fullmatch(entry.name) for entry in first.parent.iterdir())
    return max((int(match[1] or 1) for match in matches if match), default=0)


def replace_run(run_dir: Path, new: Path) -> None:
    """Let a run begin in a folder, where another one may have been.

    All files of the latter move to `replaced`, a run folder too, until `forget_replaced`. If one
    is there already, what has begun after it has never come so far, and goes. A process killed
    meanwhile leaves the one run or the other, and between them none that can be resumed.

    Args:
        run_dir: the folder.
        new: within it, what the run begins with: `opt.yaml`, its last file to move `weights/*`.
    """
    aside = run_dir / REPLACED
    is_whole = (aside / OPTIONS).is_file()  # it moves last
    for pattern in (*MADE_BY_TRAINING, OPTIONS):
        for path in [path for path in run_dir.glob(pattern) if path.is_file()]:
            if is_whole:
                path.unlink()
                continue
            target = aside / path.relative_to(run_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)
    (run_dir / "weights").mkdir(exist_ok=True)
    for path in sorted(path for path in new.rglob("*") if path.is_file()):
        path.replace(run_dir / path.relative_to(new))


def forget_replaced(run_dir: Path) -> None:
    """Let go of the run that was in the folder before: the new one has learnt something.

    What else is called so, and holds no run, is not ours.
    """
    if (run_dir / REPLACED / OPTIONS).is_file():
        shutil.rmtree(run_dir / REPLACED, ignore_errors=True)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write UTF-8 text under a temporary name in the same folder, then rename it to `path`.

    File names in it that are no UTF-8 keep their bytes.
    """
    with atomic_write(path) as file:
        file.write(text.encode("utf-8", "surrogateescape"))


def save_options(path: str | Path, options: Mapping[str, Any]) -> None:
    """Save a mapping as readable yaml: insertion order, paths as text, tuples as lists."""
    text = yaml.safe_dump(to_plain(options), sort_keys=False, allow_unicode=True, width=100)
    write_text_atomic(path, text)


def to_plain(value: Any) -> Any:
    """Numbers, text, lists and dicts only; whatever else there is becomes text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)  # also what is derived from it, as numpy.float64 is
    return value.item() if hasattr(value, "item") else str(value)


class ResultsCsv:
    """`results.csv`: one row per epoch, the column `epoch` first, one header line.

    Each row is written by rewriting the small file and renaming it, so a kill, a full disk or a
    reader in between never meets half a row. Columns that appear later are added at the end;
    rows without a value in a column leave it empty.
    """

    def __init__(
        self,
        path: str | Path,
        columns: Sequence[str] = (),
        *,
        resume_epoch: int | None = None,
    ) -> None:
        """Start an empty file, or continue one.

        Args:
            path: the csv file.
            columns: order of the columns, without `epoch`; more may come with the rows.
            resume_epoch: continue an existing file: rows of this epoch and later are dropped,
                because the resumed run writes them again. None starts anew.
        """
        self.path = Path(path)
        self._columns = list(dict.fromkeys(["epoch", *columns]))
        self._rows: list[dict[str, str]] = []
        if resume_epoch is not None and self.path.exists():
            header, rows = _read_cells(self.path)
            self._columns = list(dict.fromkeys([*header, *self._columns]))
            self._rows = [row for row in rows if _epoch_of(row, self.path) < resume_epoch]
        self._write()

    def append(self, epoch: int, values: Mapping[str, float | int | str | None]) -> None:
        """Add the row of `epoch` and save; a row of the same epoch, or later, is replaced."""
        self._columns += [name for name in values if name not in self._columns]
        self._rows = [row for row in self._rows if _epoch_of(row, self.path) < epoch]
        cells = {name: _format_cell(value) for name, value in values.items()}
        self._rows.append(cells | {"epoch": str(epoch)})
        self._write()

    def _write(self) -> None:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, self._columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_text_atomic(self.path, buffer.getvalue())


def _format_cell(value: float | int | str | None) -> str:
    """Six significant digits for fractions; None is an empty cell."""
    if value is None:
        return ""
    if isinstance(value, str | int):
        return str(value)
    return f"{float(value):.6g}"


def _epoch_of(row: Mapping[str, str], path: Path) -> int:
    try:
        return int(row["epoch"])
    except (KeyError, ValueError):
        raise ValueError(
            f"{path}: a row has no epoch number (epoch={row.get('epoch')!r}); "
            "move the file away to start a new one"
        ) from None


def _read_cells(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Header and rows as text; blanks around names and values are dropped."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = [[cell.strip() for cell in line] for line in csv.reader(file) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a csv file ({error}); move it away") from None
    if not lines:
        return [], []
    header = lines[0]
    return header, [dict(zip(header, cells, strict=False)) for cells in lines[1:]]


def read_results(path: str | Path) -> dict[str, list[float]]:
    """Columns of a `results.csv` as numbers; what is empty or no number becomes NaN."""
    header, rows = _read_cells(Path(path))
    return {name: [_number(row.get(name, "")) for row in rows] for name in header}


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")
