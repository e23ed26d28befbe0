"""Finding the images of a split and reading and checking their labels, once, with a cache.

Labels lie in a parallel tree: the last folder called `images` in the path of an image becomes
`labels`, the suffix `.txt`; without such a folder they lie beside the image. A line is
`class cx cy w h` or a polygon `class x1 y1 x2 y2 x3 y3 ...`, all coordinates normalised to 0-1.
Whatever is wrong is reported with file and line, counted and skipped; nothing is ever repaired on
disk.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import logging
import math
import os
import time
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from utils.atomic import atomic_write
from utils.image_files import image_hw, is_image_name, silent_decoder
from utils.regular_file import open_regular, read_regular

LOGGER = logging.getLogger(__name__)

COORDINATE_TOLERANCE = 0.001  # what rounding may put a normalised coordinate outside of [0, 1]
LEAST_SIDE = 1e-9  # of a box; what is smaller would become 0 in float32
MAX_LABEL_BYTES = 32 << 20  # of one file: ten thousand polygons of a hundred points are half of it
MAX_LIST_BYTES = 4 << 30
MAX_CACHE_BYTES = 1 << 40
MAX_PROBLEMS_KEPT = 100
MAX_PROBLEMS_LOGGED = 10
_CACHE_FORMAT = 1


# ------------------------------------------------------------------------------------ the result
class RaggedRows(Sequence[np.ndarray]):
    """A list of arrays [n_i, ...] held in one array: cheap to save, send and share."""

    def __init__(self, flat: np.ndarray, offsets: np.ndarray) -> None:
        self.flat, self.offsets = flat, offsets

    @classmethod
    def pack(cls, rows: Sequence[np.ndarray], width: int) -> RaggedRows:
        """From arrays [n_i, width]."""
        offsets = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=offsets[1:])
        flat = np.concatenate([*rows, np.zeros((0, width), np.float32)], dtype=np.float32)
        return cls(flat, offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return [self[i] for i in range(start, stop, step)]
            bounds = self.offsets[start : stop + 1].tolist()
            return [self.flat[a:b] for a, b in itertools.pairwise(bounds)]
        index = range(len(self))[index]  # negative indices, and IndexError past the end
        return self.flat[self.offsets[index] : self.offsets[index + 1]]


class SegmentRows(Sequence[list[np.ndarray]]):
    """Per image the list of its polygons, one [k, 2] per label row; k = 0 for a plain box."""

    def __init__(self, polygons: RaggedRows, label_offsets: np.ndarray) -> None:
        self.polygons, self.label_offsets = polygons, label_offsets

    def __len__(self) -> int:
        return len(self.label_offsets) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        return self.polygons[self.label_offsets[index] : self.label_offsets[index + 1]]


@dataclass(frozen=True)
class ScanReport:
    """What a scan found and what it skipped."""

    num_found: int = 0  # image files found, usable or not
    num_images: int = 0  # usable images, with or without boxes
    num_boxes: int = 0
    num_backgrounds: int = 0  # usable images without boxes
    num_missing_labels: int = 0  # of these, images without a label file
    num_bad_images: int = 0  # unreadable images, or their label file is
    num_bad_lines: int = 0  # label lines skipped
    num_duplicate_boxes: int = 0  # same class and box again in one file: removed
    num_duplicate_images: int = 0  # same file named twice by the sources: removed
    problems: tuple[str, ...] = ()  # `file:line: what`, the first of them

    def summary(self) -> str:
        """One line for people."""
        parts = [
            f"{self.num_images} images, {self.num_boxes} boxes",
            f"{self.num_backgrounds} images without objects"
            f" ({self.num_missing_labels} have no label file)",
        ]
        skipped = {
            "bad images": self.num_bad_images,
            "bad label lines": self.num_bad_lines,
            "duplicate boxes": self.num_duplicate_boxes,
            "duplicate images": self.num_duplicate_images,
        }
        parts += [f"{count} {what} skipped" for what, count in skipped.items() if count]
        return ", ".join(parts)


@dataclass(frozen=True)
class Split:
    """The usable images of one split and their labels, in the order of `paths`."""

    paths: tuple[str, ...]  # absolute
    labels: RaggedRows  # per image float32 [n, 5]: class, cx, cy, w, h normalised
    segments: SegmentRows  # per image, per label row: polygon [k, 2] normalised
    shapes_hw: np.ndarray  # int64 [N, 2], after EXIF orientation
    report: ScanReport

    def __len__(self) -> int:
        return len(self.paths)


# ------------------------------------------------------------------------------- one label file
class LabelFile(NamedTuple):
    """The good lines of a label file, and what was wrong with the others."""

    labels: np.ndarray  # float32 [n, 5]: class, cx, cy, w, h normalised
    segments: list[np.ndarray]  # per row float32 [k, 2]; k = 0 for a plain box
    problems: list[str]  # `where:line: what`, the first of the bad lines
    num_bad_lines: int
    num_duplicates: int


def parse_labels(text: str, where: str, num_classes: int | None) -> LabelFile:
    """Read the lines of a label file.

    Args:
        text: content of the file.
        where: name of the file, for the reports.
        num_classes: classes must be below this; None accepts any class from 0.
    """
    rows: list[tuple[float, ...]] = []
    segments: list[np.ndarray] = []
    problems: list[str] = []
    seen: set[tuple[float, ...]] = set()
    num_bad_lines = num_duplicates = 0
    for number, line in enumerate(text.split("\n"), start=1):
        fields = line.split()
        if not fields:
            continue
        try:
            row, polygon = _parse_line(fields, num_classes)
        except ValueError as error:
            num_bad_lines += 1
            if len(problems) < MAX_PROBLEMS_KEPT:
                problems.append(f"{where}:{number}: {error}")
            continue
        if row in seen:
            num_duplicates += 1
            continue
        seen.add(row)
        rows.append(row)
        segments.append(polygon)
    labels = np.array(rows, np.float32).reshape(-1, 5)
    return LabelFile(labels, segments, problems, num_bad_lines, num_duplicates)


def _parse_line(fields: list[str], num_classes: int | None) -> tuple[tuple[float, ...], np.ndarray]:
    """One label line -> (class, cx, cy, w, h) and its polygon [k, 2].

    Raises:
        ValueError: says what is wrong with the line.
    """
    num_coordinates = len(fields) - 1
    if num_coordinates != 4 and (num_coordinates < 6 or num_coordinates % 2):
        raise ValueError(
            f"{len(fields)} values; expected class cx cy w h, or class and 3 or more points x y"
        )
    numbers = [_parse_number(text) for text in fields]
    cls, coordinates = numbers[0], numbers[1:]
    if not 0 <= cls <= _MAX_CLASS or cls != int(cls):
        raise ValueError(f"class {_short(fields[0])}; expected a whole number from 0")
    if num_classes is not None and cls >= num_classes:
        known = f"{num_classes} classes (0 to {num_classes - 1})" if num_classes > 1 else "class 0"
        raise ValueError(f"class {int(cls)}, but the data set names {known}")
    for text, value in zip(fields[1:], coordinates, strict=True):
        if not -COORDINATE_TOLERANCE <= value <= 1 + COORDINATE_TOLERANCE:
            raise ValueError(f"coordinate {_short(text)} lies outside 0 to 1")
    if num_coordinates == 4:
        cx, cy, w, h = coordinates
        if w <= 0 or h <= 0:
            raise ValueError(f"box of size {_short(fields[3])} x {_short(fields[4])}")
        corners, polygon = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), _NO_POLYGON
    else:
        polygon = np.clip(np.array(coordinates, np.float32).reshape(-1, 2), 0, 1)
        corners = (*polygon.min(0).tolist(), *polygon.max(0).tolist())
    return (cls, *_box_inside_image(*corners)), polygon


_NO_POLYGON = np.zeros((0, 2), np.float32)
_MAX_CLASS = 1e6  # beyond this it is no class index but damage


def _parse_number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = None
    # Python reads 1_0 as 10, and digits of all scripts: neither was meant to be a number.
    if value is None or "_" in text or not text.isascii():
        raise ValueError(f"{_short(text)!r} is not a number")
    if not math.isfinite(value):
        raise ValueError(f"{_short(text)!r} is not a finite number")
    return value


def _short(text: str) -> str:
    """For messages: a damaged file may hold a word of many megabytes."""
    return text if len(text) <= 40 else f"{text[:40]}..."


def _box_inside_image(
    x1: float, y1: float, x2: float, y2: float
) -> tuple[float, float, float, float]:
    """The part of a box that lies in the image, as cx, cy, w, h."""
    if x1 < 0 or y1 < 0 or x2 > 1 or y2 > 1:
        x1, y1, x2, y2 = max(x1, 0.0), max(y1, 0.0), min(x2, 1.0), min(y2, 1.0)
    if x2 - x1 < LEAST_SIDE or y2 - y1 < LEAST_SIDE:
        raise ValueError("the box has no area inside the image")
    return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1


# --------------------------------------------------------------------------------- finding files
def find_images(source: Path) -> tuple[list[str], list[str]]:
    """List the images of one source.

    Args:
        source: a folder, searched with all its subfolders and what they link to elsewhere, or a
            `.txt` list with one path per line. Relative entries of a list are relative to the
            list's folder, or failing that to the working directory.

    Returns:
        Absolute paths, sorted for a folder and in the order of the list; and complaints about
        list entries that are no images.

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: it is neither a folder nor a `.txt` list.
    """
    if source.is_dir():
        return sorted(_walk_images(str(source.absolute()))), []
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such folder or list of images")
    if source.suffix.lower() != ".txt":
        raise ValueError(f"{source}: expected a folder of images or a .txt list of images")
    return _read_list(source)


def _walk_images(source: str) -> Iterable[str]:
    """Image files in a folder and all below it, in any order; of each real folder once.

    What lies below it comes before links, so that a link to it is what is passed over. So is a link
    to what contains the folder, which may hold the images of other splits.
    """
    seen: set[tuple[int, int]] = set()
    waiting, passed_over = [source], []
    links: list[str] = []  # a heap: the order is always the same
    while waiting or links:
        is_link = not waiting
        folder = heapq.heappop(links) if is_link else waiting.pop()
        try:
            status = os.stat(folder)  # noqa: PTH116 (see is_image_name)
            real = status.st_dev, status.st_ino
            if real in seen or (is_link and _contains(folder, source)):
                passed_over.append(folder)
                continue
            seen.add(real)
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_symlink() and entry.is_dir():
                        heapq.heappush(links, entry.path)
                    elif entry.is_dir():
                        waiting.append(entry.path)
                    elif is_image_name(entry.name):
                        yield entry.path
        except OSError as error:
            raise OSError(
                f"{folder}: the folder cannot be read ({error.strerror}); give yourself the "
                "permission, or connect its drive again"
            ) from None
    if passed_over:
        LOGGER.warning(
            "warning: %s leads to a folder that %s holds anyway, or that holds it; passed over%s",
            passed_over[0],
            source,
            f", as are {len(passed_over) - 1} others" if passed_over[1:] else "",
        )


def _contains(link: str, source: str) -> bool:
    """Whether a link leads up: to what the source, or the link itself, lies in."""
    target = Path(link).resolve()
    return any(Path(path).resolve().is_relative_to(target) for path in (source, Path(link).parent))


def _read_list(source: Path) -> tuple[list[str], list[str]]:
    try:
        lines = _read_text(source, MAX_LIST_BYTES).split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source}: not a text file in UTF-8: {error}") from error
    paths, problems = [], []
    base = str(source.absolute().parent)
    for number, line in enumerate(lines, start=1):
        entry = line.strip()
        if not entry:
            continue
        if not is_image_name(os.path.basename(entry)):  # noqa: PTH119 (see is_image_name)
            problems.append(f"{source}:{number}: {_short(entry)!r} has no suffix of an image")
            continue
        if "\0" in entry:
            problems.append(f"{source}:{number}: {_short(entry)!r} cannot be the name of a file")
            continue
        path = os.path.normpath(os.path.join(base, entry))  # noqa: PTH118 (as above)
        if not os.path.exists(path) and os.path.exists(entry):  # noqa: PTH110 (as above)
            path = os.path.abspath(entry)  # noqa: PTH100 (as above)
        paths.append(path)
    return paths, problems


def _read_text(path: str | Path, max_bytes: int) -> str:
    """A text file in UTF-8, with any kind of line ends."""
    text = read_regular(path, max_bytes).decode("utf-8-sig")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def label_path(image: str) -> str:
    """Where the labels of an image lie: `.../images/a/b.jpg` -> `.../labels/a/b.txt`."""
    folder, images, rest = image.rpartition(f"{os.sep}images{os.sep}")
    labels = f"{folder}{os.sep}labels{os.sep}{rest}" if images else image
    return os.path.splitext(labels)[0] + ".txt"  # noqa: PTH122 (see is_image_name)


# ---------------------------------------------------------------------------------- one image
class _Scanned(NamedTuple):
    hw: tuple[int, int] | None  # None: the image cannot be used
    label_file: LabelFile | None  # None: there is none
    problem: str | None


def _scan_image(image: str, num_classes: int | None) -> _Scanned:
    try:
        hw = image_hw(image)
    except OSError as error:
        return _Scanned(None, None, _describe(error, image))
    labels = label_path(image)
    try:
        text = _read_text(labels, MAX_LABEL_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        if isinstance(error, FileNotFoundError) and not os.path.islink(labels):  # noqa: PTH114
            return _Scanned(hw, None, None)
        # Not a background: the objects are there, we only cannot read where.
        return _Scanned(None, None, f"{labels}: labels cannot be read: {error}")
    return _Scanned(hw, parse_labels(text, labels, num_classes), None)


def _describe(error: OSError, path: str) -> str:
    return f"{path}: {error.strerror}" if error.strerror else str(error)


# --------------------------------------------------------------------------------- a whole split
def scan_split(
    sources: Sequence[Path],
    names: Sequence[str],
    *,
    single_cls: bool = False,
    cache: bool = True,
    workers: int = 8,
    require_labels: bool = True,
) -> Split:
    """Find, check and read all images and labels of a split.

    Args:
        sources: folders and `.txt` lists, as in `DatasetSpec.train`.
        names: class names; labels of other classes are bad lines.
        single_cls: turn every class into class 0, whatever it is.
        cache: keep the result in a file `*.scan.npz` beside the labels and take it from there
            while no image or label file has changed, come or gone. Where that place cannot be
            written, every run scans anew.
        workers: threads that look at files.
        require_labels: a split without a single box is an error.

    Raises:
        FileNotFoundError: a source does not exist.
        ValueError: there is no usable image, or no box and `require_labels`.
    """
    start = time.perf_counter()
    found, complaints, num_duplicates = _find_all(sources)
    if not found:
        raise ValueError(f"no images in {_spoken(sources)}")
    num_classes = None if single_cls else len(names)
    file_stats = _file_stats(found, workers)
    cache_file = _cache_path(sources) if cache else None
    split = _load_cache(cache_file, found, file_stats, num_classes) if cache_file else None
    from_cache = split is not None
    if split is None:
        split = _scan_all(found, num_classes, workers)
        if cache_file:
            _save_cache(cache_file, split, found, file_stats, num_classes)
    report = replace(
        split.report,
        num_bad_images=split.report.num_bad_images + len(complaints),
        num_duplicate_images=num_duplicates,
        problems=(*complaints, *split.report.problems)[:MAX_PROBLEMS_KEPT],
    )
    split = replace(split, report=report)
    _log_report(report, sources, from_cache, time.perf_counter() - start)
    _check_usable(split, found, sources, require_labels)
    return _with_single_class(split) if single_cls else split


def _spoken(sources: Sequence[Path]) -> str:
    return ", ".join(map(str, sources))


def _find_all(sources: Sequence[Path]) -> tuple[list[str], list[str], int]:
    found: dict[str, None] = {}
    complaints: list[str] = []
    total = 0
    for source in sources:
        paths, problems = find_images(Path(source))
        found.update(dict.fromkeys(paths))
        complaints += problems
        total += len(paths)
    return list(found), complaints, total - len(found)


def _scan_all(found: list[str], num_classes: int | None, workers: int) -> Split:
    with silent_decoder(), ThreadPoolExecutor(max(workers, 1)) as pool:
        scanned = list(pool.map(lambda image: _scan_image(image, num_classes), found))
    good = [(path, one) for path, one in zip(found, scanned, strict=True) if one.hw]
    files = [one.label_file for _, one in good]
    labels = RaggedRows.pack([file.labels if file else _NO_LABELS for file in files], 5)
    polygons = RaggedRows.pack([part for file in files if file for part in file.segments], 2)
    problems: list[str] = []
    for one in scanned:
        problems += [one.problem] if one.problem else []
        problems += one.label_file.problems if one.label_file else []
    report = ScanReport(
        num_found=len(found),
        num_images=len(good),
        num_boxes=len(labels.flat),
        num_backgrounds=sum(not file or not len(file.labels) for file in files),
        num_missing_labels=sum(file is None for file in files),
        num_bad_images=len(found) - len(good),
        num_bad_lines=sum(file.num_bad_lines for file in files if file),
        num_duplicate_boxes=sum(file.num_duplicates for file in files if file),
        problems=tuple(problems[:MAX_PROBLEMS_KEPT]),
    )
    return Split(
        paths=tuple(path for path, _ in good),
        labels=labels,
        segments=SegmentRows(polygons, labels.offsets),
        shapes_hw=np.array([one.hw for _, one in good], np.int64).reshape(-1, 2),
        report=report,
    )


_NO_LABELS = np.zeros((0, 5), np.float32)


def _with_single_class(split: Split) -> Split:
    flat = split.labels.flat.copy()
    flat[:, 0] = 0
    return replace(split, labels=RaggedRows(flat, split.labels.offsets))


def _log_report(
    report: ScanReport, sources: Sequence[Path], from_cache: bool, seconds: float
) -> None:
    origin = "cached scan" if from_cache else "scan"
    LOGGER.info("%s: %s (%s, %.1f s)", _spoken(sources), report.summary(), origin, seconds)
    for problem in report.problems[:MAX_PROBLEMS_LOGGED]:
        LOGGER.warning("%s", problem)
    total = report.num_bad_images + report.num_bad_lines
    if total > MAX_PROBLEMS_LOGGED:
        LOGGER.warning("... and %d more problems like these", total - MAX_PROBLEMS_LOGGED)


def _check_usable(
    split: Split, found: list[str], sources: Sequence[Path], require_labels: bool
) -> None:
    report = split.report
    first = f"; the first problem: {report.problems[0]}" if report.problems else ""
    if not report.num_images:
        raise ValueError(f"none of the {len(found)} images in {_spoken(sources)} is usable{first}")
    if require_labels and not report.num_boxes:
        example = f"{found[0]} would be labelled by {label_path(found[0])}"
        raise ValueError(
            f"no labels at all for the {report.num_images} images in {_spoken(sources)}"
            f" ({example}){first}"
        )


# ------------------------------------------------------------------------------------- the cache
def _file_stats(images: list[str], workers: int) -> np.ndarray:
    """int64 [N, 4]: size and mtime in ns of each image and of its labels; -1 where absent."""

    def of_file(path: str) -> tuple[int, int]:
        try:
            stat = os.stat(path)  # noqa: PTH116 (called for each of millions of files)
        except OSError:
            return -1, -1
        return stat.st_size, stat.st_mtime_ns

    with ThreadPoolExecutor(max(workers, 1)) as pool:
        rows = pool.map(lambda image: (*of_file(image), *of_file(label_path(image))), images)
        return np.array(list(rows), np.int64).reshape(-1, 4)


def _cache_path(sources: Sequence[Path]) -> Path:
    """`.../labels/train.scan.npz` for `.../images/train`; beside a list or unpaired folder."""
    first = Path(sources[0]).absolute()
    labels = Path(label_path(str(first / "x"))).parent  # the folder itself when there is no pair
    if first.is_file():
        place = first.with_suffix("")
    else:
        place = labels if labels.parent.is_dir() else first
    if len(sources) > 1:
        digest = hashlib.sha256("\n".join(map(str, sources)).encode("utf-8", "surrogateescape"))
        place = place.with_name(f"{place.name}.{digest.hexdigest()[:8]}")
    return place.with_name(f"{place.name}.scan.npz")


def _to_json_array(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _save_cache(
    path: Path, split: Split, found: list[str], file_stats: np.ndarray, num_classes: int | None
) -> None:
    polygons = split.segments.polygons
    position = {image: index for index, image in enumerate(found)}
    arrays = {
        "header": _to_json_array({"format": _CACHE_FORMAT, "num_classes": num_classes}),
        "found": _to_json_array(found),
        "file_stats": file_stats,
        "usable": np.array([position[image] for image in split.paths], np.int64),
        "shapes_hw": split.shapes_hw,
        "labels": split.labels.flat,
        "label_offsets": split.labels.offsets,
        "points": polygons.flat,
        "point_offsets": polygons.offsets,
        "report": _to_json_array(asdict(split.report)),
    }
    try:
        # A folder without any write permission was meant to stay as it is, even by a superuser.
        if not path.parent.stat().st_mode & 0o222:
            raise PermissionError("the folder is read-only")
        with atomic_write(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # mypy thinks of allow_pickle
    except OSError as error:
        reason = error.strerror or error
        LOGGER.info("%s: the scan cannot be kept (%s); the next run scans again", path, reason)


def _load_cache(
    path: Path, found: list[str], file_stats: np.ndarray, num_classes: int | None
) -> Split | None:
    """The cached split; None if there is none, files have changed, or it is damaged."""
    try:
        with _open_cache(path) as opened, np.load(opened, allow_pickle=False) as file:
            header = json.loads(file["header"].tobytes())
            if header != {"format": _CACHE_FORMAT, "num_classes": num_classes}:
                return None
            if not np.array_equal(file["file_stats"], file_stats):
                return None
            if json.loads(file["found"].tobytes()) != found:
                return None
            arrays = {name: file[name] for name in file.files}
            return _unpack_cache(arrays, found, num_classes)
    except FileNotFoundError:
        return None
    except (
        OSError, EOFError, ValueError, TypeError, KeyError, IndexError, MemoryError, RecursionError,
        NotImplementedError, zipfile.BadZipFile, zlib.error, AttributeError,
    ) as error:  # fmt: skip
        LOGGER.warning("%s: a damaged cache is built anew (%s)", path, error)
        return None


def _open_cache(path: Path) -> BinaryIO:
    """The file, if it is an archive as `np.savez` writes them, which cannot unfold to more."""
    file = open_regular(path, MAX_CACHE_BYTES)
    try:
        members = zipfile.ZipFile(file).infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("its parts are compressed")
        if sum(member.file_size for member in members) > file.seek(0, os.SEEK_END):
            raise ValueError("its parts overlap")
    except BaseException:
        file.close()
        raise
    file.seek(0)
    return file


def _unpack_cache(
    arrays: dict[str, np.ndarray], found: list[str], num_classes: int | None
) -> Split:
    usable, shapes_hw = arrays["usable"], arrays["shapes_hw"]
    labels = RaggedRows(arrays["labels"], arrays["label_offsets"])
    polygons = RaggedRows(arrays["points"], arrays["point_offsets"])
    is_consistent = (
        len(labels) == len(usable) == len(shapes_hw)
        and len(polygons) == len(labels.flat)
        and labels.flat.shape[1:] == (5,)
        and labels.flat.dtype == polygons.flat.dtype == np.float32
        and polygons.flat.shape[1:] == (2,)
        and shapes_hw.shape[1:] == (2,)
        and usable.dtype == shapes_hw.dtype == np.int64
        and all(_are_offsets(rows.offsets, len(rows.flat)) for rows in (labels, polygons))
    )
    if not is_consistent:
        raise ValueError("its parts do not fit together")
    most = _MAX_CLASS if num_classes is None else num_classes - 1
    is_possible = (
        bool((np.diff(usable, prepend=-1, append=len(found)) > 0).all())
        and bool((shapes_hw >= 1).all())
        and _are_labels(labels.flat, most)
        and bool(((polygons.flat >= 0) & (polygons.flat <= 1)).all())
    )
    report = json.loads(arrays["report"].tobytes())
    problems = tuple(report.pop("problems"))
    is_possible &= all(isinstance(problem, str) for problem in problems)
    is_possible &= all(isinstance(count, int) and count >= 0 for count in report.values())
    if not is_possible:
        raise ValueError("it holds values that no scan gives")
    return Split(
        paths=tuple(found[index] for index in usable),
        labels=labels,
        segments=SegmentRows(polygons, labels.offsets),
        shapes_hw=shapes_hw,
        report=ScanReport(**report, problems=problems),
    )


def _are_offsets(offsets: np.ndarray, total: int) -> bool:
    is_list = offsets.ndim == 1 and offsets.dtype == np.int64
    return is_list and bool(
        offsets[0] == 0 and offsets[-1] == total and (np.diff(offsets) >= 0).all()
    )


def _are_labels(rows: np.ndarray, most: float) -> bool:
    """Whether rows [n, 5] are classes up to `most` and boxes inside the image."""
    cls, centres, sides = rows[:, 0], rows[:, 1:3], rows[:, 3:5]
    reach = np.abs(centres - 0.5) + sides / 2
    is_class = (cls >= 0) & (cls <= most) & (cls == np.floor(cls))
    is_box = ((sides > 0) & (reach < 0.5 + 1e-6)).all(1)  # not for NaN
    return bool((is_class & is_box).all())
