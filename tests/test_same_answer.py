"""What must not change an answer: workers, batch size, run order, a busy machine, a second run."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml

import train
import val
from models import Model, ModelSpec
from utils import device as devices
from utils.checkpoint import build_checkpoint, load_checkpoint, save_checkpoint
from utils.loss import DetectionLoss, LossSettings

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture
def train_flags(tiny_spec, tiny_dataset, tmp_path):
    """A run of a second; hundreds of boxes, many for one cell, so that threads share the loss."""
    rng = np.random.default_rng(0)
    for number, image in enumerate(sorted(tiny_dataset.images.iterdir())):
        rows = np.c_[rng.integers(3, size=400), rng.uniform(0.3, 0.7, (400, 2)), np.full(400, 0.3)]
        lines = [f"{int(cls)} {x:.6f} {y:.6f} {side} {side}" for cls, x, y, side in rows]
        label = (tiny_dataset.labels / image.name).with_suffix(".txt")
        label.write_text("\n".join(lines[number:]), encoding="utf-8")
    cfg = tmp_path / "tiny_net.yaml"
    cfg.write_text(yaml.safe_dump(tiny_spec), encoding="utf-8")
    return [
        *("--data", str(tiny_dataset.yaml), "--cfg", str(cfg), "--weights", "", "--img", "64"),
        *("--batch", "2", "--nominal-batch", "2", "--epochs", "2", "--noautoanchor"),
        *("--device", "cpu", "--project", str(tmp_path / "runs")),
    ]


def assert_equal_runs(first, second):
    """The final weights bit by bit, and all of results.csv."""
    for name in ("best.pt", "last.pt"):
        weights = [load_checkpoint(run / "weights" / name)["model"] for run in (first, second)]
        for key, value in weights[0].items():
            assert torch.equal(value, weights[1][key]), (name, key)
    assert (first / "results.csv").read_text() == (second / "results.csv").read_text()


SPARSE = ("--bn_sparsity", "--sparsity_rate", "auto", "--optimizer", "AdamW")
KINDS = {
    "float32": ("--amp", "off"),
    "sparse, float32, image weights": ("--amp", "off", *SPARSE, "--image-weights"),
    "sparse, bfloat16, multi-scale": (
        *("--amp", "bf16", *SPARSE, "--sparsity_mode", "proximal", "--multi-scale"),
    ),
}


@pytest.fixture
def _quick(monkeypatch):
    """Leave out what takes most of the time and has tests of its own."""
    for name in ("utils.training.report.draw", "train.give_verdict"):
        monkeypatch.setattr(name, lambda *_: None)


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_weights(train_flags, tmp_path, kind):
    for workers in ("0", "2"):
        train.main([*train_flags, *KINDS[kind], "--workers", workers, "--name", f"with{workers}"])
        torch.rand(5), np.random.rand(5)  # noqa: NPY002 (what is left behind must not matter)
    assert_equal_runs(tmp_path / "runs/with0", tmp_path / "runs/with2")


@pytest.mark.usefixtures("_quick")
def test_another_seed_gives_other_weights(train_flags, tmp_path):
    for seed in ("0", "1"):
        train.main([*train_flags, "--epochs", "1", "--noval", "--seed", seed, "--name", seed])
    with pytest.raises(AssertionError):
        assert_equal_runs(tmp_path / "runs/0", tmp_path / "runs/1")


@pytest.mark.slow
def test_another_process_gives_the_same_weights(train_flags, tmp_path, pytestconfig):
    """It has another order of sets."""
    flags = [*train_flags, "--amp", "off", *SPARSE, "--epochs", "1"]
    program = """
import sys, train
from utils.training import report
report.draw = train.give_verdict = print
train.main(sys.argv[1:])
"""
    processes = []
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "2"}
        command = [sys.executable, "-c", program, *flags, "--name", seed]
        processes.append(subprocess.Popen(command, cwd=pytestconfig.rootpath, env=environment))
    assert [process.wait(300) for process in processes] == [0, 0]
    assert_equal_runs(tmp_path / "runs/1", tmp_path / "runs/2")


def test_threads_add_up_the_loss_in_one_order():
    """Else the gradients of boxes that share a cell come as the threads do."""
    devices.forbid_chance(CPU, on_gpu=False)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(8, 3, 10, 10, 85, generator=generator)
    targets = torch.rand(400, 6, generator=generator)
    targets[:, 0], targets[:, 1] = torch.arange(400) % 8, torch.arange(400) % 80
    targets[:, 2:4], targets[:, 4:] = targets[:, 2:4] * 0.3 + 0.4, 0.25
    anchors = torch.tensor([[[1.25, 1.6], [2, 3.75], [4.1, 2.9]]])
    loss = DetectionLoss(anchors, LossSettings(box=0.05, obj=1, cls=0.5))
    gradients = []
    for _ in range(30):
        leaf = logits.clone().requires_grad_()
        loss([leaf], targets)[0].backward()
        gradients.append(leaf.grad)
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)


@pytest.mark.parametrize(
    ("device", "on_gpu", "expected"),
    [("cpu", False, True), ("cpu", True, True), ("cuda", False, False), ("cuda", True, True)],
)
def test_where_chance_is_forbidden(monkeypatch, device, on_gpu, expected):
    monkeypatch.setattr(os, "environ", {})
    devices.forbid_chance(torch.device(device), on_gpu)
    assert torch.are_deterministic_algorithms_enabled() == expected
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == on_gpu
    assert not torch.utils.deterministic.fill_uninitialized_memory


# ---------------------------------------------------------------------------------- validation
@pytest.fixture
def validate(tiny_spec, tiny_dataset, tmp_path):
    """Call val.py with more flags; returns its results.json without the times."""

    def run(*flags, seed=0):
        torch.manual_seed(seed)
        weights = tmp_path / f"{seed}.pt"
        names = ("disc", "box", "bar")
        content = build_checkpoint(Model(ModelSpec.from_dict(tiny_spec)), names)
        save_checkpoint(weights, content)
        project = tmp_path / "runs"
        val.main([
            *("--weights", str(weights), "--data", str(tiny_dataset.yaml), "--img", "96"),
            *("--device", "cpu", "--noplots", "--conf-thres", "0", "--project", str(project)),
            *("--name", "one", "--exist-ok", *flags),
        ])  # fmt: skip
        results = json.loads((project / "one/results.json").read_text())
        del results["speed_ms"]
        return results

    return run


def test_map_does_not_depend_on_batch_size_or_workers(validate):
    expected = validate("--square", "--batch-size", "4")
    assert expected["map50"] > 0.001
    for flags in (("1",), ("3",), ("3", "--workers", "2"), ("1", "--workers", "1")):
        results = validate("--square", "--batch-size", *flags)
        for name in ("map50", "map50_95", "precision", "recall"):
            assert results[name] == pytest.approx(expected[name], abs=1e-6), (flags, name)


@pytest.fixture
def orders(tiny_dataset):
    """Data yamls of the same images, in several orders.

    Each picture is there four times, with other labels each time: detections of the same
    confidence, of which only some are right.
    """
    paths = []
    for picture in sorted(tiny_dataset.images.glob("[abc].*")):
        label = (tiny_dataset.labels / picture.name).with_suffix(".txt")
        lines = label.read_text("utf-8").splitlines()
        for number in range(4):
            twin = picture.with_stem(f"{picture.stem}{number}")
            shutil.copy(picture, twin)
            kept = [line for bit, line in enumerate(lines) if number >> bit & 1]
            label.with_stem(twin.stem).write_text("\n".join(kept), encoding="utf-8")
            paths.append(str(twin))
    yamls = []
    for listed in (paths, paths[::-1], paths[5:] + paths[:5]):
        listing = tiny_dataset.root / f"order{len(yamls)}.txt"
        listing.write_text("\n".join(listed), encoding="utf-8")
        data = {"train": listing.name, "val": listing.name, "names": list(tiny_dataset.names)}
        yamls.append(listing.with_suffix(".yaml"))
        yamls[-1].write_text(yaml.safe_dump(data), encoding="utf-8")
    return yamls


def test_map_does_not_depend_on_the_order_of_the_images(validate, orders):
    """Nor on what else could change it."""
    plain = ("--square", "--data", str(orders[0]))
    expected = validate(*plain, "--batch-size", "7")
    assert expected["map50"] > 0.001
    threads = torch.get_num_threads()
    for number, flags in (
        (2, ("7", "--data", str(orders[1]))),
        (2, ("7", "--data", str(orders[2]))),
        (1, ("7",)),
        (1, ("1", "--data", str(orders[1]))),
        (2, ("32",)),
        (1, ("32", "--workers", "2", "--data", str(orders[1]))),
    ):
        torch.set_num_threads(number)
        results = validate(*plain, "--batch-size", *flags)
        torch.set_num_threads(threads)
        for name in ("map50", "map50_95", "precision", "recall"):
            assert results[name] == pytest.approx(expected[name], abs=1e-6), (number, flags, name)


def test_a_validation_does_not_depend_on_those_before(validate):
    first, other = validate(), validate(seed=1)
    assert other != first
    assert validate() == first
    assert validate(seed=1) == other


def test_a_slow_machine_gives_the_same_answer(validate, monkeypatch):
    """Nothing gives up when it takes long: each look at a clock is an hour after the one before."""
    expected = validate()
    looks = []
    for clock in ("time", "perf_counter", "monotonic", "process_time"):
        monkeypatch.setattr(time, clock, lambda: 3600.0 * (looks.append(1) or len(looks)))
    assert validate() == expected
    assert looks
