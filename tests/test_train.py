"""train.py end to end on four small images: steps, stages, resuming, refusals."""

import contextlib
import copy
import csv
import dataclasses
import errno
import math
import os
import pkgutil
import re
import signal
import socket
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import yaml

import train
from models import Model, ModelSpec
from tests import kill_loop
from utils import device as devices
from utils import ranks
from utils.atomic import staging_folder
from utils.checkpoint import build_checkpoint, load_checkpoint, load_detector, save_checkpoint
from utils.config import load_hyperparameters
from utils.distill import DistillationGains
from utils.evaluate import EvaluationResult, evaluate
from utils.evolve import read_history
from utils.lasting_output import lasting_output
from utils.loss import DetectionLoss, LossSettings
from utils.optim import ModelEma, Schedule, build_optimizer
from utils.plots.images import plot_batch
from utils.plots.training import plot_labels, plot_results
from utils.pruning import slimming
from utils.pruning.slimming import AutoRate, SparsityPenalty, prunable_batchnorms
from utils.pruning.verdict import Best, History
from utils.resume import newest_unfinished
from utils.tensorboard import Board
from utils.training import rehearsal, report, saving, validation
from utils.training.run import BeforeStep, Run, build_run
from utils.training.saving import save_position
from utils.training.sparsity import give_verdict, is_verdict_due
from utils.training.step import MAX_GRADIENT_NORM, clip_gradients, compute_loss, optimizer_step
from utils.training.trouble import check_loss
from utils.training.validation import validate


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    """Drawing takes longer than these runs; only tests that ask for `draws` do it."""
    if "draws" not in request.fixturenames:
        for name in ("plot_results", "plot_labels", "plot_batch", "plot_gamma_history"):
            monkeypatch.setattr(report, name, lambda *_: None)


@pytest.fixture
def draws():
    """Ask for the pictures of a run."""


@pytest.fixture
def base(tiny_spec, tiny_dataset, tmp_path):
    """Flags of a run of seconds; the run folders are tmp_path/runs/exp*."""
    cfg = tmp_path / "tiny.yaml"
    cfg.write_text(yaml.safe_dump(tiny_spec))
    return [
        *("--data", str(tiny_dataset.yaml), "--cfg", str(cfg), "--weights", ""),
        *("--img", "64", "--batch", "2", "--workers", "0", "--device", "cpu", "--amp", "off"),
        *("--project", str(tmp_path / "runs"), "--nominal-batch", "4", "--noautoanchor"),
    ]


def results_of(run_dir):
    with (run_dir / "results.csv").open() as file:
        return list(csv.DictReader(file))


def weights_of(path):
    return load_checkpoint(path)["model"]


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def test_run_folder(base, tmp_path, draws):
    train.main([*base, "--epochs", "2", "--save-period", "1"])
    run = tmp_path / "runs/exp"
    files = {p.name for p in run.iterdir()}
    assert {"opt.yaml", "hyp.yaml", "results.csv", "results.png", "labels.jpg"} <= files
    assert {"train_batch0.jpg", "train_batch1.jpg"} <= files
    assert {p.name for p in (run / "weights").iterdir()} == {
        *("best.pt", "last.pt", "epoch0.pt", "epoch1.pt")
    }
    rows = results_of(run)
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert float(rows[1]["train/box_loss"]) > 0
    assert yaml.safe_load((run / "opt.yaml").read_text())["imgsz"] == 64
    last = load_checkpoint(run / "weights/last.pt")
    assert "training" not in last
    assert last["epoch"] == 1
    assert last["names"] == ["disc", "box", "bar"]


def test_nosave_and_noval(base, tmp_path):
    train.main([*base, "--epochs", "2", "--nosave", "--noval"])
    run = tmp_path / "runs/exp"
    rows = results_of(run)
    assert rows[0]["metrics/mAP_0.5"] == ""
    assert rows[1]["metrics/mAP_0.5"] != ""
    assert load_checkpoint(run / "weights/last.pt")["epoch"] == 1


class Interrupted(Exception):
    pass


def train_until(monkeypatch, epoch, flags):
    """Run train.py and end it right after it has saved this epoch, as a kill would."""
    save_epoch = train.save_epoch

    def save_and_stop(run, current, *judgement):
        save_epoch(run, current, *judgement)
        if current == epoch:
            raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(train, "save_epoch", save_and_stop)
        with pytest.raises(Interrupted):
            train.main(flags)


def test_a_run_to_resume_cannot_allow_its_own_commands(base, tiny_dataset, tmp_path, monkeypatch):
    """A stranger's run folder would be enough to run what its data set yaml says."""
    train_until(monkeypatch, 0, [*base, "--epochs", "2", "--allow-download-scripts"])
    last = tmp_path / "runs/exp/weights/last.pt"
    proof = tmp_path / "proof"
    spec = yaml.safe_load(tiny_dataset.yaml.read_text())
    spec |= {"path": str(tmp_path / "absent"), "download": f"touch {proof}"}
    tiny_dataset.yaml.write_text(yaml.safe_dump(spec))
    with pytest.raises((OSError, ValueError), match="--allow-download-scripts"):
        train.main(["--resume", str(last)])
    assert not proof.exists()
    with pytest.raises((OSError, ValueError)):  # it brings no images
        train.main(["--resume", str(last), "--allow-download-scripts"])
    assert proof.exists()


RESUME_CASES = {
    "dense SGD": [],
    "dense AdamW, image weights": ["--optimizer", "AdamW", "--image-weights", "--cos-lr"],
    "sparse, multi-scale": ["--bn_sparsity", "--sparsity_rate", "0.01", "--multi-scale"],
    "sparse, auto": ["--bn_sparsity", "--sparsity_rate", "auto", "--optimizer", "AdamW"],
    "sparse, auto, proximal": [
        *("--bn_sparsity", "--sparsity_rate", "auto", "--sparsity_mode", "proximal"),
        *("--shortcut", "keep"),
    ],
}


@pytest.mark.parametrize("case", RESUME_CASES)
def test_resumed_run_equals_the_uninterrupted_one(base, tmp_path, monkeypatch, case):
    monkeypatch.setattr(train, "finish", kill_loop.keeping_state(train.finish))
    flags = [*base, "--epochs", "3", *RESUME_CASES[case]]
    train.main([*flags, "--name", "whole"])
    train_until(monkeypatch, 0, [*flags, "--name", "parts"])
    parts, whole = tmp_path / "runs/parts", tmp_path / "runs/whole"
    assert len(results_of(parts)) == 1
    train.main(["--resume", str(parts / "weights/last.pt")])
    kill_loop.compare(parts, whole)


def test_patience_counts_on_in_a_resumed_run(base, tmp_path, monkeypatch):
    """From the best epoch, which is neither the first nor the last that was saved."""
    fitness = (0.1, 0.4, 0.2, 0.3, 0.2, 0.3, 0.5)

    def measure(run, loader, epoch):
        return dataclasses.replace(validate(run, loader, epoch), precision=fitness[epoch])

    monkeypatch.setattr(train, "validate", measure)
    monkeypatch.setattr(EvaluationResult, "fitness", property(lambda result: result.precision))
    train_until(monkeypatch, 2, [*base, "--epochs", "7", "--patience", "3"])
    run = tmp_path / "runs/exp"
    train.main(["--resume", str(run)])
    assert [row["metrics/precision"] for row in results_of(run)] == [
        "0.1",
        "0.4",
        "0.2",
        "0.3",
        "0.2",
    ]
    best = load_checkpoint(run / "weights/best.pt")
    assert (best["epoch"], best["fitness"]) == (1, 0.4)


def test_a_resumed_run_draws_what_the_uninterrupted_one_does(base, tmp_path, monkeypatch):
    """From torch's generator: no part of ours does, but a layer with dropout would."""
    to_device = train.to_device
    monkeypatch.setattr(train, "to_device", lambda *batch: to_device(*batch) * torch.rand(()))
    monkeypatch.setattr(train, "finish", kill_loop.keeping_state(train.finish))
    flags = [*base, "--epochs", "2"]
    train.main([*flags, "--name", "whole"])
    train_until(monkeypatch, 0, [*flags, "--name", "parts"])
    train.main(["--resume", str(tmp_path / "runs/parts")])
    kill_loop.compare(tmp_path / "runs/parts", tmp_path / "runs/whole")


def what_goes_on(run):
    """All that a run has learnt and counted, from the places where it is used."""
    parts = {
        "network": run.model.state_dict(),
        "average": run.ema.model.state_dict(),
        "updates": run.ema.updates,
        "moments": [run.optimizer.state[parameter] for parameter in run.model.parameters()],
        "scale": run.scaler.get_scale(),
        "growth": run.scaler.state_dict()["_growth_tracker"],
        "noise": [run.penalty.noise.sigma(), run.penalty.noise.state_dict()["steps"]],
        "rate": dataclasses.asdict(run.penalty.sparsity_rate),
        "let go": run.penalty.share_let_go,
        "pull": run.penalty.weights,
        "lr factor": run.schedule.factor,
        "batches": run.batches,
        "losses": run.loss_sums,
        "best": (run.best_fitness, run.best_epoch, *run.best),
        "classes": run.class_maps.tolist(),
        "validation": (run.validation_seconds, run.overflows_float16),
        "gammas": {epoch: dataclasses.asdict(row) for epoch, row in run.gammas.items()},
        "random": torch.get_rng_state(),
    }
    return copy.deepcopy(parts)


def test_whatever_a_run_knows_goes_on(base, tmp_path, monkeypatch):
    """Values that no fresh run has; float16 is for GPUs, but a CPU can do it."""
    known, save_epoch = [], train.save_epoch

    def change_and_save(run, *judgement):
        run.ema.updates, run.batches, run.validation_seconds = 77, 1, 33.0
        run.overflows_float16 = True
        run.loss_sums = torch.tensor([1.0, 2.0, 3.0])
        run.best_fitness, run.best_epoch, run.best = 0.625, 1, Best(0.75, "in epoch 1")
        run.class_maps[:] = 0.25, 0.5, 0.125
        run.schedule = dataclasses.replace(run.schedule, factor=0.5)
        run.scaler.load_state_dict({**run.scaler.state_dict(), "scale": 8.0, "_growth_tracker": 3})
        run.penalty.sparsity_rate = dataclasses.replace(run.penalty.sparsity_rate, strength=2.5)
        run.penalty.is_released = True
        run.penalty.weights = [w * (torch.arange(len(w)) % 2) for w in run.penalty.weights]
        torch.rand(5)
        known.append(what_goes_on(run))
        save_epoch(run, *judgement)

    monkeypatch.setattr(devices, "select_precision", lambda *_: torch.float16)
    with monkeypatch.context() as patched:
        patched.setattr(train, "save_epoch", change_and_save)
        train_until(
            monkeypatch, 0, [*base, "--epochs", "2", "--bn_sparsity", "--sparsity_rate", "auto"]
        )
    monkeypatch.setattr(train, "train_epochs", lambda run, *_: known.append(what_goes_on(run)))
    monkeypatch.setattr(train, "finish", lambda *_: None)
    train.main(["--resume", str(tmp_path / "runs/exp")])
    before, after = known
    assert before["gammas"]
    assert before["moments"][0]
    assert kill_loop.first_difference(after, before, "run") is None


@pytest.mark.parametrize(
    ("chosen", "common"),
    [
        (("bfloat16", "bfloat16"), "bfloat16"),
        (("bfloat16", "float32"), "float32"),
        (("float32", "bfloat16"), "float32"),
        (("bfloat16", "float16"), "float16"),
    ],
)
def test_processes_agree_on_what_all_can_compute_in(base, monkeypatch, caplog, chosen, common):
    """Each chooses for its own hardware, and may time it; the first is this process."""
    own, other = (getattr(torch, name) for name in chosen)

    caplog.set_level("INFO")

    def share(value):
        return [value, other] if isinstance(value, torch.dtype) else [value]

    def stop(*arguments):
        assert getattr(torch, common) in arguments
        raise Interrupted

    monkeypatch.setattr(devices, "select_precision", lambda *_: own)
    monkeypatch.setattr(ranks, "share", share)
    monkeypatch.setattr(train, "build_run", stop)
    with pytest.raises(Interrupted):
        train.main([*base, "--epochs", "1", "--amp", "auto"])
    assert (f"in {common}, not in {chosen[0]}" in caplog.text) == (common != chosen[0])


def test_validation_in_float16_measures_the_same(base, tmp_path, monkeypatch):
    """As on a GPU with mixed precision; a CPU can do it too, if slowly."""
    asked = []
    for name in ("float32", "float16"):
        precision = getattr(torch, name)
        monkeypatch.setattr(
            devices, "select_validation_precision", lambda *_, p=precision: asked.append(p) or p
        )
        train.main([*base, "--epochs", "1", "--name", name])
    assert asked == [torch.float32, torch.float16]
    full, half = (results_of(tmp_path / "runs" / name)[0] for name in ("float32", "float16"))
    for name in ("box", "obj", "cls"):
        key = f"val/{name}_loss"
        assert float(half[key]) == pytest.approx(float(full[key]), rel=0.01)
        assert full[f"train/{name}_loss"] == half[f"train/{name}_loss"]


def test_validation_goes_on_in_float32_where_float16_is_too_small(
    base, tmp_path, monkeypatch, caplog
):
    """From the second epoch on a bias is beyond 65504; said once, also by the resumed run."""
    precisions, evaluate = [], validation.evaluate

    def spoil(network, *rest, **options):
        if precisions:
            network.head.m[0].bias.data[-1] = 1e5
        precisions.append(str(options["precision"]))
        return evaluate(network, *rest, **options)

    monkeypatch.setattr(validation, "evaluate", spoil)
    monkeypatch.setattr(devices, "select_validation_precision", lambda *_: torch.float16)
    train_until(monkeypatch, 2, [*base, "--epochs", "4"])
    train.main(["--resume", str(tmp_path / "runs/exp")])
    half, full = "torch.float16", "torch.float32"
    assert precisions == [half, half, full, full, full]
    assert caplog.text.count("warning: epoch 1: float16 is too small") == 1
    losses = [float(row["val/cls_loss"]) for row in results_of(tmp_path / "runs/exp")]
    assert np.isfinite(losses).all()


def test_a_resumed_run_goes_on_with_its_scale_of_losses(base, tmp_path, monkeypatch):
    """float16 is for GPUs, but a CPU can do it; 2.0 ** 16 halves where a gradient overflows."""
    monkeypatch.setattr(devices, "select_precision", lambda *_: torch.float16)
    monkeypatch.setattr(train, "finish", lambda *_: None)
    flags = [*base, "--epochs", "2", "--noval"]
    train.main([*flags, "--name", "whole"])
    train_until(monkeypatch, 0, [*flags, "--name", "parts"])
    parts, whole = (tmp_path / "runs" / name / "weights/last.pt" for name in ("parts", "whole"))
    before = load_checkpoint(parts)["training"]["scaler"]
    assert before["_growth_tracker"] > 0 or before["scale"] < 2**16
    train.main(["--resume", str(parts)])
    assert_same_state(*(load_checkpoint(path)["training"] for path in (parts, whole)))


def signal_self_at_call(monkeypatch, part, number, cause):
    """Ask the process to end in the call of that number of `part`.

    That is the dotted name of a function in the module that calls it.
    """
    original, calls = pkgutil.resolve_name(part), []

    def call(*arguments, **settings):
        calls.append(part)
        if len(calls) == number:
            os.kill(os.getpid(), cause)
        return original(*arguments, **settings)

    monkeypatch.setattr(part, call)


def assert_same_state(a, b, where="training"):
    """Whatever a checkpoint holds for a resumed run, bit by bit, but for times."""
    assert kill_loop.first_difference(a, b, where) is None


# The call in which the signal comes, and after how many of its 4 batches the epoch is left.
STOPS = {
    "first step": ("train.optimizer_step", 1, signal.SIGTERM, ("dense", 0, 2)),
    "within an accumulation": ("train.compute_loss", 7, signal.SIGINT, ("sparse", 1, 2)),
    "verdict": ("utils.training.sparsity.measure_readiness", 1, signal.SIGTERM, ("sparse", 1, 0)),
    "validation": ("train.validate", 2, signal.SIGTERM, ("sparse", 1, 4)),
    "checkpoint": ("train.save_epoch", 2, signal.SIGHUP, ("dense", 2, 0)),
}


@pytest.fixture(scope="module")
def whole_runs():
    """Last training state and results of runs that nothing has interrupted, by kind."""
    return {}


def whole_run(known, kind, flags, tmp_path):
    """State and results of that run, which is trained where no test has done so yet."""
    if kind not in known:
        train.main([*flags, "--name", "whole"])
        folder = tmp_path / "runs/whole"
        known[kind] = load_checkpoint(folder / "weights/last.pt")["training"], results_of(folder)
    return known[kind]


@pytest.mark.parametrize("case", STOPS)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(
    base, tmp_path, monkeypatch, caplog, whole_runs, case
):
    part, number, cause, (kind, epoch, batches) = STOPS[case]
    caplog.set_level("INFO")
    monkeypatch.setattr(train, "finish", lambda *_: None)  # it strips the state
    flags = [*base, "--epochs", "3", "--batch", "1", "--nominal-batch", "2", "--optimizer", "AdamW"]
    flags += ["--bn_sparsity", "--sparsity_rate", "auto"] if kind == "sparse" else []
    whole, rows = whole_run(whole_runs, kind, flags, tmp_path)
    with monkeypatch.context() as patched:
        signal_self_at_call(patched, part, number, cause)
        with pytest.raises(SystemExit) as stopped:
            train.main([*flags, "--name", "parts"])
    assert stopped.value.code == 128 + cause
    parts = tmp_path / "runs/parts"
    assert f"stopped by {cause.name}, saved after batch " in caplog.text
    assert f"train.py --resume {parts} goes on" in caplog.text
    assert ("no verdict on the sparse network: asked to stop" in caplog.text) == (case == "verdict")
    state = load_checkpoint(parts / "weights/last.pt")["training"]
    assert (state["epoch"] + 1, state["batches"]) == (epoch, batches)
    train.main(["--resume", str(parts)])
    state = load_checkpoint(parts / "weights/last.pt")["training"]
    assert state["epoch"] == 2
    assert_same_state(state, whole)
    assert results_of(parts) == rows


def test_a_run_whose_output_nobody_reads_any_more_goes_on(base, tmp_path, monkeypatch):
    """As behind `| tee`, which Ctrl-C ends as well, and after a terminal has been closed."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        patched.setattr(sys, "stderr", stream)
        signal_self_at_call(patched, "train.compute_loss", 3, signal.SIGINT)
        with pytest.raises(SystemExit) as stopped, lasting_output():  # as train.py does
            train.main([*base, "--epochs", "2"])
    assert stopped.value.code == 130
    assert load_checkpoint(tmp_path / "runs/exp/weights/last.pt")["training"]["epoch"] == 0


def test_what_is_saved_now_and_then_is_as_good(base, tmp_path, monkeypatch, whole_runs):
    """Between two steps of a long epoch, for a kill or a power cut; training goes on from there."""
    saved = []

    def save_and_count(run, epoch):
        save_position(run, epoch)
        saved.append((epoch, run.batches))
        if saved[-1] == (1, 2):
            raise Interrupted

    monkeypatch.setattr(train, "finish", lambda *_: None)  # it strips the state
    flags = [*base, "--epochs", "3", "--batch", "1", "--nominal-batch", "2", "--optimizer", "AdamW"]
    with monkeypatch.context() as patched:
        patched.setattr(saving, "SAVE_SECONDS", -1)
        patched.setattr(train, "save_position", save_and_count)
        with pytest.raises(Interrupted):
            train.main([*flags, "--name", "parts"])
    assert saved == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 2)]  # warm-up: steps of 1, then 2
    train.main(["--resume", str(tmp_path / "runs/parts")])
    state = load_checkpoint(tmp_path / "runs/parts/weights/last.pt")["training"]
    assert_same_state(state, whole_run(whole_runs, "dense", flags, tmp_path)[0])


def test_what_is_saved_now_and_then_beside_a_gpu(base, tmp_path, monkeypatch):
    """It is looked at every tenth batch, when a step may be pending; here every other one."""
    saved = []
    monkeypatch.setattr(train, "is_look_due", lambda _, index: index % 2 == 0)
    monkeypatch.setattr(saving, "SAVE_SECONDS", -1)
    monkeypatch.setattr(
        train, "save_position", lambda run, epoch: saved.append((epoch, run.batches))
    )
    monkeypatch.setattr(Schedule, "accumulation", lambda *_: 2)
    train.main([*base, "--epochs", "1", "--batch", "1"])
    assert saved == [(0, 2), (0, 4)]


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_a_kill_within_a_long_validation_costs_no_training(
    base, tmp_path, monkeypatch, whole_runs, kind
):
    """The network is saved before it; here each is long, which the first epoch cannot know."""

    def save_and_note(run, epoch):
        save_position(run, epoch)
        saved.append((epoch, run.batches))

    def validate_once(run, loader, epoch):
        if epoch == 1:
            raise Interrupted
        return validate(run, loader, epoch)

    def step_and_note(run, epoch, norm):
        optimizer_step(run, epoch, norm)
        stepped.append(epoch)

    saved, stepped = [], []
    monkeypatch.setattr(saving, "LONG_VALIDATION", 0)
    monkeypatch.setattr(train, "give_verdict", lambda *_: None)
    monkeypatch.setattr(train, "finish", lambda *_: None)  # it strips the state
    flags = [*base, "--epochs", "3", "--batch", "1", "--nominal-batch", "2", "--optimizer", "AdamW"]
    flags += ["--bn_sparsity", "--sparsity_rate", "auto"] if kind == "sparse" else []
    whole, rows = whole_run(whole_runs, kind, flags, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(train, "save_position", save_and_note)
        patched.setattr(train, "validate", validate_once)
        with pytest.raises(Interrupted):
            train.main([*flags, "--name", "parts"])
    assert saved == [(1, 4)]
    monkeypatch.setattr(train, "optimizer_step", step_and_note)
    train.main(["--resume", str(tmp_path / "runs/parts")])
    assert set(stepped) == {2}
    parts = tmp_path / "runs/parts"
    assert results_of(parts) == rows
    assert_same_state(load_checkpoint(parts / "weights/last.pt")["training"], whole)


@pytest.mark.parametrize("is_known", [True, False])
def test_other_processes_and_another_precision_are_said(
    base, tmp_path, monkeypatch, caplog, is_known
):
    """`--amp auto` chooses by the machine. A version before has saved neither."""
    caplog.set_level("INFO")
    train_until(monkeypatch, 0, [*base, "--epochs", "2"])
    last = tmp_path / "runs/exp/weights/last.pt"
    content = load_checkpoint(last)
    saved = {name: content["training"].pop(name) for name in ("processes", "precision")}
    assert saved == {"processes": 1, "precision": "float32"}
    if is_known:
        content["training"] |= {"processes": 4, "precision": "bfloat16"}
    save_checkpoint(last, content)
    monkeypatch.setattr(train, "train_epochs", lambda *_: None)
    monkeypatch.setattr(train, "finish", lambda *_: None)
    train.main(["--resume", str(last)])
    for line in ("processes: 1 now, 4 when", "precision: float32 now, bfloat16 when"):
        assert (f"{line} the run was saved" in caplog.messages) == is_known


@pytest.mark.parametrize(("is_known", "expected"), [(True, [(1, 2)]), (False, [])])
def test_a_resumed_run_knows_how_long_a_validation_takes(
    base, tmp_path, monkeypatch, is_known, expected
):
    """Unless a version before has saved it."""
    saved = []
    train_until(monkeypatch, 0, [*base, "--epochs", "2"])
    last = tmp_path / "runs/exp/weights/last.pt"
    content = load_checkpoint(last)
    if not is_known:
        del content["training"]["validation_seconds"]
        save_checkpoint(last, content)
    monkeypatch.setattr(saving, "LONG_VALIDATION", 0)
    monkeypatch.setattr(
        train, "save_position", lambda run, epoch: saved.append((epoch, run.batches))
    )
    train.main(["--resume", str(last)])
    assert saved == expected


def test_a_short_validation_asks_for_no_checkpoint(base, monkeypatch):
    saved = []
    monkeypatch.setattr(train, "save_position", lambda run, epoch: saved.append(epoch))
    train.main([*base, "--epochs", "2"])
    assert saved == []


def test_nothing_is_lost_with_a_loader(base, tmp_path, monkeypatch, whole_runs):
    """Its drive has gone, or a worker was killed, while a batch waited for its step."""
    to_device, calls = train.to_device, []

    def lose(run, batch, epoch, index):
        calls.append(index)
        if len(calls) == 8:
            raise ChildProcessError("a loader process was killed")
        return to_device(run, batch, epoch, index)

    monkeypatch.setattr(train, "finish", lambda *_: None)  # it strips the state
    monkeypatch.setattr(train, "to_device", lose)
    flags = [*base, "--epochs", "3", "--batch", "1", "--nominal-batch", "2", "--optimizer", "AdamW"]
    last = tmp_path / "runs/a/weights/last.pt"
    with pytest.raises(OSError, match=r"was killed; then .*train.py --resume .*/a goes on fr"):
        train.main([*flags, "--name", "a"])
    state = load_checkpoint(last)["training"]
    assert (state["epoch"], state["batches"]) == (0, 2)
    train.main(["--resume", str(last)])
    state = load_checkpoint(last)["training"]
    assert_same_state(state, whole_run(whole_runs, "dense", flags, tmp_path)[0])


def test_a_worker_that_the_signal_has_ended_too_is_no_error(base, monkeypatch, caplog):
    """It can answer signals its own way only a moment after it has begun."""

    def lose(*_):
        os.kill(os.getpid(), signal.SIGTERM)
        raise ChildProcessError("a loader process was killed")

    caplog.set_level("INFO")
    monkeypatch.setattr(train, "to_device", lose)
    with pytest.raises(SystemExit) as stopped:
        train.main([*base, "--epochs", "1"])
    assert stopped.value.code == 143
    assert "stopped by SIGTERM, saved after batch 0 of 2 of epoch 0" in caplog.text


def test_a_run_killed_in_its_first_epoch_can_be_resumed(base, tmp_path, monkeypatch):
    flags = [*base, "--epochs", "1"]
    with monkeypatch.context() as patched:
        patched.setattr(train, "optimizer_step", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            train.main([*flags, "--name", "parts"])
    parts = tmp_path / "runs/parts"
    assert load_detector(parts / "weights/last.pt").names == ("disc", "box", "bar")
    train.main(["--resume", str(parts)])
    train.main([*flags, "--name", "whole"])
    assert_same_weights(
        weights_of(parts / "weights/last.pt"), weights_of(tmp_path / "runs/whole/weights/last.pt")
    )


def test_a_run_killed_before_it_has_saved_anything_says_how_to_start_it(
    base, tmp_path, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(train, "optimizer_step", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            train.main([*base, "--epochs", "1", "--nosave"])
    with pytest.raises(FileNotFoundError, match=r"saved anything; start it anew, .*exp/opt.yaml"):
        train.main(["--resume", str(tmp_path / "runs/exp")])


def test_what_prune_has_made_is_no_run_to_resume(tmp_path):
    for name in ("opt.yaml", "pruned_model.pt"):
        (tmp_path / name).touch()
    words = r"a folder of prune.py, .* use --weights .*/pruned_model.pt --ft_pruned_model$"
    with pytest.raises(ValueError, match=words):
        train.main(["--resume", str(tmp_path)])


@pytest.mark.parametrize("part", ["save_options", "save_checkpoint", "new_run_dir"])
def test_there_is_a_run_folder_only_with_a_checkpoint(base, tmp_path, monkeypatch, part):
    """Killed while that works, or right after: nobody must clear away what cannot be resumed."""
    original = getattr(saving, part)

    def work_and_stop(*arguments):
        original(*arguments)
        raise Interrupted

    with monkeypatch.context() as patched:
        patched.setattr(saving, part, work_and_stop)
        with pytest.raises(Interrupted):
            train.main([*base, "--epochs", "1"])
    found = list((tmp_path / "runs").iterdir())
    if part != "new_run_dir":
        assert found == []
        return
    assert found == [tmp_path / "runs/exp"]
    train.main(["--resume", str(found[0])])
    assert len(results_of(found[0])) == 1


def test_a_folder_that_never_got_its_name_is_not_resumed(base, tmp_path, monkeypatch):
    """Killed within its making; it goes a day later."""
    train_until(monkeypatch, 0, [*base, "--epochs", "2"])
    runs = tmp_path / "runs"
    assert newest_unfinished(runs) == runs / "exp/weights/last.pt"
    with staging_folder(runs) as staging:
        (runs / "exp").rename(staging / "exp")
        with pytest.raises(FileNotFoundError, match="there is no unfinished run"):
            newest_unfinished(runs)


def test_a_full_disk_costs_no_more_than_the_epoch(base, tmp_path, monkeypatch, full_disk):
    judge_epoch, run, disk = train.judge_epoch, tmp_path / "runs/exp", contextlib.ExitStack()

    def fill(current, epoch, result):
        if epoch == 1:
            disk.enter_context(full_disk())
        return judge_epoch(current, epoch, result)

    monkeypatch.setattr(train, "judge_epoch", fill)
    words = rf"(best|last)\.pt: File too large; .*; then .*train.py --resume {run} goes on"
    with disk, pytest.raises(OSError, match=words):
        train.main([*base, "--epochs", "2"])
    assert load_checkpoint(run / "weights/last.pt")["training"]["epoch"] == 0
    assert load_detector(run / "weights/best.pt").names == ("disc", "box", "bar")


def test_a_share_that_goes_while_training_says_how_to_go_on(
    base, tmp_path, tiny_dataset, monkeypatch
):
    judge_epoch, gone = train.judge_epoch, tiny_dataset.images.with_name("gone")

    def unplug(current, epoch, result):
        tiny_dataset.images.rename(gone)
        return judge_epoch(current, epoch, result)

    with monkeypatch.context() as patched:
        patched.setattr(train, "judge_epoch", unplug)
        words = r"images/train: .*connect its drive.*; then .*train.py --resume .*exp goes on"
        with pytest.raises(OSError, match=words):
            train.main([*base, "--epochs", "2", "--cache", "off"])
    gone.rename(tiny_dataset.images)
    run = tmp_path / "runs/exp"
    train.main(["--resume", str(run)])
    assert [row["epoch"] for row in results_of(run)] == ["0", "1"]


def test_out_of_memory_names_the_batch_that_fits(base, tmp_path, monkeypatch):
    """On a made-up device that holds one image, also in the trials."""

    def compute(run, images, targets, **rest):
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return compute_loss(run, images, targets, **rest)

    for caller in (train, rehearsal):
        monkeypatch.setattr(caller, "compute_loss", compute)
    run = tmp_path / "runs/exp"
    words = rf"with --batch-size 4 at 64 px; python \S*train.py --resume {run} --batch-size 1 fits"
    with pytest.raises(MemoryError, match=words):
        train.main([*base, "--batch", "4", "--epochs", "1"])
    train.main(["--resume", str(run), "--batch-size", "1"])
    assert load_checkpoint(run / "weights/last.pt")["options"]["batch_size"] == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_out_of_memory_with_one_image(base, monkeypatch, error):
    def compute(*_, **__):
        raise error

    for caller in (train, rehearsal):
        monkeypatch.setattr(caller, "compute_loss", compute)
    with pytest.raises(MemoryError, match="--batch-size 2 at 64 px; no smaller one fits either"):
        train.main([*base, "--epochs", "1"])


def test_batch_size_beside_a_cpu(base, tmp_path):
    train.main([*base, "--batch", "-1", "--epochs", "1"])  # nominal batch 4
    assert yaml.safe_load((tmp_path / "runs/exp/opt.yaml").read_text())["batch_size"] == 4


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_batch_size_that_fits_is_found_and_nothing_else_changed(
    base, tmp_path, monkeypatch, kind
):
    """On a made-up GPU that holds ten images."""

    def compute(run, images, targets, **rest):
        tried.append(len(images))
        if len(images) > 10:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return compute_loss(run, images, targets, **rest)

    def build_on_cpu(options, inputs, model, imgsz, _, *rest):
        return build_run(options, inputs, model, imgsz, torch.device("cpu"), *rest)

    def choose_for_gpu(*args):
        *first, _, precision = args
        return rehearsal.choose_batch_size(*first, torch.device("cuda"), precision)

    tried = []
    flags = [*base, "--epochs", "1", "--nominal-batch", "16"]
    flags += ["--bn_sparsity", "--sparsity_rate", "auto"] if kind == "sparse" else []
    monkeypatch.setattr(train, "give_verdict", lambda *_: None)
    train.main([*flags, "--batch", "8", "--name", "given"])
    monkeypatch.setattr(rehearsal, "compute_loss", compute)
    monkeypatch.setattr(rehearsal, "build_run", build_on_cpu)
    monkeypatch.setattr(train, "choose_batch_size", choose_for_gpu)
    monkeypatch.setattr(devices, "limit_memory", lambda *_: contextlib.nullcontext())
    train.main([*flags, "--batch", "-1", "--name", "found"])
    assert tried == [16, 4, 8]
    found, given = tmp_path / "runs/found", tmp_path / "runs/given"
    assert yaml.safe_load((found / "opt.yaml").read_text())["batch_size"] == 8
    assert_same_weights(
        weights_of(found / "weights/last.pt"), weights_of(given / "weights/last.pt")
    )
    assert results_of(found) == results_of(given)


def test_finished_run_cannot_be_resumed(base, tmp_path):
    train.main([*base, "--epochs", "1"])
    with pytest.raises(ValueError, match="finished"):
        train.main(["--resume", str(tmp_path / "runs/exp/weights/last.pt")])


def test_batches_do_not_depend_on_workers(base, tmp_path):
    for workers in ("0", "2"):
        train.main([*base, "--epochs", "2", "--workers", workers, "--name", f"w{workers}"])
    runs = tmp_path / "runs"
    assert_same_weights(
        weights_of(runs / "w0/weights/last.pt"), weights_of(runs / "w2/weights/last.pt")
    )


def test_rate_zero_changes_nothing(base, tmp_path):
    flags = [*base, "--epochs", "2", "--optimizer", "AdamW"]
    train.main([*flags, "--name", "dense"])
    train.main([*flags, "--name", "sparse", "--bn_sparsity", "--sparsity_rate", "0"])
    runs = tmp_path / "runs"
    dense, sparse = (weights_of(runs / name / "weights/last.pt") for name in ("dense", "sparse"))
    assert_same_weights(dense, sparse)


def test_sparse_run_reports_and_shrinks_gamma(base, tmp_path, draws):
    train.main([*base, "--epochs", "6", "--bn_sparsity", "--sparsity_rate", "1"])
    run = tmp_path / "runs/exp"
    rows = results_of(run)
    assert (run / "bn_gamma.png").stat().st_size > 10_000
    rates = [float(row["sparsity_rate"]) for row in rows]
    assert rates == pytest.approx([1 - 0.9 * epoch / 6 for epoch in range(6)])
    assert float(rows[-1]["gamma/q50"]) < float(rows[0]["gamma/q50"]) < 1
    assert 0 <= float(rows[-1]["gamma/suggested_percent"]) < 1


def test_proximal_run_saves_exact_zeros_and_spares_what_the_rule_keeps(base, tmp_path, caplog):
    flags = ["--bn_sparsity", "--sparsity_mode", "proximal", "--sparsity_rate", "80"]
    with caplog.at_level("INFO"):
        train.main([*base, "--epochs", "6", *flags, "--shortcut", "keep"])
    run = tmp_path / "runs/exp"
    model = load_detector(run / "weights/last.pt").model
    prunable = prunable_batchnorms(model, "keep")
    gammas = torch.cat([bn.weight for bn in prunable.values()])
    zeros = (gammas == 0).float().mean().item()
    assert zeros > 0.5
    row = results_of(run)[-1]
    assert float(row["gamma/below_1e-3"]) >= zeros - 1e-5  # the file has six digits
    others = [bn for p, bn in prunable_batchnorms(model, "group").items() if p not in prunable]
    assert min(bn.weight.min() for bn in others) > 0.5
    options = load_checkpoint(run / "weights/last.pt")["options"]
    assert (options["shortcut"], options["sparsity_mode"]) == ("keep", "proximal")
    assert "forecast: an unused channel can lose" in caplog.text


def test_the_history_of_gammas_stays_small_also_when_resumed(base, tmp_path, monkeypatch):
    """Evenly spaced epochs and the last one; a state of an older version has rows of all."""
    monkeypatch.setattr(report, "MOST_GAMMA_ROWS", 2)
    sparse = [*base, "--bn_sparsity", "--noval"]
    drawn = []
    monkeypatch.setattr(report, "draw", lambda _, *figures: drawn.append(figures))
    train_until(monkeypatch, 2, [*sparse, "--epochs", "6"])
    last = tmp_path / "runs/exp/weights/last.pt"
    content = load_checkpoint(last)
    assert [row.pop("epoch") for row in content["training"]["gammas"]] == [0, 2]
    older = copy.deepcopy(content["training"]["gammas"])
    content["training"]["gammas"].insert(1, older[0])
    torch.save(content, last)
    train.main(["--resume", str(last)])
    epochs, overall, *_ = drawn[-1]
    assert epochs == [0, 4, 5]
    medians = [float(row["gamma/q50"]) for row in results_of(tmp_path / "runs/exp")]
    assert [row[50] for row in overall] == pytest.approx([medians[i] for i in epochs], abs=1e-5)


def test_a_sparse_run_says_how_much_can_go(base, caplog, monkeypatch):
    """After every quarter and at the end, of the averaged network, cut and compensated."""
    scored = []

    def score_by_size(network, batches, names, **settings):
        scored.append(sum(network.widths().values()))
        return SimpleNamespace(map50=0.5 if scored[-1] > 0.5 * max(scored) else 0.2)

    monkeypatch.setattr("utils.training.sparsity.evaluate", score_by_size)
    with caplog.at_level("INFO"):
        train.main([*base, "--epochs", "4", "--bn_sparsity", "--sparsity_rate", "0.01"])
    said = [line for line in caplog.messages if "ready to prune" in line]
    assert len(said) == 4
    assert all(line.endswith("(on 4 validation images)") for line in said)
    assert all(line.startswith("ready to prune: ") for line in said)
    assert min(scored) < 0.5 * max(scored)


def test_a_sparse_run_that_ruins_what_it_began_with_is_told(base, tmp_path, caplog, monkeypatch):
    """Measured by its own best epoch and by the starting weights, also when resumed."""
    scores = iter((0.3, 0.7, 0.5, 0.2, 0.6))

    def next_score(network, batches, names, **settings):
        result = evaluate(network, batches, names, **settings)
        return dataclasses.replace(result, map50=next(scores))

    monkeypatch.setattr("utils.training.validation.evaluate", next_score)
    runs = tmp_path / "runs"
    train.main([*base, "--epochs", "2", "--name", "dense"])
    dense = runs / "dense/weights/last.pt"
    sparse = [*base, "--bn_sparsity", "--epochs", "3", "--weights", str(dense), "--name", "sparse"]
    with caplog.at_level("INFO"):
        train_until(monkeypatch, 1, sparse)
        train.main(["--resume", str(runs / "sparse/weights/last.pt")])
    lost = [line.split("lost ")[1] for line in caplog.messages if "has lost" in line]
    start = "points of mAP@.5 (0.{}00, against 0.700 of the starting weights). "
    assert lost[0].startswith("20 " + start.format(5) + "1 of 3 epochs are done")
    assert lost[1].startswith("10 " + start.format(6) + "Give it a smaller --sparsity_rate (it was")
    kept = load_checkpoint(runs / "dense/weights/last.pt")["history"]
    assert (kept["map50"], kept["best_map50"], kept["best_source"]) == (0.7, 0.7, "in epoch 1")


def test_the_verdict_leaves_no_trace_in_the_random_state(monkeypatch):
    """A run that is killed after saving an epoch, before its verdict, is resumed without it."""
    monkeypatch.setattr("utils.training.sparsity.judge_network", lambda *_: str(torch.rand(3)))
    before = torch.get_rng_state()
    give_verdict(None, None, SimpleNamespace(set_epoch=lambda _: None), None, 3, History({}))
    assert torch.equal(torch.get_rng_state(), before)


def test_when_the_verdict_is_due():
    options = train.parse_args(["--epochs", "10", "--bn_sparsity"])[0]
    assert [e for e in range(10) if is_verdict_due(options, e, e == 9)] == [2, 4, 7, 9]
    options = train.parse_args(["--epochs", "10", "--bn_sparsity", "--noval"])[0]
    assert [e for e in range(10) if is_verdict_due(options, e, e == 9)] == [9]


def test_channels_that_are_let_go_stay_so_in_a_resumed_run(base, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(slimming, "NEAR_ZERO", 1.0)  # half of the gammas of a new network, soon
    flags = [*base, "--epochs", "3", "--bn_sparsity", "--sparsity_rate", "1e-6", "--optimizer"]
    flags += ["AdamW", "--sparsity_share", "0.2"]
    with caplog.at_level("INFO"):
        train.main([*flags, "--name", "whole"])
        (said,) = [line for line in caplog.messages if "let go from" in line]
        train_until(monkeypatch, 1, [*flags, "--name", "parts"])
        caplog.clear()
        train.main(["--resume", str(tmp_path / "runs/parts/weights/last.pt")])
    rows = results_of(tmp_path / "runs/whole")
    share = 100 * float(rows[0]["gamma/below_1e-2"])  # every layer is trained
    assert said.startswith(f"epoch 0: {share:.1f}% of the gammas are below 0.01, --sparsity_share")
    assert 0.1 < float(rows[0]["gamma/let_go"]) == float(rows[2]["gamma/let_go"]) < 0.9
    assert "the others have been let go" in caplog.text
    assert "by cost 0 to" not in caplog.text
    assert rows == results_of(tmp_path / "runs/parts")
    whole, parts = (tmp_path / f"runs/{name}/weights/last.pt" for name in ("whole", "parts"))
    assert_same_weights(weights_of(whole), weights_of(parts))


def test_nothing_is_let_go_after_the_last_epoch(base, monkeypatch, caplog):
    monkeypatch.setattr(slimming, "NEAR_ZERO", 2.0)
    flags = ["--epochs", "1", "--bn_sparsity", "--sparsity_share", "0.2"]
    with caplog.at_level("INFO"):
        train.main([*base, *flags])
    assert "let go" not in caplog.text


@pytest.mark.parametrize(
    ("flags", "share"),
    [
        (["--sparsity_rate", "auto"], 0.6),
        (["--sparsity_rate", "0.001"], 1),
        ([], 1),
        (["--sparsity_rate", "auto", "--sparsity_share", "0.9"], 0.9),
        (["--sparsity_rate", "0.001", "--sparsity_share", "0.5"], 0.5),
    ],
    ids=str,
)
def test_auto_lets_channels_go_and_a_rate_does_not(flags, share):
    assert train.parse_args(["--bn_sparsity", *flags])[0].sparsity_share == share


def test_auto_says_what_it_has_chosen(base, tmp_path, caplog):
    flags = ["--bn_sparsity", "--sparsity_rate", "auto", "--optimizer", "AdamW"]
    with caplog.at_level("INFO"):
        train.main([*base, "--epochs", "2", *flags])
    assert "rate auto, by cost " in caplog.text
    assert "it cannot become sparse; give it" in caplog.text  # four steps
    rates = [float(row["sparsity_rate"]) for row in results_of(tmp_path / "runs/exp")]
    assert 0 < rates[1] < rates[0]
    assert load_checkpoint(tmp_path / "runs/exp/weights/last.pt")["options"]["sparsity_rate"] == (
        "auto"
    )
    assert f"auto: rate {rates[0]:.3g} = 3 x the gradient noise 0." in caplog.text
    assert f"the rate {rates[0]:.3g} is 3 x the gradient noise 0." in caplog.text  # no warning
    assert "none is known to have borne" not in caplog.text


def build_step_run(tiny_spec, precision_scale: float):
    """A Run with just enough in it for `optimizer_step`."""
    torch.manual_seed(0)
    model = Model(ModelSpec.from_dict(tiny_spec))
    scaler = torch.amp.GradScaler("cpu", init_scale=precision_scale, enabled=precision_scale != 1)
    run = Run(**dict.fromkeys(f.name for f in dataclasses.fields(Run)
                                    if f.default is dataclasses.MISSING
                                    and f.default_factory is dataclasses.MISSING))  # fmt: skip
    run.model, run.scaler, run.ema = model, scaler, ModelEma(model)
    run.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run.penalty = SparsityPenalty(model, 0.01, 10)
    return run


@pytest.mark.parametrize(("scale", "micro_batches"), [(65536.0, 1), (1.0, 3), (1024.0, 2)])
def test_rate_means_the_same_with_loss_scaling_and_accumulation(tiny_spec, scale, micro_batches):
    """Failure 1 of other tools: the term divided by the scale, or added once per micro-batch."""
    run = build_step_run(tiny_spec, scale)
    before = {n: b.weight.detach().clone() for n, b in run.penalty.batchnorms.items()}
    for _ in range(micro_batches):
        zero = sum((p * 0).sum() for p in run.model.parameters())
        run.scaler.scale(zero).backward()
    optimizer_step(run, 0, clip_gradients(run))
    for name, norm in run.penalty.batchnorms.items():
        torch.testing.assert_close(norm.weight.detach(), before[name] - 0.1 * 0.01)


def build_proximal_run(tiny_spec, optimizer="SGD", scale=1.0, rate=0.5):
    run = build_step_run(tiny_spec, scale)
    run.optimizer = build_optimizer(run.model, optimizer, 0.1, 0.9, 0.01)
    run.penalty = SparsityPenalty(run.model, rate, 10, mode="proximal")
    return run


def take_steps_without_loss(run, micro_batches, lrs):
    """Optimizer steps with a loss that moves nothing; returns gamma of all penalised channels."""
    for epoch, lr in enumerate(lrs):
        for _ in range(micro_batches):
            run.scaler.scale(sum((p * 0).sum() for p in run.model.parameters())).backward()
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        optimizer_step(run, epoch, clip_gradients(run))
    return torch.cat([bn.weight.detach() for bn in run.penalty.batchnorms.values()])


LRS = (0.1, 0.3, 0.2, 0.25)
LOST = sum(lr * 0.5 * (1 - 0.9 * epoch / 10) for epoch, lr in enumerate(LRS))


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize(("scale", "micro_batches"), [(1.0, 1), (1.0, 4), (65536.0, 1), (2.0, 4)])
def test_proximal_step_depends_on_nothing_else(tiny_spec, optimizer, scale, micro_batches):
    """Optimizer, loss scale and accumulation leave no trace: sum of lr * rate, to the last bit."""
    reference = take_steps_without_loss(build_proximal_run(tiny_spec), 1, LRS)
    torch.testing.assert_close(reference, torch.full_like(reference, 1 - LOST))
    run = build_proximal_run(tiny_spec, optimizer, scale)
    assert torch.equal(take_steps_without_loss(run, micro_batches, LRS), reference)
    betas = torch.cat([bn.bias for bn in run.penalty.batchnorms.values()])
    assert not betas.any()
    assert torch.equal(take_steps_without_loss(run, 1, [5.0]), torch.zeros_like(reference))


def test_the_average_takes_over_exact_zeros_alone(tiny_spec):
    run = build_proximal_run(tiny_spec, rate=1.0)
    bn = run.penalty.batchnorms["0"]
    bn.weight.data = torch.tensor([0.05, -0.05, 0.3, 1.0]).repeat(2)
    run.ema = ModelEma(run.model)
    before = run.ema.model.model[0].bn.weight.clone()
    take_steps_without_loss(run, 1, [0.1])
    averaged = run.ema.model.model[0].bn.weight
    assert bn.weight.tolist()[:2] == averaged.tolist()[:2] == [0, 0]
    share = 1 - 0.9999 * (1 - torch.exp(torch.tensor(-1 / 2000)))
    torch.testing.assert_close(averaged[2:4], before[2:4].lerp(bn.weight[2:4].detach(), share))


def test_a_step_that_the_scaler_leaves_out_shrinks_nothing(tiny_spec):
    run = build_proximal_run(tiny_spec, "AdamW", scale=65536.0)
    before = take_steps_without_loss(run, 1, [0.1])
    state = copy.deepcopy(run.penalty.state_dict())
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.model.model[0].conv.weight.grad[0] = float("inf")
    optimizer_step(run, 1, clip_gradients(run))
    assert run.scaler.get_scale() == 65536 / 2  # it was left out
    after = torch.cat([bn.weight.detach() for bn in run.penalty.batchnorms.values()])
    assert torch.equal(before, after)
    assert torch.equal(run.penalty.state_dict()["noise"]["steps"], state["noise"]["steps"])
    assert (take_steps_without_loss(run, 1, [0.1]) < after).all()


def train_in_two(rank, tiny_spec, folder, mode, rate, port):
    """Three steps on images of this process's own, a release, then one step without loss."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    with ranks.connected():
        run = build_proximal_run(tiny_spec, "AdamW")
        run.penalty = SparsityPenalty(run.model, rate, 10, mode=mode)
        network = torch.nn.parallel.DistributedDataParallel(run.model.train())
        torch.manual_seed(rank)
        for _ in range(3):
            sum(logits.square().mean() for logits in network(torch.rand(2, 3, 64, 64))).backward()
            optimizer_step(run, 0, clip_gradients(run))
        gammas = torch.cat([bn.weight.detach() for bn in run.penalty.batchnorms.values()])
        averaged = copy.deepcopy(run.model)
        list(prunable_batchnorms(averaged).values())[-rank].weight.data.zero_()  # another layer
        run.penalty.release_share = 0.01
        share = run.penalty.release(averaged)
        released = {"weights": torch.cat(run.penalty.weights), "share": torch.tensor(share)}
        alone = take_steps_without_loss(build_proximal_run(tiny_spec), 1, LRS)
        state = run.penalty.state_dict()["noise"]
        result = {"gammas": gammas, "alone": alone, **released, **state}
        torch.save(result, folder / f"{mode}{rank}.pt")


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "rate"), [("proximal", 0.5), ("subgradient", AutoRate(1.5))])
def test_two_processes_have_the_same_gammas(tiny_spec, tmp_path, fork_server, mode, rate):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = (tiny_spec, tmp_path, mode, rate, port)
    torch.multiprocessing.start_processes(
        train_in_two, arguments, nprocs=2, start_method=fork_server.get_start_method()
    )
    first, second = (torch.load(tmp_path / f"{mode}{rank}.pt") for rank in (0, 1))
    assert (first["gammas"] != 1).all()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["weights"].nonzero().flatten().tolist() == list(range(8))  # those of layer 0
    assert torch.equal(
        first["alone"], take_steps_without_loss(build_proximal_run(tiny_spec), 1, LRS)
    )


def test_loss_falls_on_one_batch(tiny_spec):
    torch.manual_seed(0)
    model = Model(ModelSpec.from_dict(tiny_spec)).train()
    images = torch.rand(2, 3, 64, 64)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.3, 0.4], [1, 2, 0.3, 0.6, 0.5, 0.2]])
    loss_fn = DetectionLoss(model.head.anchors, LossSettings(box=0.05, obj=1, cls=0.5))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for _ in range(30):
        loss, _ = loss_fn(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.fixture
def slim_weights(tiny_spec, tmp_path):
    model = Model(ModelSpec.from_dict(tiny_spec))
    widths = {path: width - 1 for path, width in model.widths().items()}
    path = tmp_path / "slim.pt"
    save_checkpoint(path, build_checkpoint(Model(model.spec.with_widths(widths)), ("a", "b", "c")))
    return path, widths


def test_fine_tuning_keeps_the_slim_shape_also_when_resumed(
    base, slim_weights, tmp_path, monkeypatch
):
    path, widths = slim_weights
    flags = [*base, "--weights", str(path), "--ft_pruned_model", "--epochs", "2"]
    train_until(monkeypatch, 0, flags)
    last = tmp_path / "runs/exp/weights/last.pt"
    assert load_detector(last).model.widths() == widths
    train.main(["--resume", str(last)])
    assert load_detector(last).model.widths() == widths


@pytest.fixture
def teacher(tiny_spec, tmp_path):
    """A dense network of the same data set, with weights of its own."""
    torch.manual_seed(7)
    path = tmp_path / "teacher.pt"
    model = Model(ModelSpec.from_dict(tiny_spec))
    save_checkpoint(path, build_checkpoint(model, ("disc", "box", "bar")))
    return path


def test_teacher_of_gain_zero_changes_nothing(base, tmp_path, teacher):
    flags = [*base, "--epochs", "2"]
    train.main([*flags, "--name", "alone"])
    train.main([*flags, "--name", "taught", "--teacher", str(teacher), "--distill-gain", "0"])
    alone, taught = tmp_path / "runs/alone", tmp_path / "runs/taught"
    assert_same_weights(
        weights_of(alone / "weights/last.pt"), weights_of(taught / "weights/last.pt")
    )
    for before, after in zip(results_of(alone), results_of(taught), strict=True):
        assert float(after.pop("train/distill_loss")) == 0
        assert before == after


def test_slim_network_approaches_its_teacher(base, slim_weights, tmp_path, teacher, caplog):
    flags = ["--weights", str(slim_weights[0]), "--ft_pruned_model", "--optimizer", "AdamW"]
    flags += ["--teacher", str(teacher), "--distill-gain", "20", "--amp", "bf16"]
    before = weights_of(teacher)
    with caplog.at_level("INFO"):
        train.main([*base, *flags, "--epochs", "6"])
    rows = results_of(tmp_path / "runs/exp")
    losses = [float(row["train/distill_loss"]) for row in rows]
    assert losses[-1] < 0.8 * losses[0]  # without the pull: 1.03
    assert f"teacher: {teacher}, " in caplog.text
    assert "anchors of the teacher" not in caplog.text
    assert_same_weights(before, weights_of(teacher))
    last = load_checkpoint(tmp_path / "runs/exp/weights/last.pt")
    assert not any("teacher" in name for name in last["model"])


def test_teacher_stays_as_it_is_and_gets_no_gradient(base, teacher, monkeypatch):
    runs = []
    add_teacher = train.add_teacher

    def add_and_keep(run, network):
        add_teacher(run, network)
        runs.append((run, {k: v.clone() for k, v in network.state_dict().items()}))

    monkeypatch.setattr(train, "add_teacher", add_and_keep)
    train.main([*base, "--epochs", "1", "--teacher", str(teacher), "--bn_sparsity"])
    run, before = runs[0]
    assert_same_weights(before, run.teacher.state_dict())
    assert not run.teacher.training
    assert not any(p.requires_grad or p.grad is not None for p in run.teacher.parameters())


def test_a_teacher_is_read_once_and_what_it_has_reached_is_known(
    base, teacher, tmp_path, monkeypatch
):
    """A sparse training is measured by it."""
    options = {"data": base[base.index("--data") + 1], "imgsz": 64, "single_cls": False}
    content = {"options": options, "history": History(options, 0.75).as_content()}
    save_checkpoint(teacher, load_checkpoint(teacher) | content)
    read = []

    def load_and_count(path):
        read.append(path)
        return load_detector(path)

    for module in ("networks", "inputs"):
        monkeypatch.setattr(f"utils.training.{module}.load_detector", load_and_count)
    train.main([*base, "--epochs", "1", "--teacher", str(teacher), "--bn_sparsity", "--noval"])
    assert read == [teacher]
    history = load_checkpoint(tmp_path / "runs/exp/weights/last.pt")["history"]
    assert (history["best_map50"], history["best_source"]) == (0.75, "of the teacher")


def test_teacher_of_other_anchors_is_told(base, teacher, tmp_path, caplog):
    content = load_checkpoint(teacher)
    content["model"]["model.14.anchors"] *= 1.5
    save_checkpoint(teacher, content)
    train.main([*base, "--epochs", "1", "--teacher", str(teacher)])
    assert "warning: the anchors of the teacher are others" in caplog.text


def test_teacher_of_other_classes_is_refused_before_anything_is_written(base, tmp_path, teacher):
    content = load_checkpoint(teacher)
    save_checkpoint(teacher, {**content, "names": ["bar", "box", "disc"]})
    with pytest.raises(ValueError, match=r"--teacher .*teacher.pt: class 0 is 'bar', but 'disc'"):
        train.main([*base, "--epochs", "1", "--teacher", str(teacher)])
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_resumed_run_needs_its_teacher(base, slim_weights, tmp_path, teacher, monkeypatch):
    flags = [*base, "--weights", str(slim_weights[0]), "--ft_pruned_model", "--epochs", "2"]
    flags += ["--teacher", str(teacher), "--distill-gain", "2"]
    train.main([*flags, "--name", "whole"])
    train_until(monkeypatch, 0, [*flags, "--name", "parts"])
    parts, whole = tmp_path / "runs/parts", tmp_path / "runs/whole"
    teacher.rename(tmp_path / "gone.pt")
    with pytest.raises(FileNotFoundError, match=r"--teacher .* put it back there"):
        train.main(["--resume", str(parts)])
    (tmp_path / "gone.pt").rename(teacher)
    train.main(["--resume", str(parts)])
    assert_same_weights(
        weights_of(parts / "weights/last.pt"), weights_of(whole / "weights/last.pt")
    )
    assert results_of(parts) == results_of(whole)


@pytest.mark.slow
def test_a_run_goes_on_elsewhere_when_its_files_have_moved(
    base, tiny_dataset, tmp_path, teacher, monkeypatch, caplog
):
    """Paths as typed mean nothing in another folder; what has moved is said anew."""
    monkeypatch.chdir(tmp_path)
    flags = [*base, "--data", "tiny/tiny.yaml", "--epochs", "2", "--teacher", teacher.name]
    train_until(monkeypatch, 0, flags)
    run, last = tmp_path / "runs/exp", tmp_path / "runs/exp/weights/last.pt"
    saved = last.read_bytes()
    opened = yaml.safe_load((run / "opt.yaml").read_text())
    assert opened["data"] == str(tiny_dataset.yaml)
    assert opened["teacher"] == str(teacher)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    train.main(["--resume", str(run)])
    assert not [line for line in caplog.messages if "warning" in line]
    whole = weights_of(last)

    last.write_bytes(saved)
    moved = tmp_path / "moved"
    tiny_dataset.root.rename(moved)
    text = (moved / "tiny.yaml").read_text()
    (moved / "tiny.yaml").write_text(text.replace(str(tiny_dataset.root), str(moved)))
    with pytest.raises(FileNotFoundError, match="has moved, add --data and its yaml"):
        train.main(["--resume", str(run)])
    teacher.rename(moved / "t.pt")
    with pytest.raises(FileNotFoundError, match="or add --teacher and its path"):
        train.main(["--resume", str(run), "--data", str(moved / "tiny.yaml")])
    with pytest.raises(ValueError, match="--teacher '': the run to resume learns from one"):
        train.main(["--resume", str(run), "--teacher", ""])
    now = ["--data", "../moved/tiny.yaml", "--teacher", "../moved/t.pt"]
    train.main(["--resume", str(run), *now])
    assert not [line for line in caplog.messages if "warning" in line]
    assert_same_weights(weights_of(last), whole)

    last.write_bytes(saved)
    content = load_checkpoint(moved / "t.pt")
    save_checkpoint(moved / "t.pt", content | {"epoch": 12345})
    train.main(["--resume", str(run), *now])
    (said,) = [line for line in caplog.messages if "warning" in line]
    assert re.match(r"warning: the teacher has changed since the run was saved \(", said)


def test_a_run_without_teacher_does_not_get_one_when_resumed(base, tmp_path, teacher, monkeypatch):
    train_until(monkeypatch, 0, [*base, "--epochs", "2"])
    with pytest.raises(ValueError, match=r"--teacher .*teacher.pt: the run to resume has none"):
        train.main(["--resume", str(tmp_path / "runs/exp"), "--teacher", str(teacher)])


def test_run_of_a_version_without_teachers_is_resumed(base, tmp_path, monkeypatch):
    train_until(monkeypatch, 0, [*base, "--epochs", "2"])
    last = tmp_path / "runs/exp/weights/last.pt"
    content = load_checkpoint(last)
    for name in ("teacher", "distill_gain"):
        del content["options"][name]
    save_checkpoint(last, content)
    train.main(["--resume", str(last)])
    assert load_checkpoint(last)["epoch"] == 1


def test_sparse_run_of_an_older_version_goes_on_as_it_began(base, tmp_path, monkeypatch):
    """It pulled all channels alike, and its optimizer was not fused."""
    train_until(monkeypatch, 0, [*base, "--epochs", "2", "--bn_sparsity", "--sparsity_cost", "0"])
    last = tmp_path / "runs/exp/weights/last.pt"
    content = load_checkpoint(last)
    for name in ("sparsity_schedule", "sparsity_cost", "sparsity_share"):
        del content["options"][name]
    for group in content["training"]["optimizer"]["param_groups"]:
        group["fused"] = None
    save_checkpoint(last, content)
    runs = []
    original = train.restore_run

    def restore(run, *arguments):
        original(run, *arguments)
        runs.append(run)

    monkeypatch.setattr(train, "restore_run", restore)
    train.main(["--resume", str(last)])
    (run,) = runs
    assert all((weights == 1).all() for weights in run.penalty.weights)
    assert run.penalty.schedule == "linear"
    assert all(group["fused"] for group in run.optimizer.param_groups)


def test_pruned_yaml_trains_from_scratch(base, slim_weights, tmp_path):
    path, widths = slim_weights
    cfg = tmp_path / "slim.yaml"
    cfg.write_text(yaml.safe_dump(load_checkpoint(path)["spec"]))
    train.main([*base, "--cfg", str(cfg), "--epochs", "1"])
    assert load_detector(tmp_path / "runs/exp/weights/last.pt").model.widths() == widths


def test_early_stopping(base, tmp_path, monkeypatch):
    monkeypatch.setattr(EvaluationResult, "fitness", property(lambda _: 0.5))
    train.main([*base, "--epochs", "9", "--patience", "2"])
    assert len(results_of(tmp_path / "runs/exp")) == 3


def test_the_first_step_does_not_wait_for_pictures(base, monkeypatch):
    done = []
    original = train.optimizer_step

    def step(*args):
        done.append("step")
        original(*args)

    monkeypatch.setattr(train, "optimizer_step", step)
    monkeypatch.setattr(report, "draw", lambda function, *_: done.append(function.__name__))
    for function in (plot_labels, plot_batch, plot_results):
        monkeypatch.setattr(report, function.__name__, function)
    train.main([*base, "--epochs", "2", "--nominal-batch", "2"])
    assert done == [
        *("step", "plot_labels", "plot_batch", "step", "plot_batch", "step", "step"),
        "plot_results",
    ]


def test_freeze_leaves_rows_and_their_statistics_alone(base, slim_weights, tmp_path):
    path, _ = slim_weights
    flags = ["--weights", str(path), "--ft_pruned_model", "--freeze", "3", "--epochs", "1"]
    train.main([*base, *flags])
    before, after = (weights_of(p) for p in (path, tmp_path / "runs/exp/weights/last.pt"))
    for name, value in before.items():
        frozen = int(name.split(".")[1]) < 3
        same = torch.allclose(value.float(), after[name].float(), rtol=1e-3, atol=1e-6)
        assert same or not frozen, name
        assert not same or not name.endswith(("running_mean", "m.0.bias")) or frozen, name


class Spoilt(DetectionLoss):
    """The loss is no number in the batches of these numbers, counted over a whole test."""

    bad: frozenset[int] = frozenset()
    calls = 0

    def __call__(self, logits, targets, weight=1.0):
        loss, parts = super().__call__(logits, targets, weight)
        if torch.is_grad_enabled():
            type(self).calls += 1
            loss = loss * math.nan if type(self).calls - 1 in self.bad else loss
        return loss, parts


@pytest.fixture
def spoil(monkeypatch):
    """Spoil the loss of these batches."""

    def spoil(*bad):
        monkeypatch.setattr(Spoilt, "bad", frozenset(bad))
        monkeypatch.setattr(Spoilt, "calls", 0)
        monkeypatch.setattr("utils.training.run.DetectionLoss", Spoilt)

    return spoil


def test_nan_loss_stops_before_the_step(base, tmp_path, spoil, draws):
    """Files, picture, layer and the way on are named; what was saved before is whole."""
    spoil(3)
    with pytest.raises(FloatingPointError) as caught:
        train.main([*base, "--epochs", "2", "--bn_sparsity", "--sparsity_rate", "0.01"])
    message, run = str(caught.value), tmp_path / "runs/exp"
    assert re.match(r"the loss is nan in epoch 1, batch 1 \(\w\.\w+, \w\.\w+\); ", message)
    assert "largest |gamma| 1, in " in message
    assert f"train.py --resume {run} --on-nan recover" in message
    picture = run / "nan_batch_1_1.jpg"
    assert str(picture) in message
    assert picture.stat().st_size > 1000
    listed = picture.with_suffix(".txt").read_text().splitlines()
    assert [path.name in message for path in map(Path, listed)] == [True, True]
    assert load_checkpoint(run / "weights/last.pt")["training"]["epoch"] == 0


def test_images_are_given_back_before_their_loss_is_looked_at(base, monkeypatch):
    """On a GPU that is up to ten batches later: of 128 images of 640 px each is 157 MB."""
    seen, most = [], []

    def look(run, batch, *rest):
        most.append(sum(images() is not None for images in seen))
        seen.append(weakref.ref(batch.images))
        return to_device(run, batch, *rest)

    monkeypatch.setattr(train, "is_look_due", lambda *_: False)
    monkeypatch.setattr(train, "draw_data", lambda *_: None)
    to_device = train.to_device
    monkeypatch.setattr(train, "to_device", look)
    train.main([*base, "--batch", "1", "--epochs", "1", "--noval"])
    assert len(most) == 4
    assert max(most) <= 1  # of the batch before, which the progress bar holds


def test_recovery_goes_back_and_lowers_the_rate(base, tmp_path, spoil, caplog):
    flags = [*base, "--epochs", "3", "--on-nan", "recover"]
    spoil(3, 5)
    train.main([*flags, "--name", "spoilt"])
    spoil()
    train.main([*flags, "--name", "good"])
    spoilt, good = (results_of(tmp_path / "runs" / name) for name in ("spoilt", "good"))
    assert [row["epoch"] for row in spoilt] == ["0", "1", "2"]
    assert spoilt[0] == good[0]
    rates = [float(rows[2]["lr/weights"]) for rows in (spoilt, good)]
    assert rates[0] == pytest.approx(rates[1] / 4)
    assert "back to epoch 1, batch 0, with the learning rate times 0.5" in caplog.text
    assert "back to epoch 1, batch 0, with the learning rate times 0.25" in caplog.text


@pytest.mark.parametrize("on_nan", ["stop", "recover"])
def test_a_batch_that_cannot_be_saved_is_a_warning(base, monkeypatch, spoil, caplog, on_nan):
    """The run goes on, or ends, as it would have done."""
    full = OSError(errno.ENOSPC, "No space left on device", "nan_batch_1_1.txt")
    monkeypatch.setattr("utils.finite.write_text_atomic", raising(full))
    spoil(3)
    ends = pytest.raises(FloatingPointError, match=r"the loss is nan in epoch 1, batch 1 \(\w\.")
    with ends if on_nan == "stop" else contextlib.nullcontext():
        train.main([*base, "--epochs", "2", "--on-nan", on_nan])
    warning = "warning: the batch cannot be saved for a look: nan_batch_1_1.txt: No space left"
    assert warning in caplog.text
    assert ("back to epoch 1, batch 0" in caplog.text) == (on_nan == "recover")


def raising(error):
    """A function that does nothing else."""

    def fail(*_):
        raise error

    return fail


def test_a_bad_gradient_is_forgotten_by_recovery(base, tmp_path, monkeypatch):
    """Else it would join those of the first step after it."""
    clip, calls = train.clip_gradients, []

    def spoil_once(run):
        calls.append(run)
        if len(calls) == 2:
            run.model.model[0].conv.weight.grad[0] = math.nan
        return clip(run)

    monkeypatch.setattr(train, "clip_gradients", spoil_once)
    train.main([*base, "--epochs", "2", "--on-nan", "recover"])
    rates = [float(row["lr/weights"]) for row in results_of(tmp_path / "runs/exp")]
    run = calls[0]
    assert rates[1] == pytest.approx(run.schedule.at(3, 1).lr)
    assert run.schedule.factor == 0.5


def test_recovery_gives_up_where_a_lower_rate_does_not_help(base, tmp_path, spoil):
    spoil(*range(2, 20))
    with pytest.raises(FloatingPointError, match="learning rate 32 times lower this still happens"):
        train.main([*base, "--epochs", "2", "--on-nan", "recover"])
    assert load_checkpoint(tmp_path / "runs/exp/weights/last.pt")["training"]["epoch"] == 0


def test_spoilt_statistics_are_not_saved(base, tmp_path, monkeypatch):
    """The weights can be good where the running mean of a batch norm is not."""
    original = train.optimizer_step

    def step(run, *arguments):
        original(run, *arguments)
        run.model.model[1].bn.running_mean[0] = math.inf

    monkeypatch.setattr(train, "optimizer_step", step)
    with pytest.raises(
        FloatingPointError, match=r"after epoch 0 the values of model\.1\.bn\.runn"
    ) as caught:
        train.main([*base, "--epochs", "1"])
    listed = (tmp_path / "runs/exp/nan_batch_0_1.txt").read_text().splitlines()
    names = ", ".join(Path(path).name for path in listed)
    assert f"not all finite, its last batch was 1 ({names}); the batch is in " in str(caught.value)
    assert load_checkpoint(tmp_path / "runs/exp/weights/last.pt")["training"]["epoch"] == -1


@pytest.fixture
def run_away(monkeypatch):
    """Let the second epoch have a loss that is finite, but far too large."""
    compute_loss, calls = train.compute_loss, []

    def compute(run, *args, **rest):
        loss, parts = compute_loss(run, *args, **rest)
        calls.append(loss)
        return loss, parts * 1e5 if len(calls) in (3, 4) else parts

    monkeypatch.setattr(train, "compute_loss", compute)


def test_a_loss_that_has_run_away_ends_the_run(base, tmp_path, run_away):
    """Before it is saved: what is resumed is the good state."""
    words = r"the mean loss of epoch 1 is \d.*: it has run away; .*train.py .* or lower lr0 in"
    with pytest.raises(FloatingPointError, match=words):
        train.main([*base, "--epochs", "3"])
    assert load_checkpoint(tmp_path / "runs/exp/weights/last.pt")["training"]["epoch"] == 0


def test_a_loss_that_has_run_away_is_recovered_from(base, tmp_path, run_away, caplog):
    train.main([*base, "--epochs", "3", "--on-nan", "recover"])
    assert "it has run away; back to epoch 1, batch 0, with the learning rate" in caplog.text
    rows = results_of(tmp_path / "runs/exp")
    assert [row["epoch"] for row in rows] == ["0", "1", "2"]
    assert all(float(row["train/obj_loss"]) < 10 for row in rows)


@pytest.mark.parametrize(
    ("batches", "waiting", "mean", "teacher", "is_too_large"),
    [
        pytest.param(0, 500, 5, False, False, id="before the first step"),
        pytest.param(10, 500, 5, False, False, id="within a long accumulation"),
        pytest.param(10, 0, 5, False, False, id="after a step"),
        pytest.param(10, 500, 2000, False, True, id="too large"),
        pytest.param(10, 0, 2000, True, False, id="half of it the teacher's"),
        pytest.param(10, 0, 4000, True, True, id="too large with a teacher"),
    ],
)
def test_only_batches_with_a_step_count_for_a_loss_that_has_run_away(
    batches, waiting, mean, teacher, is_too_large
):
    """Else a stop before the first step of many batches would save nothing."""
    gains = DistillationGains(box=0.1, obj=0.9, cls=0.5)
    run = SimpleNamespace(
        batches=batches,
        loss_sums=torch.tensor([mean * (batches + waiting)]),
        before=BeforeStep([], torch.tensor([mean * batches])) if waiting else None,
        loss=SimpleNamespace(settings=LossSettings(box=0.1, obj=0.9, cls=0.5)),
        distillation=SimpleNamespace(gains=gains) if teacher else None,
    )
    with pytest.raises(FloatingPointError) if is_too_large else contextlib.nullcontext():
        check_loss(run, 0)


@pytest.mark.parametrize("batch", [1, 3])
def test_one_image_of_one_cell_is_refused_before_there_is_a_run_folder(base, tmp_path, batch):
    """The first of all batches, or the last: torch would end the run within the epoch."""
    flags = ["--cfg", "yolov5n.yaml", "--img", "32", "--batch", str(batch), "--epochs", "1"]
    with pytest.raises(ValueError, match="batch norms cannot learn from one at --imgsz 32: give"):
        train.main([*base, *flags])
    assert not (tmp_path / "runs").exists()


def test_an_optimizer_that_is_spoilt_alone_is_recovered_from(base, tmp_path, monkeypatch, caplog):
    """A square that overflows leaves the weights as they are: the step divides by it."""
    original, calls = train.optimizer_step, []

    def step(run, *arguments):
        original(run, *arguments)
        calls.append(run)
        if len(calls) == 2:
            run.optimizer.state[run.model.model[1].conv.weight]["exp_avg_sq"][0] = math.inf

    monkeypatch.setattr(train, "optimizer_step", step)
    train.main([*base, "--epochs", "1", "--optimizer", "AdamW", "--on-nan", "recover"])
    assert "values of exp_avg_sq of model.1.conv.weight are not all finite, its last" in caplog.text
    assert "; back to epoch 0, batch 0" in caplog.text
    assert load_checkpoint(tmp_path / "runs/exp/weights/last.pt")["epoch"] == 0


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_step_that_is_not_finite_is_left_out_on_the_device(tiny_spec, optimizer):
    """On a GPU nobody looks at the norm before the step; the next one starts as if alone."""
    runs = [build_proximal_run(tiny_spec, optimizer) for _ in range(2)]
    for run, values in zip(runs, ((math.nan, 1.0), (1.0,)), strict=True):
        for value in values:
            for parameter in run.model.parameters():
                parameter.grad = torch.full_like(parameter, value)
            optimizer_step(run, 0, clip_gradients(run))
    assert_same_weights(*(run.model.state_dict() for run in runs))


def test_nosave_with_early_stopping_keeps_the_last_epoch(base, tmp_path, monkeypatch):
    monkeypatch.setattr(EvaluationResult, "fitness", property(lambda _: 0.5))
    train.main([*base, "--epochs", "9", "--patience", "2", "--nosave"])
    assert load_checkpoint(tmp_path / "runs/exp/weights/last.pt")["epoch"] == 2


def test_kill_between_two_files_leaves_the_best_in_place(base, tmp_path, monkeypatch):
    """last.pt remembers the best fitness, so best.pt must be there before it."""
    calls = []

    def save_once(*arguments):  # the untrained network, at the start
        if calls:
            raise Interrupted
        calls.append(save_checkpoint(*arguments))

    monkeypatch.setattr(saving, "save_checkpoint", save_once)
    with pytest.raises(Interrupted):
        train.main([*base, "--epochs", "2"])
    assert load_checkpoint(tmp_path / "runs/exp/weights/best.pt")["epoch"] == 0


def test_resume_refuses_what_is_not_an_interrupted_run(base, tmp_path, monkeypatch, shared_dir):
    train_until(monkeypatch, 0, [*base, "--epochs", "2"])
    run = tmp_path / "runs/exp"
    copied = tmp_path / "elsewhere/last.pt"
    copied.parent.mkdir()
    copied.write_bytes((run / "weights/last.pt").read_bytes())
    cases = {
        copied: "not in its run folder",
        run / "weights/best.pt": "not the last.pt of an unfinished run",
        shared_dir / "weights/yolov5n.pt": "public YOLOv5 file",
    }
    for path, words in cases.items():
        with pytest.raises(ValueError, match=words):
            train.main(["--resume", str(path)])
    assert not (tmp_path / "results.csv").exists()
    train.main(["--resume", str(run)])  # the folder will do
    assert load_checkpoint(run / "weights/last.pt")["epoch"] == 1


def spoil_lr(state):
    state["optimizer"]["param_groups"].pop()


def spoil_shape(state):
    state["model"]["model.0.conv.weight"] = torch.zeros(1)


def spoil_moment(state):
    state["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(2)


# What is wrong with last.pt, and what is said about it.
DAMAGES = {
    "nothing": (lambda c: c.update(training=None), r"\(training missing, or of the wrong kind\)"),
    "a part": (lambda c: c["training"].pop("ema"), r"\(ema missing, or of the wrong kind\)"),
    "a tensor for an option": (
        lambda c: c["options"].update(weights=torch.zeros(3)),
        r"\(weights missing, or of the wrong kind\)",
    ),
    "kinds": (
        lambda c: c["training"].update(epoch="2", class_maps=[]), r"\(epoch, class_maps missing"
    ),
    "options": (lambda c: c.update(options=None), r"\(options missing"),
    "hyp": (lambda c: c["hyp"].pop("lr0"), r"\(TypeError, .*'lr0'\)"),
    "within": (lambda c: c["training"]["ema"].pop("updates"), r"\(KeyError, 'updates'\)"),
    "groups": (lambda c: spoil_lr(c["training"]), r"\(ValueError, .* parameter groups\)"),
    "shape": (lambda c: spoil_shape(c["training"]), r"training.model.model.0.conv.weight is not"),
    "rng": (lambda c: c["training"].update(torch_rng=torch.zeros(3)), r"training.torch_rng is not"),
    "moments": (lambda c: spoil_moment(c["training"]), r"moments of another shape"),
    "classes": (lambda c: c["training"].update(class_maps=torch.zeros(9)), r"class_maps is not"),
    "sums": (lambda c: c["training"].update(loss_sums=[math.nan] * 3), r"loss_sums is \[nan, "),
    "two sums": (lambda c: c["training"].update(loss_sums=[1.0] * 2), r"2 sums of 3 losses"),
    "batches": (lambda c: c["training"].update(batches=-5), r"batches is -5, expected 0 to inf"),
    "far ahead": (lambda c: c["training"].update(epoch=10**9), r"epoch is 1000000000, expected -1"),
    "no data": (lambda c: c["training"].update(data={"training": {}}), r"\(KeyError, 'images'\)"),
    "unknown hyp": (lambda c: c["hyp"].update(foo=1), r"\(TypeError, .*'foo'\)"),
    "odd hyp": (lambda c: c["hyp"].update(lr0=-1), r"lr0 = -1 lies outside"),
    "epochs": (lambda c: c["options"].update(epochs="many"), r"epochs: invalid int value: 'many'"),
    "batch": (lambda c: c["options"].update(batch_size=0), r"--batch-size is 0, expected at least"),
    "optimizer": (lambda c: c["options"].update(optimizer="L"), r"--optimizer: invalid choice"),
    "switch": (lambda c: c["options"].update(rect=5), r"--rect is 5, expected true or false"),
    "imgsz": (lambda c: c["options"].update(imgsz=10**9), r"--imgsz is 1000000000, expected at"),
    "rows": (lambda c: c["options"].update(freeze="x"), r"--freeze: invalid int value: 'x'"),
    "seed": (lambda c: c["options"].update(seed=10**30), r"--seed is 1000000000\d*, expected at"),
    "gammas": (lambda c: c["training"].update(gammas=[{"x": 1}]), r"\(TypeError, .*'x'\)"),
    "late gammas": (lambda c: c["training"].update(gammas=[{"epoch": 7}]), r"gammas of epoch 7"),
}  # fmt: skip


def test_a_damaged_training_state_is_one_line(base, tmp_path, monkeypatch):
    """In spite of it nothing of the run folder has changed."""
    train_until(monkeypatch, 0, [*base, "--epochs", "2"])
    last = tmp_path / "runs/exp/weights/last.pt"
    whole = last.read_bytes()
    for case, (spoil, words) in DAMAGES.items():
        last.write_bytes(whole)
        content = load_checkpoint(last)
        spoil(content)
        torch.save(content, last)
        with pytest.raises(ValueError, match=words) as caught:
            train.main(["--resume", str(last)])
        assert str(caught.value).startswith(f"--resume {last}: its training state is"), case
        assert str(caught.value).endswith(f"use --weights {last}"), case
        assert "\n" not in str(caught.value), case
        assert len(results_of(tmp_path / "runs/exp")) == 1, case


def test_resume_takes_what_is_typed_also_a_default(base, tmp_path, monkeypatch):
    train_until(monkeypatch, 0, [*base, "--epochs", "2"])
    (tmp_path / "runs/exp").rename(tmp_path / "moved")
    last, place = str(tmp_path / "moved/weights/last.pt"), ["--name", "moved", "--exist-ok"]
    for typed, expected in (([], 0), (["--workers", "8"], 8), (place, 0)):
        options, given = train.parse_args(["--resume", last, *typed])
        assert train.find_resumed(options, given, train.ROOT).options.workers == expected


def test_a_resumed_run_takes_its_own_options_and_no_others(
    base, tmp_path, monkeypatch, capsys, tiny_dataset
):
    sparse = ["--bn_sparsity", "--sparsity_rate", "0.01"]
    train_until(monkeypatch, 0, [*base, "--epochs", "2", *sparse])
    last = tmp_path / "runs/exp/weights/last.pt"
    again = ["--resume", str(last.parents[1]), "--workers", "0"]
    cases = {
        ("--epochs", "9"): "--epochs is 9, but the run has 2; a run goes on",
        ("--cfg", "yolov5n.yaml", "--seed", "3"): "; --seed is 3, but the run has 0; a run goes on",
        ("--sparsity_rate", "0.02"): "--sparsity-rate is 0.02, but the run has 0.01; a run",
        ("--cos-lr",): "--cos-lr is True, but the run has False; a run",
    }
    for flags, words in cases.items():
        with pytest.raises(ValueError, match=words) as caught:
            train.main([*again, *flags])
        assert f": python train.py --weights {last} with all" in str(caught.value)
        assert "\n" not in str(caught.value)
    assert "usage" not in capsys.readouterr().err  # which would hide it
    train.main([*again, *base, "--epochs", "2", "--sparsity_rate", "0.01"])
    assert len(results_of(tmp_path / "runs/exp")) == 2


def test_resume_after_an_early_stop_trains_no_further(base, tmp_path, monkeypatch):
    monkeypatch.setattr(EvaluationResult, "fitness", property(lambda _: 0.5))
    with monkeypatch.context() as patched:
        patched.setattr(train, "finish", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            train.main([*base, "--epochs", "9", "--patience", "1"])
    run = tmp_path / "runs/exp"
    (run / "weights/.last.pt.1.tmp").write_bytes(b"left by a killed writer")
    train.main(["--resume", str(run)])
    assert len(results_of(run)) == 2
    assert "training" not in load_checkpoint(run / "weights/last.pt")
    assert not list((run / "weights").glob(".*"))


def test_a_damaged_run_does_not_hide_the_others(base, tmp_path, monkeypatch):
    train_until(monkeypatch, 0, [*base, "--epochs", "2"])
    damaged = tmp_path / "runs/later/weights/last.pt"
    damaged.parent.mkdir(parents=True)
    damaged.write_bytes(b"")
    expected = tmp_path / "runs/exp/weights/last.pt"
    assert newest_unfinished(tmp_path / "runs") == expected


def test_resume_refuses_other_classes(base, tmp_path, tiny_dataset, monkeypatch):
    train_until(monkeypatch, 0, [*base, "--epochs", "2"])
    text = tiny_dataset.yaml.read_text()
    tiny_dataset.yaml.write_text(text.replace("nc: 3", "nc: 4").replace("bar]", "bar, rod]"))
    with pytest.raises(ValueError, match=r"the run to resume has disc, box, bar$"):
        train.main(["--resume", str(tmp_path / "runs/exp/weights/last.pt")])


def test_resuming_says_what_has_changed(base, tmp_path, tiny_dataset, monkeypatch, caplog):
    train_until(monkeypatch, 0, [*base, "--epochs", "2"])
    run = tmp_path / "runs/exp"
    for file, before, after in (("opt.yaml", "epochs: 2", "epochs: 9"), ("hyp.yaml", "lr0", "#")):
        text = (run / file).read_text()
        assert before in text
        (run / file).write_text(text.replace(before, after))
    (tiny_dataset.images / "d.jpg").unlink()
    train.main(["--resume", str(run), "--batch-size", "4"])
    said = [line for line in caplog.messages if "warning" in line]
    assert [line for line in said if "opt.yaml: epochs is 9, but the run has 2" in line]
    assert [
        line for line in said if "training data have changed" in line and "4 images then, 3" in line
    ]
    assert not [
        line for line in said if "hyp.yaml" in line
    ]  # what is not there contradicts nothing
    assert len(results_of(run)) == 2


@pytest.mark.parametrize("batch_size", ["1", "2", "3"])
def test_losses_of_a_whole_epoch_stay_where_images_have_gone(
    base, tmp_path, tiny_dataset, monkeypatch, batch_size
):
    with monkeypatch.context() as patched:
        signal_self_at_call(patched, "train.validate", 2, signal.SIGTERM)
        with pytest.raises(SystemExit):
            train.main([*base, "--epochs", "2", "--batch", "1"])
    run = tmp_path / "runs/exp"
    state = load_checkpoint(run / "weights/last.pt")["training"]
    assert state["batches"] == 4
    (tiny_dataset.images / "d.jpg").unlink()
    train.main(["--resume", str(run), "--batch-size", batch_size])
    logged = [float(results_of(run)[1][f"train/{name}_loss"]) for name in ("box", "obj", "cls")]
    assert logged == pytest.approx([value / 4 for value in state["loss_sums"]], rel=1e-4)


def test_an_edited_file_that_is_no_yaml_does_not_keep_a_run_from_being_resumed(
    base, tmp_path, monkeypatch, caplog
):
    train_until(monkeypatch, 0, [*base, "--epochs", "2"])
    run = tmp_path / "runs/exp"
    (run / "opt.yaml").write_text("")
    (run / "hyp.yaml").write_text("lr0: [1,")
    options, given = train.parse_args(["--resume", str(run)])
    assert train.find_resumed(options, given, train.ROOT).options.epochs == 2
    for file in ("opt.yaml", "hyp.yaml"):
        assert [m for m in caplog.messages if file in m and m.endswith("its checkpoint holds")]


def test_resuming_an_unchanged_run_warns_of_nothing(base, tmp_path, monkeypatch, caplog):
    train_until(monkeypatch, 0, [*base, "--epochs", "2", "--freeze", "1", "2"])
    train.main(["--resume", str(tmp_path / "runs/exp"), "--workers", "0"])
    assert "warning" not in caplog.text


def test_bad_gradient_stops_before_the_step(base, monkeypatch):
    """The loss can be finite where a gradient is not."""
    kept = {}

    def spoil(run):
        kept.update(run=run, weight=run.model.model[0].conv.weight.detach().clone())
        run.model.model[0].conv.weight.grad[0] = float("nan")
        return clip(run)

    clip = train.clip_gradients
    monkeypatch.setattr(train, "clip_gradients", spoil)
    with pytest.raises(
        FloatingPointError,
        match=r"a gradient is nan in epoch 0, batch 0 .*such gradient is that of model.0.conv",
    ):
        train.main([*base, "--epochs", "1", "--amp", "off"])
    torch.testing.assert_close(kept["run"].model.model[0].conv.weight, kept["weight"])


@pytest.mark.parametrize("is_black", [True, False])
def test_gradients_of_black_images_are_explained(base, tiny_dataset, monkeypatch, is_black):
    """Batch norms multiply them, here, as there are few, by more than they do else."""

    def build_and_steepen(*args):
        model = build_network(*args)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eps = 1e-12
        return model

    def spoil(run):
        if not is_black:
            run.model.model[0].conv.weight.grad[0] = float("nan")
        return clip_gradients(run)

    build_network = train.build_network
    monkeypatch.setattr(train, "build_network", build_and_steepen)
    monkeypatch.setattr(train, "clip_gradients", spoil)
    if is_black:
        for path in tiny_dataset.images.iterdir():
            assert cv2.imwrite(str(path), np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(FloatingPointError, match=r"a gradient is (nan|inf)") as caught:
        train.main([*base, "--epochs", "1", "--amp", "off"])
    assert ("each of its images is of one colour" in str(caught.value)) == is_black


def test_penalty_keeps_its_strength_beside_large_gradients(tiny_spec):
    """It is added after clipping, which would shrink it with the gradients."""
    run = build_step_run(tiny_spec, 1.0)
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    name, norm = next(iter(run.penalty.batchnorms.items()))
    num_values = sum(p.numel() for p in run.model.parameters())
    clipped = MAX_GRADIENT_NORM / num_values**0.5
    optimizer_step(run, 0, clip_gradients(run))
    expected = torch.full_like(norm.weight, 1 - 0.1 * (clipped + 0.01))
    torch.testing.assert_close(norm.weight.detach(), expected, msg=name)


def test_anchors_asked_for_by_number_are_fitted(base, tmp_path, tiny_spec):
    cfg = tmp_path / "count.yaml"
    cfg.write_text(yaml.safe_dump({**tiny_spec, "anchors": 2}))
    flags = [flag for flag in base if flag != "--noautoanchor"]
    train.main([*flags, "--cfg", str(cfg), "--epochs", "1"])
    anchors = load_detector(tmp_path / "runs/exp/weights/last.pt").model.head.anchors_px
    assert anchors.shape == (2, 2, 2)
    boxes = torch.tensor([[20, 20], [18, 24], [30, 8], [19, 19], [20, 20], [33, 9]])
    ratio = anchors.reshape(1, -1, 2) / boxes[:, None]
    assert torch.maximum(ratio, 1 / ratio).amax(-1).amin(1).max() < 1.5
    with pytest.raises(ValueError, match="--noautoanchor forbids"):
        train.main([*base, "--cfg", str(cfg), "--epochs", "1"])


OTHER_FLAGS = {
    "rect": ["--rect"],
    "cache": ["--cache", "ram"],
    "one class": ["--single-cls"],
    "smoothing": ["--label-smoothing", "0.1"],
    "Adam": ["--optimizer", "Adam"],
    "bf16": ["--amp", "bf16"],
}


@pytest.mark.parametrize("case", OTHER_FLAGS)
def test_flags_run_and_act(base, tmp_path, case):
    plain, flagged = tmp_path / "runs/plain", tmp_path / "runs/flagged"
    train.main([*base, "--epochs", "1", "--name", "plain"])
    train.main([*base, "--epochs", "1", "--name", "flagged", *OTHER_FLAGS[case]])
    same = results_of(plain) == results_of(flagged)
    assert same == (case == "cache")  # a cache changes no result, all others do
    if case == "one class":
        assert load_detector(flagged / "weights/last.pt").names == ("object",)


def test_exist_ok_writes_into_the_same_folder(base, tmp_path):
    for _ in range(2):
        train.main([*base, "--epochs", "1", "--exist-ok"])
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["exp"]


@pytest.mark.parametrize("part", ["save_options", "save_resumable"])
def test_an_old_run_stays_until_the_new_one_can_begin(base, tmp_path, monkeypatch, part):
    train.main([*base, "--epochs", "1"])
    run = tmp_path / "runs/exp"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    del before[run / ".lock"]
    original = getattr(saving, part)

    def work_and_stop(*arguments):
        original(*arguments)
        raise Interrupted

    monkeypatch.setattr(saving, part, work_and_stop)
    with pytest.raises(Interrupted):
        train.main([*base, "--epochs", "2", "--exist-ok"])
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("times", [1, 2])
def test_a_new_run_is_not_mixed_with_the_one_of_before(base, tmp_path, monkeypatch, times):
    """It may be killed in its first epoch, again and again; the weights of the old one stay."""
    train.main([*base, "--epochs", "1", "--save-period", "1"])
    run = tmp_path / "runs/exp"
    (run / "notes.txt").write_text("mine")
    old = {name: (run / name).read_bytes() for name in ("weights/best.pt", "results.csv")}
    with monkeypatch.context() as patched:
        patched.setattr(train, "optimizer_step", lambda *_: (_ for _ in ()).throw(Interrupted))
        for _ in range(times):
            with pytest.raises(Interrupted):
                train.main([*base, "--epochs", "2", "--exist-ok"])
    assert [path.name for path in (run / "weights").iterdir()] == ["last.pt"]
    assert {name: (run / "replaced" / name).read_bytes() for name in old} == old
    train.main(["--resume", str(run)])
    assert [row["epoch"] for row in results_of(run)] == ["0", "1"]
    assert sorted(path.name for path in (run / "weights").iterdir()) == ["best.pt", "last.pt"]
    assert (run / "notes.txt").read_text() == "mine"
    assert not (run / "replaced").exists()


def test_the_run_of_before_is_not_resumed_as_the_new_one(base, tmp_path, monkeypatch):
    train_until(monkeypatch, 0, [*base, "--epochs", "2"])
    run = tmp_path / "runs/exp"
    with monkeypatch.context() as patched:
        patched.setattr(train, "optimizer_step", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            train.main([*base, "--epochs", "2", "--exist-ok", "--nosave"])
    with pytest.raises(FileNotFoundError, match="before it had saved anything"):
        train.main(["--resume", str(run)])
    with pytest.raises(FileNotFoundError, match="there is no unfinished run"):
        newest_unfinished(tmp_path / "runs")
    assert newest_unfinished(run / "replaced") == run / "replaced/weights/last.pt"
    train.main(["--resume", str(run / "replaced")])
    assert len(results_of(run / "replaced")) == 2


def test_cfg_of_another_network_is_refused_when_fine_tuning(base, slim_weights):
    path, _ = slim_weights
    with pytest.raises(ValueError, match="not pruned from the network of --cfg yolov5n"):
        train.main([*base, "--weights", str(path), "--ft_pruned_model", "--cfg", "yolov5n.yaml"])


REFUSED = {
    "two stages": (["--bn_sparsity", "--ft_pruned_model"], "different stages"),
    "rate without penalty": (["--sparsity_rate", "0.1"], "only with --bn_sparsity"),
    "no network": (["--weights", "", "--cfg", ""], "give --cfg"),
    "nothing to fine-tune": (["--ft_pruned_model"], "give --weights"),
    "two ways to go on": (["--resume", "x.pt", "--evolve", "2"], "--resume goes on with one"),
    "epochs": (["--epochs", "0"], "--epochs is 0"),
    "batch": (["--batch-size", "0"], "--batch-size is 0, expected at least 1"),
    "batch that fits on two": (["--batch", "-1", "--device", "0,1"], "give a number for several"),
    "patience without validation": (["--noval", "--patience", "3"], "needs the validation"),
    "rate of words": (["--bn_sparsity", "--sparsity_rate", "much"], "a number or auto, not 'much'"),
    "mode without penalty": (["--sparsity_mode", "proximal"], "--sparsity_mode acts only with"),
    "cost without penalty": (["--sparsity_cost", "0"], "--sparsity_cost acts only with"),
    "share above 1": (["--bn_sparsity", "--sparsity_share", "60"], "--sparsity-share is 60"),
    "cost too high": (
        ["--bn_sparsity", "--sparsity_cost", "2"],
        "--sparsity-cost is 2.0, expected",
    ),
    "rule without penalty": (["--shortcut", "keep"], "--shortcut acts only with --bn_sparsity"),
    "nothing to go back to": (["--on-nan", "recover", "--nosave"], "--nosave leaves out"),
    "rate not finite": (["--bn_sparsity", "--sparsity_rate", "nan"], "--sparsity-rate is nan"),
    "rate beyond sense": (
        ["--bn_sparsity", "--sparsity_rate", "1e30"],
        "--sparsity_rate is 1e+30, expected at most 100; 1e-4 to 1e-2 are usual",
    ),
    "gain without teacher": (["--distill-gain", "2"], "--distill-gain acts only with --teacher"),
    "gain below 0": (["--teacher", "x.pt", "--distill-gain", "-1"], "--distill-gain is -1"),
    "frozen rows": (["--freeze", "2", "-1"], "--freeze is -1, expected at least 0"),
    "device": (["--device", "0,"], "--device 0,: expected cpu, mps, a GPU number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_conflicts_are_refused_first(base, capsys, case):
    flags, words = REFUSED[case]
    with pytest.raises(SystemExit) as caught:
        train.main([*base, *flags])
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        (["--data", "none.yaml"], FileNotFoundError, "none.yaml"),
        (["--cfg", "yolov5q.yaml"], FileNotFoundError, "yolov5q.yaml"),
        (["--weights", "none.pt"], FileNotFoundError, "none.pt"),
        (["--teacher", "none.pt"], FileNotFoundError, "--teacher none.pt: no such file"),
        (["--hyp", "hyp.none.yaml"], FileNotFoundError, "hyp.none"),
        (["--freeze", "15"], ValueError, "expected a count below 15"),
        (["--bn_sparsity", "--freeze", "14"], ValueError, "no layer"),
    ],
)
def test_what_is_not_there_is_named(base, tmp_path, flags, error, words):
    with pytest.raises(error, match=words):
        train.main([*base, *flags, "--epochs", "1"])
    assert not list(tmp_path.rglob("opt.yaml")), "a run folder before all was seen to be there"


def test_a_folder_that_cannot_be_made_is_named_before_images_are_scanned(base, tiny_dataset):
    project = tiny_dataset.yaml / "runs"  # below a file
    before = sorted(tiny_dataset.root.rglob("*"))
    with pytest.raises(OSError, match=r"cannot write to .*/runs/exp: .*tiny.yaml is no folder"):
        train.main([*base, "--project", str(project)])
    assert sorted(tiny_dataset.root.rglob("*")) == before


def test_a_precision_that_the_best_device_lacks_is_refused_before_anything_is_read(
    base, monkeypatch, tmp_path
):
    monkeypatch.setattr(devices, "select_device", lambda _: torch.device("cpu"))
    with pytest.raises(ValueError, match="--amp fp16 needs a CUDA GPU, not cpu"):
        train.main([*base, "--device", "", "--amp", "fp16", "--weights", "none.pt"])
    assert not (tmp_path / "runs").exists()


def test_pruned_weights_without_the_flag_are_not_widened(base, slim_weights, tiny_dataset):
    path, _ = slim_weights
    with pytest.raises(ValueError, match="--ft_pruned_model"):
        train.main([*base, "--weights", str(path)])


def test_dense_weights_with_the_flag_are_refused(base, tiny_spec, tmp_path):
    path = tmp_path / "dense.pt"
    content = build_checkpoint(Model(ModelSpec.from_dict(tiny_spec)), ("a", "b", "c"))
    save_checkpoint(path, content)
    with pytest.raises(ValueError, match="not a pruned model"):
        train.main([*base, "--weights", str(path), "--ft_pruned_model"])


@pytest.fixture
def trains_here(monkeypatch):
    """The trainings of a search run in this process, which has loaded torch."""

    def call(command, env):
        assert command[:2] == [sys.executable, train.__file__]
        assert env[ranks.SEARCH] == str(os.getpid())
        train.main(command[2:])
        return 0

    monkeypatch.setattr(subprocess, "call", call)


@pytest.mark.slow
def test_evolve_trains_keeps_score_and_goes_on(base, tmp_path, caplog, trains_here):
    caplog.set_level("INFO")
    command = [*base, "--epochs", "1", "--name", "search", "--evolve"]
    train.main([*command, "1"])
    folder = tmp_path / "runs/search"
    first = read_history(folder / "evolve.csv")
    train.main([*command, "2", "--exist-ok"])
    history = read_history(folder / "evolve.csv")
    assert [generation.number for generation in history] == [0, 1]
    assert history[:1] == first
    assert history[1].hyp != first[0].hyp
    best = max(history, key=lambda generation: generation.score.fitness)
    assert load_hyperparameters(folder / "hyp_evolved.yaml") == best.hyp
    assert list((folder / "generation/weights").iterdir())
    assert "generation 2 of 2: fitness" in caplog.text


def test_a_training_whose_search_was_killed_saves_and_ends(base, tmp_path, monkeypatch):
    monkeypatch.setenv(ranks.SEARCH, str(os.getpid()))  # which is not its parent
    with pytest.raises(SystemExit) as stopped:
        train.main([*base, "--epochs", "2", "--nosave"])
    assert stopped.value.code == 143
    state = load_checkpoint(tmp_path / "runs/exp/weights/last.pt")["training"]
    assert (state["epoch"], state["batches"]) == (-1, 1)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there are no groups of processes to signal")
def test_an_interrupted_search_goes_on(base, tmp_path, trains_here):
    """In its second generation it is ended, then killed; no training of it is left running."""
    command = [*base, "--epochs", "1", "--name", "search", "--exist-ok", "--evolve", "3"]
    table = tmp_path / "runs/search/evolve.csv"
    first = None
    for begins, cause in (("generation 1 of 3", "SIGTERM"), ("after 1 generations", "SIGKILL")):
        with subprocess.Popen(
            [sys.executable, "train.py", *command],
            cwd=train.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        ) as search:
            for expected in (begins, "results in"):  # the latter is of the training
                assert any(expected in line for line in search.stdout), expected
            if cause == "SIGTERM":
                search.terminate()
            else:
                os.killpg(search.pid, signal.SIGKILL)
            output = search.stdout.read()  # until the training is gone as well
            assert search.wait(60) == (143 if cause == "SIGTERM" else -signal.SIGKILL)
            assert ("goes on" in output) == (cause == "SIGTERM")
            assert "weights/last.pt" not in output, "the training went on alone"
        first = first or table.read_text()
        assert table.read_text() == first
    train.main(command)
    assert table.read_text().startswith(first)
    assert [generation.number for generation in read_history(table)] == [0, 1, 2]


@pytest.mark.parametrize(("status", "fitnesses"), [(3, [0.5, 0.0, 0.5]), (1, [0.5]), (-9, [0.5])])
def test_only_numbers_that_run_away_count_against_hyperparameters(
    base, tmp_path, monkeypatch, status, fitnesses
):
    statuses = [0, status, 0]
    monkeypatch.setattr(subprocess, "call", lambda *_, **__: statuses.pop(0))
    figures = {"metrics/mAP_0.5": [0.5], "metrics/mAP_0.5:0.95": [0.5]}
    monkeypatch.setattr("utils.training.search.read_results", lambda _: figures)
    command = [*base, "--name", "search", "--exist-ok", "--evolve", "3"]
    if len(fitnesses) == 1:
        with pytest.raises(SystemExit, match=r"^generation 2 failed, see above; the same .* goes"):
            train.main(command)
    else:
        train.main(command)
    history = read_history(tmp_path / "runs/search/evolve.csv")
    assert [generation.score.fitness for generation in history] == fitnesses


def test_evolve_stops_where_nothing_can_be_trained(base, capfd):
    with pytest.raises(SystemExit, match="its first training failed, see above"):
        train.main([*base, "--epochs", "1", "--evolve", "2", "--weights", "nowhere.pt"])
    assert "nowhere.pt" in capfd.readouterr().err


def test_tensorboard_shows_figures_gammas_pictures_and_the_graph(base, tmp_path, draws):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train.main([*base, "--epochs", "2", "--tensorboard", "--bn_sparsity"])
    events = reader.EventAccumulator(str(tmp_path / "runs/exp"), {"images": 0, "histograms": 0})
    events.Reload()
    rows = results_of(tmp_path / "runs/exp")
    for tag in ("train/box_loss", "metrics/mAP_0.5", "sparsity_rate"):
        shown = [scalar.value for scalar in events.Scalars(tag)]
        assert shown == pytest.approx([float(row[tag]) for row in rows], rel=1e-4)
    assert events.Graph().node
    tags = events.Tags()
    assert {"labels", "train_batch0", "results", "bn_gamma"} <= set(tags["images"])
    model = load_detector(tmp_path / "runs/exp/weights/last.pt").model
    layers = {f"abs_gamma/{path}" for path in prunable_batchnorms(model)}
    assert set(tags["histograms"]) == layers


@pytest.mark.parametrize("part", ["add_graph", "add_figures", "add_pictures"])
def test_tensorboard_gets_what_it_was_given_before_a_run_fails(base, monkeypatch, part):
    """It writes with a thread, which would end with the process and lose what waits."""
    pytest.importorskip("tensorboard")
    closed, close = [], Board.close

    def close_on_a_full_disk(board):
        close(board)
        closed.append(board)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Board, part, raising(Interrupted()))
    monkeypatch.setattr(Board, "close", close_on_a_full_disk)
    with pytest.raises(Interrupted):
        train.main([*base, "--epochs", "1", "--tensorboard"])
    assert len(closed) == 1


def test_a_missing_tensorboard_is_said_before_anything_is_read_or_made(base, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr(train, "scan_splits", None)
    with pytest.raises(ValueError, match=r"^--tensorboard needs .*: pip install tensorboard$"):
        train.main([*base, "--epochs", "1", "--tensorboard"])
    assert not (tmp_path / "runs").exists()


def test_default_workers_are_found_anew_on_another_machine(base, tmp_path):
    at = base.index("--workers")
    train.main([*base[:at], *base[at + 2 :], "--epochs", "1"])
    assert yaml.safe_load((tmp_path / "runs/exp/opt.yaml").read_text())["workers"] is None
