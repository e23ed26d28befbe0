"""The YOLOv5 v6 loss: which anchors answer for which boxes, and what wrong answers cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from utils.boxes import paired_iou

# Weight of a level's objectness term: small objects, many cells, little signal per cell.
LEVEL_BALANCE = {3: (4.0, 1.0, 0.4)}
LEVEL_BALANCE_OTHER = (4.0, 1.0, 0.25, 0.06, 0.02)

FOCAL_ALPHA = 0.25


@dataclasses.dataclass(frozen=True)
class LossSettings:
    """Factors of the loss; the names are those of the hyperparameter files."""

    box: float
    obj: float
    cls: float
    cls_pw: float = 1.0  # weight of positive labels in the class term
    obj_pw: float = 1.0  # weight of positive labels in the objectness term
    anchor_t: float = 4.0  # an anchor answers for boxes up to this much larger or smaller a side
    fl_gamma: float = 0.0  # exponent of the focal loss, 0 is plain cross entropy
    label_smoothing: float = 0.0


class Assignment(NamedTuple):
    """The anchors of one level that answer for a box, N in number; cells are grid positions."""

    image: Tensor  # [N] index in the batch
    anchor: Tensor  # [N]
    row: Tensor  # [N]
    column: Tensor  # [N]
    classes: Tensor  # [N]
    boxes_cxcywh: Tensor  # [N, 4] in grid units, centre relative to the cell
    anchors_grid: Tensor  # [N, 2]


def assign_targets(
    targets: Tensor, anchors_grid: Tensor, grid_hw: tuple[int, int], anchor_threshold: float
) -> Assignment:
    """Find the anchors of a level that answer for the boxes of a batch.

    A box is answered for by every anchor whose sides differ from its own by less than the factor
    `anchor_threshold`, in the cell of its centre and in the nearer neighbour cell along each axis.

    How many there are depends on the values, so this belongs on the CPU, where nothing has to wait.

    Args:
        targets: [T, 6] image, class, cx, cy, w, h, normalised to 0-1.
        anchors_grid: [A, 2] width, height in grid units, on the device of the targets.
        grid_hw: cells of this level.
        anchor_threshold: `anchor_t` of the hyperparameters, above 1.
    """
    height, width = grid_hw
    scale = targets.new_tensor([width, height])
    centres, sizes = targets[:, 2:4] * scale, targets[:, 4:6] * scale  # [T, 2]
    ratio = sizes[None] / anchors_grid[:, None]  # [A, T, 2]
    fits = torch.maximum(ratio, 1 / ratio).amax(-1) < anchor_threshold  # [A, T]
    anchor, target = fits.nonzero(as_tuple=True)
    centres, sizes = centres[target], sizes[target]

    # Half a cell to the left and up reaches the neighbour that is nearer; the others by mirroring.
    from_far_side = scale - centres
    left, up = ((centres % 1 < 0.5) & (centres > 1)).T
    right, down = ((from_far_side % 1 < 0.5) & (from_far_side > 1)).T
    chosen = torch.stack((torch.ones_like(left), left, up, right, down))  # [5, N]
    moves = centres.new_tensor([[0, 0], [0.5, 0], [0, 0.5], [-0.5, 0], [0, -0.5]])
    move, pair = chosen.nonzero(as_tuple=True)
    centres, sizes = centres[pair], sizes[pair]
    anchor, target = anchor[pair], target[pair]

    cells = (centres - moves[move]).long()
    column, row = cells[:, 0].clamp(0, width - 1), cells[:, 1].clamp(0, height - 1)
    boxes = torch.cat((centres - torch.stack((column, row), 1), sizes), 1)
    image, classes = targets[target, 0].long(), targets[target, 1].long()
    return Assignment(image, anchor, row, column, classes, boxes, anchors_grid[anchor])


def pack(found: Assignment) -> tuple[Tensor, Tensor]:
    """An assignment as two tensors, int64 [5, N] and [N, 6]: few transfers to a device."""
    return torch.stack(found[:5]), torch.cat(found[5:], 1)


def unpack(numbers: Tensor, boxes: Tensor) -> Assignment:
    """What `pack` was given."""
    image, anchor, row, column, classes = numbers
    return Assignment(image, anchor, row, column, classes, boxes[:, :4], boxes[:, 4:])


def _to_device(found: Assignment, device: torch.device) -> Assignment:
    """Nothing waits for it."""
    if device == found.image.device:
        return found
    return unpack(*(_send(part, device) for part in pack(found)))


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device; nothing waits for it."""
    tensor = tensor.pin_memory() if device.type == "cuda" else tensor
    return tensor.to(device, non_blocking=True)


class Measured(NamedTuple):
    """What the terms of a batch sum up to, and over how many; each [3, L]: box, object, class."""

    sums: Tensor  # over boxes found, images, boxes found
    counts: Tensor  # of these


class DetectionLoss:
    """Box (CIoU), objectness and class (binary cross entropy) terms of a batch."""

    def __init__(
        self,
        anchors_grid: Tensor,
        settings: LossSettings,
        add_up: Callable[[Tensor], Tensor] = torch.detach,
    ) -> None:
        """Prepare for a network.

        Args:
            anchors_grid: [L, A, 2] width, height in grid units.
            settings: factors of the terms.
            add_up: the sum of a tensor over all processes that share a batch.
        """
        num_levels = len(anchors_grid)
        self.anchors_grid = anchors_grid.cpu()
        self.settings = settings
        self.add_up = add_up
        self.balance = LEVEL_BALANCE.get(num_levels, LEVEL_BALANCE_OTHER)
        if num_levels > len(self.balance):
            raise ValueError(f"{num_levels} levels; the loss knows weights for up to 5")

    def __call__(
        self, logits: Sequence[Tensor], targets: Tensor, weight: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Compute the loss in float32.

        Means are those over the whole batch: processes that share one get its loss if they add up
        theirs, however unevenly boxes and images are spread over them.

        Args:
            logits: per level [B, A, H, W, 5+K].
            targets: [T, 6] image, class, cx, cy, w, h, normalised to 0-1; T may be 0. On the CPU,
                or the device has to be waited for.
            weight: 0 for images that another process learns from, else 1.

        Returns:
            The loss to minimise (scalar: sum of the terms times batch size), and the box,
            objectness and class terms with their factors (detached [3]).
        """
        sums, counts = self.measure(logits, targets)
        counts = self.add_up(counts * weight)
        parts = self.parts(Measured(sums * weight, counts))
        return parts.sum() * counts[1, 0], parts.detach()

    def measure(self, logits: Sequence[Tensor], targets: Tensor) -> Measured:
        """The sums that the terms are the means of; arguments as for a call."""
        targets = targets.cpu()
        sums, counts = [], []
        for level, level_logits in enumerate(logits):
            terms, num_found = self._level_sums(level_logits, targets, self.anchors_grid[level])
            sums.append(torch.stack(terms))
            counts.append([num_found, len(level_logits), num_found])
        numbers = torch.tensor(counts, dtype=torch.float32)
        return Measured(torch.stack(sums, 1), _send(numbers, logits[0].device).T)

    def parts(self, measured: Measured) -> Tensor:
        """The terms [3] with their factors."""
        sums, counts = measured
        box, obj, cls = sums / counts.clamp(min=1)
        levels = [mean * weight for mean, weight in zip(obj, self.balance, strict=False)]
        settings = self.settings
        return torch.stack(
            (
                box.sum() * settings.box,
                torch.stack(levels).sum() * settings.obj,
                cls.sum() * settings.cls,
            )
        )

    def _level_sums(
        self, logits: Tensor, targets: Tensor, anchors_grid: Tensor
    ) -> tuple[list[Tensor], int]:
        """Box, objectness and class term of a level, each times its count; number of boxes."""
        found = assign_targets(
            targets, anchors_grid, (logits.shape[2], logits.shape[3]), self.settings.anchor_t
        )
        num_found = len(found.image)
        objectness = torch.zeros(logits.shape[:4], device=logits.device)
        box_sum = cls_sum = objectness.new_zeros(())
        if num_found:
            found = _to_device(found, logits.device)
            cells = (found.image, found.anchor, found.row, found.column)
            answers = logits[cells].float()  # [N, 5+K]
            centres = answers[:, 0:2].sigmoid() * 2 - 0.5
            sizes = (answers[:, 2:4].sigmoid() * 2) ** 2 * found.anchors_grid
            iou = paired_iou(torch.cat((centres, sizes), 1), found.boxes_cxcywh, kind="ciou")
            box_sum = (1 - iou).sum()
            # Where several boxes ask for one cell it takes the best IoU, on every device alike.
            _, num_anchors, height, width = objectness.shape
            cell = (found.image * num_anchors + found.anchor) * height + found.row
            quality = iou.detach().clamp(0)
            objectness.view(-1).scatter_reduce_(0, cell * width + found.column, quality, "amax")
            if answers.shape[1] > 6:  # one class needs no class term
                cls_sum = self._class_term(answers[:, 5:], found.classes) * num_found
        obj_mean = self._cross_entropy(logits[..., 4].float(), objectness, self.settings.obj_pw)
        return [box_sum, obj_mean * len(logits), cls_sum], num_found

    def _class_term(self, logits: Tensor, classes: Tensor) -> Tensor:
        smoothing = self.settings.label_smoothing
        labels = torch.full_like(logits, 0.5 * smoothing)
        labels.scatter_(1, classes[:, None], 1 - 0.5 * smoothing)
        return self._cross_entropy(logits, labels, self.settings.cls_pw)

    def _cross_entropy(self, logits: Tensor, labels: Tensor, positive_weight: float) -> Tensor:
        """Mean binary cross entropy, with focal weights if `fl_gamma` is above 0.

        Reference: Lin et al. 2017, Focal Loss, arXiv:1708.02002, eq. 5; soft labels as linear
        mixtures of the two cases.
        """
        weight = logits.new_full((), positive_weight) if positive_weight != 1 else None
        gamma = self.settings.fl_gamma
        if gamma == 0:
            return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight)
        loss = F.binary_cross_entropy_with_logits(
            logits, labels, pos_weight=weight, reduction="none"
        )
        probability = logits.sigmoid()
        correct = labels * probability + (1 - labels) * (1 - probability)
        alpha = labels * FOCAL_ALPHA + (1 - labels) * (1 - FOCAL_ALPHA)
        return (loss * alpha * (1 - correct) ** gamma).mean()
