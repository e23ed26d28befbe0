"""A training step reads nothing back from the device: a GPU is not waited for.

What runs is the loop of train.py. What reads on purpose, every tenth batch, is left out: the look
at losses and gradients, and the progress bar.

The device here is `meta`, whose tensors have a shape but no numbers: whatever would copy one to the
CPU, or needs the numbers to know the size of a result, fails. torch has neither autocast nor fused
optimizers for it; those, and loss scaling, are in the same test on a GPU, where torch itself tells.
"""

import dataclasses
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn

import train
from models import Model, ModelSpec
from models.yolo import MAX_WEIGHTS
from utils.config import load_dataset_spec, load_hyperparameters
from utils.dataset import DetectionDataset, build_loader, scan_split
from utils.flags.train import parse_args
from utils.loss import DetectionLoss
from utils.pruning import slimming
from utils.pruning.channel_groups import find_channel_groups
from utils.training import run as runs
from utils.training.inputs import Inputs

CPU, META = torch.device("cpu"), torch.device("meta")
ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--epochs", "3", "--teacher", "x", "--bn_sparsity"]


class Done(Exception):
    """The batches of the epoch are through."""


@pytest.mark.parametrize(
    "read", [torch.Tensor.item, torch.Tensor.cpu, torch.nonzero, lambda x: x[x > 0]]
)
def test_this_device_cannot_be_read(read):
    with pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)meta"):
        read(torch.ones(2, device=META)[:1])


@pytest.fixture
def begin(tiny_spec, tiny_dataset, monkeypatch, tmp_path):
    """Build a run as train.py does, and a loader of so many batches, of which two make a step."""

    def begin(device, precision, num_batches, *flags):
        size = 4 // num_batches
        sizes = ["--batch", str(size), "--nominal-batch", str(2 * size)]
        options, _ = parse_args([*FLAGS, *sizes, *flags])
        data = load_dataset_spec(tiny_dataset.yaml, ROOT)
        spec = ModelSpec.from_dict(tiny_spec)
        hyp = load_hyperparameters(ROOT / "data/hyps/hyp.scratch-low.yaml")
        inputs = Inputs(hyp, spec, None, MAX_WEIGHTS, None, data)
        model, teacher = Model(spec), Model(spec).eval().fuse().requires_grad_(False)
        if device == META:
            read_before_the_first_step(model)
        run = runs.build_run(options, inputs, model, 64, device, precision, num_batches)
        run.dir = tmp_path
        runs.add_teacher(run, teacher)
        split = scan_split(data.train, data.names)
        return run, build_loader(DetectionDataset(split, 64, hyp=hyp), size, shuffle=True)

    def read_before_the_first_step(model):
        """What is found before the training begins needs numbers, here those of the CPU."""
        costs = slimming.cost_weights(model, find_channel_groups(model, "group"), 1.0)
        anchors = model.head.anchors.clone()
        monkeypatch.setattr(slimming, "cost_weights", lambda *_: costs)
        monkeypatch.setattr(runs, "median_gamma", lambda _: 1.0)
        monkeypatch.setattr(runs, "have_same_anchors", lambda *_: True)
        monkeypatch.setattr(runs, "build_loss", lambda _, gains: DetectionLoss(anchors, gains))
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())

    return begin


@pytest.fixture
def train_blindly(monkeypatch):
    """Go through the batches of `train_one_epoch` without its looks at them."""

    def stop(*_):
        raise Done

    def train_blindly(run, loader):
        monkeypatch.setattr(train, "check_finite", lambda unread, _: unread.clear())
        for name in ("show_progress", "draw_data"):
            monkeypatch.setattr(train, name, lambda *_: None)
        monkeypatch.setattr(train, "check_weights", stop)  # after the last batch
        run.schedule = dataclasses.replace(run.schedule, warmup_steps=0)  # two batches a step
        with pytest.raises(Done):
            train.train_one_epoch(run, loader, 0)
        assert run.ema.updates == len(loader) / 2

    return train_blindly


@pytest.mark.parametrize(
    ("optimizer", "mode", "rate"),
    [
        ("SGD", "subgradient", "auto"),
        ("SGD", "proximal", "auto"),
        ("AdamW", "subgradient", "0.001"),
        ("AdamW", "proximal", "auto"),  # which is a number there
    ],
)
def test_a_step_reads_nothing_from_the_device(begin, train_blindly, optimizer, mode, rate):
    flags = ["--optimizer", optimizer, "--sparsity_mode", mode, "--sparsity_rate", rate]
    run, loader = begin(META, torch.float32, 2, *flags, "--multi-scale")
    run.optimizer.defaults["fused"] = True
    step = run.optimizer.step

    def step_unfused():
        assert run.optimizer.found_inf.device == META  # whether to leave it out is not looked at
        run.optimizer.found_inf = None
        step()

    run.optimizer.step = step_unfused
    train_blindly(run, loader)
    assert run.loss_sums.device == META
    assert all(p.device == META for p in run.model.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flags", [["--sparsity_mode", "proximal"], ["--multi-scale"]])
def test_a_step_on_a_gpu_waits_for_nothing(begin, train_blindly, monkeypatch, precision, flags):
    run, loader = begin(torch.device("cuda"), precision, 4, *flags)
    to_device, calls = train.to_device, []

    def watch_from_the_third_batch_on(*arguments):
        calls.append(arguments)
        if len(calls) == 3:  # the first ones load kernels and make the states
            torch.cuda.set_sync_debug_mode("error")
        return to_device(*arguments)

    monkeypatch.setattr(train, "to_device", watch_from_the_third_batch_on)
    try:
        train_blindly(run, loader)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(calls) == 4


@pytest.mark.parametrize("flags", [[], ["--multi-scale"]])
def test_every_convolution_of_a_training_sees_channels_last(begin, train_blindly, flags):
    """The layout that convolutions need not copy; one that is not costs, and tells nobody."""
    run, loader = begin(CPU, torch.bfloat16, 2, *flags)
    others, seen = [], []

    def look(name):
        def hook(module, inputs, output):
            seen.append(name)
            for what, tensor in (("in", inputs[0]), ("out", output), ("weight", module.weight)):
                if not tensor.is_contiguous(memory_format=torch.channels_last):
                    others.append(f"{what} of {name}")

        return hook

    for network in (run.model, run.teacher):
        for name, module in network.named_modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(look(name))
    train_blindly(run, loader)
    assert len(seen) > 2 * 2 * 20
    assert others == []
