"""The detection head: logits per level, decoded to boxes in eval mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn


class Detect(nn.Module):
    """One 1x1 convolution a level; `A` anchors a cell, `5 + K` numbers an anchor."""

    anchors: Tensor
    strides: Tensor

    def __init__(
        self,
        in_channels: Sequence[int],
        num_classes: int,
        anchors: Sequence[Sequence[float]],
        strides: Sequence[float],
    ) -> None:
        """`anchors`: per level w, h, w, h, ... in input pixels; `strides`: input pixels a cell."""
        super().__init__()
        self.num_classes = num_classes
        self.num_outputs = num_classes + 5
        strides_column = torch.tensor(strides, dtype=torch.float32)
        # [L, A, 2] in grid units (pixels / stride), the form public checkpoints hold.
        anchors_px = torch.tensor(anchors, dtype=torch.float32).view(len(strides), -1, 2)
        self.register_buffer("anchors", anchors_px / strides_column.view(-1, 1, 1))
        self.register_buffer("strides", strides_column, persistent=False)
        self.num_anchors = anchors_px.shape[1]
        self.m = nn.ModuleList(
            nn.Conv2d(channels, self.num_outputs * self.num_anchors, 1) for channels in in_channels
        )
        self._reset_bias(strides)

    @property
    def anchors_px(self) -> Tensor:
        """Anchors `[L, A, 2]`, width and height in input pixels."""
        return self.anchors * self.strides.view(-1, 1, 1)

    @torch.no_grad()
    def _reset_bias(self, strides: Sequence[float]) -> None:
        """Start from rare objects: about 8 in a 640-pixel image, classes at 0.6 / K.

        Reference: Lin et al. 2017, Focal Loss, arXiv:1708.02002, section 3.3.
        """
        for conv, stride in zip(self.m, strides, strict=True):
            bias = cast(Tensor, conv.bias).view(self.num_anchors, -1)
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] += math.log(0.6 / (self.num_classes - 0.99999))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Logits `[B, A, H, W, 5+K]` per level; in eval mode `(predictions, logits)`."""
        logits = []
        for conv, feature in zip(self.m, features, strict=True):
            y = conv(feature)
            batch, _, height, width = y.shape
            y = y.view(batch, self.num_anchors, self.num_outputs, height, width)
            logits.append(y.permute(0, 1, 3, 4, 2))
        return logits if self.training else (self.decode(logits), logits)

    def decode(self, logits: Sequence[Tensor], cells: Sequence[Tensor] = ()) -> Tensor:
        """Turn logits into predictions `[B, N, 5+K]`: cx, cy, w, h in input pixels, scores 0-1.

        Computed in float32 at least: half precision cannot hold a box corner to the pixel.

        Args:
            logits: per level `[B, A, H, W, 5+K]`.
            cells: per level what `cells` gives, where they are constants of a graph.
        """
        decoded = []
        for level, level_logits in enumerate(logits):
            dtype = torch.promote_types(level_logits.dtype, torch.float32)
            y = level_logits.to(dtype).sigmoid()
            stride = self.strides[level].to(dtype)
            anchors_px = self.anchors[level].to(dtype).view(1, -1, 1, 1, 2) * stride
            if cells:
                level_cells = cells[level]
            else:
                level_cells = self.cells(y.shape[2], y.shape[3], dtype, y.device)
            centres = (y[..., 0:2] * 2 - 0.5 + level_cells) * stride
            sizes = (y[..., 2:4] * 2) ** 2 * anchors_px
            y = torch.cat((centres, sizes, y[..., 4:]), -1)
            decoded.append(y.flatten(1, 3))
        return torch.cat(decoded, 1)

    @staticmethod
    def cells(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Column and row of each cell, `[H, W, 2]`; made anew, so no stale shape is kept."""
        rows, columns = torch.meshgrid(
            torch.arange(height, dtype=dtype, device=device),
            torch.arange(width, dtype=dtype, device=device),
            indexing="ij",
        )
        return torch.stack((columns, rows), -1)
