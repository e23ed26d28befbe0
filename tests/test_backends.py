"""Networks in any format: same predictions, metadata read back, clear errors."""

import dataclasses
import importlib
import json
import math
import os
import re
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from models import Model, ModelSpec
from utils import backends
from utils.backends import (
    ENGINE_LENGTH,
    TORCHSCRIPT_EXTRA,
    import_runtime,
    is_exported,
    load_network,
    metadata_from_json,
    metadata_to_json,
)
from utils.checkpoint import build_checkpoint, save_checkpoint
from utils.export_metadata import ExportMetadata
from utils.exports import (
    Exporter,
    NmsSettings,
    write_engine,
    write_openvino,
    write_torchscript,
)
from utils.nms import non_max_suppression, split_detections

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
NAMES = ("disc", 'it\'s a "box"', "Stange é")
RUNTIMES = {"onnx": ("onnx", "onnxruntime"), "torchscript": (), "openvino": ("onnx", "openvino")}
SIDE = 64


@torch.no_grad()
def lively_model(spec_dict, seed=0):
    """A network with folded BN whose scores and boxes vary."""
    generator = torch.Generator().manual_seed(seed)
    model = Model(ModelSpec.from_dict(spec_dict)).eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            bound = 1.15 * (6 / module.weight[0].numel()) ** 0.5  # keeps the signal strong
            module.weight.uniform_(-bound, bound, generator=generator)
            if module.bias is not None:
                module.bias.uniform_(-1, 1, generator=generator)
    return model


@pytest.fixture
def model(tiny_spec):
    return lively_model(tiny_spec)


def facts(model, **changes):
    anchors = tuple(map(tuple, model.head.anchors_px.flatten(1).tolist()))
    metadata = ExportMetadata(NAMES, 16, (SIDE, SIDE), 1, False, anchors, "float32", False)
    return dataclasses.replace(metadata, **changes)


def export(model, export_format, folder, nms=None, **changes):
    for package in RUNTIMES[export_format]:
        pytest.importorskip(package)
    metadata = facts(model, has_nms=nms is not None, **changes)
    return Exporter(model.fuse(), metadata, opset=13, nms=nms).write(export_format, folder, "x")


def pictures(count=3, height=SIDE, width=SIDE):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def predictions_of(network, images):
    return network(images)[0]


# --------------------------------------------------------------------------------- predictions
@pytest.mark.parametrize("export_format", RUNTIMES)
def test_same_predictions_for_any_number_of_images(export_format, model, tmp_path):
    path = export(model, export_format, tmp_path, batch_size=2)
    network = load_network(path, CPU)
    assert (network.format, network.names, network.stride) == (export_format, NAMES, 16)
    assert (network.imgsz_hw, network.batch_size, network.has_nms) == ((SIDE, SIDE), 2, False)
    assert network.precision == torch.float32
    for count in (1, 2, 3):
        predictions, logits = network(pictures(count))
        expected = predictions_of(model, pictures(count))
        torch.testing.assert_close(predictions, expected, rtol=1e-4, atol=1e-3)
        assert logits == []


@pytest.mark.parametrize("export_format", RUNTIMES)
def test_channels_last_and_no_parameters(export_format, model, tmp_path):
    network = load_network(export(model, export_format, tmp_path), CPU)
    images = pictures(1)
    expected = predictions_of(model, images)
    found = predictions_of(network, images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert list(network.parameters()) == []  # a cast of the module must not reach the weights


@pytest.mark.parametrize("export_format", RUNTIMES)
def test_another_size_is_refused(export_format, model, tmp_path):
    path = export(model, export_format, tmp_path, imgsz_hw=(SIDE, 96))
    network = load_network(path, CPU)
    assert predictions_of(network, pictures(1, SIDE, 96)).shape[0] == 1
    with pytest.raises(ValueError, match=r"x.*takes images of 96 x 64 pixels .* not 64 x 64"):
        network(pictures(1))


@pytest.mark.parametrize("export_format", ["onnx", "openvino"])
def test_dynamic_takes_all_sizes(export_format, model, tmp_path):
    network = load_network(export(model, export_format, tmp_path, dynamic=True), CPU)
    assert (network.imgsz_hw, network.batch_size) == (None, None)
    for shape in ((1, 64, 64), (3, 96, 32), (2, 32, 128)):
        images = pictures(*shape)
        found, expected = predictions_of(network, images), predictions_of(model, images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("export_format", RUNTIMES)
def test_half_takes_and_gives_float32(export_format, model, tmp_path):
    network = load_network(export(model, export_format, tmp_path, precision="float16"), CPU)
    found, expected = predictions_of(network, pictures(1)), predictions_of(model, pictures(1))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=1.0)
    assert not torch.equal(found, expected)


@pytest.mark.parametrize("export_format", RUNTIMES)
@pytest.mark.parametrize("max_det", [5, 400])
def test_nms_inside_the_graph(export_format, max_det, model, tmp_path):
    settings = NmsSettings(0.2, 0.45, max_det)
    path = export(model, export_format, tmp_path, nms=settings, batch_size=2)
    network = load_network(path, CPU)
    images = pictures(2)
    expected = non_max_suppression(predictions_of(model, images), 0.2, 0.45, max_det=max_det)
    assert min(map(len, expected)) > 3, "nothing to see"
    padded = predictions_of(network, images)
    assert network.has_nms
    assert padded.shape == (2, max_det, 6)
    for ours, theirs in zip(split_detections(padded), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("export_format", RUNTIMES)
def test_nms_of_nothing(export_format, model, tmp_path):
    path = export(model, export_format, tmp_path, nms=NmsSettings(0.999, 0.45, 20))
    padded = predictions_of(load_network(path, CPU), pictures(1))
    assert padded.shape == (1, 20, 6)
    assert [len(rows) for rows in split_detections(padded)] == [0]


@pytest.mark.parametrize("export_format", ["onnx", "openvino"])
def test_nms_with_free_sizes(export_format, model, tmp_path):
    path = export(model, export_format, tmp_path, nms=NmsSettings(0.2, 0.45, 50), dynamic=True)
    network = load_network(path, CPU)
    assert (network.imgsz_hw, network.batch_size) == (None, 1)
    images = pictures(2, 96, 32)
    expected = non_max_suppression(predictions_of(model, images), 0.2, 0.45, max_det=50)
    for ours, theirs in zip(
        split_detections(predictions_of(network, images)), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_checkpoints_are_folded_and_take_any_size(tiny_spec, tmp_path):
    model = lively_model(tiny_spec)
    save_checkpoint(tmp_path / "x.pt", build_checkpoint(model, NAMES))
    network = load_network(tmp_path / "x.pt", CPU)
    assert (network.format, network.names, network.stride) == ("pytorch", NAMES, 16)
    assert (network.imgsz_hw, network.batch_size) == (None, None)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    images = pictures(2, 96, 32)
    torch.testing.assert_close(
        predictions_of(network, images), predictions_of(model, images), rtol=1e-4, atol=1e-3
    )
    half = load_network(tmp_path / "x.pt", CPU, half=True)
    assert half.precision == next(half.parameters()).dtype == torch.float16


# ------------------------------------------------------------------------------------ metadata
@pytest.mark.parametrize("export_format", RUNTIMES)
def test_metadata_round_trip(export_format, model, tmp_path):
    written = facts(model, batch_size=3)
    network = load_network(export(model, export_format, tmp_path, batch_size=3), CPU)
    assert network.metadata == written


def test_stock_programs_find_names_and_stride(model, tmp_path):
    """They read them so: ONNX properties, an extra file of TorchScript, a yaml of OpenVINO."""
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(str(export(model, "onnx", tmp_path)))
    properties = session.get_modelmeta().custom_metadata_map
    assert properties["stride"] == "16"
    assert properties["names"] == repr(dict(enumerate(NAMES)))
    extra = {TORCHSCRIPT_EXTRA: ""}
    torch.jit.load(export(model, "torchscript", tmp_path), _extra_files=extra)
    content = json.loads(extra[TORCHSCRIPT_EXTRA])
    assert int(content["stride"]) == 16
    assert {int(number): name for number, name in content["names"].items()} == dict(
        enumerate(NAMES)
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("names", None, "says nothing about its names"),
        ("names", "{1: 'a'}", "damaged"),
        ("names", "__import__('os')", "damaged"),
        ("imgsz", "[64]", "damaged"),
        ("stride", "wide", "damaged"),
        ("nms", "maybe", "damaged"),
        ("anchors", "7", "damaged"),
        ("task", "segment", "made for task 'segment'"),
        ("precision", "int3", "'int3'"),
    ],
)
def test_wrong_metadata(model, key, value, message):
    text = facts(model).to_text()
    if value is None:
        del text[key]
    else:
        text[key] = value
    with pytest.raises(ValueError, match=message):
        ExportMetadata.from_text(text, "a.onnx")


def test_metadata_as_json(model, tmp_path):
    metadata = facts(model)
    text = metadata_from_json(metadata_to_json(metadata), tmp_path)
    assert ExportMetadata.from_text(text, "a") == metadata
    assert metadata_from_json("", tmp_path) == {}
    for broken in (b"\xff\xfe", "[1, 2]", "{", '{"names": {"a": "b"}}'):
        with pytest.raises(ValueError, match=r"not written by export\.py"):
            metadata_from_json(broken, tmp_path)


# -------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("name", ["a.pt", "a.onnx", "a.torchscript", "a_openvino_model", "a.xml"])
def test_a_missing_file(tmp_path, name):
    with pytest.raises(FileNotFoundError, match="no such weights file"):
        load_network(tmp_path / name, CPU)


@pytest.mark.parametrize("content", [b"", b"no network", b"\x08\x07\x12\x04abcd" * 10])
@pytest.mark.parametrize("name", ["a.pt", "a.onnx", "a.torchscript", "a.xml"])
def test_a_damaged_file(tmp_path, name, content):
    if name in ("a.onnx", "a.xml"):
        pytest.importorskip("onnxruntime" if name == "a.onnx" else "openvino")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.\w+: not a") as caught:
        load_network(tmp_path / name, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("export_format", RUNTIMES)
def test_half_a_file(export_format, model, tmp_path):
    path = export(model, export_format, tmp_path)
    path = path / "x.bin" if path.is_dir() else path
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    path = path.parent if path.suffix == ".bin" else path
    with pytest.raises(ValueError, match="not a readable") as caught:
        load_network(path, CPU)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["../secret.bin", "{tmp}/secret.bin", "beside.bin", "link.bin"])
def test_onnx_files_cannot_have_other_files_read(tmp_path, place):
    onnx = pytest.importorskip("onnx")
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("secret.bin", "in/beside.bin"):
        (tmp_path / name).write_bytes(bytes(48))
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    weights = onnx.TensorProto(name="w", data_type=1, dims=[1, 2, 6], data_location=1)
    for key, value in {"location": place.format(tmp=tmp_path), "length": "48"}.items():
        weights.external_data.add(key=key, value=value)
    nodes = [
        onnx.helper.make_node("ReduceMean", ["images"], ["m"], keepdims=0),
        onnx.helper.make_node("Add", ["w", "m"], ["output0"]),
    ]
    ends = [onnx.helper.make_tensor_value_info(name, 1, size) for name, size in
            {"images": [1, 3, 64, 64], "output0": [1, 2, 6]}.items()]  # fmt: skip
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], [weights])
    opset = onnx.helper.make_opsetid("", 17)
    content = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    (folder / "x.onnx").write_bytes(content.SerializeToString())
    with pytest.raises(
        ValueError, match=r"x.onnx: not a readable.*weights in other files"
    ) as caught:
        load_network(folder / "x.onnx", torch.device("cpu"))
    assert "secret" not in str(caught.value)


def test_openvino_reads_nothing_but_its_own_format(model, tmp_path):
    """It also takes ONNX, with whatever that refers to, from a file of any name."""
    pytest.importorskip("openvino")
    path = export(model, "onnx", tmp_path)
    with pytest.raises(ValueError, match=r"x\.xml: not a readable OpenVINO model .'no XML'"):
        load_network(path.rename(path.with_suffix(".xml")), CPU)


def test_openvino_entries_that_hold_others(model, tmp_path):
    folder = write_reshaping("openvino", tmp_path, facts(model), 1, 384, 8)
    xml = folder / "x.xml"
    text = re.sub("<names [^>]*>", '<names><a value="b" /></names>', xml.read_text("utf-8"))
    xml.write_text(text, "utf-8")
    with pytest.raises(ValueError, match="x_openvino_model: says nothing about its names"):
        load_network(folder, CPU)


def test_foreign_files(model, tmp_path):
    onnx = pytest.importorskip("onnx")
    path = export(model, "onnx", tmp_path)
    content = onnx.load(str(path))
    del content.metadata_props[:]
    onnx.save(content, str(path))
    with pytest.raises(ValueError, match=r"not written by export\.py"):
        load_network(path, CPU)
    script = torch.jit.trace(nn.Identity(), torch.zeros(1))
    torch.jit.save(script, tmp_path / "b.torchscript")
    with pytest.raises(ValueError, match=r"not written by export\.py"):
        load_network(tmp_path / "b.torchscript", CPU)


class Reshaping(nn.Module):
    """Fits the images that it is traced with, and no others."""

    def __init__(self, *shape, dtype=torch.float32):
        super().__init__()
        self.shape, self.dtype = shape, dtype

    def forward(self, images):
        return images.reshape(self.shape).to(self.dtype)


def write_reshaping(export_format, folder, metadata, *shape, dtype=torch.float32):
    """A file that loads in any format: what it says about itself is in order."""
    for package in RUNTIMES[export_format]:
        pytest.importorskip(package)
    graph = Reshaping(*shape, dtype=dtype)
    if export_format == "torchscript":
        path = folder / "x.torchscript"
        side = math.isqrt(math.prod(shape) // 3)
        write_torchscript(graph, torch.zeros(1, 3, side, side), metadata, path)
        return path
    onnx = importlib.import_module("onnx")
    path = folder / "x.onnx"
    constant = onnx.helper.make_tensor("shape", 7, [len(shape)], shape)
    nodes = [onnx.helper.make_node("Reshape", ["images", "shape"], ["output0"])]
    ends = [
        onnx.helper.make_tensor_value_info("images", 1, [1, 3, "height", "width"]),
        onnx.helper.make_tensor_value_info("output0", 1, shape),
    ]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], [constant])
    opset = onnx.helper.make_opsetid("", 13)
    content = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=8)
    onnx.helper.set_model_props(content, metadata.to_text())
    onnx.save(content, str(path))
    if export_format == "openvino":
        write_openvino(path, metadata, folder / "x_openvino_model", "x")
        return folder / "x_openvino_model"
    return path


@pytest.mark.usefixtures("two_threads")  # with one OpenVINO returns an array and no error
@pytest.mark.parametrize("export_format", RUNTIMES)
def test_a_file_that_loads_and_fails_is_told_in_one_line(export_format, model, tmp_path, capfd):
    path = write_reshaping(export_format, tmp_path, facts(model), 1, 384, 8)
    network = load_network(path, CPU)
    capfd.readouterr()
    with pytest.raises(
        ValueError, match=r"x\w*(\.\w+)?: its runtime fails \(.*[Rr]esh|shape"
    ) as caught:
        network(pictures(1))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.endswith("export the .pt file again")
    assert "\n" not in message
    assert len(message) < len(str(path)) + 320
    assert capfd.readouterr() == ("", ""), "the runtime need not say it again"


@pytest.mark.parametrize(
    ("shape", "dtype", "has_nms", "problem"),
    [
        ((1, 3072, 4), torch.float32, False, r"float32 \[1, 3072, 4\] where .* \[1, N, 8\]"),
        ((1536, 8), torch.float32, False, r"float32 \[1536, 8\] where"),
        ((2, 768, 8), torch.float32, False, r"float32 \[2, 768, 8\] where"),
        ((1, 1536, 8), torch.float32, True, r"float32 \[1, 1536, 8\] where .* \[1, M, 6\]"),
        ((1, 1536, 8), torch.int64, False, r"int64 \[1, 1536, 8\] where"),
        ((1, 2048, 6), torch.float32, True, "classes that it has no names for"),
    ],
)
def test_a_file_that_gives_something_else(shape, dtype, has_nms, problem, model, tmp_path):
    metadata = facts(model, has_nms=has_nms)
    path = write_reshaping("torchscript", tmp_path, metadata, *shape, dtype=dtype)
    network = load_network(path, CPU)
    with pytest.raises(ValueError, match=rf"x.*: gives {problem}.*: export the \.pt"):
        network(torch.full((1, 3, SIDE, SIDE), float(len(NAMES))))


@pytest.mark.parametrize("cls", [1.5, -1.0, -0.5, float("nan"), float("inf"), len(NAMES) - 0.5])
@pytest.mark.parametrize("export_format", RUNTIMES)
def test_classes_are_whole_numbers_that_have_names(export_format, cls, model, tmp_path):
    path = write_reshaping(export_format, tmp_path, facts(model, has_nms=True), 1, 2048, 6)
    network = load_network(path, CPU)
    assert network(torch.full((1, 3, SIDE, SIDE), 1.0))[0].shape == (1, 2048, 6)
    with pytest.raises(ValueError, match="gives classes that it has no names for"):
        network(torch.full((1, 3, SIDE, SIDE), cls))


@pytest.mark.parametrize("export_format", RUNTIMES)
def test_names_that_are_no_utf8_are_names(export_format, model, tmp_path):
    path = export(model, export_format, tmp_path)
    try:
        odd = path.rename(tmp_path / os.fsdecode(b"na\xefve" + os.fsencode(path.name)))
    except OSError:
        pytest.skip("this file system takes no such names")
    assert load_network(odd, CPU)(pictures(1))[0].shape[0] == 1


def test_memory_that_runs_out_is_no_fault_of_the_file(model, tmp_path, monkeypatch):
    network = load_network(export(model, "torchscript", tmp_path), CPU)
    monkeypatch.setattr(network, "infer", lambda images: torch.empty(10**16))
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        network(pictures(1))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Expand "
            "node. Name:'/x' Status Message: arena.cc:376 Failed to allocate memory for requested "
            "buffer of size 384000000000",
            MemoryError,
        ),
        ("in the TorchScript interpreter.\nRuntimeError: CUDA out of memory. Tried", MemoryError),
        (
            "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Reshape "
            "node. Name:'/x' Status Message: helper.h:47 the input cannot be reshaped",
            ValueError,
        ),
    ],
)
def test_what_runtimes_say_is_understood(model, tmp_path, monkeypatch, error, expected):
    def fail(_):
        raise RuntimeError(error)

    network = load_network(export(model, "torchscript", tmp_path), CPU)
    monkeypatch.setattr(network, "infer", fail)
    remedy = "smaller --batch-size" if expected is MemoryError else "cannot be reshaped.*export the"
    with pytest.raises(expected, match=rf"{network.path.name}: .*{remedy}"):
        network(pictures(1))


def test_a_file_that_gives_no_tensor(model, tmp_path, monkeypatch):
    network = load_network(export(model, "torchscript", tmp_path), CPU)
    monkeypatch.setattr(network, "infer", lambda images: (images, images))
    with pytest.raises(ValueError, match="gives a tuple where one tensor is expected"):
        network(pictures(1))


def test_damaged_packing_of_torchscript(model, tmp_path):
    path = export(model, "torchscript", tmp_path)
    with zipfile.ZipFile(path) as archive:
        code = next(part for part in archive.infolist() if part.filename.endswith(".py"))
    content = bytearray(path.read_bytes())
    name_and_more = struct.unpack_from("<HH", content, code.header_offset + 26)
    content[code.header_offset + 30 + sum(name_and_more)] |= 0b110  # no such kind of block
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.torchscript: not a readable TorchScript file \("):
        load_network(path, CPU)


def test_signals_reach_python_after_openvino_networks_are_gone(model, tmp_path):
    """They once crashed it: freed memory was left behind as the stack for signals."""
    path = export(model, "openvino", tmp_path)
    code = """
import signal, sys, torch
from utils.backends import load_network
first, second = (load_network(sys.argv[1], torch.device("cpu")) for _ in range(2))
del first
del second
signal.signal(signal.SIGINT, lambda *_: print("heard"))
signal.raise_signal(signal.SIGINT)
"""
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


def test_openvino_reports_to_nobody(monkeypatch):
    """Its package for that is not loaded; it comes with OpenVINO."""
    pytest.importorskip("openvino")
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    import_runtime("openvino", "a.xml")
    with pytest.raises(ImportError):
        importlib.import_module("openvino_telemetry")


def test_an_empty_openvino_folder(tmp_path):
    pytest.importorskip("openvino")
    (tmp_path / "a_openvino_model").mkdir()
    with pytest.raises(ValueError, match=r"no \.xml file"):
        load_network(tmp_path / "a_openvino_model", CPU)


def test_other_suffixes_and_half(tmp_path, model):
    (tmp_path / "a.tflite").touch()
    with pytest.raises(ValueError, match="not a known format"):
        load_network(tmp_path / "a.tflite", CPU)
    path = export(model, "torchscript", tmp_path)
    with pytest.raises(ValueError, match="leave --half away"):
        load_network(path, CPU, half=True)
    assert [is_exported(name) for name in ("a.pt", "a.onnx", "b_openvino_model", "yolov5s")] == [
        False, True, True, False,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "package"), [("a.onnx", "onnxruntime"), ("a_openvino_model", "openvino")]
)
def test_a_missing_package_is_named(monkeypatch, tmp_path, name, package):
    hide(monkeypatch, package)
    (tmp_path / name).touch()
    message = rf"{name}: needs {package}: pip install -r requirements-export.txt"
    with pytest.raises(ValueError, match=message):
        load_network(tmp_path / name, CPU)


def hide(monkeypatch, *packages):
    """Let imports of these fail as if they were not installed."""
    real = importlib.import_module

    def fake(name):
        if name.partition(".")[0] in packages:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
        return real(name)

    monkeypatch.setattr(backends.importlib, "import_module", fake)


def test_a_package_that_does_not_load(monkeypatch):
    def fake(name):
        raise ImportError("libfoo.so.3: no such file")

    monkeypatch.setattr(backends.importlib, "import_module", fake)
    with pytest.raises(ValueError, match=r"onnxruntime does not load here \(libfoo"):
        import_runtime("onnxruntime", "x.onnx")


# ------------------------------------------------------------------------------------ TensorRT
class FakeTensorrt:
    """As much of TensorRT as the writer calls; the engine is what it read."""

    __version__ = "10.0"
    NetworkDefinitionCreationFlag = SimpleNamespace(STRONGLY_TYPED=1)
    fails = False

    class Logger:
        WARNING = 1

        def __init__(self, level):
            pass

    class Builder:
        def __init__(self, logger):
            pass

        def create_network(self, flags):
            return {"flags": flags}

        def create_builder_config(self):
            return None

        def build_serialized_network(self, network, config):
            return network["content"]

    class OnnxParser:
        num_errors = 1

        def __init__(self, network, logger):
            self.network = network

        def parse_from_file(self, path):
            with open(path, "rb") as file:  # noqa: PTH123
                self.network["content"] = file.read()
            return bool(self.network["content"])

        def get_error(self, number):
            return "no nodes"


def test_engine_files_begin_with_the_metadata(monkeypatch, tmp_path, model):
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", FakeTensorrt)
    (tmp_path / "a.onnx").write_bytes(b"graph")
    metadata = facts(model)
    write_engine(tmp_path / "a.onnx", metadata, tmp_path / "a.engine")
    content = (tmp_path / "a.engine").read_bytes()
    (length,) = ENGINE_LENGTH.unpack_from(content)
    text = metadata_from_json(content[4 : 4 + length], tmp_path)
    assert ExportMetadata.from_text(text, "a.engine") == metadata
    assert content[4 + length :] == b"graph"
    (tmp_path / "a.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match="cannot read the network: no nodes"):
        write_engine(tmp_path / "a.onnx", metadata, tmp_path / "b.engine")


def test_an_engine_needs_a_gpu(tmp_path):
    (tmp_path / "a.engine").touch()
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, not cpu"):
        load_network(tmp_path / "a.engine", CPU)
