"""The images of a training: found, checked, and loaded in batches."""

from __future__ import annotations

import argparse
import platform
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from utils import device as devices
from utils import ranks
from utils.config import DatasetSpec, Hyperparameters
from utils.dataset import RECT_PAD, DetectionDataset, Loader, Split, build_loader, scan_split


def scan_splits(data: DatasetSpec, options: argparse.Namespace) -> tuple[Split, Split]:
    """Find and check images and labels of both splits."""
    train_split, val_split = (
        scan_split(sources, data.names, single_cls=options.single_cls)
        for sources in (data.train, data.val)
    )
    return train_split, val_split


def check_images_are_here(*splits: Split) -> None:
    """Stop on a machine that does not have what the first process has found on its own."""
    for path in (split.paths[0] for split in splits):
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"{path}: not on {platform.node()}; all machines must have the images under the "
                "same path"
            )


def build_loaders(
    options: argparse.Namespace,
    hyp: Hyperparameters,
    train_split: Split,
    val_split: Split,
    imgsz: int,
    stride: int,
) -> tuple[Loader, Loader]:
    """Augmented training batches and plain validation batches, of each the part of this process."""
    share = options.batch_size // devices.world_size()
    place: dict[str, Any] = {"rank": devices.rank(), "world_size": devices.world_size()}
    device = devices.select_device(options.device)
    workers = devices.count_loader_processes(options.workers, device)
    sizes = {"imgsz": imgsz, "stride": stride, "cache": options.cache, "seed": options.seed}
    # A cache on a disk is written once.
    with ranks.in_turn() if options.cache == "disk" else nullcontext():
        train_set = DetectionDataset(
            train_split, hyp=hyp, rect=options.rect, batch_size=options.batch_size, **sizes
        )
        val_set = DetectionDataset(
            val_split, rect=True, batch_size=options.batch_size * 2, pad=RECT_PAD, **sizes
        )
    train_loader = build_loader(
        train_set, share, workers=workers, shuffle=True, seed=options.seed, **place
    )
    val_loader = build_loader(val_set, share * 2, workers=workers, shuffle=False, seed=0, **place)
    return train_loader, val_loader
