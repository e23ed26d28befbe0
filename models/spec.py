"""The plain-data description of a network: rows, multiples, anchors and, if pruned, widths."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from models.blocks import ACTIVATIONS

REQUIRED_KEYS = ("nc", "depth_multiple", "width_multiple", "anchors", "backbone", "head")
OPTIONAL_KEYS = ("widths", "activation", "ch")


# Beyond these a description is a mistake or an attack.
MAX_CLASSES = 1 << 16
MAX_ROWS = 1000
MAX_SOURCES = 64  # of one row
MAX_ANCHORS = 32  # of one level


class Row(NamedTuple):
    """One line of `backbone` or `head`."""

    sources: tuple[int, ...]
    number: int
    module: str
    args: tuple[Any, ...]
    label: str  # for messages: "yolov5s.yaml: head row 3"


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """What a network is built from; equal specs give equal shapes."""

    num_classes: int
    depth_multiple: float
    width_multiple: float
    # Per level w, h, w, h, ... in input pixels; or the number of anchors a level, to be fitted.
    anchors: tuple[tuple[float, ...], ...] | int
    rows: tuple[Row, ...]
    num_backbone_rows: int
    # Output channels by module path ("0", "2.cv1", "2.m.0.cv2"); a missing path has the standard
    # width. A pruned network lists every convolution.
    widths: Mapping[str, int] = dataclasses.field(default_factory=dict)
    activation: str = "SiLU"
    source: str = "model yaml"

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "model yaml") -> ModelSpec:
        """Check and convert what a model yaml holds; `source` is its name in messages.

        Raises:
            ValueError: with file, key or row, value and what is expected.
        """
        if not isinstance(data, Mapping):
            raise ValueError(f"{source}: expected a mapping of keys, found {type(data).__name__}")
        _check_keys(data, source)
        rows = [
            _read_row(row, f"{source}: {part} row {number}")
            for part in ("backbone", "head")
            for number, row in enumerate(_read_list(data, part, source))
        ]
        # Public files write constructor calls: nn.ReLU().
        activation = str(data.get("activation", "SiLU"))
        activation = activation.removeprefix("torch.").removeprefix("nn.").removesuffix("()")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"{source}: unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}"
            )
        return cls(
            num_classes=_read_number(data, "nc", source, int, minimum=1, most=MAX_CLASSES),
            depth_multiple=_read_number(data, "depth_multiple", source, float),
            width_multiple=_read_number(data, "width_multiple", source, float),
            anchors=_read_anchors(data["anchors"], source),
            rows=tuple(rows),
            num_backbone_rows=len(data["backbone"]),
            widths=_read_widths(data.get("widths") or {}, source),
            activation=activation,
            source=source,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for yaml and checkpoints; `from_dict` gives the same spec back."""
        rows = [
            [
                list(row.sources) if len(row.sources) > 1 else row.sources[0],
                row.number,
                row.module,
                list(row.args),
            ]
            for row in self.rows
        ]
        anchors = self.anchors
        data: dict[str, Any] = {
            "nc": self.num_classes,
            "depth_multiple": self.depth_multiple,
            "width_multiple": self.width_multiple,
            "anchors": anchors if isinstance(anchors, int) else [list(level) for level in anchors],
            "backbone": rows[: self.num_backbone_rows],
            "head": rows[self.num_backbone_rows :],
        }
        if self.activation != "SiLU":
            data["activation"] = self.activation
        if self.widths:
            data["widths"] = dict(self.widths)
        return data

    def with_num_classes(self, num_classes: int) -> ModelSpec:
        """The same network for another number of classes."""
        return dataclasses.replace(self, num_classes=num_classes)

    def with_widths(self, widths: Mapping[str, int]) -> ModelSpec:
        """The same network with the given output channels by module path."""
        return dataclasses.replace(self, widths=dict(widths))

    def with_anchors(self, anchors: Sequence[Sequence[float]]) -> ModelSpec:
        """The same network with other anchors, per level w, h, w, h, ... in input pixels."""
        return dataclasses.replace(self, anchors=tuple(tuple(level) for level in anchors))

    @property
    def is_pruned(self) -> bool:
        """Whether it states widths of its own, as a pruned network does."""
        return bool(self.widths)

    def is_same_network(self, other: ModelSpec) -> bool:
        """Whether both are built alike, whatever their classes, anchors and widths."""

        def built_from(spec: ModelSpec) -> tuple[Any, ...]:
            rows = tuple((row.sources, row.number, row.module, row.args) for row in spec.rows)
            return rows, spec.depth_multiple, spec.width_multiple, spec.activation

        return built_from(self) == built_from(other)


def _check_keys(data: Mapping[str, Any], source: str) -> None:
    missing = [key for key in REQUIRED_KEYS if key not in data]
    if missing:
        raise ValueError(f"{source}: missing {', '.join(missing)}; is this a model yaml?")
    for key in data:
        if key not in REQUIRED_KEYS + OPTIONAL_KEYS:
            near = difflib.get_close_matches(str(key), REQUIRED_KEYS + OPTIONAL_KEYS, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{source}: unknown key {key!r}{hint}")
    channels = data.get("ch", 3)
    if not isinstance(channels, int) or channels != 3:
        raise ValueError(f"{source}: ch is {channels!r}, but images have 3 channels")


def _read_number(
    data: Mapping[str, Any],
    key: str,
    source: str,
    kind: type,
    minimum: float = 0,
    most: float = 1000,
) -> Any:
    value = data[key]
    accepted = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, accepted) or not minimum <= value <= most:
        expected = f"a whole number from {minimum}" if kind is int else "a positive number"
        expected += f" to {most}"
        raise ValueError(f"{source}: {key} is {value!r}, expected {expected}")
    if value == 0:
        raise ValueError(f"{source}: {key} is 0, expected a positive number")
    return value


def _read_list(data: Mapping[str, Any], key: str, source: str) -> list[Any]:
    value = data[key]
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_ROWS:
        raise ValueError(
            f"{source}: {key} must be a list of 1 to {MAX_ROWS} rows [from, number, module, args]"
        )
    return value


def _read_row(row: Any, label: str) -> Row:
    if not isinstance(row, (list, tuple)) or len(row) != 4:
        raise ValueError(f"{label}: expected [from, number, module, args], found {row!r}")
    sources, number, module, args = row
    sources = (sources,) if isinstance(sources, int) else sources
    if not isinstance(sources, (list, tuple)) or not 1 <= len(sources) <= MAX_SOURCES:
        raise ValueError(f"{label}: 'from' is {sources!r}, expected a row number or a list of them")
    if any(isinstance(s, bool) or not isinstance(s, int) for s in sources):
        raise ValueError(f"{label}: 'from' is {sources!r}, expected whole numbers")
    if isinstance(number, bool) or not isinstance(number, int) or not 1 <= number <= 1000:
        raise ValueError(f"{label}: 'number' is {number!r}, expected a whole number from 1 to 1000")
    if not isinstance(module, str):
        raise ValueError(f"{label}: the module is {module!r}, expected a name such as Conv")
    if not isinstance(args, (list, tuple)):
        raise ValueError(f"{label}: the arguments are {args!r}, expected a list")
    return Row(tuple(sources), number, module, tuple(args), label)


def _read_anchors(anchors: Any, source: str) -> tuple[tuple[float, ...], ...] | int:
    if isinstance(anchors, int) and not isinstance(anchors, bool):
        if not 1 <= anchors <= 9:
            raise ValueError(f"{source}: anchors is {anchors}, expected 1 to 9 a level")
        return anchors
    if not isinstance(anchors, (list, tuple)) or not anchors:
        raise ValueError(f"{source}: anchors must be a list per level of w, h, w, h, ... in pixels")
    levels = []
    for number, level in enumerate(anchors):
        where = f"{source}: anchors of level {number}"
        if not isinstance(level, (list, tuple)) or len(level) < 2 or len(level) % 2:
            raise ValueError(f"{where}: {level!r}, expected pairs w, h, w, h, ...")
        if len(level) > 2 * MAX_ANCHORS:
            raise ValueError(f"{where}: {len(level) // 2} of them, at most {MAX_ANCHORS} are used")
        if any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in level):
            raise ValueError(f"{where}: {level!r}, expected numbers")
        if not all(0 < v < 1e6 for v in level):
            raise ValueError(f"{where}: {level!r}, sizes must be positive")
        levels.append(tuple(level))
    if len({len(level) for level in levels}) > 1:
        raise ValueError(f"{source}: anchors: every level needs the same number of anchors")
    return tuple(levels)


def _read_widths(widths: Any, source: str) -> dict[str, int]:
    if not isinstance(widths, Mapping):
        raise ValueError(f"{source}: widths must map module paths to channels, e.g. '2.cv1': 12")
    checked = {}
    for path, width in widths.items():
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(
                f"{source}: widths: {path} is {width!r}, expected a whole number from 1"
            )
        checked[str(path)] = width
    return checked
