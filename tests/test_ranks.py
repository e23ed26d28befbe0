"""Several processes train what one would, write once, and end together."""

import copy
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn

from models import Model, ModelSpec
from utils.checkpoint import build_checkpoint, load_checkpoint, save_checkpoint
from utils.flags.train import parse_args
from utils.launch import launch
from utils.optim import ModelEma
from utils.pruning.slimming import SparsityPenalty
from utils.training.inputs import check_processes
from utils.training.loaders import check_images_are_here

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = [sys.executable, "-m", "tests.steps_of_ranks"]


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    """Where `python -m tests...` finds itself."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def base(tiny_spec, tiny_dataset, tmp_path):
    """Flags of a run of seconds on five images: the third batch of an epoch has but one."""
    for folder in (tiny_dataset.images, tiny_dataset.labels):
        source = next(folder.glob("c.*"))
        shutil.copy(source, source.with_stem("e"))
    cfg = tmp_path / "tiny.yaml"
    cfg.write_text(yaml.safe_dump(tiny_spec))
    return [
        *("--data", str(tiny_dataset.yaml), "--cfg", str(cfg), "--weights", ""),
        *("--img", "64", "--batch", "2", "--workers", "0", "--device", "cpu", "--amp", "off"),
        *("--nominal-batch", "4", "--noautoanchor", "--epochs", "2"),
    ]


@pytest.fixture
def stages(base, tiny_spec, tmp_path):
    """Command lines of all stages."""
    torch.manual_seed(7)
    model = Model(ModelSpec.from_dict(tiny_spec))
    names = ("disc", "box", "bar")
    save_checkpoint(tmp_path / "dense.pt", build_checkpoint(model, names))
    widths = {path: width - 1 for path, width in model.widths().items()}
    slim = Model(model.spec.with_widths(widths))
    save_checkpoint(tmp_path / "slim.pt", build_checkpoint(slim, names))
    sparse = [*base, "--bn_sparsity", "--optimizer", "AdamW"]
    tuned = [*base, "--weights", str(tmp_path / "slim.pt"), "--ft_pruned_model"]
    return {
        "dense": base,
        "rect": [*base, "--rect", "--batch", "4"],
        "sparse": [*sparse, "--sparsity_rate", "auto"],
        "proximal": [*sparse, "--sparsity_mode", "proximal", "--sparsity_rate", "0.05"],
        "distilled": [*tuned, "--teacher", str(tmp_path / "dense.pt")],
    }


REFUSED = {
    "norms on CPUs": (["--sync-bn"], "--sync-bn needs CUDA GPUs, not cpu; leave it out"),
    "shares": (["--batch", "15"], "--batch-size 15 cannot be shared evenly by 2 processes"),
    "batch that fits": (["--batch", "-1"], "give a number for several"),
    "going back": (["--on-nan", "recover"], "works in one process only"),
    "search": (["--evolve", "3"], "--evolve works in one process"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_several_processes_cannot_do_is_refused(monkeypatch, case):
    flags, words = REFUSED[case]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=words):
        check_processes(parse_args(flags)[0], torch.device("cpu"))


def test_an_image_that_another_machine_lacks_is_named(tmp_path):
    split = SimpleNamespace(paths=(str(tmp_path / "a.jpg"),))
    with pytest.raises(FileNotFoundError, match=r"a\.jpg: not on .*; all machines must have"):
        check_images_are_here(split)


def test_synchronised_norms_are_penalised_folded_and_counted_like_others(tiny_spec):
    plain = Model(ModelSpec.from_dict(tiny_spec))
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    assert any(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules())
    weights = [
        torch.cat(SparsityPenalty(model, 0.1, 2, cost_power=0.5).weights)
        for model in (plain, synchronised)
    ]
    assert torch.equal(*weights)
    plain, synchronised = (ModelEma(model).model.fuse() for model in (plain, synchronised))
    assert not any(isinstance(module, nn.SyncBatchNorm) for module in synchronised.modules())
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(synchronised(images)[0], plain(images)[0])


def results_of(run_dir):
    with (run_dir / "results.csv").open() as file:
        return list(csv.DictReader(file))


def compare_steps(stages, tmp_path, count):
    """What `steps_of_ranks` finds with so many processes."""
    folder = tmp_path / f"of{count}"
    folder.mkdir()
    jobs = {
        name: [*flags, "--project", str(folder), "--name", name] for name, flags in stages.items()
    }
    (folder / "jobs.json").write_text(json.dumps(jobs))
    code = launch([*PROGRAM, str(folder / "jobs.json"), str(folder)], count)
    assert code == 0
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(count)]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(stages, tmp_path):
    """Gradients, rates, penalties, metrics; and only the first of them writes and speaks."""
    (alone,), (first, second) = (compare_steps(stages, tmp_path, count) for count in (1, 2))
    for name in stages:
        assert len(alone["steps"][name]) >= 4
        for one, a, b in zip(*(f["steps"][name] for f in (alone, first, second)), strict=True):
            for what, expected in one.items():
                assert torch.equal(a[what], b[what]), (name, what)
                scale = expected.abs().max().item() if expected.numel() else 0
                torch.testing.assert_close(
                    a[what], expected, rtol=1e-5, atol=1e-6 * scale, msg=f"{name}: {what}"
                )
        assert_same_results(tmp_path / "of1" / name, tmp_path / "of2" / name)
    assert any("results.csv" in path for path in first["written"])
    assert second["written"] == []
    assert (tmp_path / "of2/rank1.log").read_text() == ""


def assert_same_results(one, other):
    for row, expected in zip(results_of(other), results_of(one), strict=True):
        assert {name: float(cell) for name, cell in row.items()} == pytest.approx(
            {name: float(cell) for name, cell in expected.items()}, rel=1e-4, nan_ok=True
        ), one


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_torchrun_goes_on(stages, tmp_path):
    """In the run's own folder, to what would have come without."""
    flags = [*stages["sparse"], "--project", str(tmp_path)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    start = time.monotonic()
    done = subprocess.run(
        [*torchrun, "--max-restarts=1", *PROGRAM[1:], "kill", *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert time.monotonic() - start < 60
    lost = f"another process of this training has ended .*--resume {tmp_path / 'exp'} goes on"
    assert len(re.findall(lost, done.stderr)) == 1
    assert done.stdout.count(f"resuming {tmp_path / 'exp'} in epoch 1") == 1
    assert launch([*PROGRAM, "never", *flags, "--name", "whole"], 2) == 0
    assert_same_results(tmp_path / "whole", tmp_path / "exp")
    assert not (tmp_path / "exp2").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mishap", "code", "said"),
    [
        ("stop", 143, "stopped by SIGTERM, saved after batch 2 of 3 of epoch 1; .*--resume {run}"),
        ("fail", 1, "error: images: the drive has gone"),
        ("nan", 3, "error: the loss is nan in epoch 1, batch 1 .*--resume {run}"),
    ],
)
def test_what_ends_one_process_ends_all_and_is_said_once(
    stages, tmp_path, capfd, monkeypatch, mishap, code, said
):
    processes, popen = [], subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda *args, **rest: processes.append(popen(*args, **rest)) or processes[-1],
    )
    start = time.monotonic()
    assert launch([*PROGRAM, mishap, *stages["dense"], "--project", str(tmp_path)], 2) == code
    # Whichever ends first: the other may have been told to end meanwhile.
    assert {process.returncode for process in processes} <= {code, 143, -signal.SIGTERM}
    assert time.monotonic() - start < 60
    output = "".join(capfd.readouterr())
    assert len(re.findall(said.format(run=tmp_path / "exp"), output)) == 1, output
    assert "Traceback" not in output
    state = load_checkpoint(tmp_path / "exp/weights/last.pt")["training"]
    assert (state["epoch"], state["batches"]) == ((0, 2) if mishap == "stop" else (0, 0))
