"""Files as the releases v6.0 to v7.0 of YOLOv5 write them, made here: all are read.

Classes of the names that such files mention stand in for theirs; what else is in a file (keys of
the checkpoint, attributes of the modules, names of the tensors) is as the files themselves have it.
"""

import sys
from collections import OrderedDict
from pathlib import PurePosixPath
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from utils.checkpoint import load_detector
from utils.torch_archive import foreign_names

NAMES = ["disc", "box", "bar"]
STRIDES = [8.0, 16.0]
COMMON = ("Conv", "Bottleneck", "C3", "SPPF", "Concat")
YOLO = ("Detect", "Model", "DetectionModel")


@pytest.fixture
def classes(monkeypatch):
    """Empty modules that are pickled as those of YOLOv5."""
    made = {}
    for where, names in (("models.common", COMMON), ("models.yolo", YOLO)):
        module = ModuleType(where)
        for name in names:
            made[name] = type(name, (nn.Module,), {"__module__": where})
            setattr(module, name, made[name])
        monkeypatch.setitem(sys.modules, where, module)
    return made


class Builder:
    """The network of `tiny_spec` out of these classes."""

    def __init__(self, classes):
        self.classes = classes

    def make(self, name, **parts):
        module = self.classes[name]()
        for key, part in parts.items():
            setattr(module, key, part)
        return module

    def conv(self, c1, c2, kernel=1, stride=1):
        padding = 2 if kernel == 6 else kernel // 2
        return self.make(
            "Conv",
            conv=nn.Conv2d(c1, c2, kernel, stride, padding, bias=False),
            bn=nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03),
            act=nn.SiLU(inplace=True),
        )

    def c3(self, c1, c2, number=1, add=True):
        half = c2 // 2
        parts = {"cv1": self.conv(c1, half), "cv2": self.conv(c1, half), "cv3": self.conv(c2, c2)}
        inner = [
            self.make(
                "Bottleneck", cv1=self.conv(half, half), cv2=self.conv(half, half, 3), add=add
            )
            for _ in range(number)
        ]
        return self.make("C3", **parts, m=nn.Sequential(*inner))

    def sppf(self, c1, c2):
        pool = nn.MaxPool2d(5, 1, 2)
        return self.make("SPPF", cv1=self.conv(c1, c1 // 2), cv2=self.conv(c1 * 2, c2), m=pool)

    def detect(self, spec, widths):
        head = self.make("Detect", nc=3, no=8, nl=2, na=3, inplace=True)
        head.stride = torch.tensor(STRIDES)
        head.grid = head.anchor_grid = [torch.zeros(1)] * 2
        pixels = torch.tensor(spec["anchors"]).float().view(2, 3, 2)
        head.register_buffer("anchors", pixels / head.stride.view(-1, 1, 1))
        head.m = nn.ModuleList(nn.Conv2d(width, 24, 1) for width in widths)
        return head

    def network(self, kind, spec, names):
        conv, c3 = self.conv, self.c3
        rows = [
            *(conv(3, 8, 6, 2), conv(8, 16, 3, 2), c3(16, 16), conv(16, 16, 3, 2), c3(16, 16, 2)),
            *(conv(16, 32, 3, 2), self.sppf(32, 32), conv(32, 16), nn.Upsample(None, 2)),
            *(self.make("Concat", d=1), c3(32, 16, add=False), conv(16, 16, 3, 2)),
            *(self.make("Concat", d=1), c3(32, 32, add=False), self.detect(spec, (16, 32))),
        ]
        froms = [*[-1] * 9, [-1, 4], -1, -1, [-1, 7], -1, [10, 13]]
        for index, (row, source) in enumerate(zip(rows, froms, strict=True)):
            row.i, row.f, row.type = index, source, type(row).__module__ + "." + type(row).__name__
            row.np = sum(p.numel() for p in row.parameters())
        network = self.make(kind, model=nn.Sequential(*rows), save=[4, 7, 10, 13], nc=3)
        network.yaml, network.names = {**spec, "ch": 3}, names
        network.stride, network.inplace = torch.tensor(STRIDES), True
        network.hyp, network.class_weights = {"lr0": 0.01, "anchor_t": 4.0}, torch.ones(3)
        with torch.no_grad():
            for name, tensor in network.state_dict().items():
                if tensor.is_floating_point() and not name.endswith("anchors"):
                    tensor.uniform_(0.1, 1)
        return network.half().eval()


LATER = (
    *("_backward_pre_hooks", "_forward_hooks_always_called", "_forward_hooks_with_kwargs"),
    *("_forward_pre_hooks_with_kwargs", "_load_state_dict_post_hooks", "_state_dict_pre_hooks"),
    "recompute_scale_factor",
)


def age(network):
    """As modules were before torch 2: ordered mappings, and none of the later attributes."""
    for module in network.modules():
        for name in ("_parameters", "_buffers", "_modules"):
            module.__dict__[name] = OrderedDict(module.__dict__[name])
        for name in LATER:
            module.__dict__.pop(name, None)


DONE = {"epoch": -1, "optimizer": None, "ema": None, "updates": None, "wandb_id": None}
TRAINED = {
    "epoch": 7,
    "best_fitness": np.array([0.5]),
    "updates": 80,
    "optimizer": torch.optim.SGD([nn.Parameter(torch.ones(2))], 0.01, 0.9).state_dict(),
    "wandb_id": None,
}
OPTIONS = {"opt": {"epochs": 3, "imgsz": 64, "cfg": "", "data": PurePosixPath("data/a.yaml")}}
GIT = {"git": {"remote": "https://example.org/a.git", "branch": "master", "commit": "0" * 40}}
DATE = {"date": "2022-11-22T14:09:42.193402"}

# The class of the network, whether its names have numbers, whether torch was older than 2, and what
# the file holds beside it; `ema` True: another network, the better one.
VERSIONS = {
    "v6.0": ("Model", False, True, DONE | {"best_fitness": None, "training_results": None}),
    "v6.0 in training": ("Model", False, True, TRAINED | {"training_results": "1/3", "ema": True}),
    "v6.1": ("Model", False, True, DONE | {"best_fitness": None} | DATE),
    "v6.1 in training": ("Model", False, True, TRAINED | {"ema": True} | DATE),
    "v6.2": ("DetectionModel", True, True, DONE | {"best_fitness": None} | DATE),
    "v6.2 in training": ("DetectionModel", True, True, TRAINED | {"ema": True} | OPTIONS | DATE),
    "v7.0": ("DetectionModel", True, False, DONE | {"best_fitness": None} | OPTIONS | GIT | DATE),
    "v7.0 in training": (
        "DetectionModel", True, False, TRAINED | {"ema": True} | OPTIONS | GIT | DATE
    ),
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_files_of_all_versions_are_read(tiny_spec, classes, tmp_path, monkeypatch, version):
    kind, are_numbered, is_old, content = VERSIONS[version]
    torch.manual_seed(7)
    builder, names = Builder(classes), dict(enumerate(NAMES)) if are_numbered else NAMES
    networks = {"model": builder.network(kind, tiny_spec, names)}
    if content["ema"]:
        networks["ema"] = builder.network(kind, tiny_spec, names)
    expected = OrderedDict(networks.get("ema", networks["model"]).state_dict())
    if is_old:
        for network in networks.values():
            age(network)
    path = tmp_path / "public.pt"
    torch.save(content | networks, path)
    monkeypatch.undo()  # nothing of the classes is needed to read it

    assert {f"models.yolo.{kind}", "models.common.SPPF"} <= set(foreign_names(path))
    model, found_names, own = load_detector(path)
    assert (found_names, own) == (tuple(NAMES), {})
    tensors = model.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        whole = expected[name].float() if expected[name].is_floating_point() else expected[name]
        assert torch.equal(tensor, whole), name
    assert [list(row) for row in model.spec.anchors] == tiny_spec["anchors"]
    assert model.head.strides.tolist() == STRIDES
    assert not model.spec.is_pruned
