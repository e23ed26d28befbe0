"""Reading the publicly released YOLOv5 v6.0-v7.0 `.pt` files without running anything in them.

Such a file is a pickle of whole module objects. It is read with torch's allow-list unpickler
(`weights_only=True`), which calls nothing that is not on its list; the class names that a YOLOv5
file must mention are put on the list as an empty stand-in that only stores what it is given. From
the stand-ins we take the yaml, the names, the strides and the tensors. Any other name in the file
is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.spec import OPTIONAL_KEYS, REQUIRED_KEYS, ModelSpec

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
    if not isinstance(content, Mapping) or not isinstance(
        content.get("ema") or content.get("model"), _StandIn
    ):
        raise ValueError(f"{path}: not a YOLOv5 checkpoint, it holds no model")
    module = content.get("ema") or content["model"]
    state_dict = {
        name: tensor.float() if tensor.is_floating_point() else tensor
        for name, tensor in _tensors(module, "", depth=0)
    }
    spec = _read_spec(module, state_dict, path)
    return PublicWeights(spec, _read_names(module, spec, path), state_dict)


def _load_inert(path: Path) -> Any:
    try:
        foreign = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        unknown = [name for name in foreign if not name.startswith(STAND_IN_PREFIXES)]
        if unknown:
            raise ValueError(
                f"{path}: refused, the file wants to call {', '.join(sorted(unknown)[:3])}, "
                "which no YOLOv5 v6.0-v7.0 checkpoint needs; nothing of it was run"
            )
        with torch.serialization.safe_globals([(_StandIn, name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path}: not a readable torch checkpoint ({reason})") from None


def _tensors(module: Any, prefix: str, depth: int) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by state-dict name, as `Module.state_dict` orders them."""
    if not isinstance(module, _StandIn) or depth > 20:
        return
    transient = _mapping_or_set(module, "_non_persistent_buffers_set")
    for kind in ("_parameters", "_buffers"):
        for name, tensor in dict(_mapping_or_set(module, kind)).items():
            if isinstance(tensor, Tensor) and name not in transient and name != "anchor_grid":
                yield prefix + name, tensor.detach()
    for name, child in dict(_mapping_or_set(module, "_modules")).items():
        yield from _tensors(child, f"{prefix}{name}.", depth + 1)


def _mapping_or_set(module: _StandIn, attribute: str) -> Any:
    value = module.__dict__.get(attribute)
    return value if isinstance(value, (Mapping, set)) else {}


def _read_spec(module: _StandIn, state_dict: Mapping[str, Tensor], path: Path) -> ModelSpec:
    description = module.__dict__.get("yaml")
    if not isinstance(description, Mapping):
        raise ValueError(f"{path}: the checkpoint does not say which network it is (no yaml)")
    known = {key: description[key] for key in REQUIRED_KEYS + OPTIONAL_KEYS if key in description}
    spec = ModelSpec.from_dict(known, str(path))
    anchors = [tensor for name, tensor in state_dict.items() if name.endswith(".anchors")]
    stride = module.__dict__.get("stride")
    if len(anchors) != 1 or not isinstance(stride, Tensor) or len(stride) != len(anchors[0]):
        raise ValueError(f"{path}: anchors or strides are missing in the checkpoint")
    # The yaml keeps the anchors the training began with; the buffer those that it used.
    anchors_px = (anchors[0] * stride.float().view(-1, 1, 1)).flatten(1)
    if not isinstance(spec.anchors, int):
        stated = torch.tensor(spec.anchors, dtype=torch.float32)
        if stated.shape == anchors_px.shape and torch.allclose(stated, anchors_px, rtol=2e-3):
            return spec
    return spec.with_anchors(anchors_px.tolist())


def _read_names(module: _StandIn, spec: ModelSpec, path: Path) -> tuple[str, ...]:
    names = module.__dict__.get("names")
    if isinstance(names, Mapping):
        names = [names[key] for key in sorted(names)]
    if not isinstance(names, (list, tuple)) or len(names) != spec.num_classes:
        raise ValueError(f"{path}: {spec.num_classes} classes, but the names do not match")
    return tuple(str(name) for name in names)
