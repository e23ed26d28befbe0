"""YAML files -> frozen, validated dataclasses: hyperparameters and data sets.

Every complaint names the file, the line where there is one, the key and what would be valid.
Nothing here touches the network or the images; a data set that is not on disk yet still loads.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from utils.lookup import expand_home, nearest
from utils.regular_file import read_regular, why_no_file

LOGGER = logging.getLogger(__name__)

DATASET_KEYS = ("path", "train", "val", "test", "nc", "names", "download")
# Far beyond any real file: 20,000 class names are 40,000 nodes in less than a megabyte.
MAX_YAML_BYTES = 2 << 20
MAX_YAML_NODES = 200_000
MAX_YAML_SCALAR = 4096  # characters
MAX_CLASSES = 1 << 16  # as in models/spec.py
# Keys that labelling services and other trainers add to a data set file; they mean nothing here.
FOREIGN_DATASET_KEYS = frozenset(
    {"author", "channels", "colors", "contact", "date", "description", "flip_idx", "info"}
    | {"kpt_shape", "licence", "license", "minival", "roboflow", "task", "url", "version", "year"}
)


# ------------------------------------------------------------------------------------------ YAML
class _Loader(yaml.SafeLoader):
    """Safe YAML 1.1 loader that reads `1e-3` as a number and `yes`, `no`, `on`, `off` as text.

    Plain YAML 1.1 does the opposite of both: learning rates become strings and a class called
    `no` becomes False. A key given twice in one mapping is an error instead of a silent choice,
    and so are values that PyYAML itself trips over (`!!int ""`), and aliases that would unfold to
    more than `MAX_YAML_NODES`.
    """

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _unfolded_size(node, {})
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            is_good = not isinstance(value, int) or value.bit_length() <= 64
        except (ValueError, OverflowError, LookupError, AttributeError):
            is_good = False
        if not is_good:
            kind = node.tag.rpartition(":")[2]
            raise yaml.constructor.ConstructorError(
                None,
                None,
                f"{str(node.value)[:40]!r} cannot be read as {kind}; if text is meant, quote it",
                node.start_mark,
            )
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[tuple[str, str]] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.value == "<<":
                continue
            key = (key_node.tag, key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _unfolded_size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Nodes below and with this one, counting aliases as what they stand for.

    Raises:
        yaml.YAMLError: there are too many of them, a value is too long, or one holds itself.
    """
    if id(node) not in sizes:
        sizes[id(node)] = 0  # until it is known
        children: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            children = node.value
        elif isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif len(node.value) > MAX_YAML_SCALAR:
            raise _refusal(f"a value of more than {MAX_YAML_SCALAR} characters", node)
        sizes[id(node)] = 1 + sum(_unfolded_size(child, sizes) for child in children)
    if not sizes[id(node)]:
        raise _refusal("it contains itself", node)
    if sizes[id(node)] > MAX_YAML_NODES:
        raise _refusal(f"it holds more than {MAX_YAML_NODES} values", node)
    return sizes[id(node)]


def _refusal(reason: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.composer.ComposerError(None, None, reason, node.start_mark)


_REPLACED_TAGS = ("tag:yaml.org,2002:bool", "tag:yaml.org,2002:float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in rules if tag not in _REPLACED_TAGS]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|[-+]?\d+[eE][-+]?\d+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+.0123456789"),
)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping of plain data.

    Raises:
        OSError: there is no such file, it cannot be read or is too large.
        ValueError: the file is not YAML (with file and line), or not a mapping at its top.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {why_no_file(path)}")
    # Bytes, not text: the YAML reader then sees byte order marks and reports bad encodings.
    text = read_regular(path, MAX_YAML_BYTES)
    try:
        content = yaml.load(text, Loader=_Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ValueError(f"{path}:{line}: not valid YAML: {error.problem or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        is_deep = isinstance(error, RecursionError)
        reason = "nested too deeply" if is_deep else " ".join(str(error).split())
        raise ValueError(f"{path}: not valid YAML: {reason}") from error
    if not isinstance(content, dict):
        kind = "empty" if content is None else f"a {type(content).__name__}"
        raise ValueError(f"{path}: expected a mapping of keys to values, the file is {kind}")
    return content


def locate_key(path: Path, key: str) -> str:
    """`path:line` of a top-level key, or just the path when the key is not there."""
    with path.open("rb") as file:
        root = yaml.compose(file, Loader=_Loader)
    for key_node, _ in root.value if isinstance(root, yaml.MappingNode) else ():
        if key_node.value == key:
            return f"{path}:{key_node.start_mark.line + 1}"
    return str(path)


# ------------------------------------------------------------------------------- hyperparameters
def _bounded(low: float, high: float, *, low_open: bool = False, high_open: bool = False) -> Any:
    """A required number with its valid interval, kept in the field's metadata."""
    return field(metadata={"interval": (low, high, low_open, high_open)})


@dataclass(frozen=True)
class Hyperparameters:
    """The values of one `data/hyps/*.yaml`. Use `dataclasses.replace` to vary one.

    Raises:
        ValueError: a value is not a number or lies outside its interval.
    """

    lr0: float = _bounded(0, 10, low_open=True)  # learning rate after warm-up
    lrf: float = _bounded(0, 1)  # last learning rate, as a share of lr0
    momentum: float = _bounded(0, 1, high_open=True)  # SGD momentum, Adam beta1
    weight_decay: float = _bounded(0, 1)  # at the nominal batch of 64
    warmup_epochs: float = _bounded(0, 1000)  # epochs, fractions allowed
    warmup_momentum: float = _bounded(0, 1, high_open=True)  # momentum at step 0
    warmup_bias_lr: float = _bounded(0, 10)  # learning rate of biases at step 0, with SGD only
    box: float = _bounded(0, 1000)  # gain of the box loss
    cls: float = _bounded(0, 1000)  # gain of the class loss, at 80 classes
    cls_pw: float = _bounded(0, 1000, low_open=True)  # weight of positives in the class loss
    obj: float = _bounded(0, 1000)  # gain of the objectness loss, at 640 px
    obj_pw: float = _bounded(0, 1000, low_open=True)  # weight of positives in objectness
    iou_t: float = _bounded(0, 1)  # not used; kept so that existing files load
    anchor_t: float = _bounded(1, 100, low_open=True)  # largest side ratio anchor : box
    fl_gamma: float = _bounded(0, 10)  # focal loss exponent, 0 = plain cross entropy
    hsv_h: float = _bounded(0, 1)  # hue shift, +- share of the colour circle
    hsv_s: float = _bounded(0, 1)  # saturation gain, 1 +- this
    hsv_v: float = _bounded(0, 1)  # brightness gain, 1 +- this
    degrees: float = _bounded(0, 180)  # rotation, +- degrees
    translate: float = _bounded(0, 1)  # shift, +- share of the image side
    scale: float = _bounded(0, 1, high_open=True)  # zoom, 1 +- this
    shear: float = _bounded(0, 45, high_open=True)  # shear, +- degrees
    perspective: float = _bounded(0, 0.01)  # +- per pixel; useful up to about 0.001
    flipud: float = _bounded(0, 1)  # probability of an up-down flip
    fliplr: float = _bounded(0, 1)  # probability of a left-right flip
    mosaic: float = _bounded(0, 1)  # probability of composing four images
    mixup: float = _bounded(0, 1)  # probability of blending in a second image
    copy_paste: float = _bounded(0, 1)  # share of polygon objects pasted again, mirrored
    label_smoothing: float = field(default=0.0, metadata={"interval": (0, 1, False, True)})
    anchors: int | None = None  # anchors per level to compute anew; None keeps the network's

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):
            if entry.name != "anchors":
                _check_number(entry, getattr(self, entry.name))
        if self.anchors is not None and not (_is_integer(self.anchors) and 1 <= self.anchors <= 32):
            raise ValueError(f"anchors = {self.anchors!r}: expected a whole number from 1 to 32")

    def to_dict(self) -> dict[str, float | int]:
        """Plain data to save; `load_hyperparameters` reads it back."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_number(entry: dataclasses.Field[Any], value: object) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared, not math.isfinite: that fails for whole numbers beyond any float.
    if not is_number or not -math.inf < value < math.inf:  # type: ignore[operator]
        raise ValueError(f"{entry.name} = {value!r}: expected a number")
    low, high, low_open, high_open = entry.metadata["interval"]
    too_low = value <= low if low_open else value < low
    too_high = value >= high if high_open else value > high
    if too_low or too_high:
        interval = f"{'(' if low_open else '['}{low}, {high}{')' if high_open else ']'}"
        raise ValueError(f"{entry.name} = {value!r} lies outside {interval}")


def load_hyperparameters(path: str | Path) -> Hyperparameters:
    """Read a hyperparameter file; every key must be known, present and in range.

    `label_smoothing` and `anchors` are the only keys that may be left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names file, line, key, and for an unknown key the nearest known one.
    """
    path = Path(path)
    values = load_yaml(path)
    entries = dataclasses.fields(Hyperparameters)
    known = [entry.name for entry in entries]
    for key in values:
        if key not in known:
            hint = nearest(str(key), known)
            raise ValueError(f"{locate_key(path, str(key))}: unknown hyperparameter {key!r}{hint}")
    optional = ("label_smoothing", "anchors")
    missing = [name for name in known if name not in values and name not in optional]
    if missing:
        raise ValueError(f"{path}: hyperparameters missing: {', '.join(missing)}")
    for entry in entries:
        if entry.name in values and entry.name != "anchors":
            try:
                _check_number(entry, values[entry.name])
            except ValueError as error:
                raise ValueError(f"{locate_key(path, entry.name)}: {error}") from error
    try:
        return Hyperparameters(**values)
    except ValueError as error:  # only `anchors` is left to fail
        raise ValueError(f"{locate_key(path, 'anchors')}: {error}") from error


# ------------------------------------------------------------------------------------- data sets
@dataclass(frozen=True)
class DatasetSpec:
    """What one `data/*.yaml` says, with absolute paths.

    A split may be empty (the key is absent) and its paths need not exist yet: then they are where
    a download would put them. `tried` remembers every place looked at, for the error message.
    """

    source: Path  # the yaml file
    root: Path  # folder of the data set: what `path` resolved to
    train: tuple[Path, ...]  # folders of images or .txt lists of images
    val: tuple[Path, ...]
    test: tuple[Path, ...]
    names: tuple[str, ...]  # class names by class index
    download: str | None = None  # URL of an archive, or a command
    tried: Mapping[Path, tuple[Path, ...]] = field(default_factory=dict, repr=False)

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.names)

    def missing(self, splits: Sequence[str] = ("train", "val")) -> tuple[Path, ...]:
        """Paths of these splits that do not exist."""
        paths = [path for split in splits for path in getattr(self, split)]
        return tuple(path for path in dict.fromkeys(paths) if not path.exists())

    def check_exists(self, splits: Sequence[str] = ("train", "val")) -> None:
        """Stop when a split is not named or its images are not there.

        Raises:
            ValueError: the yaml does not name the split.
            FileNotFoundError: lists what was tried.
        """
        for split in splits:
            if not getattr(self, split):
                raise ValueError(f"{self.source}: no key {split!r}, which is needed here")
        missing = self.missing(splits)
        if missing:
            looked = {place: None for path in missing for place in self.tried.get(path, (path,))}
            places = ", ".join(map(str, looked))
            raise FileNotFoundError(f"{self.source}: images not found; tried {places}")


def load_dataset_spec(path: str | Path, root: str | Path) -> DatasetSpec:
    """Read a data set file.

    Args:
        path: the yaml file.
        root: the project folder. A relative `path` in the yaml is taken from it or from the yaml's
            own folder, wherever more of the splits are (the former if that is equal); without
            `path`, each split is tried at both.

    Raises:
        FileNotFoundError: there is no such yaml file. Missing images are not an error here, see
            `DatasetSpec.check_exists`.
        ValueError: names file, line and key.
    """
    path = Path(path).absolute()
    values = load_yaml(path)
    for key in values:
        if key in FOREIGN_DATASET_KEYS:
            LOGGER.info("%s: key %r is not used", path, key)
        elif key not in DATASET_KEYS:
            hint = nearest(str(key), DATASET_KEYS)
            raise ValueError(f"{locate_key(path, str(key))}: unknown key {key!r}{hint}")
    names = _parse_names(values, path)
    entries = {split: _split_entries(values, split, path) for split in ("train", "val", "test")}
    bases = _base_folders(values.get("path"), path, Path(root))
    has_one_place = bool(values.get("path"))
    if has_one_place:
        bases = _most_complete_first(bases, [one for listed in entries.values() for one in listed])
    tried: dict[Path, tuple[Path, ...]] = {}
    splits = {
        split: tuple(_resolve_split(entry, bases, has_one_place, tried) for entry in listed)
        for split, listed in entries.items()
    }
    download = values.get("download")
    if download is not None and not isinstance(download, str):
        raise ValueError(f"{locate_key(path, 'download')}: download must be a URL or a command")
    return DatasetSpec(
        source=path,
        root=bases[0],
        names=names,
        download=(download or "").strip() or None,
        tried=tried,
        **splits,
    )


def _parse_names(values: Mapping[str, Any], path: Path) -> tuple[str, ...]:
    names, num_classes = values.get("names"), values.get("nc")
    if num_classes is not None and not (
        _is_integer(num_classes) and 1 <= num_classes <= MAX_CLASSES
    ):
        where = locate_key(path, "nc")
        raise ValueError(
            f"{where}: nc = {num_classes!r}: expected a whole number from 1 to {MAX_CLASSES}"
        )
    if names is None and num_classes is None:
        raise ValueError(f"{path}: key 'names' is missing: the class names, as list or mapping")
    if names is None and num_classes is not None:
        names = [f"class{index}" for index in range(num_classes)]
    where = locate_key(path, "names")
    if isinstance(names, dict):
        names = _names_from_mapping(names, where)
    if not isinstance(names, list) or not names:
        raise ValueError(f"{where}: names must be a list, or a mapping from index to name")
    if any(isinstance(name, list | dict) or name is None for name in names):
        raise ValueError(f"{where}: every class name must be a plain text")
    if num_classes is not None and num_classes != len(names):
        raise ValueError(f"{where}: nc is {num_classes}, but there are {len(names)} names")
    names = tuple(str(name) for name in names)
    if len(set(names)) < len(names):
        twice = sorted(name for name, count in Counter(names).items() if count > 1)
        LOGGER.warning("%s: class names used more than once: %s", where, ", ".join(twice))
    return names


def _names_from_mapping(names: Mapping[Any, Any], where: str) -> list[Any]:
    """`{0: a, 1: b}` -> `[a, b]`; the indices must be 0, 1, 2, ... without gaps."""
    try:
        by_index = {int(index): name for index, name in names.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{where}: the keys of names must be class indices") from error
    absent = [index for index in range(len(names)) if index not in by_index]
    if absent:
        raise ValueError(f"{where}: names has {len(names)} entries but no class {absent[0]}")
    return [by_index[index] for index in range(len(names))]


def _base_folders(folder: object, source: Path, root: Path) -> tuple[Path, ...]:
    """Folders the splits may be relative to: of the project, of the yaml."""
    if folder is not None and not isinstance(folder, str):
        raise ValueError(f"{locate_key(source, 'path')}: path = {folder!r}: expected a folder")
    relative = _as_path(folder or "", "path", source)
    bases = [_normal(root.absolute() / relative), _normal(source.parent / relative)]
    return tuple(dict.fromkeys(bases))


def _most_complete_first(bases: Sequence[Path], entries: Sequence[str]) -> tuple[Path, ...]:
    """Sort folders by how many of the entries are there; equal ones keep their order."""

    def completeness(base: Path) -> tuple[int, bool]:
        return sum((base / expand_home(entry)).exists() for entry in entries), base.is_dir()

    return tuple(sorted(bases, key=completeness, reverse=True))


def _split_entries(values: Mapping[str, Any], split: str, source: Path) -> list[str]:
    entries = values.get(split)
    if entries is None or entries == "":
        return []
    entries = entries if isinstance(entries, list) else [entries]
    if not all(isinstance(entry, str) and entry for entry in entries):
        where = locate_key(source, split)
        raise ValueError(f"{where}: {split} must be a folder, a .txt list, or a list of those")
    for entry in entries:
        _as_path(entry, split, source)
    return entries


def _as_path(text: str, key: str, source: Path) -> Path:
    """The path that a yaml gives, if a path can be so.

    Raises:
        ValueError: names file, line and key.
    """
    path = expand_home(text)
    try:
        is_possible = "\0" not in text and all(len(os.fsencode(part)) < 256 for part in path.parts)
    except UnicodeEncodeError:
        is_possible = False
    if not is_possible:
        where = locate_key(source, key)
        raise ValueError(f"{where}: {key} = {text[:60]!r}: no file or folder can have this name")
    return path


def _resolve_split(
    entry: str, bases: Sequence[Path], only_first: bool, tried: dict[Path, tuple[Path, ...]]
) -> Path:
    """Where a split is, or would be; adds to `tried` where it might have been."""
    relative = expand_home(entry)
    candidates = tuple(dict.fromkeys(_normal(base / relative) for base in bases))
    eligible = candidates[:1] if only_first else candidates
    chosen = next((path for path in eligible if path.exists()), candidates[0])
    tried[chosen] = candidates
    return chosen


def _normal(path: Path) -> Path:
    """Absolute and without `..`, as text: links are kept, so labels lie where users see them."""
    parts: list[str] = []
    for part in path.absolute().parts:
        if part == ".." and len(parts) > 1:
            parts.pop()
        elif part != "..":
            parts.append(part)
    return Path(*parts)
