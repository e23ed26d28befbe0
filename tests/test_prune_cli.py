"""prune.py from its command line to its files."""

import json
import logging
import runpy
import subprocess
import sys

import pytest
import torch
from torch import nn

import prune
from models import Model, ModelSpec
from utils.checkpoint import build_checkpoint, load_detector, save_checkpoint, save_final
from utils.config import load_yaml
from utils.evaluate import evaluate as real_evaluate
from utils.profile import Latency
from utils.profile import compare_latency as real_compare_latency

NAMES = ("disc", "box", "bar")
SPARSE_SHARE = 0.5  # of the channels that `sparse_model` leaves without any use


def sparse_model(spec, seed=0):
    """A network as sparse training leaves it: some gammas near 0, the others spread."""
    torch.manual_seed(seed)
    model = Model(ModelSpec.from_dict(spec)).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            gamma = torch.rand(module.num_features) * 0.5 + 0.5
            gamma[1 :: int(1 / SPARSE_SHARE)] *= 1e-4
            module.weight.data.copy_(gamma)
            module.bias.data.copy_((gamma > 0.1) * torch.randn(module.num_features) * 0.1)
    return model


@pytest.fixture
def weights(tiny_spec, tmp_path):
    """Checkpoint of a sparse network, in half precision like all final files."""
    model = sparse_model(tiny_spec)
    path = tmp_path / "sparse.pt"
    save_final(path, build_checkpoint(model, NAMES, epoch=9), model.state_dict())
    return path


@pytest.fixture
def run(weights, tmp_path, caplog, monkeypatch):
    """Call prune.main in a project folder of its own; returns what it logged."""

    def quick_latency(*args):
        return real_compare_latency(*args, seconds=0)

    monkeypatch.setattr(prune, "compare_latency", quick_latency)

    def call(*flags, source=weights):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            machine = ["--device", "cpu", "--workers", "0", "--img", "64"]
            project = ["--project", str(tmp_path / "runs")]
            prune.main(["--weights", str(source), *machine, *project, *map(str, flags)])
        return caplog.text

    return call


def test_a_whole_run(run, weights, tiny_dataset, tmp_path):
    log = run("--percent", 0.4, "--data", tiny_dataset.yaml, "--batch", 2)
    folder = tmp_path / "runs" / "exp"
    report = json.loads((folder / "prune.json").read_text())
    assert {file.name for file in folder.iterdir()} == {
        "pruned_model.pt", "pruned_model.yaml", "prune.json", "opt.yaml",
    }  # fmt: skip

    slim = load_detector(folder / "pruned_model.pt")
    assert slim.names == NAMES
    assert slim.model.widths() == report["widths"]
    assert {row["layer"]: row["after"] for row in report["layers"]} == report["widths"]
    assert slim.model.spec.is_pruned

    before, after = report["before"], report["after"]
    assert after["parameters"] == sum(p.numel() for p in slim.model.parameters())
    for name in ("channels", "parameters", "gflops", "file_mb"):
        assert after[name] < before[name], name
    assert all(before[name] is not None for name in ("precision", "recall", "map50", "map50_95"))
    for text in ("mAP@.5:.95", "suggested percent: 0.", "GFLOPs at 64 px", "cut verified"):
        assert text in log
    assert "warning: channels with" not in log
    assert "2.m.0.cv1" in log
    assert "frozen (shortcut)" in log


def test_the_slim_checkpoint_computes_what_the_masked_network_does(run, weights, tmp_path):
    run("--percent", 0.45)
    dense = load_detector(weights).model
    slim = load_detector(tmp_path / "runs/exp/pruned_model.pt").model
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        for ours, theirs in zip(slim(x)[1], dense(x)[1], strict=True):
            # The removed channels had gammas of 1e-4 and beta 0, so the dense one is close too.
            torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-3)


def test_the_yaml_builds_the_slim_shape(run, tmp_path):
    run("--percent", 0.4)
    path = tmp_path / "runs/exp/pruned_model.yaml"
    spec = ModelSpec.from_dict(load_yaml(path), str(path))
    saved = load_detector(tmp_path / "runs/exp/pruned_model.pt").model.spec
    assert spec.to_dict() == saved.to_dict()
    assert Model(spec).widths() == saved.widths
    text = path.read_text()
    assert "  - [-1, 1, Conv, [8, 6, 2, 2]]  # 0\n" in text
    assert "  - [[10, 13], 1, Detect, [nc, anchors]]  # 14\n" in text


@pytest.mark.parametrize("path", ["10", "1.10", "0.0", "2.m.0.cv1"])
def test_layer_names_that_look_like_numbers_survive_the_yaml(tiny_spec, tmp_path, path):
    spec = ModelSpec.from_dict({**tiny_spec, "widths": {path: 3}})
    file = tmp_path / "slim.yaml"
    file.write_text(prune.format_spec(spec, "two\nlines"))
    assert ModelSpec.from_dict(load_yaml(file)).widths == {path: 3}


def test_a_dry_run_writes_nothing(run, tiny_dataset, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    log = run("--percent", 0.4, "--data", tiny_dataset.yaml, "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before
    assert "mAP@.5:.95" in log
    assert "dry run" in log


def test_every_run_has_its_own_folder(run, tmp_path):
    for _ in range(2):
        run("--percent", 0.1)
    run("--percent", 0.3, "--name", "slim")
    run("--percent", 0.2, "--name", "slim", "--exist-ok")
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"exp", "exp2", "slim"}
    assert json.loads((tmp_path / "runs/slim/prune.json").read_text())["percent"] == 0.2


def test_pruning_again_keeps_the_shortcuts_and_shrinks(run, tmp_path):
    run("--percent", 0.3)
    first = tmp_path / "runs/exp/pruned_model.pt"
    run("--percent", 0.2, source=first)
    models = [load_detector(p).model for p in (first, tmp_path / "runs/exp2/pruned_model.pt")]
    totals = [sum(model.widths().values()) for model in models]
    assert totals[1] < totals[0]
    shortcuts = [[m.add for m in model.modules() if hasattr(m, "add")] for model in models]
    assert shortcuts[0] == shortcuts[1]
    assert sum(shortcuts[0]) == 3


def test_a_floor_is_a_warning_that_names_the_layer(run, tiny_spec, tmp_path):
    model = sparse_model(tiny_spec)
    model.model.get_submodule("6.cv1").bn.weight.data *= 1e-6
    save_checkpoint(tmp_path / "weak.pt", build_checkpoint(model, NAMES))
    log = run("--percent", 0.3, source=tmp_path / "weak.pt")
    assert "warning: every channel of 6.cv1 lies below the threshold" in log
    report = json.loads((tmp_path / "runs/exp/prune.json").read_text())
    assert report["widths"]["6.cv1"] == 1
    assert [row["layer"] for row in report["layers"] if row["floored"]] == ["6.cv1"]


@pytest.mark.parametrize(
    ("gammas", "percent", "warning"),
    [
        ("fresh", 0.3, "nothing is removed"),
        ("spread", 0.3, "expect mAP to fall"),
        ("sparse", 0.6, "they are not near 0, expect mAP to fall"),
        ("constant", 0.4, "they are constant, not silent, expect mAP to fall"),
        ("sparse", 0.4, None),
        ("sparse", 0.0, None),
    ],
)
def test_gammas_that_are_not_sparse_are_said_to_be(
    run, tiny_spec, tmp_path, gammas, percent, warning
):
    """Where gamma never shrank, cutting costs most of the mAP: that must not pass in silence."""
    model = sparse_model(tiny_spec)
    for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        if gammas == "constant":
            bn.bias.data.fill_(-0.5)
        elif gammas != "sparse":
            low = 1.0 if gammas == "fresh" else 0.5
            bn.weight.data.uniform_(low, 1.0)
    save_checkpoint(tmp_path / "other.pt", build_checkpoint(model, NAMES))
    log = run("--percent", percent, "--dry-run", source=tmp_path / "other.pt")
    lines = [line for line in log.splitlines() if "warning: " in line and "not faster" not in line]
    assert len([line for line in lines if "every channel of" not in line]) == bool(warning)
    assert warning is None or any(warning in line for line in lines)


def test_before_and_after_are_measured_alike(run, tiny_dataset, monkeypatch):
    """Another precision or NMS threshold after the cut would make the comparison worthless."""
    calls = []

    def recorded(model, loader, names, **settings):
        calls.append((loader, names, settings, {p.dtype for p in model.parameters()}))
        return real_evaluate(model, loader, names, progress=False, **settings)

    monkeypatch.setattr(prune, "evaluate", recorded)
    run("--percent", 0.3, "--data", tiny_dataset.yaml, "--conf-thres", 0.01, "--iou-thres", 0.5,
        "--dry-run")  # fmt: skip
    assert len(calls) == 2
    assert calls[0] == calls[1]
    settings, dtypes = calls[0][2:]
    assert dtypes == {torch.float32}
    assert (settings["conf_thres"], settings["iou_thres"]) == (0.01, 0.5)


def test_one_class_for_all(run, tiny_dataset):
    log = run("--percent", 0.3, "--data", tiny_dataset.yaml, "--single-cls", "--dry-run")
    assert "mAP@.5" in log


@pytest.mark.parametrize(
    ("low", "ratio", "high", "said"),
    [
        (1.25, 1.31, 1.36, "speed: 1.31x (1.25-1.36) faster on cpu"),
        (0.96, 1.22, 1.40, "warning: not faster on cpu: 1.22x (0.96-1.40)"),
        (0.80, 0.90, 0.95, "warning: not faster on cpu: 0.90x (0.80-0.95)"),
    ],
)
def test_a_missing_speed_up_is_said(caplog, low, ratio, high, said):
    """Fewer channels need not be faster; a ratio alone may be the noise of a busy machine."""
    with caplog.at_level(logging.INFO):
        prune.print_speed_up(Latency(10.0, ratio, low, high), torch.device("cpu"))
    assert said in caplog.text


def test_a_wrong_cut_is_not_saved(run, tmp_path, monkeypatch):
    right = prune.prune_model

    def wrong(*args):
        model = right(*args)
        weight = model.model[3].conv.weight
        weight.data.copy_(weight.data.roll(1, 1))
        return model

    monkeypatch.setattr(prune, "prune_model", wrong)
    with pytest.raises(ValueError, match=r"differs from the masked dense one.*nothing was saved"):
        run("--percent", 0.3)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("percent", [0.3, 1e-6])
def test_what_is_not_smaller_is_not_saved(run, tiny_spec, tmp_path, monkeypatch, percent):
    """All alike, or a share below one channel: nothing goes, and no time is spent on measuring."""
    model = sparse_model(tiny_spec)
    if percent == 0.3:
        for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            bn.weight.data.fill_(1.0)
    save_checkpoint(tmp_path / "other.pt", build_checkpoint(model, NAMES))
    monkeypatch.setattr(prune, "verify_cut", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match=r"^nothing is removed: no \|gamma\| .*Nothing was saved$"):
        run("--percent", percent, source=tmp_path / "other.pt")
    assert not (tmp_path / "runs").exists()


class TestRunFolder:
    """It is made before the work, and goes again where nothing came of it."""

    def test_a_bad_place_is_known_first(self, run, tmp_path, monkeypatch):
        monkeypatch.setattr(prune, "load_detector", lambda *_: pytest.fail("too late"))
        (tmp_path / "file").write_text("")
        for project, name in ((tmp_path / "file", "exp"), (tmp_path, "n" * 300), ("/proc", "exp")):
            with pytest.raises(OSError, match=r"^cannot write to .*; see --project, --name$"):
                run("--percent", 0.3, "--project", project, "--name", name)
        assert (tmp_path / "file").is_file()

    @pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
    def test_a_failure_leaves_nothing(self, run, tmp_path, monkeypatch, error):
        def fail(*_):
            assert (tmp_path / "new/runs/exp").is_dir()
            raise error

        monkeypatch.setattr(prune, "verify_cut", fail)
        with pytest.raises(error):
            run("--percent", 0.3, "--project", tmp_path / "new/runs")
        assert not (tmp_path / "new").exists()

    @pytest.mark.parametrize("content", [None, "notes.txt"])
    def test_a_folder_of_the_user_stays(self, run, tmp_path, monkeypatch, content):
        folder = tmp_path / "runs/mine"
        folder.mkdir(parents=True)
        if content:
            (folder / content).write_text("kept")
        monkeypatch.setattr(prune, "verify_cut", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run("--percent", 0.3, "--name", "mine", "--exist-ok")
        assert [p.name for p in folder.iterdir()] == ([content] if content else [])

    def test_the_empty_folder_of_another_run_stays(self, run, tmp_path, monkeypatch):
        def other_run_starts(*_):
            (tmp_path / "runs/exp").mkdir()
            raise ZeroDivisionError

        (tmp_path / "runs/exp7").mkdir(parents=True)
        monkeypatch.setattr(prune, "verify_cut", other_run_starts)
        with pytest.raises(ZeroDivisionError):
            run("--percent", 0.3)
        assert {p.name for p in (tmp_path / "runs").iterdir()} == {"exp", "exp7"}


def test_other_class_names_are_said(run, tiny_dataset):
    text = tiny_dataset.yaml.read_text().replace("bar", "rod")
    tiny_dataset.yaml.write_text(text)
    log = run("--percent", 0.3, "--data", tiny_dataset.yaml, "--dry-run")
    assert "name their classes differently ('bar', 'rod')" in log


def test_too_little_memory_is_one_line_with_a_remedy(monkeypatch, pytestconfig):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ...")

    monkeypatch.setattr("utils.device.select_device", fail)
    monkeypatch.setattr(sys, "argv", ["prune.py", "--weights", "a.pt", "--percent", "0.3"])
    with pytest.raises(SystemExit, match=r"9 GiB; try a smaller --batch-size or --imgsz$"):
        runpy.run_path(str(pytestconfig.rootpath / "prune.py"), run_name="__main__")


class TestCfg:
    @pytest.fixture
    def cfg(self, tiny_spec, tmp_path):
        def write(name, **changes):
            path = tmp_path / name
            spec = ModelSpec.from_dict({**tiny_spec, **changes})
            path.write_text(prune.format_spec(spec, "test"))
            return path

        return write

    def test_the_same_network_for_other_classes_is_accepted(self, run, cfg, tmp_path):
        run("--percent", 0.3, "--cfg", cfg("same.yaml", nc=80))
        assert (tmp_path / "runs/exp/pruned_model.pt").is_file()

    def test_the_widths_of_a_pruned_checkpoint_win(self, run, cfg, tmp_path):
        run("--percent", 0.3)
        slim = tmp_path / "runs/exp/pruned_model.pt"
        for yaml in (cfg("dense.yaml"), slim.with_suffix(".yaml")):
            run("--percent", 0.2, "--cfg", yaml, source=slim)
        reports = [
            json.loads((tmp_path / "runs" / name / "prune.json").read_text())
            for name in ("exp", "exp2", "exp3")
        ]
        widths = [{row["layer"]: row["before"] for row in r["layers"]} for r in reports]
        assert reports[0]["widths"] == widths[1] == widths[2] != widths[0]

    @pytest.mark.parametrize("change", ["width", "row", "shortcut", "fewer rows"])
    def test_another_network_is_refused(self, run, cfg, tiny_spec, change):
        backbone, head = list(tiny_spec["backbone"]), list(tiny_spec["head"])
        if change == "row":
            backbone[1] = [-1, 1, "Conv", [16, 5, 2]]
        elif change == "shortcut":
            backbone[4] = [-1, 2, "C3", [16, False]]
        elif change == "fewer rows":
            head = [[[4, 6], 1, "Detect", ["nc", "anchors"]]]
        path = cfg(
            "other.yaml",
            backbone=backbone,
            head=head,
            width_multiple=2.0 if change == "width" else 1.0,
        )
        row = {"width": 0, "row": 1, "shortcut": 4, "fewer rows": 7}[change]
        with pytest.raises(ValueError, match=f"not the network of --cfg .* from row {row} on"):
            run("--percent", 0.3, "--cfg", path)

    def test_bare_names_are_found(self, run):
        with pytest.raises(ValueError, match="not the network of --cfg yolov5s"):
            run("--percent", 0.3, "--cfg", "yolov5s")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--percent", "50"], "for 50 % type 0.5"),
        (["--percent", "1"], "from 0 to below 1"),
        (["--percent", "-0.1"], "from 0 to below 1"),
        (["--percent", "0"], "--percent 0 removes nothing; add --dry-run"),
        (["--percent", "nan"], "from 0 to below 1"),
        (["--percent", "half"], "invalid float value"),
        ([], "--percent"),
        (["--percent", "0.5", "--imgsz", "0"], "--imgsz is 0"),
        (["--percent", "0.5", "--batch-size", "0"], "--batch-size is 0"),
        (["--percent", "0.5", "--conf-thres", "2"], "--conf-thres is 2.0"),
        (["--percent", "0.5", "--half"], "unrecognized arguments"),
    ],
)
def test_bad_flags_are_one_clear_line(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        prune.parse_args(["--weights", "x.pt", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_prefixes_of_flags():
    short = ["--perc", "0.5", "--img", "320", "--batch", "8", "--dev", "cpu", "--dry"]
    options = prune.parse_args(["--weights", "a.pt", *short])
    assert (options.percent, options.imgsz, options.batch_size) == (0.5, 320, 8)
    assert options.dry_run


def test_bad_files_are_named(run, weights, tiny_dataset, tmp_path):
    (tmp_path / "broken.pt").write_bytes(weights.read_bytes()[:1000])
    (tmp_path / "two.yaml").write_text(
        f"train: {tiny_dataset.images}\nval: {tiny_dataset.images}\nnames: [a, b]\n"
    )
    cases = [
        ({"source": tmp_path / "absent.pt"}, [], "absent.pt"),
        ({"source": tmp_path / "broken.pt"}, [], "broken.pt"),
        ({}, ["--data", tmp_path / "absent.yaml"], "absent.yaml"),
        ({}, ["--data", tmp_path / "two.yaml"], "detects 3 classes, .* names 2"),
        ({}, ["--cfg", "absent.yaml"], "absent.yaml"),
    ]
    for source, flags, message in cases:
        with pytest.raises((OSError, ValueError), match=message):
            run("--percent", 0.3, *flags, **source)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_said(run):
    with pytest.raises(ValueError, match="no CUDA GPU"):
        run("--percent", 0.3, "--device", "0")


@pytest.mark.slow
def test_from_the_shell(weights, tmp_path, pytestconfig):
    """An error is one line and a code, never a traceback; success is 0."""
    command = [sys.executable, "prune.py", "--device", "cpu", "--img", "64", "--percent", "0.3"]
    command += ["--project", str(tmp_path / "runs"), "--weights"]
    settings = {"cwd": pytestconfig.rootpath, "capture_output": True, "text": True}
    failed = subprocess.run([*command, str(tmp_path / "absent.pt")], **settings)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert len(failed.stderr.splitlines()) == 1
    done = subprocess.run([*command, str(weights)], **settings)
    assert done.returncode == 0, done.stderr
    assert "pruned_model.pt" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.slow
def test_a_network_of_four_levels(run, pytestconfig, tmp_path):
    """P6: no row number or number of levels is built in."""
    model = sparse_model(load_yaml(pytestconfig.rootpath / "models/yolov5n6.yaml"))
    save_checkpoint(tmp_path / "n6.pt", build_checkpoint(model, [str(n) for n in range(80)]))
    run("--percent", 0.4, "--cfg", "yolov5n6.yaml", source=tmp_path / "n6.pt")
    assert len(load_detector(tmp_path / "runs/exp/pruned_model.pt").model.head.strides) == 4


@pytest.mark.data
def test_public_weights(run, shared_dir, tmp_path):
    """Never sparse-trained: said so; half the file size where half of the parameters are gone."""
    log = run("--percent", 0.3, "--cfg", "yolov5n.yaml", source=shared_dir / "weights/yolov5n.pt")
    assert "expect mAP to fall" in log
    report = json.loads((tmp_path / "runs/exp/prune.json").read_text())
    before, after = report["before"], report["after"]
    assert before["parameters"] == 1_872_157
    shares = [after[name] / before[name] for name in ("parameters", "file_mb")]
    assert shares[0] == pytest.approx(shares[1], abs=0.05)
