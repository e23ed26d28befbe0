"""The checkpoint format: plain data, written atomically, read without running code.

A checkpoint is one dict:
    format, version     FORMAT and FORMAT_VERSION
    spec                `ModelSpec.to_dict()`, with widths if the network is pruned
    names               class names, in order
    model               state dict: the weights to use; of a training run the averaged ones
    training            absent in final files; else what a resumed run needs (training/saving.py)
    epoch, fitness, options, hyp
                        where the weights come from; fitness as measured after this epoch
    history             mAP@.5 of the weights and the best that is known (pruning/verdict.py)
Final files hold floating-point tensors in half precision.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from models.spec import ModelSpec
from models.yolo import Model
from utils.atomic import atomic_write
from utils.public_weights import read_public_weights
from utils.torch_archive import foreign_names, load, plain_copy

LOGGER = logging.getLogger(__name__)

FORMAT = "yolov5-slim"
FORMAT_VERSION = 1
LITTLE = 1 << 22  # weights that may be allocated without asking how many the file holds


class Detector(NamedTuple):
    """A network as read from a file, in float32."""

    model: Model
    names: tuple[str, ...]
    checkpoint: dict[str, Any]  # the whole content of our own files, {} for public ones


def build_checkpoint(model: Model, names: Sequence[str], **extra: Any) -> dict[str, Any]:
    """The content of a checkpoint for `model`; `extra` is plain data (epoch, options, ...)."""
    return {
        "format": FORMAT,
        "version": FORMAT_VERSION,
        "spec": model.spec.to_dict(),
        "names": list(names),
        "model": model.state_dict(),
        **extra,
    }


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write the file whole or not at all.

    Raises:
        FloatingPointError: a weight is not finite; the previous file is left as it is.
        OSError: it cannot be written; the same holds.
    """
    bad = _name_not_finite(content)
    if bad is not None:
        raise FloatingPointError(f"{path}: not saved, the values of {bad} are not all finite")
    with atomic_write(path) as file:
        output = _Output(file)
        try:
            torch.save(dict(content), output)  # type: ignore[arg-type]  # it only calls `write`
        except RuntimeError:
            if output.error is None:
                raise
            raise output.error from None


class _Output:
    """A file for torch.save, which does not say why a write has failed; this one remembers."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        """As a file does."""
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        """Left to the one who closes the file."""


def _name_not_finite(content: Any, name: str = "") -> str | None:
    """Where in nested content the first tensor is that is not finite."""
    if isinstance(content, Tensor):
        is_good = not content.is_floating_point() or bool(torch.isfinite(content).all())
        return None if is_good else name
    if isinstance(content, Mapping):
        items = list(content.items())
    else:
        items = list(enumerate(content)) if isinstance(content, list | tuple) else []
    found = (_name_not_finite(item, f"{name}.{key}".lstrip(".")) for key, item in items)
    return next((bad for bad in found if bad is not None), None)


def save_final(path: Path, content: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Save `content` with these weights in half precision and nothing that only training needs."""
    kept = {key: value for key, value in content.items() if key != "training"}
    save_checkpoint(path, {**kept, "model": {k: to_half(v) for k, v in weights.items()}})


def to_half(tensor: Tensor) -> Tensor:
    """A half-precision copy; tensors that would overflow (running variances) stay float32."""
    tensor = tensor.detach().cpu()
    if not tensor.is_floating_point():
        return tensor.clone()
    half = tensor.half()
    return half if torch.isfinite(half).all() else tensor.float()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read one of our own checkpoints.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not of this format.
    """
    path = Path(path)
    if foreign_names(path):
        raise ValueError(
            f"{path}: holds pickled objects, so it is not a checkpoint of this toolkit; a public "
            "YOLOv5 file can be given as --weights"
        )
    return _read_plain(path)


def _read_plain(path: Path) -> dict[str, Any]:
    """The checked content of a file without foreign names."""
    content = plain_copy(load(path), path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: not a checkpoint of this toolkit and not a public YOLOv5 file")
    if content.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"{path}: checkpoint version {content.get('version')!r}, "
            f"this toolkit reads version {FORMAT_VERSION}"
        )
    missing = {"spec", "names", "model"} - content.keys()
    if missing:
        raise ValueError(f"{path}: damaged checkpoint, {', '.join(sorted(missing))} missing")
    wrong = [key for key, kind in _KINDS.items() if not isinstance(content.get(key), kind)]
    wrong += [] if "model" in wrong or _are_tensors(content["model"]) else ["model"]
    wrong += [] if "names" in wrong or _are_texts(content["names"]) else ["names"]
    if wrong:
        raise ValueError(f"{path}: damaged checkpoint, {', '.join(wrong)} of the wrong kind")
    return content


_NOTHING = type(None)
_KINDS: dict[str, tuple[type, ...]] = {
    "names": (list, tuple),
    "model": (dict,),
    "training": (dict, _NOTHING),
    "epoch": (int, _NOTHING),
    "fitness": (float, int, _NOTHING),
    "options": (dict, _NOTHING),
    "hyp": (dict, _NOTHING),
}


def _are_tensors(state_dict: Mapping[Any, Any]) -> bool:
    return all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state_dict.items())


def _are_texts(names: Sequence[Any]) -> bool:
    return all(isinstance(name, str) for name in names)


def load_detector(path: Path, device: torch.device | str = "cpu") -> Detector:
    """Read a checkpoint of ours or a public YOLOv5 v6.0-v7.0 file; eval mode, float32.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, refused, or its tensors do not fit its network.
    """
    path = Path(path)
    if foreign_names(path):
        content = {}
        spec, names, state_dict = read_public_weights(path)
    else:
        content = _read_plain(path)
        spec = ModelSpec.from_dict(content["spec"], str(path))
        names, state_dict = tuple(content["names"]), content["model"]
    if len(names) != spec.num_classes:
        raise ValueError(f"{path}: {len(names)} class names for {spec.num_classes} classes")
    model = Model(spec, max_weights=most_weights(state_dict))
    try:
        model.load_state_dict(state_dict)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(f"{path}: the tensors do not fit the network: {reason}") from None
    return Detector(model.eval().to(device), names, content)


def most_weights(state_dict: Mapping[str, Tensor]) -> int:
    """What its network may have: a file of a few bytes must not ask for one of gigabytes."""
    return max(2 * sum(tensor.numel() for tensor in state_dict.values()), LITTLE)


def transfer_weights(
    model: nn.Module, state_dict: Mapping[str, Tensor], keep_anchors: bool = False
) -> list[str]:
    """Copy every tensor that has the same name and shape; return the names left as they were.

    `keep_anchors` leaves the anchors of `model` alone (its spec says which it has).
    """
    own = model.state_dict()
    fitting = {
        name: tensor
        for name, tensor in state_dict.items()
        if name in own
        and own[name].shape == tensor.shape
        and not (keep_anchors and name.endswith("anchors"))
    }
    model.load_state_dict({**own, **fitting})
    skipped = [name for name in own if name not in fitting and not name.endswith("anchors")]
    LOGGER.info(
        "transferred %d of %d tensors%s",
        len(own) - len(skipped),
        len(own),
        f"; left fresh: {_abbreviate(skipped)}" if skipped else "",
    )
    return skipped


def _abbreviate(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
