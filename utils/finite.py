"""Finding numbers that are not finite before they are learnt or saved, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils import ranks
from utils.dataset import Batch
from utils.plots.figures import draw
from utils.plots.images import plot_batch
from utils.run_dir import write_text_atomic


class Reading(NamedTuple):
    """What must be finite: a scalar on the device, and the batch that it belongs to."""

    what: str
    value: Tensor
    number: int  # of the batch within its epoch


class NotFinite(FloatingPointError):
    """A figure of the batch of this number is not finite."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.number = number


def check_finite(unread: list[Reading], epoch: int) -> None:
    """Stop at the first of these figures that is not finite, and forget them; waits for the device.

    Of several processes all stop if one has such a figure, and say the same.

    Args:
        unread: in all processes of the same batches.
        epoch: the current one.

    Raises:
        NotFinite: one is not. The network and its average are not to be saved.
    """
    values = torch.stack([reading.value for reading in unread]).tolist() if unread else []
    bad = next(((i, value) for i, value in enumerate(values) if not math.isfinite(value)), None)
    if unread and ranks.is_true_anywhere(bad is not None, unread[0].value.device):
        found = [one for one in ranks.share(bad) if one is not None]
        index, value = min(found, key=lambda one: one[0])
        what, _, number = unread[index]
        raise NotFinite(f"{what} is {value} in epoch {epoch}, batch {number}", number)
    unread.clear()


def first_not_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a value that is not finite; waits for the device once."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floats:
        return None
    is_finite = torch.stack([tensor.isfinite().all() for tensor in floats.values()]).tolist()
    return next((name for name, good in zip(floats, is_finite, strict=True) if not good), None)


def first_layer_not_finite(network: nn.Module, forward: Callable[[], object]) -> str | None:
    """The first layer, in the order of the computation, whose output is not finite.

    Args:
        network: what is looked at.
        forward: sends a batch through it. Statistics of batch norms take it in.
    """
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name)

        return hook

    leaves = [(name, m) for name, m in network.named_modules() if not any(m.children())]
    hooks = [module.register_forward_hook(look(name)) for name, module in leaves]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def are_of_one_colour(images: Tensor) -> bool:
    """Whether each of the images [B, 3, H, W] is.

    Batch norms of a fresh network then divide by the root of their eps alone, as all that they see
    is 0. So gradients grow 32-fold in each layer, and beyond all numbers in some 30 of them.
    """
    pixels = images.flatten(2)
    return bool((pixels == pixels[..., :1]).all())


def save_for_a_look(
    run_dir: Path, batch: Batch, epoch: int, number: int, names: tuple[str, ...]
) -> Path:
    """Write the batch as a picture with its labels, and the list of its files beside it."""
    picture = run_dir / f"nan_batch_{epoch}_{number}.jpg"
    draw(plot_batch, batch.images, batch.targets, batch.paths, names, picture)
    write_text_atomic(picture.with_suffix(".txt"), "".join(f"{path}\n" for path in batch.paths))
    return picture
