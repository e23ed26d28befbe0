"""Which convolution outputs, batch norms and consumer inputs are tied: the only topology knowledge.

The rows of a network are walked once with symbolic tensors: a tensor is a tuple of segments, each
some channels that stand or fall together. Concat puts tuples in a row, upsampling and pooling pass
them on, a shortcut makes the segments of its two sides the same. What is left are the channel
groups and, per convolution, the layout of its inputs and outputs in segments of these groups.

Paths are those of `ModelSpec.widths`: below `model.`, as in `2.m.0.cv1`.

Reference: the rules are those of Liu et al. 2017, Network Slimming, arXiv:1708.06519, and of
Fang et al. 2023, DepGraph, arXiv:2301.12900, for the blocks of YOLOv5 v6.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

from torch import nn

from models.blocks import C3, SPP, SPPF, Bottleneck, Concat, Conv
from models.head import Detect
from models.yolo import Model
from utils.choices import SHORTCUT_RULES

IMAGE = "image"  # the group of the three input channels


class Segment(NamedTuple):
    """Neighbouring channels of a tensor that belong to one group, in the order of the group."""

    group: str
    size: int


Layout = tuple[Segment, ...]


class Term(NamedTuple):
    """The output of the Conv block at `path` is added into a tensor, from `first_channel` on."""

    path: str
    first_channel: int


@dataclasses.dataclass(frozen=True)
class ChannelGroup:
    """Channels that share one keep mask.

    The name is the path of the first producer, with the first channel where it is only a part of
    it (`4.cv2@8`). All producers write these channels; a path stands twice if it does so twice.
    """

    name: str
    producers: tuple[str, ...]
    num_channels: int
    prunable: bool


@dataclasses.dataclass(frozen=True)
class ChannelGroups:
    """All groups of a network by name, in the order of the network, and who uses them.

    `inputs` and `outputs` are given for every Conv block by its path; the convolutions of the head
    (`24.m.0`) have inputs alone, because their outputs mean something by position. `terms` says of
    the same inputs which outputs they are the sum of: several where a shortcut adds, at different
    channels where a concatenation puts them in a row; the image has none.
    """

    groups: Mapping[str, ChannelGroup]
    inputs: Mapping[str, Layout]
    outputs: Mapping[str, Layout]
    terms: Mapping[str, tuple[Term, ...]]

    @property
    def prunable(self) -> dict[str, ChannelGroup]:
        """The groups that may lose channels."""
        return {name: group for name, group in self.groups.items() if group.prunable}

    def is_prunable(self, path: str) -> bool:
        """Whether the Conv block at `path` may lose output channels."""
        return all(self.groups[segment.group].prunable for segment in self.outputs[path])


def find_channel_groups(model: Model, shortcut: str = "keep") -> ChannelGroups:
    """Find what is tied in a network of any width, pruned or not.

    Args:
        model: the network; it is only looked at.
        shortcut: one of `SHORTCUT_RULES`. With "keep" nothing in a bottleneck with a shortcut, and
            nothing its shortcut adds to, is prunable (of a C3 `cv1` and all of `m`).

    Raises:
        ValueError: unknown rule, or a module whose channels this file knows nothing about.
    """
    if shortcut not in SHORTCUT_RULES:
        raise ValueError(f"shortcut is {shortcut!r}, expected one of {', '.join(SHORTCUT_RULES)}")
    walk = _Walk(frozen_shortcuts=shortcut == "keep")
    image = _Tensor((walk.ties.new(3),), ())
    outputs: dict[int, _Tensor] = {-1: image}
    for index, row in enumerate(model.model):
        sources = [outputs[source] for source in model.routes[index]]
        outputs[index] = walk.visit(row, str(index), sources, model.spec.rows[index].label)
    return walk.result(image)


def conv_block(model: Model, path: str) -> Conv:
    """The Conv block at a path of `ChannelGroups.outputs`."""
    return cast(Conv, model.model.get_submodule(path))


_Segments = tuple[int, ...]  # handles of segments, see _Ties


class _Tensor(NamedTuple):
    """A tensor on its way through the network: what it consists of, and what was added up in it."""

    segments: _Segments
    terms: tuple[Term, ...]


class _Ties:
    """Segments with a size that can turn out to be the same, or to consist of smaller ones."""

    def __init__(self) -> None:
        self._sizes: list[int] = []
        self._parts: dict[int, _Segments] = {}  # one part: the same as; several: consists of

    def new(self, size: int) -> int:
        self._sizes.append(size)
        return len(self._sizes) - 1

    def size(self, segment: int) -> int:
        return self._sizes[segment]

    def resolve(self, segments: _Segments) -> _Segments:
        """The final segments these consist of."""
        resolved: list[int] = []
        for segment in segments:
            parts = self._parts.get(segment)
            resolved.extend((segment,) if parts is None else self.resolve(parts))
        return tuple(resolved)

    def tie(self, a: _Segments, b: _Segments) -> None:
        """Make two tensors of equal width channel by channel the same.

        Where their segments end at different channels the longer one is split; every step
        removes a difference or makes a segment smaller, so it ends.
        """
        while True:
            a, b = self.resolve(a), self.resolve(b)
            pair = next(((x, y) for x, y in zip(a, b, strict=False) if x != y), None)
            if pair is None:
                return
            short, long = sorted(pair, key=self.size)
            if self.size(short) == self.size(long):
                self._parts[max(pair)] = (min(pair),)
            else:
                rest = self.size(long) - self.size(short)
                self._parts[long] = (self.new(self.size(short)), self.new(rest))


class _Walk:
    """One pass over a network; collects who reads and writes which segments."""

    def __init__(self, frozen_shortcuts: bool) -> None:
        self.ties = _Ties()
        self.frozen_shortcuts = frozen_shortcuts
        self.inputs: dict[str, _Tensor] = {}
        self.outputs: dict[str, _Tensor] = {}
        self.frozen: list[_Segments] = []

    def visit(self, module: nn.Module, path: str, sources: list[_Tensor], where: str) -> _Tensor:
        """Follow `sources` through one row, or one part of a row."""
        if isinstance(module, nn.Sequential):
            for name, part in module.named_children():
                sources = [self.visit(part, f"{path}.{name}", sources, where)]
            return sources[0]
        visit = _VISITS.get(type(module))
        if visit is None:
            known = ", ".join(kind.__name__ for kind in _VISITS)
            raise ValueError(
                f"{where}: cannot tell which channels {type(module).__name__} (at {path}) ties; "
                f"known modules: {known}"
            )
        return visit(self, module, path, sources)

    def conv(self, module: Conv, path: str, sources: list[_Tensor]) -> _Tensor:
        (self.inputs[path],) = sources
        segments = (self.ties.new(module.conv.out_channels),)
        self.outputs[path] = _Tensor(segments, (Term(path, 0),))
        return self.outputs[path]

    def bottleneck(self, module: Bottleneck, path: str, sources: list[_Tensor]) -> _Tensor:
        inner = self.conv(module.cv1, f"{path}.cv1", sources)
        outer = self.conv(module.cv2, f"{path}.cv2", [inner])
        if not module.add:
            return outer
        (source,) = sources
        self.ties.tie(source.segments, outer.segments)
        if self.frozen_shortcuts:
            self.frozen += [inner.segments, outer.segments]
        return _Tensor(outer.segments, source.terms + outer.terms)

    def c3(self, module: C3, path: str, sources: list[_Tensor]) -> _Tensor:
        deep = self.conv(module.cv1, f"{path}.cv1", sources)
        flat = self.conv(module.cv2, f"{path}.cv2", sources)
        for name, part in module.m.named_children():
            deep = self.bottleneck(cast(Bottleneck, part), f"{path}.m.{name}", [deep])
        return self.conv(module.cv3, f"{path}.cv3", [self.in_a_row([deep, flat])])

    def spatial_pyramid(self, module: SPP | SPPF, path: str, sources: list[_Tensor]) -> _Tensor:
        level = self.conv(module.cv1, f"{path}.cv1", sources)
        num_levels = module.cv2.conv.in_channels // module.cv1.conv.out_channels
        return self.conv(module.cv2, f"{path}.cv2", [self.in_a_row([level] * num_levels)])

    def concat(self, module: Concat, path: str, sources: list[_Tensor]) -> _Tensor:
        return self.in_a_row(sources)

    def in_a_row(self, sources: list[_Tensor]) -> _Tensor:
        """Concatenate along the channels."""
        segments: list[int] = []
        terms: list[Term] = []
        for source in sources:
            shift = sum(self.ties.size(segment) for segment in segments)
            terms += [Term(term.path, term.first_channel + shift) for term in source.terms]
            segments += source.segments
        return _Tensor(tuple(segments), tuple(terms))

    def pass_on(self, module: nn.Module, path: str, sources: list[_Tensor]) -> _Tensor:
        return sources[0]

    def detect(self, module: Detect, path: str, sources: list[_Tensor]) -> _Tensor:
        for level, source in enumerate(sources):
            self.inputs[f"{path}.m.{level}"] = source
        return _Tensor((), ())

    def result(self, image: _Tensor) -> ChannelGroups:
        """Name the segments and give each the paths that write it."""
        fixed = image.segments
        frozen = {*fixed, *(s for part in self.frozen for s in self.ties.resolve(part))}
        names = dict.fromkeys(fixed, IMAGE)
        producers: dict[int, list[str]] = {segment: [] for segment in fixed}
        for path, tensor in self.outputs.items():
            first_channel = 0
            for segment in self.ties.resolve(tensor.segments):
                names.setdefault(segment, f"{path}@{first_channel}" if first_channel else path)
                producers.setdefault(segment, []).append(path)
                first_channel += self.ties.size(segment)
        groups = {
            name: ChannelGroup(
                name, tuple(producers[segment]), self.ties.size(segment), segment not in frozen
            )
            for segment, name in names.items()
        }

        def layout(tensor: _Tensor) -> Layout:
            segments = self.ties.resolve(tensor.segments)
            return tuple(Segment(names[s], self.ties.size(s)) for s in segments)

        return ChannelGroups(
            groups,
            {path: layout(tensor) for path, tensor in self.inputs.items()},
            {path: layout(tensor) for path, tensor in self.outputs.items()},
            {path: tensor.terms for path, tensor in self.inputs.items()},
        )


_VISITS: dict[type[nn.Module], Callable[..., _Tensor]] = {
    Conv: _Walk.conv,
    Bottleneck: _Walk.bottleneck,
    C3: _Walk.c3,
    SPP: _Walk.spatial_pyramid,
    SPPF: _Walk.spatial_pyramid,
    nn.Upsample: _Walk.pass_on,
    nn.MaxPool2d: _Walk.pass_on,
    Concat: _Walk.concat,
    Detect: _Walk.detect,
}
