import csv
import json
import os
import runpy
import shutil
import sys

import pytest
import torch
import yaml

import val
from models import Model, ModelSpec
from utils.checkpoint import build_checkpoint, save_checkpoint
from utils.coco_json import COCO_CATEGORY_IDS
from utils.config import load_dataset_spec
from utils.dataset import scan_split

PICTURES = {
    "confusion_matrix.png", "PR_curve.png", "P_curve.png", "R_curve.png", "F1_curve.png",
    "val_batch0_labels.jpg", "val_batch0_pred.jpg",
}  # fmt: skip


@pytest.fixture
def weights(tiny_spec, tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "tiny.pt"
    model = Model(ModelSpec.from_dict(tiny_spec))
    save_checkpoint(path, build_checkpoint(model, ("disc", "box", "bar")))
    return path


@pytest.fixture
def command(weights, tiny_dataset, tmp_path):
    """Arguments for a run on the tiny data set, results in `tmp_path/runs`."""
    return [
        "--weights", str(weights), "--data", str(tiny_dataset.yaml), "--img", "96", "--batch", "4",
        "--workers", "0", "--device", "cpu", "--project", str(tmp_path / "runs"),
    ]  # fmt: skip


def files_of(run_dir):
    return {path.name for path in run_dir.iterdir()}


def test_a_run_that_fails_leaves_no_empty_folder(command, tmp_path, monkeypatch):
    monkeypatch.setattr(val, "evaluate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        val.main([*command, "--save-txt"])
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--conf-thres", "1.5"], "--conf-thres is 1.5, expected 0 to 1"),
        (["--conf-thres", "nan"], "--conf-thres is nan"),
        (["--iou-thres", "-0.1"], "--iou-thres is -0.1"),
        (["--batch-size", "0"], "--batch-size is 0, expected at least 1"),
        (["--img", "0"], "--imgsz is 0"),
        (["--max-det", "0"], "--max-det is 0"),
        (["--workers", "-1"], "--workers is -1"),
        (["--save-conf"], "--save-conf acts only with --save-txt"),
        (["--task", "speed", "--save-json"], "--save-json does not act with --task speed"),
        (["--task", "study", "--img", "640"], "--imgsz does not act with --task study"),
        (["--task", "study", "--save-txt"], "--save-txt does not act with --task study"),
        (["--task", "play"], "invalid choice"),
        (["--weights", "a.pt", "b.pt"], "several --weights"),
        (["--imgsz", "big"], "invalid int value"),
        (["--half-precision"], "unrecognized arguments"),
        (["--device", "mars"], "--device mars: expected cpu, mps"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        val.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_spellings_and_defaults():
    options = val.parse_args(["--batch", "4", "--img", "320", "--data", "a", "--data", "b"])
    assert (options.batch_size, options.imgsz, options.data) == (4, 320, "b")
    assert (options.conf_thres, options.iou_thres, options.max_det) == (0.001, 0.6, 300)
    assert val.parse_args(["--img-size", "64"]).imgsz == 64
    assert val.parse_args(["--imgsz", "64"]).imgsz == 64


def test_speed_uses_thresholds_of_use():
    options = val.parse_args(["--task", "speed"])
    assert (options.conf_thres, options.iou_thres) == (0.25, 0.45)
    assert val.parse_args(["--task", "speed", "--conf", "0.1"]).conf_thres == 0.1


@pytest.mark.parametrize(("flag", "value"), [("--weights", "none.pt"), ("--data", "none.yaml")])
def test_missing_files(command, flag, value):
    with pytest.raises(FileNotFoundError, match=value):
        val.main([*command, flag, value])


def test_half_where_the_best_device_is_a_cpu(command, monkeypatch):
    monkeypatch.setattr(val, "select_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(val, "load_data", lambda _: pytest.fail("too late"))
    with pytest.raises(ValueError, match="--half needs a GPU"):
        val.main([*command, "--device", "", "--half"])


def test_wrong_number_of_classes(command, tiny_dataset):
    content = yaml.safe_load(tiny_dataset.yaml.read_text())
    content |= {"nc": 4, "names": ["a", "b", "c", "d"]}
    tiny_dataset.yaml.write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"detects 3 classes, .* names 4; .*--single-cls"):
        val.main(command)


def test_missing_split(command):
    with pytest.raises(ValueError, match="no key 'test'"):
        val.main([*command, "--task", "test"])


def test_no_labels_at_all(command, tiny_dataset):
    shutil.rmtree(tiny_dataset.labels)
    with pytest.raises(ValueError, match="no labels"):
        val.main(command)


# --------------------------------------------------------------------------------------- results
def test_everything_is_saved(command, tmp_path, caplog):
    caplog.set_level("INFO")
    val.main([*command, "--verbose", "--save-txt", "--save-conf", "--save-json"])
    run_dir = tmp_path / "runs/exp"
    assert files_of(run_dir) == PICTURES | {
        "opt.yaml", "results.json", "labels", "predictions.json", "annotations.json",
        "pycocotools.txt",
    }  # fmt: skip
    assert all((run_dir / name).stat().st_size > 1000 for name in PICTURES)
    results = json.loads((run_dir / "results.json").read_text())
    assert (results["images"], results["labels"], results["imgsz"]) == (4, 6, 96)
    assert [row["name"] for row in results["classes"]] == ["disc", "box", "bar"]
    assert yaml.safe_load((run_dir / "opt.yaml").read_text())["save_conf"] is True
    for text in ("mAP@.5:.95", "disc", "speed per image at 96 px", "Average Precision", "GFLOPs"):
        assert text in caplog.text
    val.main(command)
    assert (tmp_path / "runs/exp2").is_dir()


@pytest.mark.skipif(os.name == "nt", reason="files cannot be called so")
def test_hostile_names_do_not_reach_the_terminal(run_script, command, tiny_dataset, caplog):
    image = tiny_dataset.images / "a.jpg"
    image.rename(image.with_name("a\x1b[2J\nb.jpg"))
    (tiny_dataset.labels / "a\x1b[2J\nb.txt").write_text("9 9 9 9 9\n")
    spec = yaml.safe_load(tiny_dataset.yaml.read_text())
    spec["names"][0] = "disc\x1b]0;owned\x07\n\x9b"
    tiny_dataset.yaml.write_text(yaml.safe_dump(spec))
    caplog.set_level("INFO")
    ended = run_script("val.py", *command, "--verbose", "--noplots")
    assert ended.returncode == 0
    messages = [record.getMessage() for record in caplog.records]
    assert any(r"a\x1b[2J\nb.txt:" in message for message in messages)
    assert any(r"disc\x1b]0;owned\x07\n\x9b" in m and "0." in m for m in messages), messages
    for text in (*messages, ended.stdout, ended.stderr):
        assert all(line.isprintable() for line in text.split("\n")), text


def test_text_files_match_the_json(command, tmp_path, tiny_dataset):
    val.main([*command, "--save-txt", "--save-conf", "--save-json", "--noplots"])
    run_dir = tmp_path / "runs/exp"
    assert {path.name for path in (run_dir / "labels").iterdir()} == {
        "a.txt", "b.txt", "c.txt", "d.txt"
    }  # fmt: skip
    found = json.loads((run_dir / "predictions.json").read_text())
    images = json.loads((run_dir / "annotations.json").read_text())["images"]
    assert len(found) > 0
    for image in images:
        rows = [row for row in found if row["image_id"] == image["id"]]
        lines = (run_dir / "labels" / image["file_name"]).with_suffix(".txt").read_text()
        assert len(lines.splitlines()) == len(rows)
        for line, row in zip(lines.splitlines(), rows, strict=True):
            cls, cx, cy, w, h, conf = map(float, line.split())
            assert 0 <= cx - w / 2 + 1e-5 <= cx + w / 2 <= 1 + 1e-5
            left, top = (cx - w / 2) * image["width"], (cy - h / 2) * image["height"]
            assert [left, top] == pytest.approx(row["bbox"][:2], abs=2e-3)
            assert (cls + 1, conf) == pytest.approx((row["category_id"], row["score"]), abs=1e-5)
    assert not PICTURES & files_of(run_dir)


def test_text_files_can_serve_as_labels(command, tmp_path, tiny_dataset):
    """Without confidences the files have the form of the data set's own labels."""
    val.main([*command, "--save-txt", "--max-det", "5", "--noplots"])
    shutil.rmtree(tiny_dataset.labels)
    (tmp_path / "runs/exp/labels").rename(tiny_dataset.labels)
    spec = load_dataset_spec(tiny_dataset.yaml, tiny_dataset.root)
    split = scan_split(spec.val, spec.names, cache=False)
    assert split.report.num_boxes > 0
    assert split.report.num_missing_labels == 0


def test_annotations_hold_the_labels(command, tmp_path):
    val.main([*command, "--save-json", "--noplots"])
    content = json.loads((tmp_path / "runs/exp/annotations.json").read_text())
    first = next(image for image in content["images"] if image["file_name"] == "a.jpg")
    boxes = [a["bbox"] for a in content["annotations"] if a["image_id"] == first["id"]]
    assert [round(number) for number in boxes[0]] == [20, 20, 40, 40]
    assert (first["width"], first["height"]) == (128, 96)


def test_a_picture_never_ends_a_run(command, tmp_path, monkeypatch, caplog):
    """Nor does it come before the figures."""
    run_dir = tmp_path / "runs/exp"

    def plot_batch(*_):
        raise ValueError("no")

    def plot_pr_curve(*_):
        assert (run_dir / "predictions.json").is_file()
        assert (run_dir / "results.json").is_file()
        raise OSError("disk full")

    monkeypatch.setattr(val, "plot_batch", plot_batch)
    monkeypatch.setattr(val, "plot_pr_curve", plot_pr_curve)
    val.main([*command, "--save-json"])
    assert caplog.text.count("the picture is missing: no\n") == 2
    assert caplog.text.count("the picture is missing: disk full\n") == 1
    assert (run_dir / "confusion_matrix.png").is_file()


def test_results_of_coco_test_dev_can_be_submitted(tiny_spec, command, tmp_path, caplog):
    """80 classes, images named by their number, no labels: COCO's numbers, and no score here."""
    root = tmp_path / "coco"
    images = root / "images/test2017"
    images.mkdir(parents=True)
    (root / "annotations").mkdir()
    (root / "annotations/image_info_test-dev2017.json").write_text("{}")
    source = next((tmp_path / "tiny/images/train").glob("*.jpg"))
    shutil.copy(source, images / "000000000019.jpg")
    names = [f"class {number}" for number in range(80)]
    (root / "coco.yaml").write_text(
        yaml.safe_dump({"path": str(root), "train": "x", "val": "x", "test": "images/test2017",
                        "names": names})
    )  # fmt: skip
    model = Model(ModelSpec.from_dict({**tiny_spec, "nc": 80}))
    save_checkpoint(tmp_path / "80.pt", build_checkpoint(model, names))
    caplog.set_level("INFO")
    val.main([*command, "--data", str(root / "coco.yaml"), "--weights", str(tmp_path / "80.pt"),
              "--task", "test", "--save-json", "--conf", "0", "--noplots"])  # fmt: skip
    found = json.loads((tmp_path / "runs/exp/predictions.json").read_text())
    assert {row["image_id"] for row in found} == {19}
    categories = {row["category_id"] for row in found}
    assert categories <= set(COCO_CATEGORY_IDS)
    assert max(categories) > 80
    assert caplog.text.count("to be submitted; without labels there is nothing to score here") == 1
    assert files_of(tmp_path / "runs/exp") == {"opt.yaml", "results.json", "predictions.json"}


def test_too_little_memory_is_one_line_with_a_remedy(monkeypatch, pytestconfig):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ...")

    monkeypatch.setattr("utils.device.select_device", fail)
    monkeypatch.setattr(sys, "argv", ["val.py"])
    with pytest.raises(SystemExit, match=r"9 GiB; try a smaller --batch-size or --imgsz$"):
        runpy.run_path(str(pytestconfig.rootpath / "val.py"), run_name="__main__")


def test_other_class_names_are_said(command, tiny_dataset, caplog):
    tiny_dataset.yaml.write_text(tiny_dataset.yaml.read_text().replace("bar", '"$rod\\t"'))
    val.main(command)
    assert "name their classes differently ('bar', '$rod" in caplog.text
    assert "the picture is missing" not in caplog.text


def test_single_cls(command, tmp_path):
    val.main([*command, "--single-cls", "--save-json"])
    results = json.loads((tmp_path / "runs/exp/results.json").read_text())
    assert [row["name"] for row in results["classes"]] == ["disc"]
    found = json.loads((tmp_path / "runs/exp/predictions.json").read_text())
    assert {row["category_id"] for row in found} == {1}


def test_task_train(command, tmp_path):
    val.main([*command, "--task", "train", "--noplots"])
    assert (tmp_path / "runs/exp/results.json").is_file()


def test_task_speed_reports_time_only(command, tmp_path, caplog):
    caplog.set_level("INFO")
    val.main([*command, "--task", "speed"])
    assert files_of(tmp_path / "runs/exp") == {"opt.yaml", "results.json"}
    report = json.loads((tmp_path / "runs/exp/results.json").read_text())
    assert set(report) == {"imgsz", "images", "speed_ms"}
    assert report["speed_ms"]["inference"] > 0
    assert "speed per image" in caplog.text
    assert "mAP" not in caplog.text


def test_task_study_sweeps_over_sizes(command, tmp_path, monkeypatch):
    assert list(val.STUDY_SIZES) == [256, 384, 512, 640, 768, 896, 1024, 1152, 1280, 1408, 1536]
    monkeypatch.setattr(val, "STUDY_SIZES", (64, 96))
    val.main([part for part in command if part not in ("--img", "96")] + ["--task", "study"])
    run_dir = tmp_path / "runs/exp"
    with (run_dir / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["imgsz"] for row in rows] == ["64", "96"]
    assert all(float(row["inference_ms"]) > 0 for row in rows)
    assert (run_dir / "study.png").stat().st_size > 1000


def test_size_is_rounded_up(command, tmp_path, caplog):
    val.main([*command, "--img", "90", "--noplots"])
    assert "--imgsz 90 is not a multiple of 16; using 96" in caplog.text
    assert json.loads((tmp_path / "runs/exp/results.json").read_text())["imgsz"] == 96


def test_folding_changes_nothing(command, tmp_path, weights, monkeypatch):
    val.main([*command, "--noplots"])
    monkeypatch.setattr(Model, "fuse", lambda self: self)
    val.main([*command, "--noplots"])
    first, second = (
        json.loads((tmp_path / f"runs/{name}/results.json").read_text()) for name in ("exp", "exp2")
    )
    assert first["map50"] == pytest.approx(second["map50"], abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "code", "message"),
    [([], 0, ""), (["--weights", "none.pt"], 1, "error: none.pt: no such file")],
)
def test_as_a_command(run_script, command, extra, code, message):
    done = run_script("val.py", *command, "--noplots", *extra)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith(message)
