"""From a spec to a network: parsing of rows, routing between them, folding of BN."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from models.blocks import C3, SPP, SPPF, Bottleneck, Concat, Conv
from models.head import Detect
from models.spec import ModelSpec, Row

# Far beyond any detector: what is larger would fill the memory or never end, and is a mistake or
# an attack. (yolov5x6 has 140 million weights, 300 convolutions and strides up to 64.)
MAX_WEIGHTS = 1 << 29  # of all convolutions
MAX_CONVS = 10_000
MAX_REPEATS = 1000  # of one row
MAX_CHANNELS = 1 << 16
MAX_KERNEL = 99
LEAST_STRIDE, MAX_STRIDE = Fraction(1, 4), 512  # input pixels a cell


class Feature(NamedTuple):
    """Output of a row while the network is being built."""

    design: int  # channels by the multiples alone: decides where shortcuts are
    width: int  # channels there really are
    stride: Fraction  # input pixels a cell


class Model(nn.Module):
    """A YOLOv5 v6 detector; `model` is the sequence of rows, its last row the head.

    `routes` holds for each row the absolute numbers of the rows it reads, -1 for the image. Sides
    of the input must be multiples of `max_stride` pixels: the coarsest tensor may be one that the
    head does not read itself.
    """

    model: nn.Sequential
    routes: tuple[tuple[int, ...], ...]
    max_stride: int

    def __init__(self, spec: ModelSpec, max_weights: int = MAX_WEIGHTS) -> None:
        """Build the network with fresh weights; `max_weights` is where it stops before.

        Raises:
            ValueError: naming the file, the row and what is wrong in it.
        """
        super().__init__()
        builder = _Builder(spec, max_weights)
        self.model = nn.Sequential(*builder.build())
        self.routes = tuple(builder.routes)
        self.max_stride = math.ceil(max(feature.stride for feature in builder.features))
        if isinstance(spec.anchors, int):
            spec = spec.with_anchors(self.head.anchors_px.flatten(1).tolist())
        self.spec = spec
        self._kept = {source for sources in self.routes for source in sources}

    @property
    def head(self) -> Detect:
        """The detection head."""
        return cast(Detect, self.model[-1])

    def forward(self, x: Tensor) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Detect in images `[B, 3, H, W]`, RGB in 0-1, sides multiples of `max_stride`.

        Returns:
            Training mode: logits, per level `[B, A, H, W, 5+K]`.
            Eval mode: `(predictions, logits)`, predictions `[B, N, 5+K]` as `Detect.decode` says.
        """
        outputs = {-1: x}
        for index, (row, sources) in enumerate(zip(self.model, self.routes, strict=True)):
            inputs = [outputs[source] for source in sources]
            y = row(inputs if isinstance(row, (Concat, Detect)) else inputs[0])
            if index in self._kept:
                outputs[index] = y
        return y

    def fuse(self) -> Model:
        """Fold every batch normalisation into its convolution, in place; for inference only."""
        for module in self.modules():
            if isinstance(module, Conv):
                module.fuse()
        return self

    def widths(self) -> dict[str, int]:
        """Output channels of every Conv block by module path, the form of `ModelSpec.widths`."""
        return {
            name.removeprefix("model."): module.conv.out_channels
            for name, module in self.named_modules()
            if isinstance(module, Conv)
        }

    @torch.no_grad()
    def set_anchors(self, anchors_px: Tensor) -> None:
        """Replace the anchors, `[L, A, 2]` in input pixels, in the head and in the spec."""
        head = self.head
        head.anchors.copy_(anchors_px.to(head.anchors.device) / head.strides.view(-1, 1, 1))
        self.spec = self.spec.with_anchors(anchors_px.flatten(1).tolist())


class _Builder:
    """Turns the rows of one spec into modules, in order."""

    def __init__(self, spec: ModelSpec, max_weights: int) -> None:
        self.spec, self.max_weights = spec, min(max_weights, MAX_WEIGHTS)
        self.features: list[Feature] = []
        self.routes: list[tuple[int, ...]] = []
        self.used_widths: set[str] = set()
        self.num_weights = 0

    def build(self) -> list[nn.Module]:
        modules = []
        for index, row in enumerate(self.spec.rows):
            if (row.module == "Detect") != (index == len(self.spec.rows) - 1):
                raise ValueError(
                    f"{row.label}: Detect must be the last row, and the last row Detect"
                )
            try:
                modules.append(self._build_row(index, row))
            except ValueError as error:
                raise ValueError(f"{row.label}: {error}") from None
        unused = set(self.spec.widths) - self.used_widths
        if unused:
            raise ValueError(
                f"{self.spec.source}: widths: no convolution is called {sorted(unused)[0]!r}"
            )
        return modules

    def _build_row(self, index: int, row: Row) -> nn.Module:
        build = _BUILDERS.get(row.module)
        if build is None:
            near = difflib.get_close_matches(row.module, _BUILDERS, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"unknown module {row.module!r}; {hint}known modules: {', '.join(_BUILDERS)}"
            )
        sources = [index + s if s < 0 else s for s in row.sources]
        if any(not -1 <= s < index for s in sources) or (index > 0 and -1 in sources):
            raise ValueError(f"'from' {list(row.sources)} must point at earlier rows")
        image = Feature(3, 3, Fraction(1))
        inputs = [self.features[s] if s >= 0 else image for s in sources]
        if len(inputs) > 1 and row.module not in ("Concat", "Detect"):
            raise ValueError(f"{row.module} takes one input, 'from' names {len(inputs)}")
        number = row.number
        if number > 1:
            number = max(round(number * self.spec.depth_multiple), 1)
        if number > MAX_REPEATS:
            raise ValueError(f"repeated {number} times; at most {MAX_REPEATS} make sense")
        self.routes.append(tuple(sources))
        return self._build_modules(build, str(index), inputs, number, row)

    def _build_modules(
        self, build: Callable, path: str, inputs: list[Feature], number: int, row: Row
    ) -> nn.Module:
        """One module, or a sequence of `number`; C3 takes the number inside."""
        _check_arguments(build, row)
        if row.module == "C3":
            module, feature = build(self, path, inputs, number, *row.args)
        elif number == 1:
            module, feature = build(self, path, inputs, *row.args)
        elif row.module in ("Concat", "Detect"):
            raise ValueError(f"{row.module} cannot be repeated, but 'number' is {row.number}")
        else:
            parts = []
            for part in range(number):
                module, feature = build(self, f"{path}.{part}", inputs, *row.args)
                parts.append(module)
                inputs = [feature]
            module = nn.Sequential(*parts)
        if feature.width > MAX_CHANNELS:
            raise ValueError(f"gives {feature.width} channels; at most {MAX_CHANNELS} make sense")
        if not LEAST_STRIDE <= feature.stride <= MAX_STRIDE:
            raise ValueError(
                f"gives one cell for {feature.stride} pixels; only {LEAST_STRIDE} to {MAX_STRIDE} "
                "make sense"
            )
        self.features.append(feature)
        return module

    def width(self, path: str, design: int, in_channels: int, kernel: int = 1) -> int:
        """Channels of the convolution at `path`: explicit, or `design` by the multiples."""
        self.used_widths.add(path)
        width = self.spec.widths.get(path, design)
        self.claim(in_channels, width, kernel)
        return width

    def claim(self, in_channels: int, out_channels: int, kernel: int = 1) -> None:
        """Count a convolution before it takes memory.

        Raises:
            ValueError: there are too many of them, or of their weights.
        """
        self.num_weights += in_channels * out_channels * kernel**2
        if self.num_weights > self.max_weights or len(self.used_widths) > MAX_CONVS:
            raise ValueError(
                f"up to here the network has {self.num_weights} weights in "
                f"{len(self.used_widths)} convolutions; the limit is {self.max_weights} in "
                f"{MAX_CONVS}"
            )

    def scaled(self, channels: Any) -> int:
        """A channel argument times width_multiple, rounded up to a multiple of 8."""
        channels = _positive("channels", channels, most=MAX_CHANNELS)
        return math.ceil(channels * self.spec.width_multiple / 8) * 8

    # One method a module name: (path, inputs, [number,] *yaml arguments) -> module, its output.

    def conv(
        self, path: str, inputs: list[Feature], channels: Any, kernel: Any = 1, stride: Any = 1,
        padding: Any = None,
    ) -> tuple[nn.Module, Feature]:  # fmt: skip
        (x,), design = inputs, self.scaled(channels)
        kernel, stride = _positive("kernel", kernel), _positive("stride", stride)
        padding = None if _is_none(padding) else _positive("padding", padding, minimum=0)
        width = self.width(path, design, x.width, kernel)
        module = Conv(x.width, width, kernel, stride, padding, self.spec.activation)
        return module, Feature(design, width, x.stride * stride)

    def bottleneck(
        self, path: str, inputs: list[Feature], channels: Any, shortcut: Any = True
    ) -> tuple[nn.Module, Feature]:
        (x,), design = inputs, self.scaled(channels)
        inner = self.width(f"{path}.cv1", design // 2, x.width)
        outer = self.width(f"{path}.cv2", design, inner, 3)
        add = _flag("shortcut", shortcut) and x.design == design
        module = Bottleneck(x.width, inner, outer, add, self.spec.activation)
        return module, Feature(design, outer, x.stride)

    def c3(
        self, path: str, inputs: list[Feature], number: int, channels: Any, shortcut: Any = True
    ) -> tuple[nn.Module, Feature]:
        (x,), design = inputs, self.scaled(channels)
        hidden = design // 2
        cv1, cv2 = (self.width(f"{path}.{part}", hidden, x.width) for part in ("cv1", "cv2"))
        inner, last = [], cv1
        for n in range(number):
            first = self.width(f"{path}.m.{n}.cv1", hidden, last)
            last = self.width(f"{path}.m.{n}.cv2", hidden, first, 3)
            inner.append((first, last))
        cv3 = self.width(f"{path}.cv3", design, last + cv2)
        shortcut = _flag("shortcut", shortcut)
        module = C3(x.width, cv1, cv2, cv3, inner, shortcut, self.spec.activation)
        return module, Feature(design, cv3, x.stride)

    def sppf(
        self, path: str, inputs: list[Feature], channels: Any, kernel: Any = 5
    ) -> tuple[nn.Module, Feature]:
        (x,), design = inputs, self.scaled(channels)
        cv1 = self.width(f"{path}.cv1", x.design // 2, x.width)
        cv2 = self.width(f"{path}.cv2", design, cv1 * 4)
        module = SPPF(x.width, cv1, cv2, _odd("kernel", kernel), self.spec.activation)
        return module, Feature(design, cv2, x.stride)

    def spp(
        self, path: str, inputs: list[Feature], channels: Any, kernels: Any = (5, 9, 13)
    ) -> tuple[nn.Module, Feature]:
        (x,), design = inputs, self.scaled(channels)
        if not isinstance(kernels, (list, tuple)) or not 1 <= len(kernels) <= 16:
            raise ValueError(f"kernels is {kernels!r}, expected a list of 1 to 16 odd numbers")
        cv1 = self.width(f"{path}.cv1", x.design // 2, x.width)
        cv2 = self.width(f"{path}.cv2", design, cv1 * (len(kernels) + 1))
        sizes = [_odd("kernels", kernel) for kernel in kernels]
        return SPP(x.width, cv1, cv2, sizes, self.spec.activation), Feature(design, cv2, x.stride)

    def upsample(
        self, path: str, inputs: list[Feature], size: Any, scale: Any, mode: Any = "nearest"
    ) -> tuple[nn.Module, Feature]:
        if not _is_none(size):
            raise ValueError(f"size is {size!r}; only a scale can be given, size must be None")
        if mode not in ("nearest", "bilinear"):
            raise ValueError(f"mode is {mode!r}, expected nearest or bilinear")
        scale = _positive("scale", scale)
        (x,) = inputs
        return nn.Upsample(scale_factor=scale, mode=mode), x._replace(stride=x.stride / scale)

    def max_pool(
        self, path: str, inputs: list[Feature], kernel: Any, stride: Any = None, padding: Any = 0
    ) -> tuple[nn.Module, Feature]:
        kernel = _positive("kernel", kernel)
        stride = kernel if _is_none(stride) else _positive("stride", stride)
        padding = _positive("padding", padding, minimum=0)
        (x,) = inputs
        return nn.MaxPool2d(kernel, stride, padding), x._replace(stride=x.stride * stride)

    def concat(
        self, path: str, inputs: list[Feature], dimension: Any = 1
    ) -> tuple[nn.Module, Feature]:
        if dimension != 1:
            raise ValueError(f"the dimension is {dimension!r}, only 1 (channels) is supported")
        if len({x.stride for x in inputs}) > 1:
            strides = ", ".join(str(x.stride) for x in inputs)
            raise ValueError(f"inputs have different strides ({strides}) and cannot be joined")
        design, width = sum(x.design for x in inputs), sum(x.width for x in inputs)
        return Concat(), Feature(design, width, inputs[0].stride)

    def detect(
        self, path: str, inputs: list[Feature], num_classes: Any = "nc", anchors: Any = "anchors"
    ) -> tuple[nn.Module, Feature]:
        if (num_classes, anchors) != ("nc", "anchors"):
            raise ValueError("the arguments must be [nc, anchors], set by the keys of these names")
        strides = [float(x.stride) for x in inputs]
        anchors_px = self.spec.anchors
        if isinstance(anchors_px, int):  # placeholders, to be fitted to the data
            sizes = [2 ** (n / anchors_px) for n in range(anchors_px)]
            anchors_px = tuple(tuple(2 * s * f for f in sizes for _ in "wh") for s in strides)
        if len(anchors_px) != len(inputs):
            raise ValueError(f"{len(inputs)} levels, but anchors for {len(anchors_px)}")
        widths = [x.width for x in inputs]
        for width in widths:
            self.claim(width, (5 + self.spec.num_classes) * (len(anchors_px[0]) // 2))
        return Detect(widths, self.spec.num_classes, anchors_px, strides), inputs[0]


_BUILDERS: dict[str, Callable] = {
    "Conv": _Builder.conv,
    "Bottleneck": _Builder.bottleneck,
    "C3": _Builder.c3,
    "SPP": _Builder.spp,
    "SPPF": _Builder.sppf,
    "nn.Upsample": _Builder.upsample,
    "nn.MaxPool2d": _Builder.max_pool,
    "Concat": _Builder.concat,
    "Detect": _Builder.detect,
}


def _check_arguments(build: Callable, row: Row) -> None:
    """Refuse too few or too many yaml arguments, naming those the module has."""
    own = ("self", "path", "inputs", "number")
    parameters = [p for p in inspect.signature(build).parameters.values() if p.name not in own]
    needed = sum(p.default is inspect.Parameter.empty for p in parameters)
    if not needed <= len(row.args) <= len(parameters):
        names = ", ".join(p.name for p in parameters)
        raise ValueError(
            f"{row.module} takes {needed} to {len(parameters)} arguments ({names}), "
            f"found {len(row.args)}: {list(row.args)}"
        )


def _is_none(value: Any) -> bool:
    return value is None or value == "None"  # yaml has no word None: `[None, 2]` holds a string


def _positive(name: str, value: Any, minimum: int = 1, most: int = MAX_KERNEL) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= most:
        raise ValueError(f"{name} is {value!r}, expected a whole number from {minimum} to {most}")
    return value


def _odd(name: str, value: Any) -> int:
    if _positive(name, value) % 2 == 0:
        raise ValueError(f"{name} is {value!r}, expected an odd number")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected true or false")
    return value
