"""The building blocks of a YOLOv5 v6 network; every width is an explicit argument.

A block never derives one width from another, so that a pruned network is the same class with other
numbers. Tensors are `[B, C, H, W]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

BN_EPS = 1e-3
BN_MOMENTUM = 0.03
BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)  # the second over several processes

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "SiLU": nn.SiLU,
    "ReLU": nn.ReLU,
    "ReLU6": nn.ReLU6,
    "LeakyReLU": nn.LeakyReLU,
    "Hardswish": nn.Hardswish,
    "Mish": nn.Mish,
    "Identity": nn.Identity,
}


class Conv(nn.Module):
    """Convolution without bias, batch normalisation, activation."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 1,
        stride: int = 1,
        padding: int | None = None,
        activation: str = "SiLU",
    ) -> None:
        """`padding` None keeps the size at stride 1 for odd kernels (kernel // 2)."""
        super().__init__()
        padding = kernel // 2 if padding is None else padding
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=BN_EPS, momentum=BN_MOMENTUM)
        self.act: Any = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in_channels, H, W]` to `[B, out_channels, H', W']`."""
        return self.act(self.bn(self.conv(x)))

    def fuse(self) -> None:
        """Fold the batch normalisation into the convolution (inference only, not reversible)."""
        if isinstance(self.bn, BATCH_NORMS):
            # Folding reads the running statistics, which is what eval mode stands for.
            self.conv = fuse_conv_bn_eval(self.conv.eval(), self.bn.eval())
            self.add_module("bn", nn.Identity())
            if hasattr(self.act, "inplace"):
                self.act.inplace = True  # nothing else reads what the convolution gives


class Bottleneck(nn.Module):
    """1x1 convolution, 3x3 convolution and, with `add`, the input on top (shortcut)."""

    def __init__(
        self, in_channels: int, cv1_width: int, cv2_width: int, add: bool, activation: str = "SiLU"
    ) -> None:
        """With `add`, `cv2_width` must equal `in_channels`."""
        super().__init__()
        if add and cv2_width != in_channels:
            raise ValueError(
                f"a shortcut adds {in_channels} input channels to {cv2_width} output channels; "
                "the two widths must be equal"
            )
        self.cv1 = Conv(in_channels, cv1_width, 1, activation=activation)
        self.cv2 = Conv(cv1_width, cv2_width, 3, activation=activation)
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in_channels, H, W]` to `[B, cv2_width, H, W]`."""
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C3(nn.Module):
    """Two 1x1 branches, one of them through bottlenecks, concatenated and mixed by a third 1x1."""

    def __init__(
        self,
        in_channels: int,
        cv1_width: int,
        cv2_width: int,
        cv3_width: int,
        bottleneck_widths: Sequence[tuple[int, int]],
        shortcut: bool = True,
        activation: str = "SiLU",
    ) -> None:
        """`bottleneck_widths` holds (cv1, cv2) for each bottleneck of the deep branch."""
        super().__init__()
        bottlenecks, width = [], cv1_width
        for inner, outer in bottleneck_widths:
            bottlenecks.append(Bottleneck(width, inner, outer, shortcut, activation))
            width = outer
        self.cv1 = Conv(in_channels, cv1_width, 1, activation=activation)
        self.cv2 = Conv(in_channels, cv2_width, 1, activation=activation)
        self.cv3 = Conv(width + cv2_width, cv3_width, 1, activation=activation)
        self.m = nn.Sequential(*bottlenecks)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in_channels, H, W]` to `[B, cv3_width, H, W]`."""
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class SPP(nn.Module):
    """Spatial pyramid pooling: the input beside its max-pools of several kernel sizes."""

    def __init__(
        self,
        in_channels: int,
        cv1_width: int,
        cv2_width: int,
        kernels: Sequence[int] = (5, 9, 13),
        activation: str = "SiLU",
    ) -> None:
        """All `kernels` must be odd, so that pooling keeps the size."""
        super().__init__()
        self.cv1 = Conv(in_channels, cv1_width, 1, activation=activation)
        self.cv2 = Conv(cv1_width * (len(kernels) + 1), cv2_width, 1, activation=activation)
        self.m = nn.ModuleList(nn.MaxPool2d(k, stride=1, padding=k // 2) for k in kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in_channels, H, W]` to `[B, cv2_width, H, W]`."""
        x = self.cv1(x)
        return self.cv2(torch.cat((x, *(pool(x) for pool in self.m)), 1))


class SPPF(nn.Module):
    """SPP with one kernel applied three times in a row: the same windows at less cost."""

    def __init__(
        self,
        in_channels: int,
        cv1_width: int,
        cv2_width: int,
        kernel: int = 5,
        activation: str = "SiLU",
    ) -> None:
        """`kernel` must be odd."""
        super().__init__()
        self.cv1 = Conv(in_channels, cv1_width, 1, activation=activation)
        self.cv2 = Conv(cv1_width * 4, cv2_width, 1, activation=activation)
        self.m = nn.MaxPool2d(kernel, stride=1, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, in_channels, H, W]` to `[B, cv2_width, H, W]`."""
        levels = [self.cv1(x)]
        for _ in range(3):
            levels.append(self.m(levels[-1]))
        return self.cv2(torch.cat(levels, 1))


class Concat(nn.Module):
    """Concatenate several inputs along the channels."""

    def forward(self, x: Sequence[Tensor]) -> Tensor:
        """Map tensors `[B, C_i, H, W]` to `[B, sum C_i, H, W]`."""
        return torch.cat(tuple(x), 1)
