"""Reading the publicly released YOLOv5 v6.0-v7.0 `.pt` files without running anything in them.

Such a file is a pickle of whole module objects. It is read with torch's allow-list unpickler
(`weights_only=True`), which calls nothing that is not on its list; the class names that a YOLOv5
file must mention are put on the list as an empty stand-in that only stores what it is given. From
the stand-ins we take the yaml, the names, the strides and the tensors. Any other name in the file
is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.spec import OPTIONAL_KEYS, REQUIRED_KEYS, ModelSpec
from utils.torch_archive import foreign_names, load, plain_copy

# Modules of a YOLOv5 file, and what its training leaves beside them (fitness as a NumPy scalar,
# options with paths). None of these is ever imported or called.
STAND_IN_PREFIXES = (
    "models.",
    "utils.",
    "torch.nn.modules.",
    "numpy.",
    "pathlib.",
    "argparse.Namespace",
    "_codecs.encode",
)
MAX_MODULES = 100_000  # in a network, counting what is repeated as often as it is


class PublicWeights(NamedTuple):
    """What a public file holds, as plain data."""

    spec: ModelSpec
    names: tuple[str, ...]
    state_dict: dict[str, Tensor]  # float32


class _StandIn:
    """Takes the place of any class of the file; stores its state and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _StandIn:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def read_public_weights(path: Path) -> PublicWeights:
    """Read a released or user-trained YOLOv5 v6.0-v7.0 checkpoint.

    Raises:
        ValueError: the file is not such a checkpoint, or names something outside the allow-list.
    """
    content = _load_inert(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a YOLOv5 checkpoint, it holds no model")
    content = {"ema": dict.get(content, "ema"), "model": dict.get(content, "model")}
    module = content["ema"] if isinstance(content["ema"], _StandIn) else content["model"]
    if not isinstance(module, _StandIn):
        raise ValueError(f"{path}: not a YOLOv5 checkpoint, it holds no model")
    state_dict = plain_copy(_state_dict(module, path), path)
    state_dict = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in state_dict.items()
    }
    spec = _read_spec(module, state_dict, path)
    return PublicWeights(spec, _read_names(module, spec, path), state_dict)


def _load_inert(path: Path) -> Any:
    foreign = foreign_names(path)
    unknown = [name for name in foreign if not name.startswith(STAND_IN_PREFIXES)]
    if unknown:
        raise ValueError(
            f"{path}: refused, the file wants to call {', '.join(unknown[:3])[:200]}, "
            "which no YOLOv5 v6.0-v7.0 checkpoint needs; nothing of it was run"
        )
    return load(path, dict.fromkeys(foreign, _StandIn))


def _state_dict(module: _StandIn, path: Path) -> dict[str, Tensor]:
    """Parameters and persistent buffers by state-dict name, as `Module.state_dict` orders them."""
    tensors: dict[str, Tensor] = {}
    waiting = [("", module)]
    num_seen = 0
    while waiting:
        prefix, module = waiting.pop()
        num_seen += 1
        if num_seen > MAX_MODULES or len(prefix) > 1000:
            raise ValueError(f"{path}: refused, its modules are nested or repeated without end")
        transient = module.__dict__.get("_non_persistent_buffers_set")
        transient = transient if isinstance(transient, set) else set()
        for kind in ("_parameters", "_buffers"):
            for name, tensor in _items(module, kind):
                if isinstance(tensor, Tensor) and name not in transient and name != "anchor_grid":
                    tensors[prefix + name] = tensor.detach()
        children = [(f"{prefix}{name}.", child) for name, child in _items(module, "_modules")]
        waiting += [pair for pair in reversed(children) if isinstance(pair[1], _StandIn)]
    return tensors


def _items(module: _StandIn, attribute: str) -> Iterator[tuple[str, Any]]:
    value = module.__dict__.get(attribute)
    if isinstance(value, dict):
        yield from ((key, part) for key, part in dict.items(value) if isinstance(key, str))


def _read_spec(module: _StandIn, state_dict: dict[str, Tensor], path: Path) -> ModelSpec:
    description = module.__dict__.get("yaml")
    if not isinstance(description, dict):
        raise ValueError(f"{path}: the checkpoint does not say which network it is (no yaml)")
    wanted = REQUIRED_KEYS + OPTIONAL_KEYS
    known = {key: value for key, value in dict.items(description) if key in wanted}
    known = plain_copy(known, path)
    spec = ModelSpec.from_dict(known, str(path))
    anchors = [tensor for name, tensor in state_dict.items() if name.endswith(".anchors")]
    stride: Any = module.__dict__.get("stride")
    is_stride = isinstance(stride, Tensor) and len(anchors) == 1
    if not is_stride or (*stride.shape, 2) != anchors[0].shape[::2]:
        raise ValueError(f"{path}: anchors or strides are missing in the checkpoint")
    # The yaml keeps the anchors the training began with; the buffer those that it used.
    anchors_px = (anchors[0] * stride.float().view(-1, 1, 1)).flatten(1)
    if not isinstance(spec.anchors, int):
        stated = torch.tensor(spec.anchors, dtype=torch.float32)
        if stated.shape == anchors_px.shape and torch.allclose(stated, anchors_px, rtol=2e-3):
            return spec
    return ModelSpec.from_dict({**known, "anchors": anchors_px.tolist()}, str(path))


def _read_names(module: _StandIn, spec: ModelSpec, path: Path) -> tuple[str, ...]:
    names = plain_copy(module.__dict__.get("names"), path)
    if isinstance(names, dict):
        names = [names.get(index) for index in range(len(names))]
    is_list = isinstance(names, (list, tuple)) and len(names) == spec.num_classes
    if not is_list or not all(isinstance(name, (str, int, float)) for name in names):
        raise ValueError(f"{path}: {spec.num_classes} classes, but the names do not match")
    return tuple(str(name) for name in names)
