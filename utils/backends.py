"""A stand-in for .pt files alone, until the other formats come."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from utils.checkpoint import load_detector


class Network(nn.Module):
    """A detector in any format: images in, predictions out."""

    names: tuple[str, ...]  # classes
    stride: int  # input sides are multiples of it
    imgsz_hw: tuple[int, int] | None  # the only input size; None: any multiple of the stride
    batch_size: int | None  # images its runtime takes at once; None: any
    precision: torch.dtype  # of the images it takes
    format: str
    has_nms: bool = False  # gives detections [B, M, 6], rows of padding with confidence 0

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Images `[B, 3, H, W]`, RGB in 0-1 -> predictions `[B, N, 5+K]`, logits."""
        raise NotImplementedError


class PytorchNetwork(Network):
    """A checkpoint, with folded batch normalisation."""

    format = "pytorch"

    def __init__(self, path: Path, device: torch.device, half: bool = False) -> None:
        super().__init__()
        detector = load_detector(path, device)
        self.precision = torch.float16 if half else torch.float32
        self.model = detector.model.fuse().to(self.precision)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.names, self.stride = detector.names, detector.model.max_stride
        self.imgsz_hw = self.batch_size = None
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See `Network.forward`."""
        return self.model(images)


def load_network(path: str | Path, device: torch.device, *, half: bool = False) -> Network:
    """Open a network, ready for inference."""
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such weights file")
    return PytorchNetwork(path, device, half)
