"""TorchScript files are programs; only those that compute a detector are opened."""

import warnings
import zipfile

import pytest
import torch

from models import Model, ModelSpec
from models.blocks import ACTIVATIONS
from utils.backends import load_network
from utils.export_metadata import ExportMetadata
from utils.exports import ExportGraph, NmsSettings, write_torchscript
from utils.torchscript_check import check_torchscript

METADATA = ExportMetadata(
    ("a", "b", "c"), 16, (64, 64), 1, False, ((1.0, 2.0),) * 2, "float32", False
)


def write(spec, path, activation="SiLU", nms=None, imgsz_hw=(64, 64), half=False, mode="nearest"):
    spec = spec | {"activation": activation}
    spec["head"][1][3][2] = mode
    model = Model(ModelSpec.from_dict(spec)).eval().fuse()
    graph = ExportGraph(model.half() if half else model, imgsz_hw, nms)
    write_torchscript(graph, torch.zeros(1, 3, 64, 64), METADATA, path)


_WRITTEN: list[bytes] = []  # tracing takes its time


@pytest.fixture
def script(tiny_spec, tmp_path):
    path = tmp_path / "x.torchscript"
    if not _WRITTEN:
        write(tiny_spec, path)
        _WRITTEN.append(path.read_bytes())
    path.write_bytes(_WRITTEN[0])
    return path


@pytest.mark.parametrize(
    "options",
    [
        *({"activation": activation} for activation in ACTIVATIONS),
        {"nms": NmsSettings(0.25, 0.45, 10)},
        {"nms": NmsSettings(0.25, 0.45, 10), "imgsz_hw": None},
        {"imgsz_hw": None},
        {"half": True},
        {"mode": "bilinear"},
    ],
    ids=str,
)
def test_what_export_writes_passes(tiny_spec, tmp_path, options):
    write(tiny_spec, tmp_path / "x.torchscript", **options)
    check_torchscript(tmp_path / "x.torchscript")


def rewritten(path, change) -> None:
    """Change the source of the whole graph."""
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            is_graph = "/code/" in name and "/utils/exports" in name and name.endswith(".py")
            archive.writestr(name, change(content.decode()).encode() if is_graph else content)


def before_the_end(line: str):
    """Add a line before the first `return`."""
    return lambda text: text.replace("    return ", f"    {line}\n    return ", 1)


ATTACKS = {
    "save": ("torch.save(images, {proof})", "a call of torch.save"),
    "save with a blank": ("torch . save(images, {proof})", "a call of torch.save"),
    "method": ("(images).save({proof})", "a call of images.save"),
    "map a file": ("y = torch.from_file({proof}, True, 10)", "a call of torch.from_file"),
    "operator by path": ("ops.aten.save(images, {proof})", "a call of ops.aten.save"),
    "alias": ("t = torch", "torch by itself"),
    "alias of a function": ("f = torch.save", "torch by itself"),
    "getattr": ("y = getattr(torch, 'save')", "torch by itself"),
    "called getattr": ("y = getattr(images, 'save')({proof})", "a call of getattr"),
    "class of C++": ("y = __torch__.torch.classes.x.Y()", "a call of __torch__"),
    "loop": ("while True:\n      pass", "the statement While"),
    "for": ("for i in range(9):\n      pass", "the statement For"),
    "import": ("import os", "the statement Import"),
    "comment": ("y = 1  # type: ignore", "unusual characters"),
    "text": ("y = 'ä'", "unusual characters"),
    "no Python": ("y = = 1", "no straight program"),
    "print": ("print(images)", "the statement Expr"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_more_than_a_detector_is_refused(script, tmp_path, name):
    path, proof = script, tmp_path / "proof"
    line, complaint = ATTACKS[name]
    rewritten(path, before_the_end(line.replace("{proof}", f'"{proof}"')))
    with pytest.raises(ValueError, match=r"x.torchscript: refused before any") as caught:
        load_network(path, torch.device("cpu"))
    assert complaint in str(caught.value) or "the statement Expr" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not proof.exists()


def test_such_a_file_would_write_files(script, tmp_path):
    """What the check is for: torch itself runs it."""
    path, proof = script, tmp_path / "proof"
    rewritten(path, before_the_end(f'torch.save(images, "{proof}")'))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.load(path)(torch.zeros(1, 3, 64, 64))
    assert proof.exists()


def test_state_methods_and_bombs(script, tmp_path):
    path = script
    rewritten(path, lambda text: text.replace("def forward(", "def __setstate__(", 1))
    with pytest.raises(ValueError, match="the method __setstate__"):
        check_torchscript(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/code/a.py", b" " * 70_000_000)
    with pytest.raises(ValueError, match="unfolds to too much"):
        check_torchscript(path)
    path.write_bytes(b"    PTMF" + path.read_bytes())
    with pytest.raises(ValueError, match="does not begin as an archive"):
        check_torchscript(path)
