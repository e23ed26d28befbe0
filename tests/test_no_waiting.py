"""What a training step is made of reads nothing back from the device: a GPU is not waited for.

Network, losses, gradients, penalty, optimizer and average; the lines of train.py around them,
copies to the device, autocast and loss scaling are not in it.

The device here is `meta`, whose tensors have a shape but no numbers: whatever would copy one to the
CPU, or needs the numbers to know the size of a result, fails.
"""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from models import Model, ModelSpec
from utils.distill import DistillationLoss
from utils.loss import DetectionLoss, LossSettings
from utils.optim import ModelEma, build_optimizer
from utils.pruning import slimming
from utils.pruning.channel_groups import find_channel_groups
from utils.pruning.slimming import MODES, AutoRate, SparsityPenalty

META = torch.device("meta")
TARGETS = torch.tensor([[0, 1, 0.5, 0.5, 0.4, 0.3], [1, 2, 0.3, 0.6, 0.2, 0.5]])
ALL_SETTINGS = LossSettings(0.05, 1.0, 0.5, 0.7, 2.0, fl_gamma=1.5, label_smoothing=0.1)


@pytest.mark.parametrize(
    "read", [torch.Tensor.item, torch.Tensor.cpu, torch.nonzero, lambda x: x[x > 0]]
)
def test_this_device_cannot_be_read(read):
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):
        read(torch.ones(2, device=META)[:1])


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rate", [0.001, AutoRate(0.3, least=0.001, limit=2.0)], ids=["", "auto"])
def test_a_step_reads_nothing_from_the_device(tiny_spec, monkeypatch, optimizer, mode, rate):
    model = Model(ModelSpec.from_dict(tiny_spec))
    # Costs are found before the first step, by a forward pass on the CPU.
    costs = slimming.cost_weights(model, find_channel_groups(model, "group"), 1.0)
    monkeypatch.setattr(slimming, "cost_weights", lambda *_: costs)
    model.to(META, memory_format=torch.channels_last)
    loss = DetectionLoss(torch.rand(2, 3, 2) + 1, ALL_SETTINGS)
    distillation = DistillationLoss(model.head.anchors, model.head.anchors)
    penalty, average = SparsityPenalty(model, rate, epochs=3, mode=mode), ModelEma(model)
    steps = build_optimizer(model, optimizer, lr=0.01, momentum=0.9, weight_decay=5e-4)

    logits = model(torch.empty(2, 3, 64, 64, device=META))
    first, parts = loss(logits, TARGETS)
    second, terms = distillation(logits, [level.detach() for level in logits])
    (first + second).backward()
    norm = clip_grad_norm_(model.parameters(), 10.0)
    penalty.before_step(0, norm)
    steps.step()
    penalty.after_step(0, norm, steps, average.model)
    average.update(model)
    for result in (first, parts, terms, norm):
        assert result.device == META
    assert all(parameter.grad is not None for parameter in model.parameters())
