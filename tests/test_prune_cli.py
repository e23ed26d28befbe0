"""prune.py from its command line to its files."""

import copy
import csv
import dataclasses
import json
import logging
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import prune
from models import Model, ModelSpec
from utils import profile
from utils.checkpoint import build_checkpoint, load_detector, save_checkpoint, save_final
from utils.config import load_yaml
from utils.evaluate import evaluate as real_evaluate
from utils.plots.figures import draw
from utils.profile import Latency, count_gflops, count_parameters
from utils.profile import compare_latency as real_compare_latency
from utils.pruning import trials
from utils.pruning.report import SpeedRow
from utils.pruning.verdict import Best, History

NAMES = ("disc", "box", "bar")

CLASSIC = ("--shortcut", "keep", "--importance", "gamma", "--compensate", "none")
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


def quick_latency(models, **settings):
    return real_compare_latency(models, **{**settings, "seconds": 0})


@pytest.fixture
def run(weights, tmp_path, caplog, monkeypatch):
    """Call prune.main in a project folder of its own; returns what it logged."""

    def quick_picture(function, *args, **settings):
        out = next(arg for arg in args[::-1] if isinstance(arg, Path))
        Image.new("RGB", (1, 1)).save(out)

    monkeypatch.setattr(prune, "compare_latency", quick_latency)
    monkeypatch.setattr(prune, "draw", quick_picture)

    def call(*flags, source=weights):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            machine = ["--device", "cpu", "--workers", "0", "--img", "64"]
            project = ["--project", str(tmp_path / "runs")]
            prune.main(["--weights", str(source), *machine, *project, *map(str, flags)])
        return "\n".join(caplog.messages)

    return call


@pytest.fixture
def real_pictures(run, monkeypatch):
    """They are what takes longest; one test of each kind is enough."""
    monkeypatch.setattr(prune, "draw", draw)


@pytest.fixture
def seeing(tiny_dataset, monkeypatch):
    """Flags for a data set in which mAP is what `found` says, by the share of channels that stay.

    Training a network that detects something would take minutes.
    """

    class Seeing:
        flags = ("--data", tiny_dataset.yaml, "--batch", 2)
        num_evaluated = 0

        @staticmethod
        def found(share):
            return 0.8 * (share > 0.6)

        def evaluate(self, model, *args, **settings):
            self.num_evaluated += 1
            result = real_evaluate(model, *args, **settings)
            share = sum(model.widths().values()) / 408
            map50 = self.found(share)
            return dataclasses.replace(result, map50=map50, map50_95=map50 / 2)

    seeing = Seeing()
    monkeypatch.setattr(trials, "evaluate", seeing.evaluate)
    return seeing


def read_report(tmp_path, name="exp"):
    return json.loads((tmp_path / "runs" / name / "report.json").read_text(encoding="utf-8"))


FILES = {
    "pruned_model.pt", "pruned_model.yaml", "report.json", "report.html", "opt.yaml",
    "layers.png", "gamma.png",
}  # fmt: skip
SHOWN = {f"detections{number}.jpg" for number in range(4)}


@pytest.mark.usefixtures("real_pictures")
def test_a_whole_run(run, weights, tiny_dataset, tmp_path):
    log = run("--percent", 0.4, "--data", tiny_dataset.yaml, "--batch", 2)
    folder = tmp_path / "runs" / "exp"
    report = read_report(tmp_path)
    assert {file.name for file in folder.iterdir()} == FILES | SHOWN
    for picture in ("layers.png", "gamma.png", "detections0.jpg"):
        assert min(Image.open(folder / picture).size) > 90

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
    assert "frozen (shortcut)" not in log
    settings = ("shortcut", "importance", "compensate", "min_channels", "round_to", "target")
    assert [report[name] for name in settings] == ["group", "error-per-cost", "linear", 1, 1, ""]
    assert report["verdict"].startswith("not ready to prune: ")  # it is not trained at all
    assert report["verdict"] in log
    assert report["verdict"] not in report["warnings"]
    assert [row["batch_size"] for row in report["speeds"]] == [1, 16]
    assert [row["name"] for row in report["classes"]] == list(NAMES)


def test_the_classic_rule(run, weights, tmp_path):
    """One percentile of all |gamma|, bottlenecks with a shortcut left alone."""
    log = run("--percent", 0.4, *CLASSIC)
    assert "frozen (shortcut)" in log
    assert "threshold: |gamma| >= " in log
    dense = load_detector(weights).model
    groups = prune.find_channel_groups(dense, "keep")
    paths = [path for path in groups.outputs if groups.is_prunable(path)]
    gammas = {path: dense.model.get_submodule(path).bn.weight.abs() for path in paths}
    everything = torch.cat(list(gammas.values()))
    threshold = everything.sort().values[int(len(everything) * 0.4)]
    report = read_report(tmp_path)
    widths = {path: int((gamma >= threshold).sum()) for path, gamma in gammas.items()}
    assert {path: report["widths"][path] for path in paths} == widths
    assert {row["layer"] for row in report["layers"] if row["prunable"]} == set(paths)
    assert report["threshold"] == pytest.approx(threshold.item())


def test_without_images_nothing_about_them_is_said(run, tmp_path):
    log = run("--percent", 0.4)
    assert {file.name for file in (tmp_path / "runs/exp").iterdir()} == FILES
    report = read_report(tmp_path)
    assert "mAP was not measured: give --data" in log
    assert report["before"]["map50"] is report["after"]["map50_95"] is report["readiness"] is None
    assert (report["verdict"], report["compensate"], report["recalibrate"]) == ("", "mean", 0)
    assert "re-calibration" not in log
    page = (tmp_path / "runs/exp/report.html").read_text(encoding="utf-8")
    assert "not measured: there was no data set" in page


def test_a_network_that_its_sparse_training_has_ruined_is_not_ready(run, seeing, weights, tmp_path):
    content = torch.load(weights)
    content["options"] = {"bn_sparsity": True, "sparsity_rate": 0.003, "epochs": 60}
    content["history"] = History({}, 0.101, Best(0.38, "in epoch 4"), False).as_content()
    save_checkpoint(weights, content)
    log = run("--percent", 0.3, *seeing.flags)
    said = "the sparse training itself has lost 28 points of mAP@.5 (0.101, against 0.380 in epoch"
    assert f"not ready to prune: {said} 4). Give it a smaller --sparsity_rate (it was 0.003)" in log
    assert said in read_report(tmp_path)["verdict"]
    del content["history"]  # a checkpoint of a version before
    save_checkpoint(weights, content)
    assert "\nready to prune: " in run("--percent", 0.3, *seeing.flags)


def test_the_page_holds_what_the_run_found(run, seeing, tmp_path):
    run("--percent", 0.3, *seeing.flags)
    page = (tmp_path / "runs/exp/report.html").read_text(encoding="utf-8")
    assert page.count("<img") == 6  # layers, gamma, four images
    assert "http" not in page.replace("http-equiv", "")
    for text in ("ready to prune: ", "disc", "13.m.0.cv2", "a.jpg", "linear", "error-per-cost"):
        assert text in page, text


def test_the_slim_checkpoint_computes_what_the_masked_network_does(run, weights, tmp_path):
    run("--percent", 0.45, *CLASSIC)
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


@pytest.mark.parametrize(
    "flags",
    [
        ["--percent", 0.4],
        ["--percent", 0],
        ["--percent", 0.2, 0.4],
        ["--target-gflops", "60%"],
        ["--target-params", "60%"],
        ["--max-drop", 0.01],
    ],
    ids=lambda flags: " ".join(map(str, flags)),
)
def test_a_dry_run_writes_nothing(run, seeing, tmp_path, flags):
    before = sorted(tmp_path.rglob("*"))
    log = run(*flags, *seeing.flags, "--dry-run")
    assert sorted(tmp_path.rglob("*")) == before
    assert "mAP@.5:.95" in log
    assert log.splitlines()[-1].endswith("dry run: nothing was written")


def test_every_run_has_its_own_folder(run, tmp_path):
    for _ in range(2):
        run("--percent", 0.1)
    run("--percent", 0.3, "--name", "slim")
    run("--percent", 0.2, "--name", "slim", "--exist-ok")
    assert {p.name for p in (tmp_path / "runs").iterdir()} == {"exp", "exp2", "slim"}
    assert json.loads((tmp_path / "runs/slim/report.json").read_text())["percent"] == 0.2


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
    log = run("--percent", 0.3, *CLASSIC, source=tmp_path / "weak.pt")
    floor = "fewer than 1 channel(s) of 6.cv1 reach the threshold; the strongest stay"
    assert f"warning: {floor}" in log
    report = read_report(tmp_path)
    assert report["widths"]["6.cv1"] == 1
    assert [row["layer"] for row in report["layers"] if row["added"]] == ["6.cv1"]
    assert report["warnings"][0] == floor


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
    log = run("--percent", percent, "--dry-run", *CLASSIC, source=tmp_path / "other.pt")
    about_speed = ("not faster", "no measurable difference")
    lines = [line for line in log.splitlines() if "warning: " in line]
    lines = [line for line in lines if not any(words in line for words in about_speed)]
    assert len([line for line in lines if "fewer than 1" not in line]) == bool(warning)
    assert warning is None or any(warning in line for line in lines)


def test_whatever_is_measured_is_measured_alike(run, tiny_dataset, monkeypatch):
    """Another precision or NMS threshold after the cut would make the comparison worthless."""
    calls = []

    def recorded(model, batches, names, **settings):
        images = [batch.images for batch in batches]
        settings.pop("on_batch")
        calls.append((images, names, settings, {p.dtype for p in model.parameters()}))
        result = real_evaluate(model, batches, names, progress=False, **settings)
        return dataclasses.replace(result, map50=0.5)

    monkeypatch.setattr(trials, "evaluate", recorded)
    run("--percent", 0.2, 0.3, "--data", tiny_dataset.yaml, "--conf-thres", 0.01, "--iou-thres",
        0.5, "--dry-run")  # fmt: skip
    assert len(calls) >= 5
    for images, *others in calls:
        assert all(map(torch.equal, images, calls[0][0]))
        assert others == list(calls[0][1:])
    settings, dtypes = calls[0][2:]
    assert dtypes == {torch.float32}
    assert (settings["conf_thres"], settings["iou_thres"]) == (0.01, 0.5)


def test_the_dense_network_is_measured_once(run, seeing):
    """For the verdict, the sweep and the comparison."""
    widths = []
    seeing.found = lambda share: widths.append(share) or 0.8
    run("--percent", 0.1, 0.2, *seeing.flags, "--dry-run")
    assert widths.count(1) == 1
    assert len(widths) > 5


class TestTargets:
    """They lead to the smallest cut that meets them, and say what they led to."""

    def slim(self, tmp_path):
        return load_detector(tmp_path / "runs/exp/pruned_model.pt").model

    @pytest.mark.parametrize(
        ("target", "share"), [("50%", 0.5), ("12.5k", None), ("0.0125M", None), ("12500", None)]
    )
    def test_parameters(self, run, weights, tmp_path, target, share):
        log = run("--target-params", target)
        most = share * count_parameters(load_detector(weights).model) if share else 12_500
        assert 0.9 * most < count_parameters(self.slim(tmp_path)) <= most
        report = read_report(tmp_path)
        assert report["target"] == f"target-params {target}"
        assert f"--target-params {target} is met by --percent {report['percent']:.4g}" in log
        options = load_yaml(tmp_path / "runs/exp/opt.yaml")
        assert options["target_params"] == target

    @pytest.mark.parametrize("target", ["60%", "2.5M"])
    def test_gflops(self, run, weights, tmp_path, target):
        run("--target-gflops", target)
        dense = count_gflops(load_detector(weights).model, 64)
        most = 0.6 * dense if target == "60%" else 0.0025
        assert 0.9 * most < count_gflops(self.slim(tmp_path), 64) <= most

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--target-params", "1%"], r"252.8 of 25,280 parameters is out of reach: at least "),
            (["--target-params", "0.5"], r"stops it: every layer keeps 1 .*typed as 50%$"),
            (["--target-gflops", "9%", *CLASSIC], r"GFLOPs .*--shortcut group frees them"),
            (["--target-params", "30%", "--round-to", "8"], r"widths are multiples of 8"),
            (["--target-params", "1M"], "no more than the target of 1,000,000: there is nothing"),
            (["--target-latency", "1e9"], "no more than the target of 1000000000.00"),
            (["--target-latency", "0.00001"], "is out of reach: .* ms is left when nearly all"),
        ],
    )
    def test_what_cannot_be_met_says_why(self, run, tmp_path, flags, message):
        with pytest.raises(ValueError, match=message):
            run(*flags)
        assert not (tmp_path / "runs").exists()

    @pytest.fixture
    def clock(self, monkeypatch):
        """A machine on which time is proportional to the channels: 408 of them take 40.8 ms."""

        def compare(models, **settings):
            times = [sum(model.widths().values()) / 10 for model in models]
            return [Latency(t, *3 * [times[0] / t]) for t in times]

        def use():
            monkeypatch.setattr(prune, "compare_latency", compare)

        return use

    @pytest.mark.parametrize("target", ["70%", "28.56", "28.56ms"])
    def test_latency(self, run, tmp_path, clock, target):
        clock()
        log = run("--target-latency", target)
        channels = sum(self.slim(tmp_path).widths().values())
        assert 0.7 * 408 - 10 < channels <= 0.7 * 408
        assert "--percent 0.49: " in log
        assert f"--target-latency {target} is met by --percent 0." in log
        assert "measured again" not in log

    def test_a_busy_machine_is_a_warning(self, caplog):
        options = prune.parse_args(["--weights", "x.pt", "--target-latency", "50%"])
        prune.print_speeds(options, [SpeedRow(1, 10.0, 6.0, 1.7, 1.6, 1.8)], 2.0, "cpu")
        assert "measured again, it takes 5.88 ms, not the 5.00 of --target-latency" in caplog.text

    def test_a_drop(self, run, seeing, tmp_path):
        log = run("--max-drop", 0.01, *seeing.flags)
        share = sum(self.slim(tmp_path).widths().values()) / 408
        assert 0.6 < share < 0.63
        report = read_report(tmp_path)
        assert report["before"]["map50"] == report["after"]["map50"] == 0.8
        assert report["target"] == "max-drop 0.01"
        assert "--percent 0.50: mAP@.5 0.0000" in log

    @pytest.mark.parametrize("flags", [["--max-drop", 0.01], ["--percent", 0.2, 0.3]])
    def test_a_drop_holds_for_what_is_saved(self, run, seeing, tmp_path, monkeypatch, flags):
        """Re-calibration must not lose what the search kept, even if mAP@.5:.95 gains."""
        marked = []

        def recalibrated(self, model):
            marked.append(copy.deepcopy(model))
            return marked[-1]

        def evaluate(model, *args, **settings):
            result = seeing_evaluate(model, *args, **settings)
            if marked:
                result = dataclasses.replace(result, map50=0.5, map50_95=0.5)
            return result

        seeing_evaluate = trials.evaluate
        monkeypatch.setattr(trials.Trials, "recalibrated", recalibrated)
        monkeypatch.setattr(trials, "evaluate", evaluate)
        log = run(*flags, *seeing.flags)
        assert len(marked) == 1
        assert "left out" in log

    @pytest.mark.parametrize(
        ("found", "message"),
        [
            (lambda share: 0.8 * (share == 1), "every cut costs more than 0.01 of mAP@.5"),
            (lambda share: 0.0, "mAP@.5 is 0.0000 before anything is cut"),
        ],
    )
    def test_no_cut_for_a_drop(self, run, seeing, tmp_path, found, message):
        seeing.found = found
        with pytest.raises(ValueError, match=message):
            run("--max-drop", 0.01, *seeing.flags)
        assert not (tmp_path / "runs").exists()


class TestSweep:
    @pytest.mark.usefixtures("real_pictures")
    @pytest.mark.parametrize("flags", [["--sweep"], ["--percent", 0.6, 0.2, 0.3, 0.2]])
    def test_the_model_at_the_knee_is_saved(self, run, seeing, tmp_path, flags):
        log = run(*flags, *seeing.flags)
        folder = tmp_path / "runs/exp"
        assert {file.name for file in folder.iterdir()} == FILES | SHOWN | {
            "sweep.csv", "sweep.png",
        }  # fmt: skip
        with (folder / "sweep.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        percents = [float(row["percent"]) for row in rows]
        assert percents == [
            0.0,
            *(prune.SWEEP_PERCENTS if flags == ["--sweep"] else (0.2, 0.3, 0.6)),
        ]
        report = read_report(tmp_path)
        assert report["target"] == ("sweep" if flags == ["--sweep"] else "")
        knee = report["sweep"][report["knee"]]
        assert knee["map50"] == 0.8
        assert report["sweep"][report["knee"] + 1]["map50"] == 0
        assert report["percent"] == knee["percent"]
        slim = load_detector(folder / "pruned_model.pt").model
        assert count_parameters(slim) == knee["parameters"] == report["after"]["parameters"]
        assert count_gflops(slim, 64) == pytest.approx(knee["gflops"])
        (line,) = [line for line in log.splitlines() if line.endswith("<- knee")]
        assert f"{100 * knee['percent']:.1f}%" in line
        assert f"the network at the knee, --percent {knee['percent']:g}, is saved" in log
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert page.count("<img") == 7

    @pytest.mark.parametrize(
        ("found", "reason"),
        [
            (None, "without mAP there is no knee (give --data)"),
            (lambda share: 0.0, "the network detects nothing that could be lost"),
            (lambda share: 0.8 * (share == 1), "every percent costs more than a point of mAP@.5"),
        ],
    )
    def test_without_a_knee_there_is_the_table_alone(self, run, seeing, tmp_path, found, reason):
        seeing.found = found
        log = run("--percent", 0.2, 0.4, *(seeing.flags if found else ()))
        files = {file.name for file in (tmp_path / "runs/exp").iterdir()}
        assert files == {"sweep.csv", "sweep.png", "opt.yaml", "report.html"}
        page = (tmp_path / "runs/exp/report.html").read_text(encoding="utf-8")
        assert f"No network is saved: {reason}; choose one with --percent." in page
        assert "<td>20.0%</td>" in page
        assert ("ready to prune: " in page) == (found is not None)
        assert f"no network of the sweep is saved: {reason}; choose one with --percent" in log
        assert "sweep.csv" in log


class TestWidths:
    def test_round_to(self, run, tmp_path):
        log = run("--percent", 0.4, "--round-to", 4)
        report = read_report(tmp_path)
        prunable = [row for row in report["layers"] if row["prunable"]]
        assert {row["after"] % 4 for row in prunable} == {0}
        assert any(row["after"] % 8 for row in prunable)
        added = [row for row in prunable if row["added"]]
        assert added
        for row in added:
            (line,) = [text for text in log.splitlines() if text.startswith(row["layer"] + " ")]
            assert line.endswith(f"{row['added']} more for floor and rounding")
        assert "channels stay for --round-to 4 and --min-channels 1 alone" in log

    def test_min_channels(self, run, tmp_path):
        log = run("--percent", 0.7, "--min-channels", 5)
        report = read_report(tmp_path)
        assert min(report["widths"].values()) == 5
        floored = [row["layer"] for row in report["layers"] if row["added"]]
        assert floored
        assert "warning: fewer than 5 channel(s) of " in log
        assert "leaves every layer 5 channels; it says nothing about mAP" in log

    def test_rounding_that_brings_all_back(self, run):
        with pytest.raises(ValueError, match=r"multiples of 64 \(--round-to\); give a larger"):
            run("--percent", 0.3, "--round-to", 64)


class TestRecalibration:
    @pytest.mark.parametrize(
        ("flags", "gain", "kept"),
        [
            ([], 0.1, 1),
            ([], -0.1, 0),
            ([], 0.0, 0),
            (["--recalibrate", 2], -0.1, 1),
            (["--recalibrate", 0], 0.1, 0),
        ],
    )
    def test_it_is_kept_where_it_helps(
        self, run, weights, seeing, tmp_path, monkeypatch, flags, gain, kept
    ):
        def measure(self, model):
            result = real_measure(self, model)
            if hasattr(model, "was_recalibrated"):
                better = dataclasses.replace(result.result, map50_95=0.4 + gain)
                result = result._replace(result=better)
            return result

        def recalibrated(self, model):
            model = real_recalibrated(self, model)
            model.was_recalibrated = True
            return model

        real_measure, real_recalibrated = trials.Trials.measure, trials.Trials.recalibrated
        monkeypatch.setattr(trials.Trials, "measure", measure)
        monkeypatch.setattr(trials.Trials, "recalibrated", recalibrated)
        log = run("--percent", 0.3, *flags, *seeing.flags)
        report = read_report(tmp_path)
        assert report["recalibrate"] == kept  # four images are one batch
        assert report["after"]["map50_95"] == pytest.approx(0.4 + gain * kept)
        said = [line for line in log.splitlines() if "re-calibration" in line]
        assert len(said) == (not flags)
        assert not said or said[0].endswith("kept" if kept else "left out")
        state = load_detector(tmp_path / "runs/exp/pruned_model.pt").model.state_dict()
        dense = load_detector(weights).model.state_dict()
        path = next(p for p in dense if p.endswith("running_var"))
        assert bool((state[path] == 1).all()) == (not kept)
        assert bool((dense[path] == 1).all())

    def test_there_are_not_so_many_images(self, run, seeing):
        log = run("--percent", 0.3, "--recalibrate", 9, "--dry-run", *seeing.flags)
        assert "warning: --recalibrate 9: the training images make 1 batches" in log

    @pytest.mark.parametrize("trained", [True, False])
    def test_it_sees_images_as_the_training_did(
        self, run, tiny_spec, tiny_dataset, tmp_path, monkeypatch, pytestconfig, trained
    ):
        """Statistics of plain images would not fit what the network learnt from mosaics."""
        hyp = load_yaml(pytestconfig.rootpath / "data/hyps/hyp.scratch-low.yaml")
        content = build_checkpoint(
            sparse_model(tiny_spec), NAMES, **({"hyp": hyp} if trained else {})
        )
        save_checkpoint(tmp_path / "trained.pt", content)
        made = []
        real = trials.DetectionDataset

        def recorded(*args, hyp, rect, **settings):
            made.append(None if hyp is None else hyp.mosaic)
            return real(*args, hyp=hyp, rect=rect, **settings)

        monkeypatch.setattr(trials, "DetectionDataset", recorded)
        run("--percent", 0.3, "--data", tiny_dataset.yaml, source=tmp_path / "trained.pt")
        assert made == [None, 1.0 if trained else None, None]  # least squares, BN, validation


class TestShortcut:
    """By default the rule is that of the sparse training."""

    @pytest.mark.parametrize(
        ("trained", "flags", "rule", "said"),
        [
            ({}, [], "group", "--shortcut group, as no sparse training says otherwise"),
            ({"bn_sparsity": False, "shortcut": "keep"}, [], "group", "--shortcut group, as no "),
            ({"bn_sparsity": True, "shortcut": "keep"}, [], "keep", "--shortcut keep, as in the "),
            ({"bn_sparsity": True}, [], "keep", "--shortcut keep, as in the sparse training"),
            ({"bn_sparsity": True, "shortcut": "group"}, [], "group", "--shortcut group, as in t"),
            ({"bn_sparsity": True, "shortcut": "group"}, ["keep"], "keep", ""),
            ({"bn_sparsity": True, "shortcut": "keep"}, ["group"], "group", "left the shortcuts"),
        ],
    )
    def test_rule(self, run, tiny_spec, tmp_path, trained, flags, rule, said):
        path = tmp_path / "trained.pt"
        save_checkpoint(path, build_checkpoint(sparse_model(tiny_spec), NAMES, options=trained))
        flags = ["--shortcut", *flags] if flags else []
        log = run("--percent", 0.3, "--dry-run", *flags, source=path)
        assert said in log
        assert ("frozen (shortcut)" in log) == (rule == "keep")

    def test_a_slim_network_remembers(self, run, tiny_spec, tmp_path):
        options = {"bn_sparsity": True, "shortcut": "keep"}
        content = build_checkpoint(sparse_model(tiny_spec), NAMES, options=options)
        save_checkpoint(tmp_path / "trained.pt", content)
        run("--percent", 0.2, source=tmp_path / "trained.pt")
        log = run("--percent", 0.3, source=tmp_path / "runs/exp/pruned_model.pt")
        assert "--shortcut keep, as in the sparse training" in log


def test_images_are_read_only_where_they_are_needed(run, tiny_dataset, tmp_path):
    """The classic rule needs no training images; only so many are read as are asked for."""
    text = tiny_dataset.yaml.read_text().replace("train: images/train", "train: images/none")
    tiny_dataset.yaml.write_text(text)
    flags = ("--percent", 0.3, "--data", tiny_dataset.yaml, "--dry-run")
    run(*flags, *CLASSIC, "--recalibrate", 0)
    with pytest.raises(FileNotFoundError):
        run(*flags)


def test_the_number_of_calibration_images(run, tiny_dataset, monkeypatch):
    seen = []
    real = trials.measure_inputs

    def measure(model, groups, batches):
        batches = list(batches)
        seen.append(sum(map(len, batches)))
        return real(model, groups, batches)

    monkeypatch.setattr(trials, "measure_inputs", measure)
    for number in (3, 64):
        run("--percent", 0.3, "--data", tiny_dataset.yaml, "--dry-run", "--calibration-images",
            number)  # fmt: skip
    assert seen == [3, 4]


def test_latency_batches(run, tmp_path):
    log = run("--percent", 0.4, "--latency-batch", 2, 3)
    report = read_report(tmp_path)
    assert [row["batch_size"] for row in report["speeds"]] == [2, 3]
    assert ", 2 images" in log
    assert ", 3 images" in log
    assert report["before"]["latency_ms"] == report["speeds"][0]["before_ms"]


def test_large_data_sets_are_searched_by_a_part(run, seeing, monkeypatch):
    monkeypatch.setattr(trials, "SEARCH_IMAGES", 2)
    log = run("--percent", 0.3, *seeing.flags, "--dry-run")
    assert "(measured on 2 validation images)" in log


def test_one_class_for_all(run, tiny_dataset):
    log = run("--percent", 0.3, "--data", tiny_dataset.yaml, "--single-cls", "--dry-run")
    assert "mAP@.5" in log


@pytest.mark.parametrize(
    ("low", "ratio", "high", "said"),
    [
        (1.25, 1.31, 1.36, "speed: 1.31x (1.25-1.36) faster on cpu"),
        (0.96, 1.22, 1.40, "warning: no measurable difference on cpu: 1.22x (0.96-1.40)"),
        (1.0, 1.0, 1.0, "warning: no measurable difference on cpu: 1.00x (1.00-1.00)"),
        (0.80, 0.90, 0.95, "warning: not faster on cpu: 0.90x (0.80-0.95)"),
    ],
)
def test_a_missing_speed_up_is_said(caplog, low, ratio, high, said):
    """Fewer channels need not be faster; a ratio alone may be the noise of a busy machine."""
    with caplog.at_level(logging.INFO):
        speeds = [SpeedRow(1, 10.0, 10.0 / ratio, ratio, low, high)]
        options = prune.parse_args(["--weights", "x.pt", "--percent", "0.5"])
        prune.print_speeds(options, speeds, 2.0, torch.device("cpu"))
    assert said in caplog.text
    assert ("of the 2.00x by which the FLOPs fell" in caplog.text) == (low > 1)


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


@pytest.mark.parametrize(
    ("percent", "reason"),
    [
        (0.3, "all channels are alike; train with --bn_sparsity first"),
        (1e-6, "the share is less than one channel; give a larger --percent"),
    ],
)
def test_what_is_not_smaller_is_not_saved(run, tiny_spec, tmp_path, monkeypatch, percent, reason):
    """All alike, or a share below one channel: nothing goes, and no time is spent on measuring."""
    model = sparse_model(tiny_spec)
    if percent == 0.3:
        for bn in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            bn.weight.data.fill_(1.0)
    save_checkpoint(tmp_path / "other.pt", build_checkpoint(model, NAMES))
    monkeypatch.setattr(prune, "verify_cut", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match=f"^nothing is removed: {reason}. Nothing was saved$"):
        run("--percent", percent, *CLASSIC, source=tmp_path / "other.pt")
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


def test_too_little_memory_is_one_line_with_a_remedy(tmp_path, monkeypatch, pytestconfig):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB. GPU 0 has ...")

    monkeypatch.setattr("utils.device.select_device", fail)
    weights = tmp_path / "a.pt"
    weights.touch()  # it is looked for before torch is loaded
    monkeypatch.setattr(sys, "argv", ["prune.py", "--weights", str(weights), "--percent", "0.3"])
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
            json.loads((tmp_path / "runs" / name / "report.json").read_text())
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
        (["--percent", "0.1", "50"], "for 50 % type 0.5"),
        (["--percent", "0", "0"], "--percent 0 removes nothing"),
        ([], "--percent, --sweep, --target-gflops, --target-params, --target-latency or --max-dr"),
        (["--percent", "0.5", "--sweep"], "--percent and --sweep exclude each other"),
        (["--max-drop", "0.01", "--target-params", "50%"], "--target-params and --max-drop excl"),
        (["--target-gflops", "half"], "--target-gflops: 'half' is no number and no share such"),
        (["--target-gflops", "100%"], "--target-gflops: 100% is not between 0% and 100%"),
        (["--target-params", "0"], "--target-params: 0 is not above 0"),
        (["--target-latency", "5k"], "--target-latency: '5k' is no number"),
        (["--max-drop", "1", "--data", "x"], "1 points are typed as 0.01"),
        (["--max-drop", "-0.1", "--data", "x"], "--max-drop is -0.1, expected 0 to below 1"),
        (["--max-drop", "0.01"], "--max-drop needs images: give --data"),
        (["--percent", "0.5", "--recalibrate", "4"], "--recalibrate needs images: give --data"),
        (["--percent", "0.5", "--recalibrate", "-1"], "--recalibrate is -1, expected at least 0"),
        (["--percent", "0.5", "--compensate", "linear"], "--compensate linear needs images"),
        (["--percent", "0.5", "--compensate", "best"], "--compensate: invalid choice: 'best'"),
        (["--percent", "0.5", "--importance", "L1"], "--importance: invalid choice: 'L1'"),
        (["--percent", "0.5", "--shortcut", "cut"], "--shortcut: invalid choice: 'cut'"),
        (["--percent", "0.5", "--conf-thres", "0.1"], "--conf-thres acts only with --data"),
        (["--percent", "0.5", "--single-cls"], "--single-cls acts only with --data"),
        (["--percent", "0.5", "--calibration-images", "8"], "--calibration-images acts only with"),
        (["--percent", "0.5", "--calibration-images", "0"], "--calibration-images is 0"),
        (["--percent", "0.5", "--min-channels", "0"], "--min-channels is 0, expected at least 1"),
        (["--percent", "0.5", "--round-to", "0"], "--round-to is 0, expected at least 1"),
        (["--percent", "0.5", "--latency-batch", "8", "0"], "--latency-batch is 0"),
    ],
)
def test_bad_flags_are_one_clear_line(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        prune.parse_args(["--weights", "x.pt", *flags])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_prefixes_of_flags():
    short = [
        "--perc",
        "0.5",
        "--img",
        "320",
        "--batch",
        "8",
        "--data",
        "d.yaml",
        "--dev",
        "cpu",
        "--dry",
    ]
    options = prune.parse_args(["--weights", "a.pt", *short])
    assert (options.percent, options.imgsz, options.batch_size) == ([0.5], 320, 8)
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
def test_as_a_command(run_script, weights, tmp_path, caplog, monkeypatch):
    """An error is one line and a code, never a traceback; success is 0."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(profile, "compare_latency", quick_latency)
    command = ["prune.py", "--device", "cpu", "--img", "64", "--percent", "0.3"]
    command += ["--project", tmp_path / "runs", "--weights"]
    failed = run_script(*command, tmp_path / "absent.pt")
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert len(failed.stderr.splitlines()) == 1
    done = run_script(*command, weights)
    assert (done.returncode, done.stderr) == (0, "")
    assert "pruned_model.pt" in caplog.text


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
    report = json.loads((tmp_path / "runs/exp/report.json").read_text())
    before, after = report["before"], report["after"]
    assert before["parameters"] == 1_872_157
    shares = [after[name] / before[name] for name in ("parameters", "file_mb")]
    assert shares[0] == pytest.approx(shares[1], abs=0.05)
