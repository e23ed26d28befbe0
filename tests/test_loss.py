"""The loss against published numbers and against a slow loop."""

import json
import math

import pytest
import torch

from utils.checkpoint import load_detector
from utils.distill import DistillationLoss
from utils.loss import DetectionLoss, LossSettings, assign_targets, pack, unpack

SETTINGS = LossSettings(box=0.05, obj=1.0, cls=0.5)


@pytest.fixture(scope="module")
def facts(shared_dir):
    return json.loads((shared_dir / "facts/forward_and_loss.json").read_text())


@pytest.fixture(scope="module")
def public_model(shared_dir):
    return load_detector(shared_dir / "weights/yolov5n.pt").model


@pytest.fixture(scope="module")
def fact_input():
    values = torch.arange(2 * 3 * 64 * 96) * 37 % 256
    return (values.float() / 255).reshape(2, 3, 64, 96)


def test_forward_pass_equals_the_facts(facts, public_model, fact_input):
    with torch.no_grad():
        predictions, logits = public_model(fact_input)
    assert list(predictions.shape) == facts["decoded_shape"]
    assert predictions.double().sum().item() == pytest.approx(facts["decoded_sum"], rel=1e-6)
    assert predictions.abs().max().item() == pytest.approx(facts["decoded_abs_max"], abs=1e-4)
    first, last = facts["decoded_row0_first8"], facts["decoded_row_last_first8"]
    assert predictions[0, 0, :8].tolist() == pytest.approx(first, abs=1e-4)
    assert predictions[-1, -1, :8].tolist() == pytest.approx(last, abs=1e-4)
    for level, raw in zip(logits, facts["raw"], strict=True):
        assert list(level.shape) == raw["shape"]
        assert level.double().sum().item() == pytest.approx(raw["sum"], rel=1e-6)
        assert level.flatten()[:8].tolist() == pytest.approx(raw["first8"], abs=1e-4)


@pytest.mark.parametrize("case", range(6))
def test_loss_equals_the_facts(facts, public_model, fact_input, case):
    case = facts["loss"]["cases"][case]
    settings = LossSettings(**{**facts["loss"]["hyp"], **case["hyp_changes"]})
    targets = torch.tensor(case["targets"]).reshape(-1, 6)
    with torch.no_grad():
        _, logits = public_model(fact_input)
        total, parts = DetectionLoss(public_model.head.anchors, settings)(logits, targets)
    assert total.item() == pytest.approx(case["loss_times_batch"], abs=1e-4)
    assert parts.tolist() == pytest.approx([case["box"], case["obj"], case["cls"]], abs=1e-4)


def slow_assignment(targets, anchors, grid_hw, threshold):
    """One box, one anchor, one cell at a time."""
    height, width = grid_hw
    found = set()
    for target, (image, _, cx, cy, w, h) in enumerate(targets.tolist()):
        x, y = cx * width, cy * height
        cells = {(math.floor(x), math.floor(y))}
        if x % 1 < 0.5 and x > 1:
            cells.add((math.floor(x) - 1, math.floor(y)))
        if y % 1 < 0.5 and y > 1:
            cells.add((math.floor(x), math.floor(y) - 1))
        if (width - x) % 1 < 0.5 and width - x > 1:
            cells.add((math.floor(x) + 1, math.floor(y)))
        if (height - y) % 1 < 0.5 and height - y > 1:
            cells.add((math.floor(x), math.floor(y) + 1))
        for anchor, (anchor_w, anchor_h) in enumerate(anchors.tolist()):
            ratios = (w * width / anchor_w, h * height / anchor_h)
            if max(max(r, 1 / r) for r in ratios) < threshold:
                found |= {(target, int(image), anchor, row, column) for column, row in cells}
    return found


@pytest.mark.parametrize("grid_hw", [(8, 8), (5, 9), (1, 1)])
def test_assignment_equals_a_slow_loop(grid_hw):
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(40, 6, generator=generator)
    targets[:, 0] = torch.randint(0, 4, (40,), generator=generator)
    targets[:, 1] = torch.arange(40)  # the class tells which target an entry belongs to
    anchors = torch.tensor([[1.2, 2.0], [3.0, 1.0], [4.0, 6.0]])
    found = assign_targets(targets, anchors, grid_hw, 3.0)
    entries = torch.stack((found.classes, found.image, found.anchor, found.row, found.column), 1)
    assert set(map(tuple, entries.tolist())) == slow_assignment(targets, anchors, grid_hw, 3.0)
    assert len(set(map(tuple, entries.tolist()))) == len(entries)
    scale = torch.tensor([grid_hw[1], grid_hw[0]])
    centres = found.boxes_cxcywh[:, :2] + torch.stack((found.column, found.row), 1)
    torch.testing.assert_close(centres, targets[found.classes, 2:4] * scale)


def test_what_is_sent_to_a_device_arrives_as_it_was():
    targets = torch.rand(9, 6, generator=torch.Generator().manual_seed(1))
    found = assign_targets(targets, torch.tensor([[1.2, 2.0], [3.0, 1.0]]), (5, 7), 4.0)
    assert len(found.image) > 3
    for sent, arrived in zip(found, unpack(*pack(found)), strict=True):
        torch.testing.assert_close(arrived, sent, rtol=0, atol=0)


def test_no_boxes_still_trains_objectness():
    logits = [torch.zeros(2, 3, 4, 4, 7, requires_grad=True)]
    total, parts = DetectionLoss(torch.ones(1, 3, 2), SETTINGS)(logits, torch.zeros(0, 6))
    total.backward()
    assert parts[0] == parts[2] == 0
    assert parts[1].item() == pytest.approx(4 * math.log(2))
    assert logits[0].grad[..., 4].abs().min() > 0
    assert logits[0].grad[..., :4].abs().max() == 0


def test_one_class_has_no_class_term():
    targets = torch.tensor([[0, 0, 0.5, 0.5, 0.3, 0.3]])
    logits = [torch.zeros(1, 3, 4, 4, 6)]
    _, parts = DetectionLoss(torch.ones(1, 3, 2), SETTINGS)(logits, targets)
    assert parts[0] > 0
    assert parts[2] == 0


def test_box_on_the_far_border_stays_inside_the_grid():
    targets = torch.tensor([[0, 1, 1.0, 1.0, 0.2, 0.2]])
    found = assign_targets(targets, torch.ones(3, 2), (4, 4), 4.0)
    assert len(found.row)
    assert found.row.max() == found.column.max() == 3


@pytest.mark.parametrize("shares", [(1, 3), (2, 2), (4, 0)], ids=str)
@pytest.mark.parametrize("kind", ["labels", "teacher"])
def test_processes_that_share_a_batch_add_up_to_its_loss(shares, kind):
    """However unevenly boxes and images are spread; one without images takes an extra one."""
    rng = torch.Generator().manual_seed(0)
    anchors = torch.tensor([[[1.5, 2.0], [3.0, 3.0]], [[1.0, 2.0], [4.0, 2.0]]])
    logits = [torch.randn(4, 2, side, side, 8, generator=rng) for side in (8, 4)]
    wanted = [torch.randn(level.shape, generator=rng) for level in logits]
    targets = torch.rand(7, 6, generator=rng) * 0.4 + 0.2
    targets[:, 0] = torch.tensor([0, 0, 0, 0, 1, 1, 3])
    targets[:, 1] = torch.tensor([0, 1, 2, 0, 1, 2, 1])

    def loss_of(images, weight, add_up=torch.detach):
        leaves = [level[images].clone().requires_grad_() for level in logits]
        if kind == "teacher":
            loss_fn = DistillationLoss(anchors, anchors, add_up=add_up)
            loss, parts = loss_fn(leaves, [level[images] for level in wanted], weight)
        else:
            rows = targets[torch.isin(targets[:, 0], images)].clone()
            rows[:, 0] = torch.searchsorted(images, rows[:, 0].long())
            loss, parts = DetectionLoss(anchors, SETTINGS, add_up)(leaves, rows, weight)
        loss.backward()
        return loss.detach(), parts, [leaf.grad for leaf in leaves]

    whole = torch.arange(4)
    parts = [
        (part if len(part) else whole[:1], float(len(part) > 0)) for part in whole.split(shares)
    ]
    counts = []
    for part, weight in parts:
        loss_of(part, weight, lambda count: counts.append(count) or count)
    total = sum(counts)
    found = [loss_of(part, weight, lambda _: total) for part, weight in parts]
    loss, terms, grads = loss_of(whole, 1.0)
    torch.testing.assert_close(sum(f[0] for f in found), loss)
    torch.testing.assert_close(sum(f[1] for f in found), terms)
    for level, grad in enumerate(grads):
        of_shares = [f[2][level] for f in found]
        torch.testing.assert_close(torch.cat(of_shares)[:4], grad)
        assert not torch.cat(of_shares)[4:].any()  # the extra image
