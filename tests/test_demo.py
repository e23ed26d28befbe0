import csv
import importlib
import json
import sys
from pathlib import Path

import pytest
import yaml

import demo
from utils.flags import prune, train, val
from utils.profile import compare_latency
from utils.training import report

ROOT = Path(__file__).resolve().parents[1]


def _stages(*options: str) -> list[demo.Stage]:
    return demo.list_stages(demo.parse_args(options), Path("runs/demo/exp"))


def test_stages_hand_their_weights_on():
    train, sparse, prune, finetune, val = _stages("--epochs", "3", "2", "1")
    for before, after in ((train, sparse), (sparse, prune), (prune, finetune), (finetune, val)):
        assert str(before.weights) == after.command[after.command.index("--weights") + 1]
    assert [stage.command[0] for stage in (train, prune, val)] == ["train.py", "prune.py", "val.py"]
    assert "--bn_sparsity" in sparse.command
    assert "--ft_pruned_model" in finetune.command


def test_commands_can_be_typed_as_printed():
    """Every command is one that its script accepts."""
    flags = {"train.py": train, "prune.py": prune, "val.py": val}
    for stage in _stages("--device", "cpu", "--sparsity_rate", "1e-05"):
        script, *options = stage.command
        flags[script].parse_args(options)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--epochs", "3", "0", "3"], "--epochs is 0, expected at least 1"),
        (["--imgsz", "0"], "--imgsz is 0, expected at least 32"),
        (["--batch-size", "0"], "--batch-size is 0, expected at least 1"),
        (["--workers", "-1"], "--workers is -1, expected at least 0"),
        (["--sparsity_rate", "much"], "expected a number or auto, not 'much'"),
        (["--sparsity_rate", "-1"], "--sparsity-rate is -1.0, expected at least 0"),
        (["--percent", "0"], "--percent is 0, expected more than 0 and less than 1"),
        (["--percent", "nan"], "--percent is nan, expected more than 0"),
        (["--device", "mars"], "--device mars: expected cpu"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_first(flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        demo.parse_args(flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_demo_only_runs_in_the_project_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="cd "):
        demo.main([])


def test_scores_are_those_of_the_saved_weights(tmp_path):
    results = tmp_path / "results.csv"
    results.write_text(
        "epoch,metrics/mAP_0.5,metrics/mAP_0.5:0.95\n0,0.1,0.05\n1,0.5,0.3\n2,0.6,0.2\n"
    )
    best = demo.Stage("train", [], tmp_path / "best.pt", results)
    last = demo.Stage("sparse", [], tmp_path / "last.pt", results)
    assert demo.read_scores(best) == (0.5, 0.3)
    assert demo.read_scores(last) == (0.6, 0.2)
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"before": {}, "after": {"map50": 0.4, "map50_95": 0.1}}))
    assert demo.read_scores(demo.Stage("prune", [], tmp_path / "p.pt", report)) == (0.4, 0.1)


def test_table_is_aligned():
    row = {
        "stage": "1 train",
        "map50": 0.5,
        "map50_95": 0.25,
        "parameters": 1_765_270,
        "gflops": 0.26,
        "latency_ms": 3.25,
        "file_mb": 3.7,
    }
    lines = demo.format_table([row], "title").splitlines()
    assert lines[0] == "title"
    assert len(lines[2]) == len(lines[3])
    assert lines[3].split() == [
        "1", "train", "0.500", "0.250", "1,765,270", "0.26", "3.2", "3.70",
    ]  # fmt: skip


def test_a_failing_stage_ends_the_demo():
    stage = demo.Stage("train", ["-c", "raise SystemExit(3)"], Path(), Path())
    with pytest.raises(SystemExit, match=r"stage 1 \(train\) ended with code 3"):
        demo.run_stage(1, stage)


@pytest.fixture
def stages_of_seconds(monkeypatch):
    """The commands run in this process, measure the latency of five passes and draw nothing."""

    def call(command):
        python, script, *flags = command
        assert python == sys.executable
        module = importlib.import_module(script.removesuffix(".py"))
        with monkeypatch.context() as patched:
            draws = report if script == "train.py" else module
            patched.setattr(draws, "draw", lambda *_, **__: None)
            if hasattr(module, "compare_latency"):
                patched.setattr(module, "compare_latency", quick_latency)
            module.main(flags)
        return 0

    def quick_latency(models, imgsz, device, *settings, **more):
        return compare_latency(models, imgsz, device, *settings, **more | {"seconds": 0})

    monkeypatch.setattr(demo.subprocess, "call", call)
    monkeypatch.setattr(demo, "compare_latency", quick_latency)


@pytest.mark.slow
def test_demo_end_to_end_on_a_tiny_data_set(
    tmp_path, tiny_dataset, tiny_spec, stages_of_seconds, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    cfg = tmp_path / "tiny.yaml"
    cfg.write_text(yaml.safe_dump(tiny_spec))
    command = ["--data", str(tiny_dataset.yaml), "--cfg", str(cfg), "--imgsz", "64"]
    command += ["--epochs", "1", "1", "1", "--batch-size", "2", "--workers", "0"]
    command += ["--percent", "0.1", "--device", "cpu", "--project", str(tmp_path / "demo")]
    demo.main(command)
    printed = capsys.readouterr().out
    assert "5 val" in printed
    folder = tmp_path / "demo" / "exp"
    with (folder / "stages.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["stage"][0] for row in rows] == list("12345")
    parameters = [int(row["parameters"]) for row in rows]
    assert parameters[0] == parameters[1] > parameters[2] == parameters[3] == parameters[4]
    assert all(float(row["latency_ms"]) > 0 for row in rows)
    assert (folder / "stages.png").stat().st_size > 10_000
    assert (folder / "stages.txt").read_text() in printed
