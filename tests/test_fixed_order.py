"""Operators of ours that torch knows to have no fixed order on CUDA: docs/commands.md names each.

No GPU is needed: torch lists such operators, and which of them a run uses a CPU tells too.
"""

import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode

import prune
import train
from models import Model, ModelSpec
from utils.checkpoint import build_checkpoint, save_checkpoint

PAGE = Path(__file__).resolve().parents[1] / "docs/commands.md"

# What torch lists by a name with which none of its operators begins.
OPERATORS = {
    "interpolate": ["upsample_linear", "upsample_bi", "upsample_trilinear"],
    "grid_sample": ["grid_sampler"],
    **{f"conv{n}d": ["convolution"] for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": ["convolution"] for n in (1, 2, 3)},
}


def listed_names():
    """Of the functions and modules that torch lists, those for CUDA, as `conv2d`."""
    text = inspect.cleandoc(torch.use_deterministic_algorithms.__doc__)  # as Python 3.13 has it
    entries = re.findall(r"^    \* (:\w+:`.*?)(?=^    \* |^\S)", text, re.M | re.S)
    names = set()
    for entry in entries:
        if "CUDA" in entry or not re.search("MPS|CPU|quantized", entry):
            for path in re.findall(r":(?:func|class):`torch\.([\w.]+)`", entry):
                snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", path.rpartition(".")[2]).lower()
                names.add(snake.replace("nllloss", "nll_loss").replace("ctcloss", "ctc_loss"))
    return names


def plain(operator):
    """`index_put` of `aten.index_put_`."""
    return operator.rpartition(".")[2].strip("_")


def find_listed(operators):
    """Which of these, given by plain names, are listed; rather one too many."""
    names = [kind for name in listed_names() for kind in OPERATORS.get(name, [name.strip("_")])]
    return {operator for operator in operators if operator.startswith(tuple(names))}


def test_torch_lists_what_it_always_did():
    """Else the text is read wrongly."""
    known = {"conv2d", "nll_loss", "scatter_reduce", "histc", "interpolate", "index_add", "cumsum"}
    assert listed_names() >= known | {"adaptive_avg_pool2d", "bincount", "grid_sample", "put_"}
    assert not {"max_pool2d", "resize_", "relu"} & listed_names(), "not on CUDA"


@pytest.mark.parametrize(
    ("operator", "is_listed"),
    [
        ("aten.histc", True),
        ("aten.convolution_backward", True),
        ("aten._adaptive_avg_pool2d_backward", True),
        ("aten.upsample_bilinear2d_backward", True),
        ("aten.upsample_nearest2d_backward", False),
        ("aten.nll_loss2d_forward", True),
        ("aten.grid_sampler_2d", True),
        ("aten.index_put_", True),
        ("aten.index", False),
        ("aten.max_pool2d_with_indices_backward", False),
        ("aten.add_", False),
    ],
)
def test_listed_operators_are_recognised(operator, is_listed):
    assert bool(find_listed({plain(operator)})) == is_listed


class Recorder(TorchDispatchMode):
    """Notes what is called, forward and backward: `aten.median` and `aten.median.default`."""

    def __init__(self):
        super().__init__()
        self.names = set()
        self.overloads = set()
        self.reductions = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(plain(str(function.overloadpacket)))
        self.overloads.add(str(function))
        if function.overloadpacket is torch.ops.aten.scatter_reduce_:
            self.reductions.add(args[4])
        return function(*args, **(kwargs or {}))


@pytest.fixture
def recorded(tiny_spec, tiny_dataset, tmp_path, monkeypatch):
    """A dense training, a sparse one and its verdict, and a pruning; all of them validate."""
    weights, cfg = tmp_path / "tiny.pt", tmp_path / "tiny.yaml"
    cfg.write_text(yaml.safe_dump(tiny_spec), encoding="utf-8")
    content = build_checkpoint(Model(ModelSpec.from_dict(tiny_spec)), tiny_dataset.names)
    save_checkpoint(weights, content)
    monkeypatch.setattr("utils.training.report.draw", lambda *_: None)
    monkeypatch.setattr(prune, "LATENCY_SECONDS", 0.01)
    data = ("--data", str(tiny_dataset.yaml), "--img", "64", "--device", "cpu")
    data = (*data, "--project", str(tmp_path / "runs"))
    dense = ("--optimizer", "SGD", "--multi-scale", "--amp", "off", "--teacher", str(weights))
    sparse = ("--optimizer", "AdamW", "--bn_sparsity", "--sparsity_rate", "auto", "--amp", "bf16")
    with Recorder() as recorder:
        for kind in (dense, (*sparse, "--sparsity_mode", "proximal")):
            fresh = ("--cfg", str(cfg), "--weights", "", "--epochs", "1", "--batch", "2")
            train.main([*data, *fresh, *kind, "--workers", "0"])
        # One image at a time, or threads that nobody listens to share the NMS.
        ratio = ("--percent", "0.3", "--latency-batch", "1", "--batch-size", "1")
        prune.main([*data, "--weights", str(weights), *ratio])
    return recorder


def documented_names():
    """In the first column of the table."""
    section = PAGE.read_text("utf-8").partition("| operator |")[2].partition("\n\n")[0]
    columns = re.findall(r"^\| ([^|]*) \|", section, re.MULTILINE)
    return {name for column in columns for name in re.findall(r"`(\w+)`", column)}


@pytest.mark.slow
def test_the_page_names_what_has_no_fixed_order(recorded):
    assert recorded.names >= {"convolution_backward", "nms", "max_pool2d_with_indices"}
    assert documented_names() >= find_listed(recorded.names), "explain the others there"
    assert recorded.names >= documented_names(), "these are not used any more"
    # Why some do no harm, as the page says.
    assert recorded.reductions == {"amax"}
    unused = {"median.dim", "scatter_.src", "scatter.src", "scatter_add_.default"}
    unused |= {f"{name}_backward.default" for name in ("upsample_bilinear2d", "index_select")}
    assert not recorded.overloads & {f"aten.{name}" for name in unused}
