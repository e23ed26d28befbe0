"""The distillation loss against a hand-worked case and a slow loop; who may teach whom."""

import dataclasses
import math

import pytest
import torch

from models import Model, ModelSpec
from utils.boxes import paired_iou
from utils.distill import (
    DistillationGains,
    DistillationLoss,
    check_teacher,
    divergence,
    have_same_anchors,
)
from utils.loss import LEVEL_BALANCE

ANCHORS = torch.tensor(
    [[[1.0, 2.0], [3.0, 1.0]], [[1.5, 1.5], [4.0, 2.0]], [[2.0, 2.0], [3.0, 5.0]]]
)
GAINS = DistillationGains(box=0.5, obj=2.0, cls=3.0)


def make_logits(seed, num_classes=3, batch=2, sides=(8, 4, 2)):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, 2, side, side + 2, 5 + num_classes, generator=generator)
        for side in sides
    ]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def slow_divergence(logit, wanted):
    p, q = sigmoid(wanted), sigmoid(logit)
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def slow_box(numbers, anchor):
    x, y, w, h = (sigmoid(number) for number in numbers)
    return [2 * x - 0.5, 2 * y - 0.5, (2 * w) ** 2 * anchor[0], (2 * h) ** 2 * anchor[1]]


def slow_loss(student, teacher, student_anchors, teacher_anchors, gains):
    """One cell at a time."""
    box = obj = cls = weight = 0.0
    for level, (answers, wanted) in enumerate(zip(student, teacher, strict=True)):
        obj_sum, count = 0.0, 0
        for index in torch.cartesian_prod(*map(torch.arange, answers.shape[:4])).tolist():
            a, b = answers[tuple(index)].tolist(), wanted[tuple(index)].tolist()
            own = slow_box(a[:4], student_anchors[level, index[1]].tolist())
            other = slow_box(b[:4], teacher_anchors[level, index[1]].tolist())
            iou = paired_iou(torch.tensor(own), torch.tensor(other), kind="ciou").item()
            seen = sigmoid(b[4])
            weight += seen
            box += seen * (1 - iou)
            pairs = list(zip(a[5:], b[5:], strict=True))
            if len(pairs) > 1:
                cls += seen * sum(slow_divergence(*pair) for pair in pairs) / len(pairs)
            obj_sum, count = obj_sum + slow_divergence(a[4], b[4]), count + 1
        obj += LEVEL_BALANCE[3][level] * obj_sum / count
    scale = len(student) / max(weight, 1)
    return [box * scale * gains.box, obj * gains.obj, cls * scale * gains.cls]


@pytest.mark.parametrize("num_classes", [1, 3])
def test_loss_equals_a_slow_loop(num_classes):
    student, teacher = make_logits(0, num_classes), make_logits(1, num_classes)
    other_anchors = ANCHORS.flip(1) * 1.3
    total, parts = DistillationLoss(ANCHORS, other_anchors, GAINS)(student, teacher)
    expected = slow_loss(student, teacher, ANCHORS, other_anchors, GAINS)
    assert parts.tolist() == pytest.approx(expected, rel=1e-4)
    assert total.item() == pytest.approx(2 * sum(expected), rel=1e-4)
    assert (parts[2] == 0) == (num_classes == 1)


def test_hand_worked_case():
    """One level, two cells: the teacher is almost sure of the first and sees nothing in the second.

    First cell: the student's box is as wide and twice as high with the same centre, so IoU is 1/2
    and the angle term of CIoU is alpha * v. Objectness 1/2 against 1, and class 1/2 against 3/4.
    """
    sure, never = 40.0, -40.0
    quarter, eighth = math.log(1 / 3), math.log((1 / 8) ** 0.5 / (1 - (1 / 8) ** 0.5))
    # sizes (2 sigmoid)^2 * anchor: sigmoid 1/4 gives anchor / 4, sigmoid sqrt(1/8) gives anchor / 2
    teacher = torch.tensor(
        [[0, 0, quarter, quarter, sure, math.log(3), 0], [0, 0, 0, 0, never, 9, 9]]
    )
    student = torch.tensor([[0, 0, quarter, eighth, 0, 0, 0], [3, 3, 3, 3, never, -9, -9.0]])
    teacher, student = (x.view(1, 1, 1, 2, 7) for x in (teacher, student))
    anchors = torch.tensor([[[4.0, 4.0]]])
    total, parts = DistillationLoss(anchors, anchors, DistillationGains(1, 1, 1))(
        [student], [teacher]
    )
    v = 4 / math.pi**2 * (math.atan(1) - math.atan(1 / 2)) ** 2
    ciou = 0.5 - v / (0.5 + v) * v
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    balance = 4.0  # of the first level
    expected = [1 - ciou, balance * math.log(2) / 2, (math.log(2) - entropy) / 2]
    assert parts.tolist() == pytest.approx(expected, rel=1e-5)
    assert total.item() == pytest.approx(sum(expected), rel=1e-5)


def gradients(student, teacher, gains, anchors=ANCHORS):
    student = [level.clone().requires_grad_() for level in student]
    teacher = [level.clone().requires_grad_() for level in teacher]
    total, _ = DistillationLoss(anchors, ANCHORS, gains)(student, teacher)
    total.backward()
    assert all(level.grad is None for level in teacher)
    return total.item(), [level.grad for level in student]


def test_the_student_that_agrees_is_left_alone():
    logits = make_logits(0)
    total, grads = gradients(logits, logits, GAINS)
    assert total == pytest.approx(0, abs=1e-5)
    assert max(grad.abs().max().item() for grad in grads) < 1e-6


ONE_TERM = {
    "box": (DistillationGains(1, 0, 0), slice(0, 4)),
    "obj": (DistillationGains(0, 1, 0), slice(4, 5)),
    "cls": (DistillationGains(0, 0, 1), slice(5, None)),
}


@pytest.mark.parametrize("term", ONE_TERM)
def test_each_term_moves_its_own_numbers_towards_the_teacher(term):
    gains, own = ONE_TERM[term]
    student, teacher = make_logits(0), make_logits(1)
    before, grads = gradients(student, teacher, gains)
    for level, grad in enumerate(grads):
        moved = grad.abs().amax(dim=(0, 1, 2, 3)) > 0
        assert moved[own].all()
        assert moved.sum() == moved[own].sum()
        if term != "box":  # a box may have to shrink before it can move
            downhill = torch.sign(student[level] - teacher[level])[..., own]
            assert torch.equal(torch.sign(grad[..., own]), downhill)
    stepped = [level - 0.1 * grad for level, grad in zip(student, grads, strict=True)]
    assert gradients(stepped, teacher, gains)[0] < before


def test_objectness_gradient_is_that_of_cross_entropy():
    """It pulls as a label would: sigmoid(student) - sigmoid(teacher), over the number of cells."""
    student, teacher = make_logits(0), make_logits(1)
    _, grads = gradients(student, teacher, DistillationGains(0, 1, 0))
    for level, grad in enumerate(grads):
        error = student[level][..., 4].sigmoid() - teacher[level][..., 4].sigmoid()
        expected = error * LEVEL_BALANCE[3][level] / error.numel() * len(error)
        torch.testing.assert_close(grad[..., 4], expected)


def test_parts_depend_neither_on_image_size_nor_on_batch():
    student, teacher = make_logits(0), make_logits(1)
    loss = DistillationLoss(ANCHORS, ANCHORS, GAINS)
    total, parts = loss(student, teacher)
    for tiles in ((1, 1, 2, 3, 1), (3, 1, 1, 1, 1)):
        tiled = ([level.repeat(tiles) for level in logits] for logits in (student, teacher))
        tiled_total, tiled_parts = loss(*tiled)
        torch.testing.assert_close(tiled_parts, parts)
        torch.testing.assert_close(tiled_total, total * tiles[0])


def test_a_teacher_that_sees_nothing_teaches_only_that():
    student, teacher = make_logits(0), make_logits(1)
    for level in teacher:
        level[..., 4] = -20
    _, grads = gradients(student, teacher, GAINS)
    for grad in grads:
        assert (grad[..., 4] > 0).all()
        assert grad[..., [0, 1, 2, 3, 5, 6, 7]].abs().max() < 1e-6


def test_the_same_boxes_from_other_anchors_are_the_same():
    teacher = make_logits(1)
    student = [level.clone() for level in teacher]
    for level in student:  # (2 sigmoid)^2 * 2 * anchor = the teacher's: sigmoid is less by sqrt(2)
        level[..., 2:4] = torch.logit(level[..., 2:4].sigmoid() / 2**0.5)
    total, _ = gradients(student, teacher, GAINS, anchors=ANCHORS * 2)
    assert total == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_compared_in_float32(dtype):
    student, teacher = ([y.to(dtype) for y in make_logits(seed)] for seed in (0, 1))
    total, parts = DistillationLoss(ANCHORS, ANCHORS)(student, teacher)
    expected = DistillationLoss(ANCHORS, ANCHORS)(
        [y.float() for y in student], [y.float() for y in teacher]
    )
    assert total.dtype == parts.dtype == torch.float32
    assert torch.equal(total, expected[0])


def test_extreme_logits_stay_finite():
    for low, high in ((-100.0, 100.0), (100.0, -100.0)):
        student = [torch.full((1, 2, 2, 2, 8), low) for _ in range(3)]
        teacher = [torch.full((1, 2, 2, 2, 8), high) for _ in range(3)]
        total, grads = gradients(student, teacher, GAINS)
        assert math.isfinite(total)
        assert all(grad.isfinite().all() for grad in grads)


def test_divergence_is_never_negative_and_zero_for_equal_answers():
    values = torch.linspace(-30, 30, 61)
    table = divergence(values[:, None].expand(-1, 61), values[None].expand(61, -1))
    assert table.min() >= -1e-6
    assert table.diagonal().abs().max() == 0


def build(spec, **changes):
    return Model(dataclasses.replace(ModelSpec.from_dict(spec), **changes))


def test_a_slim_network_may_learn_from_its_parent(tiny_spec):
    dense = build(tiny_spec)
    widths = {path: width - 1 for path, width in dense.widths().items()}
    slim = Model(dense.spec.with_widths(widths))
    check_teacher(dense, ("a", "b", "c"), slim, ("a", "b", "c"), "dense.pt")
    assert have_same_anchors(dense, slim)
    slim.set_anchors(slim.head.anchors_px * 1.001)  # as rounding to half precision
    assert have_same_anchors(dense, slim)
    slim.set_anchors(slim.head.anchors_px * 1.1)
    assert not have_same_anchors(dense, slim)


def test_the_name_of_a_single_class_does_not_count(tiny_spec):
    model = build(tiny_spec, num_classes=1)
    check_teacher(model, ("cell",), model, ("object",), "dense.pt")


def other_levels(tiny_spec):
    """Without the level of stride 8."""
    head = [*tiny_spec["head"][:-1], [[13], 1, "Detect", ["nc", "anchors"]]]
    return {**tiny_spec, "head": head, "anchors": tiny_spec["anchors"][1:]}


TEACHERS = {
    "number of classes": (lambda spec: {**spec, "nc": 2}, "ab", "t.pt detects 2 classes, .* 3;"),
    "order of classes": (lambda spec: spec, "acb", "t.pt: class 1 is 'c', but 'b'"),
    "levels": (other_levels, "abc", "t.pt detects at strides 16, the network to train at 8, 16;"),
    "anchors a level": (
        lambda spec: {**spec, "anchors": [row[:4] for row in spec["anchors"]]},
        "abc",
        "t.pt has 2 anchors a level, the network to train 3;",
    ),
}


@pytest.mark.parametrize("case", TEACHERS)
def test_teachers_whose_answers_do_not_compare_are_refused(tiny_spec, case):
    change, names, words = TEACHERS[case]
    teacher = build(change(tiny_spec))
    with pytest.raises(ValueError, match=words):
        check_teacher(teacher, tuple(names), build(tiny_spec), ("a", "b", "c"), "t.pt")
