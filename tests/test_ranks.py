"""Several processes train what one would, write once, and end together."""

import contextlib
import copy
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import yaml
from torch import nn
from torch.distributed import TCPStore

from models import Model, ModelSpec
from tests.steps_of_ranks import STOPPED, become, floats
from utils import launch as launching
from utils.checkpoint import build_checkpoint, load_checkpoint, load_detector, save_checkpoint
from utils.dataset import DetectionDataset, build_loader, scan_split
from utils.flags.train import parse_args
from utils.loss import DetectionLoss, LossSettings
from utils.optim import ModelEma
from utils.pruning.slimming import SparsityPenalty, prunable_batchnorms
from utils.training.inputs import check_processes, check_smallest_batch
from utils.training.loaders import check_images_are_here

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 240  # seconds until what hangs is killed
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
PROGRAM = ["-m", "tests.steps_of_ranks"]
SPARSE = ["--bn_sparsity", "--optimizer", "AdamW", "--sparsity_rate", "auto"]


# Eleven convolutions, one shortcut, two levels.
SPEC = {
    "nc": 3,
    "depth_multiple": 1.0,
    "width_multiple": 1.0,
    "anchors": [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 60]],
    "backbone": [
        [-1, 1, "Conv", [8, 6, 2, 2]],
        [-1, 1, "Conv", [16, 3, 2]],
        [-1, 1, "C3", [16]],
        [-1, 1, "Conv", [16, 3, 2]],
    ],
    "head": [[-1, 1, "Conv", [16, 3, 2]], [[3, 4], 1, "Detect", ["nc", "anchors"]]],
}


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    """Where `python -m tests...` finds itself."""
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def trained():
    """A function: checkpoints of two networks, one slim, that find objects; made once."""
    made = {}

    def train(dataset):
        if not made:
            torch.manual_seed(7)
            dense = Model(ModelSpec.from_dict(SPEC))
            widths = {path: width - 1 for path, width in dense.widths().items()}
            networks = {"dense": dense, "slim": Model(dense.spec.with_widths(widths))}
            split = scan_split([dataset.images], dataset.names, cache=False)
            (batch,) = build_loader(DetectionDataset(split, 64), len(split))
            for name, network in networks.items():
                learn(network, batch.images.float() / 255, batch.targets)
                made[name] = build_checkpoint(network, dataset.names)
        return made

    return train


def learn(network, images, targets):
    loss = DetectionLoss(network.head.anchors, LossSettings(box=0.05, obj=1.0, cls=0.5))
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    for _ in range(60):
        loss(network(images), targets)[0].backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def base(tiny_dataset, trained, tmp_path):
    """Flags of a run of seconds on seven images: the fourth batch of an epoch has but one."""
    for folder in (tiny_dataset.images, tiny_dataset.labels):
        source = next(folder.glob("c.*"))
        for name in "efg":
            shutil.copy(source, source.with_stem(name))
    cfg = tmp_path / "tiny.yaml"
    cfg.write_text(yaml.safe_dump(SPEC))
    for name, content in trained(tiny_dataset).items():
        save_checkpoint(tmp_path / f"{name}.pt", content)
    return [
        *("--data", str(tiny_dataset.yaml), "--cfg", str(cfg)),
        *("--weights", str(tmp_path / "dense.pt")),
        *("--img", "64", "--batch", "2", "--workers", "0", "--device", "cpu", "--amp", "off"),
        *("--nominal-batch", "4", "--noautoanchor", "--epochs", "2"),
    ]


@pytest.fixture
def stages(base, tmp_path):
    """Command lines of all stages."""
    proximal = [*base, *SPARSE, "--sparsity_mode", "proximal", "--sparsity_rate", "0.05"]
    tuned = [*base, "--weights", str(tmp_path / "slim.pt"), "--ft_pruned_model"]
    synchronised = [*proximal, "--batch", "4", "--sync-bn", "--freeze", "1"]
    return {
        "dense": base,
        "rect": [*base, "--rect", "--batch", "4"],
        "sparse": [*base, *SPARSE],
        "proximal": proximal,
        "tuned": tuned,
        "distilled": [*tuned, "--teacher", str(tmp_path / "dense.pt")],
        "synchronised": synchronised,
        STOPPED: synchronised,
    }


REFUSED = {
    "norms on CPUs": (["--sync-bn"], "--sync-bn needs CUDA GPUs, not cpu; leave it out"),
    "shares": (["--batch", "15"], "--batch-size 15 cannot be shared evenly by 2 processes"),
    "batch that fits": (["--batch", "-1"], "give a number for several"),
    "search": (["--evolve", "3"], "--evolve works in one process"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_several_processes_cannot_do_is_refused(monkeypatch, case):
    flags, words = REFUSED[case]
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=words):
        check_processes(parse_args(flags)[0], torch.device("cpu"))


@pytest.mark.parametrize(
    ("flags", "num_images", "processes", "words"),
    [
        (["--img", "32", "--batch", "1"], 0, 1, r"1 is one image; .* 32: give --imgsz 64"),
        (["--img", "32", "--batch", "8"], 9, 1, "leaves one of 9 images in the last batch"),
        (["--img", "32", "--batch", "8"], 10, 1, None),
        (["--img", "32", "--batch", "8"], 0, 1, None),
        (["--img", "64", "--batch", "1"], 9, 1, None),
        (["--img", "64", "--batch", "1", "--multi-scale"], 9, 1, r"halves: give --imgsz 128, or"),
        (["--img", "96", "--batch", "1", "--multi-scale"], 9, 1, None),
        (["--img", "32", "--batch", "2"], 0, 2, "is one image for each of 2 processes;"),
        (["--img", "32", "--batch", "4"], 7, 2, "one of 7 images for each of 2 processes in the"),
        (["--img", "32", "--batch", "8"], 12, 2, None),
        (["--img", "32", "--batch", "2", "--sync-bn"], 9, 2, None),
    ],
)  # fmt: skip
def test_a_process_with_one_image_of_one_cell(monkeypatch, flags, num_images, processes, words):
    """torch refuses to train a batch norm with it."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    options = parse_args(flags)[0]
    refused = pytest.raises(ValueError, match=words) if words else contextlib.nullcontext()
    with refused:
        check_smallest_batch(options, options.imgsz, 32, num_images)


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


def assert_same_steps(alone, first, second, name):
    """Two that train together take the same steps bit by bit, and those of one by itself."""
    for step, a, b in zip(alone, first, second, strict=True):
        for what, expected in step.items():
            assert torch.equal(a[what], b[what]), (name, what)
            scale = expected.abs().max().item() if expected.numel() else 0
            torch.testing.assert_close(
                a[what], expected, rtol=1e-5, atol=1e-5 * scale, msg=f"{name}: {what}"
            )


def results_of(run_dir):
    with (run_dir / "results.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same_results(one, other):
    for row, expected in zip(results_of(other), results_of(one), strict=True):
        assert {name: float(cell) for name, cell in row.items()} == pytest.approx(
            {name: float(cell) for name, cell in expected.items()}, rel=1e-4, nan_ok=True
        ), one


def assert_it_finds_objects(run_dir):
    for row in results_of(run_dir):
        for metric in ("precision", "recall", "mAP_0.5", "mAP_0.5:0.95"):
            assert float(row[f"metrics/{metric}"]) > 0, (run_dir.name, metric)


class Forked:
    """In place of `subprocess.Popen`: a fork of a process that has loaded torch already.

    What it says is in `rank*.log`.
    """

    def __init__(self, context, folder, command, env):
        log = folder / f"rank{env['RANK']}.log"
        self.process = context.Process(target=become, args=(command, env, log))
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.process.pid, number)

    def wait(self):
        self.process.join()

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Ended(NamedTuple):
    """How processes ended, and what they said."""

    code: int
    codes: list[int]
    logs: list[str]


@pytest.fixture
def launch_forked(monkeypatch, fork_server):
    """`launch`, but what hangs is killed."""

    def start(command, count, folder):
        processes = []

        def fork(*args, **rest):
            processes.append(Forked(fork_server, folder, *args, **rest))
            return processes[-1]

        def kill():
            for process in processes:
                process.kill()

        monkeypatch.setattr(launching, "subprocess", SimpleNamespace(Popen=fork))
        alarm = threading.Timer(PATIENCE, kill)
        alarm.start()
        code = launching.launch([*map(str, command)], count)
        alarm.cancel()
        logs = [(folder / f"rank{rank}.log").read_text() for rank in range(count)]
        return Ended(code, [process.poll() for process in processes], logs)

    return start


@pytest.fixture(scope="module")
def known():
    """What `compare_steps` has found, by the number of processes."""
    return {}


@pytest.fixture
def compare_steps(known, stages, tmp_path, launch_forked):
    """A function: what all stages do with so many processes; trained once."""

    def compare(count):
        if count not in known:
            folder = tmp_path / f"of{count}"
            folder.mkdir()
            jobs = {
                name: [*flags, "--project", str(folder), "--name", name]
                for name, flags in stages.items()
            }
            jobs["resumed"] = ["--resume", str(folder / STOPPED)]
            (folder / "jobs.json").write_text(json.dumps(jobs))
            ended = launch_forked(["compare", folder / "jobs.json", folder], count, folder)
            assert ended.code == 0, ended.logs
            found = [torch.load(folder / f"rank{rank}.pt") for rank in range(count)]
            known[count] = Compared(folder, found, ended.logs)
        return known[count]

    return compare


class Compared(NamedTuple):
    """What `steps_of_ranks` finds."""

    folder: Path
    found: list[dict]  # one a process
    logs: list[str]


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(stages, compare_steps, tiny_dataset):
    """Gradients, rates, penalties, metrics; and only the first of them writes and speaks.

    Of files the second opens the images alone.
    """
    one, two = compare_steps(1), compare_steps(2)
    (alone,), (first, second) = one.found, two.found
    for name in first["steps"]:
        assert_same_steps(*(found["steps"][name] for found in (alone, first, second)), name)
    for name in stages.keys() - {STOPPED}:
        assert len(first["steps"][name]) >= 4
        assert_same_results(one.folder / name, two.folder / name)
        assert_it_finds_objects(two.folder / name)
    assert any("results.csv" in path for path in first["written"])
    assert second["written"] == []
    assert {path for path in first["read"] if path.endswith(".pt")}
    assert {Path(path).parent for path in second["read"]} == {tiny_dataset.images}
    assert two.logs[1] == ""


@pytest.mark.slow
def test_synchronised_statistics_are_those_of_one_process(compare_steps):
    """In the network, its average, what is saved of it, and what goes on from there."""
    two = compare_steps(2)
    steps = two.found[0]["steps"]
    stopped, whole = two.folder / STOPPED, two.folder / "synchronised"
    start, *_, end = expected = steps["synchronised"]
    assert not torch.equal(start["statistics"], end["statistics"])
    for step, same in zip(steps[STOPPED] + steps["resumed"], expected, strict=True):
        assert all(torch.equal(step[what], same[what]) for what in same)
    assert_same_results(whole, stopped)
    saved = load_detector(whole / "weights/last.pt").model
    assert torch.equal(floats(saved), end["average"].half().float())
    assert {type(bn) for bn in prunable_batchnorms(saved).values()} == {nn.BatchNorm2d}
    # Twice in each of the two proximal runs that are not stopped, one of them synchronised.
    assert len(re.findall(r"\(on 7 validation images\)", two.logs[0])) == 4


# The exit status of the command and of its processes, and what they say, once. One that is to end
# may have been told so, by SIGTERM, when it was about to.
TOLD = {143, -signal.SIGTERM}
NAN = (
    "error: the loss is nan in epoch 1, batch 1 [(]NAMES[)]; the batch is in "
    "{run}/nan_batch_1_1.jpg and .txt; "
)
ENDS = {
    "stop": (
        143,
        TOLD,
        "stopped by SIGTERM, saved after batch 2 of 4 of epoch 1; torchrun .*--resume {run} goes",
    ),
    "fail": (1, {1, *TOLD}, "error: images: the drive has gone"),
    "nan": (3, {3, *TOLD}, f"{NAN}.*torchrun .*{{run}} --on-nan recover goes on"),
    "nan in second": (3, {3, *TOLD}, f"{NAN}.*--resume {{run}} --on-nan recover goes on"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mishap", ENDS)
def test_what_ends_one_process_ends_all_and_is_said_once(
    base, tmp_path, capfd, launch_forked, mishap
):
    code, codes, said = ENDS[mishap]
    ended = launch_forked([mishap, *base, "--project", tmp_path], 2, tmp_path)
    assert ended.code == code
    assert set(ended.codes) <= codes
    assert ended.codes.count(-signal.SIGKILL) == 0  # by the launcher
    output = "".join([*ended.logs, *capfd.readouterr()])
    if mishap.startswith("nan"):  # of the whole batch, not of one process
        listed = (tmp_path / "exp/nan_batch_1_1.txt").read_text().splitlines()
        assert len(set(listed)) == 2
        said = said.replace("NAMES", ", ".join(Path(path).name for path in listed))
    assert len(re.findall(said.format(run=tmp_path / "exp"), output)) == 1, output
    assert "Traceback" not in output
    state = load_checkpoint(tmp_path / "exp/weights/last.pt")["training"]
    assert (state["epoch"], state["batches"]) == ((0, 2) if mishap == "stop" else (0, 0))


@pytest.mark.slow
def test_two_processes_go_back_together(base, tmp_path, launch_forked):
    """To what one process would have come to that goes back from the same batch."""
    for count, mishap in ((1, "nan"), (2, "nan in second")):
        folder = tmp_path / f"of{count}"
        folder.mkdir()
        command = [mishap, *base, "--project", folder, "--on-nan", "recover"]
        ended = launch_forked(command, count, folder)
        assert ended.code == 0, ended.logs
        assert "back to epoch 1, batch 0, with the learning rate times 0.5" in ended.logs[0]
        assert set(ended.logs[1:]) <= {""}
    assert_same_results(tmp_path / "of1/exp", tmp_path / "of2/exp")


@pytest.mark.slow
def test_two_nodes_lose_a_process_and_go_on(base, tmp_path, compare_steps):
    """In the run's own folder, to what one process would have come to without."""
    whole = compare_steps(1).folder / "sparse"
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    node = [
        *(*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", "--max-restarts=1", "--rdzv-id=nodes"),
        *("--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{store.port}"),
        *("--rdzv-conf=is_host=0", "--local-addr=127.0.0.1"),
        *(*PROGRAM, "kill second", *base, *SPARSE, "--project", str(tmp_path)),
    ]
    logs = [tmp_path / f"node{number}.log" for number in range(2)]
    nodes = []
    for log in logs:
        with log.open("w") as file:
            nodes.append(subprocess.Popen(node, stdout=file, stderr=subprocess.STDOUT))
    alarm = threading.Timer(PATIENCE, lambda: [process.kill() for process in nodes])
    alarm.start()
    codes = [process.wait() for process in nodes]
    alarm.cancel()
    said = "".join(log.read_text() for log in logs)
    assert codes == [0, 0], said[-3000:]
    lost = f"another process of this training has ended .*--resume {tmp_path / 'exp'} goes on"
    assert len(re.findall(lost, said)) == 1
    assert said.count(f"resuming {tmp_path / 'exp'} in epoch 1") == 1
    assert_same_results(whole, tmp_path / "exp")
    assert not (tmp_path / "exp2").exists()
