"""export.py from its command line to its files, and val.py on what it wrote."""

import json
import shutil
import subprocess
import sys
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import detect
import export
import val
from benchmarks import formats
from models import Model, ModelSpec
from utils import backends, exports
from utils.backends import load_network
from utils.checkpoint import build_checkpoint, load_detector, save_checkpoint
from utils.config import load_dataset_spec
from utils.export_check import (
    Difference,
    check_difference,
    compare_detections,
    compare_predictions,
    synthetic_pictures,
)
from utils.export_metadata import ExportMetadata
from utils.flags.export import parse_args
from utils.nms import non_max_suppression
from utils.pruning.channel_groups import find_channel_groups
from utils.pruning.keep_masks import select_keep_masks
from utils.pruning.rewrite import prune_model
from utils.pruning.slimming import gamma_importance

NAMES = ("disc", "box", "bar")
CPU = torch.device("cpu")


@torch.no_grad()
def pruned_model(tiny_spec):
    """A network whose scores vary, without a third of its channels."""
    generator = torch.Generator().manual_seed(0)
    model = Model(ModelSpec.from_dict(tiny_spec)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1.5, generator=generator)
        elif isinstance(module, nn.Conv2d):
            bound = 1.25 * (6 / module.weight[0].numel()) ** 0.5  # keeps the signal strong
            module.weight.uniform_(-bound, bound, generator=generator)
            if module.bias is not None:
                module.bias.uniform_(-1, 1, generator=generator)
    groups = find_channel_groups(model)
    importance = gamma_importance(model, groups)
    slim = prune_model(model, groups, select_keep_masks(importance, 0.3, min_channels=4).masks)
    assert sum(slim.widths().values()) < sum(model.widths().values())
    return slim


@pytest.fixture
def weights(tiny_spec, tmp_path):
    path = tmp_path / "weights" / "tiny.pt"
    path.parent.mkdir()
    save_checkpoint(path, build_checkpoint(pruned_model(tiny_spec), NAMES))
    return path


def files_beside(weights):
    return sorted(path.name for path in weights.parent.iterdir() if path != weights)


def usual_decoding(raw, conf_thres, iou_thres):
    """Boxes [M, 6] as programs for stock YOLOv5 ONNX files get them with OpenCV, best first."""
    confidence = raw[:, 4] * raw[:, 5:].max(1)
    rows = raw[confidence > conf_thres]
    scores, classes = rows[:, 4] * rows[:, 5:].max(1), rows[:, 5:].argmax(1)
    top_left = rows[:, :2] - rows[:, 2:4] / 2
    corners = np.concatenate((top_left, rows[:, 2:4]), 1)  # x, y, w, h
    kept = cv2.dnn.NMSBoxesBatched(
        corners.tolist(), scores.tolist(), classes.tolist(), conf_thres, iou_thres
    )
    kept = np.array(kept, int).reshape(-1)
    found = np.concatenate(
        (top_left, top_left + rows[:, 2:4], scores[:, None], classes[:, None]), 1
    )[kept]
    return found[np.argsort(-found[:, 4], kind="stable")]


# ------------------------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--include", "tflite"], "invalid choice"),
        (["--img", "0"], "--imgsz is 0, expected at least 32"),
        (["--img", "64", "64", "3"], "--imgsz takes one or two numbers, not 3"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--opset", "9"], "--opset is 9, expected 12 to 20"),
        (["--int8", "--half", "--data", "a.yaml"], "--int8 and --half exclude each other"),
        (["--int8"], "--int8 needs --data"),
        (["--int8", "--data", "a", "--opset", "12"], "--int8 needs --opset 13 or later"),
        (["--int8", "--data", "a", "--include", "torchscript"], "--int8 does not act on torch"),
        (["--dynamic", "--include", "onnx", "engine"], "--dynamic does not act on engine"),
        (["--nms", "--include", "engine"], "--nms does not act on engine"),
        (["--conf-thres", "0.3"], "--conf-thres acts only with --nms"),
        (["--nms", "--iou-thres", "2"], "--iou-thres is 2.0, expected 0 to 1"),
        (["--max-det", "5"], "--max-det acts only with --nms"),
        (["--calib-images", "5"], "--calib-images acts only with --int8"),
        (["--simplify", "--include", "torchscript"], "--simplify acts only on onnx"),
        (["--opset", "13", "--include", "torchscript"], "--opset acts only on onnx"),
        (["--device", "mars"], "--device mars"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        export.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_spellings_and_defaults():
    options = parse_args(["--img", "320", "--batch", "2", "--include", "onnx", "onnx"])
    assert (options.imgsz, options.batch_size, options.include) == ([320], 2, ["onnx"])
    assert (options.opset, options.conf_thres, options.iou_thres) == (13, 0.25, 0.45)
    assert parse_args(["--imgsz", "256", "320"]).imgsz == [256, 320]


def test_help_does_not_load_torch():
    code = (
        "import runpy, sys; sys.argv = ['export.py', '--help']\n"
        "try: runpy.run_path('export.py', run_name='__main__')\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=export.ROOT, capture_output=True, text=True
    )
    assert result.stdout.splitlines()[-1] == "False", result.stderr


# --------------------------------------------------------------------------------- whole exports
def test_export_without_data(weights, caplog):
    for package in ("onnx", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    caplog.set_level("INFO")
    include = ["--include", "onnx", "torchscript", "openvino"]
    export.main(["--weights", str(weights), "--img", "64", *include])
    assert files_beside(weights) == ["tiny.onnx", "tiny.torchscript", "tiny_openvino_model"]
    assert "no --data" in caplog.text
    assert "ONNX opset 13" in caplog.text
    assert caplog.text.count("boxes differ by 0.00") == 3
    network = load_network(weights.with_suffix(".onnx"), CPU)
    assert (network.names, network.stride, network.imgsz_hw) == (NAMES, 16, (64, 64))


def test_export_again_replaces_what_is_there(weights):
    pytest.importorskip("openvino")
    command = ["--weights", str(weights), "--include", "openvino", "--img"]
    export.main([*command, "64"])
    old = weights.parent / "tiny_openvino_model" / "old.txt"
    old.touch()
    export.main([*command, "96"])
    assert not old.exists()
    assert files_beside(weights) == ["tiny_openvino_model"]
    assert load_network(weights.parent / "tiny_openvino_model", CPU).imgsz_hw == (96, 96)


def test_what_answers_otherwise_has_a_name_of_its_own(weights, caplog):
    caplog.set_level("INFO")
    command = ["--weights", str(weights), "--img", "64", "--include", "torchscript"]
    for flags in ([], ["--half", "--nms"]):
        export.main([*command, *flags])
        assert "replaces" not in caplog.text
    assert files_beside(weights) == ["tiny.torchscript", "tiny_half_nms.torchscript"]
    export.main(command)
    assert caplog.messages[-1].endswith(" s, replaces the one before")


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ([], "tiny.onnx"),
        (["--half"], "tiny_half.onnx"),
        (["--nms", "--conf-thres", "0.01"], "tiny_nms.onnx"),
        (["--dynamic"], "tiny.onnx"),
    ],
)
def test_export_with_data_says_both_map(weights, tiny_dataset, caplog, flag, name):
    pytest.importorskip("onnxruntime")
    caplog.set_level("INFO")
    data = ["--data", str(tiny_dataset.yaml)]
    export.main(["--weights", str(weights), "--img", "96", "128", *data, *flag])
    assert "onnx on 4 images: mAP@.5 0." in caplog.text
    assert "; torch 0." in caplog.text
    assert "onnx at 96 x 128: boxes differ by" in caplog.text
    assert ("onnx at 112 x 112: boxes" in caplog.text) == ("--dynamic" in flag)
    assert files_beside(weights) == [name]


@pytest.mark.parametrize("export_format", ["onnx", "openvino"])
def test_int8(weights, tiny_dataset, export_format, caplog):
    for package in ("onnxruntime", export_format):
        pytest.importorskip(package)
    onnx = pytest.importorskip("onnx")
    caplog.set_level("INFO")
    command = ["--weights", str(weights), "--img", "96", "--data", str(tiny_dataset.yaml)]
    export.main([*command, "--include", export_format, "--int8", "--batch", "3"])
    assert "calibrating with 4 of 4 training images" in caplog.text
    (name,) = files_beside(weights)
    network = load_network(weights.parent / name, CPU)
    assert network.metadata.precision == "int8"
    if export_format == "onnx":
        nodes = onnx.load(str(weights.parent / name)).graph.node
        convolutions = [node for node in nodes if node.op_type == "Conv"]
        in_float = [n.name for n in convolutions if not n.input[1].endswith("_Output")]
        assert len(convolutions) > 28
        assert len(in_float) == 2, "those of the head"


@pytest.mark.parametrize("export_format", ["onnx", "openvino"])
def test_int8_with_nms_where_nothing_is_found(weights, tiny_dataset, export_format):
    """Calibration looks at NMS too, and once stopped at the empty tensors of such images."""
    for package in ("onnxruntime", export_format):
        pytest.importorskip(package)
    command = ["--weights", str(weights), "--img", "96", "--data", str(tiny_dataset.yaml)]
    command += ["--include", export_format]
    export.main([*command, "--int8", "--nms", "--conf-thres", "1"])
    (name,) = files_beside(weights)
    network = load_network(weights.parent / name, CPU)
    found = network(synthetic_pictures((96, 96), 1))[0]
    assert found.shape == (1, 300, 6)
    assert not found.any()


@pytest.mark.parametrize("export_format", ["onnx", "openvino"])
def test_int8_with_nms_inside_is_run_by_val_and_detect(
    weights, tiny_dataset, tmp_path, export_format, caplog
):
    for package in ("onnxruntime", export_format):
        pytest.importorskip(package)
    caplog.set_level("INFO")
    command = ["--weights", str(weights), "--img", "96", "--data", str(tiny_dataset.yaml)]
    nms = ["--int8", "--nms", "--conf-thres", "0.1", "--max-det", "20"]
    export.main([*command, "--include", export_format, *nms])
    (compared,) = (text for text in caplog.messages if " on 4 images: mAP@.5" in text)
    (name,) = files_beside(weights)
    assert name.startswith("tiny_int8_nms")
    result = validate(weights.parent / name, tiny_dataset, tmp_path / "runs", "--max-det", "20")
    assert f"mAP@.5 {result['map50']:.4f}, mAP@.5:.95 {result['map50_95']:.4f}; " in compared
    detect.main(
        ["--weights", str(weights.parent / name), "--source", str(tiny_dataset.images / "a.jpg"),
         "--device", "cpu", "--conf-thres", "0.1", "--nosave", "--save-txt", "--save-conf",
         "--project", str(tmp_path / "detected")]
    )  # fmt: skip
    found = np.loadtxt(tmp_path / "detected/exp/labels/a.txt", ndmin=2)
    assert 0 < len(found) <= 20
    assert found[:, 5].min() >= 0.1


@pytest.mark.parametrize(("calib_images", "batch_size"), [(1, 1), (3, 8), (4, 3), (9, 2)])
def test_calibration_fills_its_batches(tiny_dataset, calib_images, batch_size):
    data = load_dataset_spec(tiny_dataset.yaml, export.ROOT)
    metadata = ExportMetadata(NAMES, 16, (64, 96), batch_size, False, (), "int8", False)
    options = SimpleNamespace(calib_images=calib_images)
    batches = export.load_calibration(data, metadata, options)
    assert {tuple(batch.shape) for batch in batches} == {(batch_size, 3, 64, 96)}
    assert len(batches) == -(-min(calib_images, 4) // batch_size)


def test_simplify(weights):
    pytest.importorskip("onnxslim")
    export.main(["--weights", str(weights), "--img", "64", "--simplify"])
    assert files_beside(weights) == ["tiny.onnx"]


# ------------------------------------------------------------------------------------- failures
def test_a_folder_that_cannot_be_written_is_said_at_once(weights, monkeypatch):
    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(export.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(export, "load_checkpoint", None)
    with pytest.raises(OSError, match=r"^cannot write to .*: Permission denied; .* copy the \.pt"):
        export.main(["--weights", str(weights), "--include", "torchscript"])


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        ([], "onnx"),
        ([], "onnxruntime"),
        (["--include", "torchscript", "openvino"], "openvino"),
        (["--simplify"], "onnxslim"),
        (["--include", "onnx", "engine"], "tensorrt"),
    ],
)
def test_a_missing_package_is_said_before_anything_is_done(weights, monkeypatch, flags, package):
    real = backends.importlib.import_module

    def fake(name):
        if name == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name)

    monkeypatch.setattr(backends.importlib, "import_module", fake)
    with pytest.raises(ValueError, match=rf"needs {package}[:,] "):
        export.main(["--weights", str(weights), "--img", "64", *flags])
    assert files_beside(weights) == []


@pytest.mark.parametrize("export_format", ["onnx", "torchscript"])
def test_what_differs_is_not_kept(weights, monkeypatch, export_format):
    """The old file stays, nothing else does."""
    pytest.importorskip("onnxruntime")
    old = weights.with_suffix(f".{export_format}")
    old.write_text("old")

    real = exports.ExportGraph.forward
    monkeypatch.setattr(exports.ExportGraph, "forward", lambda self, x: real(self, x) * 1.01)
    with pytest.raises(ValueError, match=r"differs too much from torch: boxes .* was not kept"):
        export.main(["--weights", str(weights), "--img", "64", "--include", export_format])
    assert files_beside(weights) == [old.name]
    assert old.read_text() == "old"


def test_a_runtime_that_fails_is_one_line(weights, monkeypatch):
    def fail(self, images):
        raise RuntimeError("Exception from node.cpp:\nno such shape")

    monkeypatch.setattr(backends.TorchScriptNetwork, "infer", fail)
    message = r"^tiny\.torchscript: its runtime fails \(no such shape\); it was not kept$"
    with pytest.raises(ValueError, match=message):
        export.main(["--weights", str(weights), "--img", "64", "--include", "torchscript"])
    assert files_beside(weights) == []


def test_an_interrupted_export_leaves_nothing(weights, monkeypatch):
    def stop(path, trial):
        assert path.exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "check_export", stop)
    with pytest.raises(KeyboardInterrupt):
        export.main(["--weights", str(weights), "--img", "64", "--include", "torchscript"])
    assert files_beside(weights) == []


def test_wrong_weights_and_data(weights, tiny_dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        export.main(["--weights", "none.pt", "--include", "torchscript"])
    other = tmp_path / "a.onnx"
    other.touch()
    with pytest.raises(ValueError, match=r"only \.pt checkpoints"):
        export.main(["--weights", str(other), "--include", "torchscript"])
    yaml = tmp_path / "one.yaml"
    yaml.write_text(
        tiny_dataset.yaml.read_text().replace("nc: 3", "nc: 1").replace("disc, box, bar", "disc")
    )
    with pytest.raises(ValueError, match="detects 3 classes"):
        export.main(["--weights", str(weights), "--include", "torchscript", "--data", str(yaml)])


# ------------------------------------------------------------------------------------ comparing
def test_differences_are_those_of_confident_rows():
    rows = torch.zeros(1, 200, 7)
    rows[..., 4:] = 0.9
    rows[:, 150:, 4] = 0.01
    other = rows.clone()
    other[0, 3, 2] += 2
    other[0, 4, 6] -= 0.25
    other[0, 199, 0] += 50  # nobody sees it
    assert compare_predictions(rows, other) == Difference(2.0, 0.25, 150)
    assert compare_predictions(rows[:, :5], rows[:, :5]) == Difference(0.0, 0.0, 5)
    with pytest.raises(ValueError, match="shape"):
        compare_predictions(rows, rows[:, :7])
    with pytest.raises(ValueError, match="not finite"):
        compare_predictions(rows, rows / 0)


def test_differences_of_detections():
    ours = torch.tensor([[0, 0, 10, 10, 0.9, 0], [50, 50, 60, 60, 0.5, 1]], dtype=torch.float32)
    theirs = ours.clone()
    theirs[0, 0] += 1
    theirs[1, 5] = 0
    none, flat = ours[:0], torch.tensor([[5.0, 5, 5, 5, 0.3, 0], [5, 5, 5, 6, 0.2, 0]])
    assert compare_detections([flat], [flat.flip(0)]) == Difference(0.0, 0.0, 2)
    assert compare_detections([ours, none], [theirs, none]) == Difference(1.0, 0.0, 2, 2)
    assert compare_detections([ours], [none]).num_missing == 2
    with pytest.raises(ValueError, match="2 without a partner"):
        check_difference(compare_detections([ours], [theirs]), "float32", 10_000)
    check_difference(compare_detections([ours], [ours.flip(0)]), "float32", 64)


def test_synthetic_pictures_are_pictures():
    pictures = synthetic_pictures((64, 96))
    assert pictures.shape == (4, 3, 64, 96)
    assert 0 <= pictures.min() < 0.1
    assert 0.9 < pictures.max() <= 1
    assert torch.equal(pictures, synthetic_pictures((64, 96)))


# -------------------------------------------------------------------------------------- OpenCV
@pytest.mark.parametrize("opset", [[], ["--opset", "12"], ["--opset", "17"], ["--simplify"]])
def test_opencv_gives_the_same_boxes(weights, opset):
    pytest.importorskip("onnxruntime")
    export.main(["--weights", str(weights), "--img", "64", "96", *opset])
    network = cv2.dnn.readNetFromONNX(str(weights.with_suffix(".onnx")))
    image = synthetic_pictures((64, 96), 1)
    network.setInput(image.numpy())
    (raw,) = network.forward()
    with torch.no_grad():
        expected = load_detector(weights).model.fuse()(image)[0]
    assert raw.shape == tuple(expected.shape[1:])
    (boxes,) = non_max_suppression(expected, 0.2, 0.45)
    assert len(boxes) > 3
    np.testing.assert_allclose(usual_decoding(raw, 0.2, 0.45), boxes, rtol=1e-3, atol=0.01)


@pytest.mark.data
@pytest.mark.parametrize("name", ["yolov5n.pt", "face_nc1.pt"])
def test_public_weights_in_opencv(name, shared_dir, tmp_path):
    pytest.importorskip("onnxruntime")
    weights = tmp_path / name
    shutil.copy(shared_dir / "weights" / name, weights)
    export.main(["--weights", str(weights), "--img", "256", "320", "--include", "onnx"])
    model = load_detector(weights).model.fuse()
    network = cv2.dnn.readNetFromONNX(str(weights.with_suffix(".onnx")))
    num_boxes, conf_thres = 0, 0.1 if name == "yolov5n.pt" else 0.001
    for photograph in sorted((shared_dir / "data/coco128/images").rglob("*.jpg"))[:4]:
        image = cv2.imread(str(photograph))
        blob = cv2.dnn.blobFromImage(image, 1 / 255, (320, 256), swapRB=True)
        network.setInput(blob)
        (raw,) = network.forward()
        with torch.no_grad():
            expected = model(torch.from_numpy(blob))[0]
        np.testing.assert_allclose(raw, expected[0], rtol=1e-3, atol=0.01)
        (boxes,) = non_max_suppression(expected, conf_thres, 0.45)
        found = usual_decoding(raw, conf_thres, 0.45)
        np.testing.assert_allclose(found, boxes, rtol=1e-3, atol=0.05)
        num_boxes += len(boxes)
    assert num_boxes > 4 or name == "face_nc1.pt"


# --------------------------------------------------------------------------------------- val.py
def validate(weights, data, folder, *flags):
    command = ["--weights", str(weights), "--data", str(data.yaml), "--workers", "0", "--noplots"]
    command += ["--device", "cpu", "--project", str(folder), "--exist-ok", *flags]
    val.main(command)
    return json.loads((folder / "exp" / "results.json").read_text())


@pytest.mark.parametrize("export_format", ["onnx", "torchscript", "openvino"])
def test_val_gives_the_same_map_by_the_same_protocol(
    weights, tiny_dataset, tmp_path, export_format
):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    dynamic = [] if export_format == "torchscript" else ["--dynamic"]
    include = ["--include", export_format]
    export.main(["--weights", str(weights), "--img", "96", *include, *dynamic])
    (name,) = files_beside(weights)
    flags = [] if export_format == "torchscript" else ["--img", "96"]
    found = validate(weights.parent / name, tiny_dataset, tmp_path / "runs", *flags)
    assert found["imgsz"] == 96
    if dynamic:  # else torch takes rectangles
        expected = validate(weights, tiny_dataset, tmp_path / "runs", "--img", "96")
        for key in ("map50", "map50_95", "precision", "recall"):
            assert found[key] == pytest.approx(expected[key], abs=1e-3)


def test_val_finds_exports_where_it_finds_checkpoints(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/a.onnx").touch()
    monkeypatch.setattr(val, "ROOT", tmp_path)
    monkeypatch.setattr(val, "load_exported", lambda path, *_, half: SimpleNamespace(names=path))
    options = SimpleNamespace(single_cls=True, half=False, task="val")
    assert val.load_network("a.onnx", None, options, CPU).names == tmp_path / "weights/a.onnx"
    with pytest.raises(FileNotFoundError, match=r"b\.onnx: no such file; tried"):
        val.load_network("b.onnx", None, options, CPU)


def test_val_refuses_another_size_and_half(weights, tiny_dataset, tmp_path, caplog):
    caplog.set_level("INFO")
    export.main(["--weights", str(weights), "--img", "64", "96", "--include", "torchscript"])
    script = weights.with_suffix(".torchscript")
    with pytest.raises(ValueError, match=r"--imgsz 640: .* was exported for 96"):
        validate(script, tiny_dataset, tmp_path / "runs", "--img", "640")
    with pytest.raises(ValueError, match="takes one size only"):
        validate(script, tiny_dataset, tmp_path / "runs", "--task", "study")
    result = validate(script, tiny_dataset, tmp_path / "runs", "--batch", "3")
    assert (result["imgsz"], result["images"]) == (96, 4)
    assert "letterboxed to 64 x 96" in caplog.text


def test_val_of_a_file_with_nms_inside(weights, tiny_dataset, tmp_path, caplog):
    caplog.set_level("INFO")
    nms = ["--nms", "--conf-thres", "0.001", "--iou-thres", "0.6"]
    export.main(["--weights", str(weights), "--img", "96", "--include", "torchscript", *nms])
    script = weights.with_name("tiny_nms.torchscript")
    result = validate(script, tiny_dataset, tmp_path / "runs")
    assert result["images"] == 4
    assert "NMS inside" in caplog.text


@pytest.mark.parametrize(
    ("name", "package"), [("a.onnx", "onnxruntime"), ("a_openvino_model", "openvino")]
)
@pytest.mark.parametrize("script", ["val.py", "detect.py"])
def test_a_missing_runtime_is_said_in_one_line(
    run_script, tiny_dataset, tmp_path, monkeypatch, script, name, package
):
    monkeypatch.setitem(sys.modules, package, None)
    (tmp_path / name).touch()
    source = ["--source", tiny_dataset.images] if script == "detect.py" else []
    flags = ["--weights", tmp_path / name, "--device", "cpu", "--project", tmp_path / "runs"]
    done = run_script(script, *flags, *source or ["--data", tiny_dataset.yaml])
    assert done.returncode == 1
    assert done.stderr == (
        f"error: {tmp_path / name}: needs {package}: pip install -r requirements-export.txt\n"
    )
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------ benchmark
@pytest.mark.slow
def test_the_table_of_formats(weights, tiny_dataset, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("openvino")
    out = tmp_path / "formats.md"
    command = ["--weights", str(weights), "--data", str(tiny_dataset.yaml), "--img", "64"]
    command += ["--repeats", "2", "--threads", "1", "--device", "cpu", "--out", str(out)]
    formats.main(command)
    rows = [line for line in out.read_text().splitlines() if line.startswith(f"| {weights}")]
    kinds = [tuple(cell.strip() for cell in row.split("|")[2:4]) for row in rows]
    exported = [
        (runtime, precision)
        for precision in ("float32", "float16", "int8")
        for runtime in ("ONNX Runtime", "OpenVINO")
    ]
    assert kinds == [("torch", "float32"), *exported]
    assert files_beside(weights) == [], "exports go into a temporary folder"


@pytest.mark.parametrize("export_format", ["torchscript", "onnx", "openvino"])
def test_a_full_disk_is_said_and_leaves_nothing(weights, full_disk, export_format):
    flags = ["--weights", str(weights), "--img", "64", "--include", export_format]
    name = "for_openvino.onnx" if export_format == "openvino" else f"tiny.{export_format}"
    with full_disk(), pytest.raises(OSError, match="too large") as caught:
        export.main(flags)
    assert caught.value.filename == str(weights.with_name(name)), "not where it is made"
    assert files_beside(weights) == []


def test_openvino_that_cannot_write_is_one_line(weights, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr("openvino.save_model", fail)
    words = r"tiny_openvino_model: OpenVINO cannot write there \(basic_ios.*see whether the disk"
    with pytest.raises(OSError, match=words):
        export.main(["--weights", str(weights), "--img", "64", "--include", "openvino"])
    assert files_beside(weights) == []


def test_activations_without_ranges_are_said(weights, tiny_dataset, monkeypatch):
    def fail(*_, **__):
        raise ValueError("Too many bins for data range. Cannot create 2048 finite-sized bins.")

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", fail)
    flags = ["--data", str(tiny_dataset.yaml), "--img", "64", "--int8", "--include", "onnx"]
    with pytest.raises(ValueError, match=r"--int8: activations have no ranges .*Too many bins"):
        export.main(["--weights", str(weights), *flags])
