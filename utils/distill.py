"""Knowledge distillation: a network learns from the answers of a teacher, beside the labels.

The teacher says at every cell what it sees there; a slim network thus gets back what its dense
parent knew, also where no label says anything. Cells count by the objectness the teacher gives
them, or the many empty ones would teach random boxes.

References: Hinton et al. 2015, Distilling the Knowledge in a Neural Network, arXiv:1503.02531;
Mehta & Ozturk 2018, Object detection at 200 Frames Per Second, arXiv:1805.06361
(objectness scaled distillation).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models.yolo import Model
from utils.boxes import paired_iou
from utils.loss import LEVEL_BALANCE, LEVEL_BALANCE_OTHER


@dataclasses.dataclass(frozen=True)
class DistillationGains:
    """Factors of the terms, in the scale of `LossSettings`: equal numbers give equal weight."""

    box: float = 0.05
    obj: float = 1.0
    cls: float = 0.5


class DistillationLoss:
    """How far the answers of a student are from those of its teacher; 0 where they agree.

    - objectness: divergence at all cells, levels balanced as in the detection loss;
    - classes: divergence, mean over the classes; none for one class, as in the detection loss;
    - boxes: 1 - CIoU of the decoded boxes, so each network may have anchors of its own.

    Classes and boxes are means over all cells, weighted with the teacher's objectness, times the
    number of levels, as the detection loss sums one mean a level. Here it is one mean for all: a
    level where the teacher sees nothing shall not weigh as much as the others.

    The divergence of two probabilities (Kullback-Leibler) is their cross entropy less the
    teacher's own entropy: the same gradient, sigmoid(student) - sigmoid(teacher), but 0 at best.
    """

    def __init__(
        self,
        student_anchors_grid: Tensor,
        teacher_anchors_grid: Tensor,
        gains: DistillationGains | None = None,
        add_up: Callable[[Tensor], Tensor] = torch.detach,
    ) -> None:
        """Prepare for two networks.

        Args:
            student_anchors_grid: [L, A, 2] width, height in grid units, on the device of the
                logits.
            teacher_anchors_grid: likewise.
            gains: factors of the terms.
            add_up: the sum of a tensor over all processes that share a batch.
        """
        self.student_anchors_grid = student_anchors_grid
        self.teacher_anchors_grid = teacher_anchors_grid
        self.gains = gains or DistillationGains()
        self.add_up = add_up
        self.balance = LEVEL_BALANCE.get(len(student_anchors_grid), LEVEL_BALANCE_OTHER)

    def __call__(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], weight: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Compare in float32; only the student gets gradients.

        Args:
            student: logits per level [B, A, H, W, 5+K].
            teacher: logits for the same images, of the same shapes.
            weight: 0 for images that another process learns from, else 1.

        Returns:
            The loss to minimise (scalar: sum of the terms times batch size), and the box,
            objectness and class terms with their gains (detached [3]).
        """
        box_sums, obj_means, cls_sums, weights = [], [], [], []
        for level, (answers, wanted) in enumerate(zip(student, teacher, strict=True)):
            answers, wanted = answers.float(), wanted.detach().float()
            objectness = wanted[..., 4].sigmoid()  # [B, A, H, W]
            boxes = decode_in_cell(answers, self.student_anchors_grid[level])
            wanted_boxes = decode_in_cell(wanted, self.teacher_anchors_grid[level])
            distance = 1 - paired_iou(boxes, wanted_boxes, kind="ciou")
            box_sums.append((objectness * distance).sum())
            obj_mean = divergence(answers[..., 4], wanted[..., 4]).mean()
            obj_means.append(obj_mean * self.balance[level])
            if answers.shape[-1] > 6:
                classes = divergence(answers[..., 5:], wanted[..., 5:]).mean(-1)
                cls_sums.append((objectness * classes).sum())
            else:
                cls_sums.append(box_sums[-1] * 0)
            weights.append(objectness.sum())
        batch_size = student[0].shape[0]
        seen = torch.stack(weights).sum()
        counts = torch.stack((seen, torch.full_like(seen, batch_size))) * weight
        seen, num_images = self.add_up(counts)
        # Less than one object in the whole batch: what is seen fades, noise is not blown up.
        scale = weight * len(weights) / seen.clamp(1)
        parts = torch.stack(
            (
                torch.stack(box_sums).sum() * scale * self.gains.box,
                torch.stack(obj_means).sum() * (weight * batch_size / num_images) * self.gains.obj,
                torch.stack(cls_sums).sum() * scale * self.gains.cls,
            )
        )
        return parts.sum() * num_images, parts.detach()


def decode_in_cell(logits: Tensor, anchors_grid: Tensor) -> Tensor:
    """Boxes `[B, A, H, W, 4]`, cxcywh in grid units, each relative to its own cell.

    Args:
        logits: [B, A, H, W, 5+K].
        anchors_grid: [A, 2] width, height in grid units.
    """
    y = logits[..., :4].sigmoid() * 2
    sizes = y[..., 2:4] ** 2 * anchors_grid.view(1, -1, 1, 1, 2)
    return torch.cat((y[..., 0:2] - 0.5, sizes), -1)


def divergence(logits: Tensor, wanted: Tensor) -> Tensor:
    """Kullback-Leibler divergence of each pair of yes-no answers, both as logits; >= 0."""
    probability = wanted.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, probability, reduction="none")
    entropy = F.binary_cross_entropy_with_logits(wanted, probability, reduction="none")
    return cross_entropy - entropy


def check_teacher(
    teacher: Model,
    teacher_names: Sequence[str],
    student: Model,
    student_names: Sequence[str],
    source: str,
) -> None:
    """Stop if the answers of the two networks cannot be compared number by number.

    Args:
        teacher: network to learn from.
        teacher_names: its classes.
        student: network to train.
        student_names: its classes.
        source: where the teacher is from, for the messages.

    Raises:
        ValueError: number, names or order of the classes, strides, or anchors a cell differ. The
            name of a single class does not count.
    """
    if len(teacher_names) != len(student_names):
        raise ValueError(
            f"{source} detects {len(teacher_names)} classes, the network to train "
            f"{len(student_names)}; a teacher must have been trained for the same classes"
        )
    for index, (theirs, ours) in enumerate(zip(teacher_names, student_names, strict=True)):
        if theirs != ours and len(student_names) > 1:
            raise ValueError(
                f"{source}: class {index} is {theirs!r}, but {ours!r} for the network to train; a "
                "teacher must have been trained for the same classes in the same order"
            )
    theirs, ours = (_strides(model) for model in (teacher, student))
    if theirs != ours:
        raise ValueError(
            f"{source} detects at strides {theirs}, the network to train at {ours}; take a teacher "
            "with the same levels"
        )
    if teacher.head.num_anchors != student.head.num_anchors:
        raise ValueError(
            f"{source} has {teacher.head.num_anchors} anchors a level, the network to train "
            f"{student.head.num_anchors}; take a teacher with as many"
        )


def have_same_anchors(teacher: Model, student: Model) -> bool:
    """Whether they agree to 1 %: checkpoints hold them rounded to half precision."""
    theirs, ours = teacher.head.anchors_px.cpu(), student.head.anchors_px.cpu()
    return torch.allclose(theirs, ours, rtol=0.01)


def _strides(model: Model) -> str:
    return ", ".join(f"{stride:g}" for stride in model.head.strides.tolist())
