"""Fetching named weights and data sets: resume, checksum, safe unpacking.

Only the standard library is used. A file appears under its name when it is complete and checked,
never before; until then it is `NAME.part`.
"""

from __future__ import annotations

import filecmp
import hashlib
import http.client
import logging
import lzma
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO
from urllib.parse import unquote, urldefrag, urlsplit

from utils.atomic import atomic_write, staging_folder
from utils.config import DatasetSpec, load_dataset_spec, locate_key
from utils.image_files import IMAGE_SUFFIXES
from utils.lookup import WEIGHT_NAMES, expand_home, find_config, locate_weights

LOGGER = logging.getLogger(__name__)

PROJECT_ROOT = Path(__file__).resolve().parents[1]
WEIGHTS_URL = "https://github.com/ultralytics/yolov5/releases/download/v7.0"
CHECKSUM_FILE = "SHA256SUMS"

# What an archive may unfold to: labels shrink to a tenth or less, images hardly at all.
MAX_RATIO = 200
LITTLE_BYTES = 100 << 20  # that it may unfold to in any case
MAX_PARTS = 64  # folders in each other
MAX_SHARE = 0.9  # of the free disk, for a download that does not say how long it is
# What is taken over from the archive of a data set; nothing else in it can be needed.
DATA_SUFFIXES = IMAGE_SUFFIXES | {"", ".txt", ".json", ".xml", ".csv", ".yaml", ".yml", ".md"}
# Commands that run without being asked about: the scripts of the project, as its yaml files say it.
_OWN_COMMAND = re.compile(r"python -m data\.scripts\.\w+")
_CHUNK_BYTES = 1 << 20
_LOG_EVERY_S = 10.0
_USER_AGENT = "yolov5-slim"


# ---------------------------------------------------------------------------------------- one file
def download(
    url: str,
    path: str | Path,
    sha256: str | None = None,
    *,
    attempts: int = 3,
    timeout_s: float = 30.0,
) -> Path:
    """Fetch a file once.

    Args:
        url: http or https.
        path: where it goes. A file that is there already is kept, after its checksum is checked.
        sha256: hexadecimal checksum, if known.
        attempts: how often a broken connection is taken up again, where it broke if the server
            can do that and the file there is still the same.
        timeout_s: longest silence of the server in seconds.

    Returns:
        `path`.

    Raises:
        ValueError: the URL is not http or https.
        OSError: no connection, an answer other than the file, a short or wrong file, a full disk;
            in one line with URL, path and what to do.
    """
    path = Path(path)
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url}: only http and https addresses are fetched")
    if path.exists():
        if sha256 and file_sha256(path) != sha256.lower():
            raise OSError(f"{path}: sha256 is not {sha256}; delete the file to fetch it again")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    LOGGER.info("downloading %s to %s", url, path)
    part = path.with_name(f"{path.name}.part")
    for attempt in range(1, attempts + 1):
        try:
            _fetch(url, part, timeout_s)
            break
        except _BrokenConnection as error:
            if attempt == attempts:
                raise OSError(f"{url}: {error}; run again to go on from there") from error
            LOGGER.warning("%s: %s; trying again", url, error)
    if sha256:
        actual = file_sha256(part)
        if actual != sha256.lower():
            _forget(part)
            raise OSError(f"{url}: sha256 is {actual}, expected {sha256}; the file was discarded")
    part.replace(path)
    _forget(part)
    return path


class _BrokenConnection(Exception):
    """The transfer stopped in the middle; what came so far is kept."""


def _validator_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.etag")


def _forget(part: Path) -> None:
    part.unlink(missing_ok=True)
    _validator_file(part).unlink(missing_ok=True)


def _fetch(url: str, part: Path, timeout_s: float) -> None:
    """Add to `part` until the file is complete."""
    headers = {"User-Agent": _USER_AGENT, "Accept-Encoding": "identity"}
    have, validator = _resumable(part)
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": validator}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            resumes = response.status == 206 and _starts_at(response, have)
            have = have if resumes else 0
            _remember_validator(part, response)
            length = response.headers.get("Content-Length")
            total = have + int(length) if length and length.isdigit() else None
            _check_room(part, (total or 0) - have)
            limit = total or have + int(MAX_SHARE * shutil.disk_usage(part.parent).free)
            with part.open("ab" if resumes else "wb") as file:
                received = have + _copy(response, file, have, total, limit)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # the part is longer than the file: it belongs to another one
            _forget(part)
            raise _BrokenConnection("the server has another file now") from error
        raise OSError(f"{url}: the server answers {error.code} {error.reason}") from error
    except (
        urllib.error.URLError,
        http.client.HTTPException,
        TimeoutError,
        ConnectionError,
    ) as error:
        reason = getattr(error, "reason", error)
        if part.exists() and part.stat().st_size > have:
            raise _BrokenConnection(f"the connection broke ({reason})") from error
        goal = part.with_suffix("")
        raise OSError(
            f"cannot download {url} ({reason}); without internet, put the file at {goal}"
        ) from error
    if total is not None and received < total:
        raise _BrokenConnection(f"the connection ended after {received} of {total} bytes")


def _resumable(part: Path) -> tuple[int, str]:
    """Bytes that are there already and what identifies their file; (0, "") to start anew."""
    try:
        validator = _validator_file(part).read_text(encoding="utf-8").strip()
        size = part.stat().st_size
    except (OSError, UnicodeDecodeError):
        return 0, ""
    return (size, validator) if validator else (0, "")


def _starts_at(response: http.client.HTTPResponse, position: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {position}-")


def _remember_validator(part: Path, response: http.client.HTTPResponse) -> None:
    etag = response.headers.get("ETag", "")
    validator = etag if etag and not etag.startswith("W/") else ""
    validator = validator or response.headers.get("Last-Modified", "")
    _validator_file(part).write_text(validator, encoding="utf-8")


def _copy(source: IO[bytes], target: IO[bytes], have: int, total: int | None, limit: int) -> int:
    """Copy to the end, saying now and then how far; returns the number of bytes copied."""
    copied, last_said = 0, time.monotonic()
    while chunk := source.read(_CHUNK_BYTES):
        if have + copied + len(chunk) > limit:
            raise OSError(
                f"{target.name}: stopped after {(have + copied) / 2**30:.1f} GiB: the answer "
                "has no end, or fills the disk; delete it, and fetch the file in another way"
            )
        target.write(chunk)
        copied += len(chunk)
        if time.monotonic() - last_said > _LOG_EVERY_S:
            last_said = time.monotonic()
            done = (have + copied) / 2**20
            of_total = f" of {total / 2**20:.0f}" if total else ""
            LOGGER.info("... %.0f%s MiB", done, of_total)
    return copied


def _check_room(path: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        raise OSError(
            f"{path.parent}: {num_bytes / 2**30:.1f} GiB are needed, {free / 2**30:.1f} are free"
        )


def file_sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------- archives
def unpack(archive: str | Path, folder: str | Path) -> Path:
    """Unpack a zip or tar archive; all of it or nothing.

    Every name is checked before the first byte is written: no absolute path, no `..`, no link, no
    device can lead out of the folder.

    Args:
        archive: `.zip`, `.tar`, or a compressed `.tar`; told by content, not by name.
        folder: made if it is not there. Files of the same name are replaced.

    Returns:
        `folder`.

    Raises:
        ValueError: not an archive, a damaged one, or one with a forbidden member (named).
        OSError: the disk is full or cannot be written.
    """
    archive, folder = Path(archive), Path(folder)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened:
                _unpack_zip(opened, archive, folder)
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as tar:
                _unpack_tar(tar, archive, folder)
        else:
            raise ValueError(f"{archive}: neither a zip nor a tar archive")
    except RuntimeError as error:  # and NotImplementedError
        raise ValueError(f"{archive}: needs a password or an unknown method: {error}") from error
    except (
        zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, OverflowError,
        UnicodeError,
    ) as error:  # fmt: skip
        raise ValueError(f"{archive}: a damaged archive: {error}") from error
    return folder


def _unpack_zip(opened: zipfile.ZipFile, archive: Path, folder: Path) -> None:
    members = opened.infolist()
    _check_ratio(sum(member.file_size for member in members), archive)
    for member in members:
        kind = member.external_attr >> 28  # upper bits of the Unix mode; 0 if made elsewhere
        if kind not in (0, 0o04, 0o10):
            raise ValueError(f"{archive}: member {member.filename!r} is a link or a device")
    targets = _checked_targets([member.filename for member in members], archive, folder)
    _check_size(sum(member.file_size for member in members), archive, folder)
    for member, target in zip(members, targets, strict=True):
        if member.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            with opened.open(member) as source:
                _write_member(source, target)


def _unpack_tar(tar: tarfile.TarFile, archive: Path, folder: Path) -> None:
    members, num_bytes = [], 0
    for member in tar:  # one by one: the next is behind all bytes of this one
        if not (member.isreg() or member.isdir()):
            raise ValueError(f"{archive}: member {member.name!r} is a link or a device")
        members.append(member)
        num_bytes += member.size + tarfile.BLOCKSIZE
        _check_ratio(num_bytes, archive)
    targets = _checked_targets([member.name for member in members], archive, folder)
    _check_size(num_bytes, archive, folder)
    for member, target in zip(members, targets, strict=True):
        if member.isdir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            source = tar.extractfile(member)
            if source is not None:
                _write_member(source, target)


def _checked_targets(names: Iterable[str], archive: Path, folder: Path) -> list[Path]:
    targets = []
    for name in names:
        parts = PurePosixPath(name.replace("\\", "/")).parts
        is_absolute = name.startswith(("/", "\\")) or bool(PureWindowsPath(name).drive)
        if is_absolute or ".." in parts or "\0" in name:
            raise ValueError(f"{archive}: member {name!r} would be written outside of {folder}")
        if len(parts) > MAX_PARTS:
            raise ValueError(f"{archive}: member {name[:60]!r}... lies in {len(parts)} folders")
        targets.append(folder.joinpath(*parts))
    real = folder.resolve()
    for parent in {target.parent for target in targets if target != folder}:
        if not parent.resolve().is_relative_to(real):  # through a link that was there before
            raise ValueError(f"{archive}: {parent} leads outside of {folder}")
    return targets


def _check_ratio(num_bytes: int, archive: Path) -> None:
    """Refuse what unfolds to a multiple of its size that only bombs reach."""
    if num_bytes > max(MAX_RATIO * archive.stat().st_size, LITTLE_BYTES):
        raise ValueError(
            f"{archive}: unpacks to {num_bytes / 2**20:.0f} MiB or more, over {MAX_RATIO} times its"
            " size: no data set does; unpack it yourself if you trust it"
        )


def _check_size(num_bytes: int, archive: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise OSError(
            f"{archive}: unpacks to {num_bytes / 2**30:.1f} GiB, but {folder} has room for"
            f" {free / 2**30:.1f} GiB"
        )


def _write_member(source: IO[bytes], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # a link that was there before must not be followed
    with target.open("wb") as file:
        shutil.copyfileobj(source, file, _CHUNK_BYTES)


# --------------------------------------------------------------------------------------- data sets
def open_dataset(
    name: str | Path, *, splits: Sequence[str] = ("train", "val"), allow_scripts: bool = False
) -> DatasetSpec:
    """Find the yaml of a data set, get the images if they are missing, and see that they are there.

    Args:
        name: path of the yaml, or a bare name in `data/`.
        splits: what is needed.
        allow_scripts: run the download command of any yaml.

    Raises:
        OSError, ValueError: as `find_config`, `load_dataset_spec`, `ensure_dataset` and
            `DatasetSpec.check_exists` say.
    """
    spec = load_dataset_spec(find_config(name, ["data"], PROJECT_ROOT), PROJECT_ROOT)
    ensure_dataset(spec, splits=splits, allow_scripts=allow_scripts)
    spec = load_dataset_spec(spec.source, PROJECT_ROOT)  # paths may exist only now
    spec.check_exists(splits)
    return spec


def ensure_dataset(
    spec: DatasetSpec,
    *,
    splits: Sequence[str] = ("train", "val"),
    allow_scripts: bool = False,
    root: Path = PROJECT_ROOT,
) -> None:
    """Get a data set that is not there, if its yaml says how; otherwise do nothing.

    A URL (if it ends in `#sha256=...`, of a file with that checksum) is fetched and unpacked into
    the folder of the data set, where it replaces nothing: images, labels and texts alone, and only
    into a folder that a strange yaml may choose, see `_check_place`. A command runs in the project
    folder, and only if the user allows it, or the yaml lies in `data/` and the command is a script
    of the project.

    Args:
        spec: from `load_dataset_spec`.
        splits: what is needed.
        allow_scripts: run commands of any yaml, and unpack into any folder.
        root: the project folder.

    Raises:
        PermissionError: a command is needed that may not run, or a folder that is not free.
        FileNotFoundError: there is no `download`, or afterwards the images are still not there.
        FileExistsError: a file that is there differs from that of the archive.
        OSError: from `download`; or the command failed.
        ValueError: from `unpack`; the data set has no folder of its own; `download` is no command.
    """
    splits = [split for split in splits if getattr(spec, split)]
    if not spec.missing(splits):
        return
    if not spec.download:
        spec.check_exists(splits)
    elif urlsplit(spec.download).scheme in ("http", "https"):
        if not allow_scripts:
            _check_place(spec, root)
        _fetch_dataset(spec, splits, root)
    else:
        _run_download_command(spec, allow_scripts, root)
    spec.check_exists(splits)


def _check_place(spec: DatasetSpec, root: Path) -> None:
    """Refuse to unpack where a file that appears may be taken for a program or for settings.

    Raises:
        PermissionError: the folder is hidden, or below neither the working directory nor what
            holds the folder of the project or that of the yaml (`path` often begins with `../`).
    """
    target = spec.root.resolve()
    bases = {root.resolve().parent, spec.source.resolve().parent.parent, Path.cwd()}
    bases.discard(Path(target.anchor))  # everything is below that
    inside = [target.relative_to(base).parts for base in bases if target.is_relative_to(base)]
    if not inside or any(part.startswith(".") for parts in inside for part in parts):
        raise PermissionError(
            f"{spec.source}: images are missing, and {spec.download} would be unpacked into"
            f" {spec.root}, which is hidden or belongs to neither this file nor this project;"
            " unpack it there yourself, change 'path:', or allow it with --allow-download-scripts"
        )


def _fetch_dataset(spec: DatasetSpec, splits: Sequence[str], root: Path) -> None:
    url, fragment = urldefrag(spec.download or "")
    sha256 = fragment.removeprefix("sha256=") if fragment.startswith("sha256=") else None
    if root.resolve().is_relative_to(spec.root.resolve()):
        raise ValueError(
            f"{spec.source}: images are missing, and {url} would be unpacked into {spec.root},"
            " among the files of this project; give the data set a folder of its own with 'path:'"
        )
    name = re.sub(r"[^\w.-]", "_", PurePosixPath(unquote(urlsplit(url).path)).name)[-100:]
    name = "dataset" if name.strip(".") == "" else name
    LOGGER.info("%s: images are missing; fetching %s into %s", spec.source, url, spec.root)
    spec.root.parent.mkdir(parents=True, exist_ok=True)
    was_there = (spec.root.parent / name).exists()
    archive = download(url, spec.root.parent / name, sha256)
    with staging_folder(spec.root.parent) as temporary:
        unpack(archive, temporary)
        content = _content_folder(temporary, spec, splits)
        _leave_out_foreign_files(content, archive)
        _check_places(content, spec.root)
        _move_into(content, spec.root)
    if not was_there:
        archive.unlink()


def _leave_out_foreign_files(folder: Path, archive: Path) -> None:
    """Remove what is no part of a data set, above all programs."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    foreign = [
        path for path in files
        if path.suffix.lower() not in DATA_SUFFIXES or path.name.startswith(".")
    ]  # fmt: skip
    for path in foreign:
        path.unlink()
    if foreign:
        LOGGER.info(
            "%s: %d files that are neither images, labels nor texts are left out, for example %s",
            archive, len(foreign), foreign[0].relative_to(folder),
        )  # fmt: skip


def _content_folder(unpacked: Path, spec: DatasetSpec, splits: Sequence[str]) -> Path:
    """The folder within an archive that takes the place of the data set's root.

    Archives hold the content of that folder, or the folder itself, or it within some others.
    """
    wanted = [
        path.relative_to(spec.root)
        for path in spec.missing(splits)
        if path.is_relative_to(spec.root)
    ]
    if not wanted:
        missing = ", ".join(map(str, spec.missing(splits)))
        raise FileNotFoundError(
            f"{spec.source}: {missing} is not there, and no archive can put it there: it lies"
            f" outside of 'path', which is {spec.root}"
        )
    folder = unpacked
    while True:
        if all((folder / path).exists() for path in wanted):
            return folder
        children = [child for child in folder.iterdir() if not child.name.startswith((".", "__"))]
        if len(children) != 1 or not children[0].is_dir():
            names = ", ".join(sorted(child.name for child in children)[:8]) or "nothing"
            raise FileNotFoundError(
                f"{spec.source}: {', '.join(map(str, wanted))} is not in the archive, which"
                f" holds {names}"
            )
        folder = children[0]


def _check_places(source: Path, target: Path) -> None:
    """Stop if moving a folder into another would replace anything but a file by its equal."""
    for child in sorted(source.iterdir()):
        place = target / child.name
        if child.is_dir() and place.is_dir():
            _check_places(child, place)
        elif place.is_symlink() or place.exists():
            are_files = child.is_file() and place.is_file()
            if not (are_files and filecmp.cmp(child, place, shallow=False)):
                raise FileExistsError(
                    f"{place}: differs from what the archive holds under this name, so nothing was"
                    " unpacked; move it away and run again"
                )


def _move_into(source: Path, target: Path) -> None:
    """Move the content of a folder into another, which may hold some of it already."""
    target.mkdir(parents=True, exist_ok=True)
    for child in list(source.iterdir()):
        place = target / child.name
        if child.is_dir() and place.is_dir():
            _move_into(child, place)
        elif not place.exists():
            child.rename(place)


def _run_download_command(spec: DatasetSpec, allow_scripts: bool, root: Path) -> None:
    command = spec.download or ""
    words = _command_words(spec)
    is_shipped = spec.source.resolve().parent == (root / "data").resolve()
    is_shipped &= _OWN_COMMAND.fullmatch(command) is not None
    if not (is_shipped or allow_scripts):
        raise PermissionError(
            f"{spec.source}: images are missing, and its download is the command {command!r}."
            " It may do anything: run it yourself, or allow it with --allow-download-scripts"
        )
    LOGGER.info("%s: images are missing; running %s in %s", spec.source, command, root)
    try:
        status, last_line = _run_aloud(words, root)
    except OSError as error:
        raise OSError(f"{spec.source}: cannot run {command!r}: {error.strerror}") from error
    if status:
        reason = f": {last_line.removeprefix('error: ')}" if last_line else ""
        raise OSError(f"{spec.source}: {command!r} failed with status {status}{reason}")


def _command_words(spec: DatasetSpec) -> list[str]:
    """The words of the `download` command; `python` is the interpreter that runs now."""
    command = spec.download or ""
    try:
        if "\n" in command:
            raise ValueError("several lines")
        words = shlex.split(command)
    except ValueError as error:
        where = locate_key(spec.source, "download")
        what = f"{command[:60]!r}{'...' if len(command) > 60 else ''}"
        raise ValueError(
            f"{where}: download must be a URL or one command line, got {what}: {error}"
        ) from error
    return [sys.executable, *words[1:]] if words[0] in ("python", "python3") else words


def _run_aloud(words: Sequence[str], folder: Path) -> tuple[int, str]:
    """Run a command, passing on what it says; returns its status and its last line on stderr."""
    tail = b""
    with subprocess.Popen(words, cwd=folder, stderr=subprocess.PIPE) as process:
        try:
            while process.stderr and (chunk := process.stderr.read1()):  # type: ignore[attr-defined]
                sys.stderr.write(chunk.decode(errors="replace"))
                sys.stderr.flush()
                tail = (tail + chunk)[-4096:]
        except BaseException:
            process.kill()
            raise
    lines = tail.decode(errors="replace").split("\n")
    return process.returncode, next((line.strip() for line in reversed(lines) if line.strip()), "")


# ----------------------------------------------------------------------------------------- weights
def find_weights(name: str | Path, root: Path = PROJECT_ROOT) -> Path:
    """Find a weights file, or OpenVINO folder, by path or name; fetch publicly released ones.

    A released name (`yolov5s.pt`) that `locate_weights` does not find is fetched into
    `root/weights`.

    Raises:
        FileNotFoundError: from `locate_weights`.
        OSError: from `named_weights`.
    """
    path = locate_weights(name, root)
    if path is None:
        return named_weights(expand_home(name).name, root / "weights")
    if path.is_file():
        _check_recorded_sum(path)
    return path


def _check_recorded_sum(path: Path) -> None:
    """Compare a file with the checksum that was recorded beside it at its download, if any."""
    known = read_checksums(path.parent / CHECKSUM_FILE).get(path.name)
    if known is not None and file_sha256(path) != known:
        raise OSError(
            f"{path}: has changed since its download (see {CHECKSUM_FILE} beside it); delete it to "
            "fetch it again"
        )


def named_weights(name: str, folder: str | Path, base_url: str = WEIGHTS_URL) -> Path:
    """Fetch publicly released YOLOv5 v7.0 weights into a folder, once.

    The release publishes no checksums. So the first download is accepted if it has the length the
    server announced and is an undamaged zip archive, as these files are; its SHA-256 is recorded
    in the folder's `SHA256SUMS` (the format of `sha256sum -c`), and every later use, also a later
    download of the same name, must match it.

    Raises:
        ValueError: not a released name.
        OSError: no connection, a damaged file, or one that differs from the recorded checksum.
    """
    if name not in WEIGHT_NAMES:
        raise ValueError(f"{name}: not a released name; known are {', '.join(WEIGHT_NAMES)}")
    folder = Path(folder)
    known = read_checksums(folder / CHECKSUM_FILE)
    is_new = not (folder / name).exists()
    path = download(f"{base_url}/{name}", folder / name, known.get(name))
    if is_new and not _is_whole_zip(path):
        path.unlink()
        raise OSError(f"{base_url}/{name}: the answer is not a weights file; it was discarded")
    if is_new and name not in known:
        record_checksum(folder / CHECKSUM_FILE, name, file_sha256(path))
    return path


def _is_whole_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OSError):
        return False


def read_checksums(path: str | Path) -> dict[str, str]:
    """Name -> hexadecimal SHA-256 of a `SHA256SUMS` file; empty if there is none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    entries = (line.split(maxsplit=1) for line in lines if line.strip())
    return {parts[1].lstrip("*"): parts[0].lower() for parts in entries if len(parts) == 2}


def record_checksum(path: str | Path, name: str, sha256: str) -> None:
    """Add or replace one line of a `SHA256SUMS` file."""
    path = Path(path)
    checksums = read_checksums(path) | {name: sha256}
    lines = [f"{value}  {key}\n" for key, value in sorted(checksums.items())]
    with atomic_write(path) as file:
        file.write("".join(lines).encode())
