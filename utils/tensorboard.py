"""What `train.py --tensorboard` shows: figures, gamma histograms, pictures, the graph.

TensorBoard is optional: nothing else imports it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor, nn

from utils.image_files import read_image

MAX_PICTURE_SIDE = 1280  # px: event files keep every picture


def load_writer() -> Any:
    """The class that writes event files.

    Raises:
        ValueError: tensorboard is not installed, or in a state that cannot be used.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(
            "--tensorboard needs the package tensorboard: pip install tensorboard"
        ) from None
    return SummaryWriter


class Board:
    """Event files in a run folder: `tensorboard --logdir runs/train`."""

    def __init__(self, folder: Path, first_epoch: int = 0) -> None:
        """Start or continue; what an earlier part wrote of later epochs is hidden.

        Raises:
            ValueError: tensorboard is not installed.
        """
        self._writer = load_writer()(str(folder), purge_step=first_epoch or None)

    def add_figures(self, figures: Mapping[str, float], epoch: int) -> None:
        """Scalars by tag, as the columns of `results.csv`."""
        for tag, value in figures.items():
            self._writer.add_scalar(tag, value, epoch)
        self._writer.flush()

    def add_gammas(self, gammas: Mapping[str, Tensor], epoch: int) -> None:
        """Histograms of |gamma| by layer."""
        for layer, gamma in gammas.items():
            self._writer.add_histogram(f"abs_gamma/{layer}", gamma.detach().abs().cpu(), epoch)

    def add_pictures(self, paths: Iterable[Path], epoch: int) -> None:
        """Picture files, by their names; those that are not there are passed over."""
        for path in paths:
            if path.is_file():
                image = read_image(path)
                factor = min(MAX_PICTURE_SIDE / max(image.shape[:2]), 1.0)
                image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
                self._writer.add_image(path.stem, image[..., ::-1].copy(), epoch, dataformats="HWC")

    def add_graph(self, model: nn.Module, imgsz: int) -> None:
        """The graph of a network, in eval mode, for one square image."""
        device = next(model.parameters()).device
        was_training = model.training
        try:
            image = torch.zeros(1, 3, imgsz, imgsz, device=device)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # tracing is deprecated, but TensorBoard's way
                self._writer.add_graph(model.eval(), image, use_strict_trace=False)
        finally:
            model.train(was_training)

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
