"""Reading what `torch.save` writes, from whoever it comes: plain data and tensors, nothing else.

Such a file is a zip archive of a pickle and the bytes of its tensors. It is looked at before it is
read (nothing in it may unfold to more than is there), read with torch's allow-list unpickler, which
calls nothing that is not on its list, and what comes out is checked again: of known types, nested
and repeated with measure, no tensor larger than its bytes.
"""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.regular_file import open_regular, why_no_file

MAX_FILE_BYTES = 1 << 40
MAX_PICKLE_BYTES = 8 << 20  # yolov5n has 80 KB; one operation is a byte, and costs 64 in memory
MAX_MEMBERS = 100_000
MAX_VALUES = 1_000_000  # in lists and mappings, counting what is repeated as often as it is
MAX_DEPTH = 100
MAX_INT_BITS = 256  # of a number; states of random generators have 128


def foreign_names(path: Path) -> list[str]:
    """Names of classes and functions that a file mentions, beside those of plain data and tensors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not such a file, damaged, or built to fill the memory.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {why_no_file(path, 'no such weights file')}")
    _check_archive(path)
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception as error:  # noqa: BLE001 (a hostile pickle can make it raise anything)
        raise _not_readable(path, error) from None


def load(path: Path, stand_ins: Mapping[str, type] | None = None) -> Any:
    """The content of a file that `foreign_names` has seen, on the CPU, not yet checked.

    Args:
        path: the file.
        stand_ins: what takes the place of foreign names.

    Raises:
        ValueError: it is damaged, or wants something that is not on the allow-list.
    """
    allowed: list[Any] = [(kind, name) for name, kind in (stand_ins or {}).items()]
    with torch.serialization.safe_globals(allowed) if allowed else contextlib.nullcontext():
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # noqa: BLE001 (as above)
            raise _not_readable(path, error) from None


def plain_copy(value: Any, path: Path) -> Any:
    """The same data in new lists, tuples and dicts; the tensors themselves.

    Raises:
        ValueError: something is neither plain data nor an ordinary tensor, or there is too much.
    """
    return _Copier(path).copy(value, 0)


class _Copier:
    def __init__(self, path: Path) -> None:
        self.path, self.num_values = path, 0
        self.bytes_left = path.stat().st_size
        self.storages: set[int] = set()

    def copy(self, value: Any, depth: int) -> Any:
        self.num_values += 1
        if self.num_values > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError(f"{self.path}: refused, its data is nested or repeated without end")
        if isinstance(value, Tensor):
            self._check_tensor(value)
            return value
        if isinstance(value, dict):  # of OrderedDict only the items: it may have attributes
            items = dict.items(value)
            return {self._key(key): self.copy(part, depth + 1) for key, part in items}
        if isinstance(value, (list, tuple)):
            parts = [self.copy(part, depth + 1) for part in value]
            return parts if isinstance(value, list) else tuple(parts)
        if value is None or type(value) in (bool, float, str, bytes):
            return value
        if type(value) is int and value.bit_length() <= MAX_INT_BITS:
            return value
        raise ValueError(
            f"{self.path}: refused, it holds a {type(value).__name__} that is no plain data"
        )

    def _key(self, key: Any) -> Any:
        if type(key) not in (str, int, bool) or (type(key) is int and key.bit_length() > 64):
            raise ValueError(f"{self.path}: refused, it holds a mapping with a strange key")
        return key

    def _check_tensor(self, tensor: Tensor) -> None:
        is_ordinary = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not is_ordinary or tensor.is_quantized:
            raise ValueError(f"{self.path}: refused, it holds a tensor that is not a dense one")
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.storages:
            self.storages.add(storage.data_ptr())
            self.bytes_left -= storage.nbytes()
        if tensor.numel() * tensor.element_size() > storage.nbytes() or self.bytes_left < 0:
            raise ValueError(f"{self.path}: refused, it holds a tensor larger than its bytes")


def _check_archive(path: Path) -> None:
    """See that the archive is stored as it is, each byte once.

    Raises:
        ValueError: it is not.
    """
    try:
        with open_regular(path, MAX_FILE_BYTES) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError):
        raise ValueError(
            f"{path}: not a checkpoint that torch.save writes (since PyTorch 1.6), or a damaged one"
        ) from None
    problem = ""
    if any(
        m.compress_type != zipfile.ZIP_STORED or m.compress_size != m.file_size for m in members
    ):
        problem = "its parts are compressed, so that they may unfold to anything"
    elif sum(m.file_size for m in members) > path.stat().st_size or len(members) > MAX_MEMBERS:
        problem = "its parts overlap, or there are too many"
    elif len({m.filename.casefold() for m in members}) < len(members):
        problem = "two of its parts have the same name"
    elif any(m.file_size > MAX_PICKLE_BYTES for m in members if m.filename.endswith(".pkl")):
        problem = f"its pickle has more than {MAX_PICKLE_BYTES >> 20} MiB"
    if problem:
        raise ValueError(f"{path}: refused, {problem}; torch.save does not write such files")


def _not_readable(path: Path, error: Exception) -> ValueError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0]
    return ValueError(
        f"{path}: not a checkpoint that torch.save writes, or a damaged one ({reason[:200]})"
    )
