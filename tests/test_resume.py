"""What has changed since an interrupted run was saved."""

import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from utils.resume import (
    command_to_resume,
    describe_change,
    is_same_training,
    summarize_data,
    without_own_folder,
)
from utils.run_dir import write_text_atomic
from utils.scan import scan_split
from utils.training.run import Run

ROOT = Path(__file__).resolve().parents[1]


def summary(dataset):
    return summarize_data(scan_split([dataset.images], dataset.names))


def remove_image(dataset):
    (dataset.images / "d.jpg").unlink()


def remove_box(dataset):
    path = dataset.labels / "a.txt"
    path.write_text(path.read_text().splitlines()[0])


def rename_image(dataset):
    (dataset.images / "d.jpg").rename(dataset.images / "e.jpg")


def move_box(dataset):
    path = dataset.labels / "b.txt"
    path.write_text("2 0.5 0.5 0.2 0.2")


CHANGES = {
    "nothing": (lambda _: None, None),
    "image": (remove_image, "4 images then, 3 now"),
    "box": (remove_box, "6 boxes then, 5 now"),
    "name": (rename_image, "4 images as then, but other file names"),
    "label": (move_box, "other labels"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changes_are_said(tiny_dataset, case):
    change, words = CHANGES[case]
    before = summary(tiny_dataset)
    change(tiny_dataset)
    assert describe_change(before, summary(tiny_dataset)) == words


def test_a_name_that_is_no_utf8_is_a_name(tiny_dataset, tmp_path):
    try:
        (tiny_dataset.images / "d.jpg").rename(tiny_dataset.images / os.fsdecode(b"na\xefve.jpg"))
    except OSError:
        pytest.skip("this file system takes no such names")
    assert describe_change(summary(tiny_dataset), summary(tiny_dataset)) is None
    write_text_atomic(tmp_path / "list.txt", os.fsdecode(b"na\xefve.jpg\n"))
    assert (tmp_path / "list.txt").read_bytes() == b"na\xefve.jpg\n"


def test_a_data_set_may_move(tiny_dataset):
    before = summary(tiny_dataset)
    moved = tiny_dataset.root.rename(tiny_dataset.root.with_name("elsewhere"))
    dataset = tiny_dataset._replace(images=moved / "images/train", labels=moved / "labels/train")
    assert describe_change(before, summary(dataset)) is None


@pytest.mark.parametrize(
    ("changes", "is_same"),
    [
        ({}, True),
        ({"weights": "nets/n.pt"}, True),  # as it was typed, before it was fetched
        ({"workers": 4, "device": "0", "name": "other"}, True),
        ({"bn_sparsity": False}, False),  # typed then, and not now
        ({"data": "other.yaml"}, False),
        ({"epochs": 4}, False),
    ],
)
def test_only_the_same_training_goes_on_by_itself(tmp_path, monkeypatch, changes, is_same):
    monkeypatch.chdir(tmp_path)
    before = {"epochs": 3, "bn_sparsity": True, "workers": 2, "device": "", "name": "exp"}
    before |= {"weights": str(tmp_path / "nets/n.pt"), "data": str(tmp_path / "d.yaml")}
    assert is_same_training(before | {"newer_flag": 1} | changes, before) == is_same


# How many processes there are on this machine and in all, who has started them, and --device.
STARTS = {
    "alone": (1, 1, "", "", "python train.py --resume 'my run' --batch-size 4"),
    "one GPU": (1, 1, "", "1", "python train.py --resume 'my run' --batch-size 4"),
    "launcher": (2, 2, "", "0,1", "python train.py --device 0,1 --resume 'my run' --batch-size 4"),
    "torchrun": (
        *(2, 2, "none", "0,1"),
        "torchrun --standalone --nproc_per_node 2 train.py --resume 'my run' --batch-size 4",
    ),
    "machines": (
        *(2, 4, "a job", ""),
        "torchrun --nnodes 2 --nproc_per_node 2 --rdzv-backend c10d --rdzv-endpoint HOST:PORT "
        "train.py --resume 'my run' --batch-size 4",
    ),
    "another starter": (
        *(2, 2, "", ""),
        "torchrun --standalone --nproc_per_node 2 train.py --resume 'my run' --batch-size 4",
    ),
}


@pytest.mark.parametrize("case", STARTS)
def test_the_command_to_go_on_starts_as_many_processes(monkeypatch, case):
    """And can be pasted into a shell."""
    local, total, job, device, command = STARTS[case]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    monkeypatch.setenv("WORLD_SIZE", str(total))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if job:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", job)
    monkeypatch.setattr("utils.resume.sys", SimpleNamespace(platform="linux", argv=["train.py"]))
    assert command_to_resume(Path("my run"), device, "--batch-size", "4") == command
    monkeypatch.setattr("utils.resume.sys", SimpleNamespace(platform="win32", argv=["train.py"]))
    quoted = command.replace("'", '"')
    assert command_to_resume(Path("my run"), device, "--batch-size", "4") == quoted


@pytest.mark.parametrize(
    ("typed", "script"),
    [
        ("train.py", "train.py"),
        ("../a project/train.py", "'../a project/train.py'"),
        ("/usr/bin/pytest", shlex.quote(str(ROOT / "train.py"))),  # a program that calls it
        ("-c", shlex.quote(str(ROOT / "train.py"))),
    ],
)
def test_the_script_is_named_as_it_was_typed(monkeypatch, typed, script):
    monkeypatch.setattr("utils.resume.sys", SimpleNamespace(platform="linux", argv=[typed]))
    assert command_to_resume(Path("/run"), "") == f"python {script} --resume /run"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert command_to_resume(Path("/run"), "").endswith(f"2 {script} --resume /run")


def test_a_run_is_named_so_that_it_is_found_from_anywhere(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    run = SimpleNamespace(dir=Path("runs/exp"), options=SimpleNamespace(device=""))
    command = Run.command_to_resume(run, "--workers", "0")
    assert Path("runs/exp").absolute() in map(Path, shlex.split(command))


@pytest.mark.parametrize(
    ("folder", "typed"),
    [
        (r"runs\train\exp", r"runs\train\exp"),
        (r"C:\Users\Ann Lee\exp", r'"C:\Users\Ann Lee\exp"'),
        ("it's", "it's"),
    ],
)
def test_a_path_of_windows_can_be_typed_there(monkeypatch, folder, typed):
    monkeypatch.setattr("utils.resume.sys", SimpleNamespace(platform="win32", argv=["train.py"]))
    assert command_to_resume(folder, "") == f"python train.py --resume {typed}"


@pytest.mark.parametrize(
    ("typed", "left"),
    [
        ({}, {}),
        ({"exist_ok": True, "epochs": 9}, {"epochs"}),
        ({"name": "renamed"}, {}),
        ({"project": "moved", "name": "renamed", "exist_ok": True}, {}),
        ({"project": ".", "name": "moved/renamed"}, {}),
        ({"name": "exp2", "exist_ok": True}, {"name"}),
        ({"project": "elsewhere", "name": "renamed"}, {"project", "name"}),
        ({"project": "."}, {"project"}),
    ],
)
def test_options_that_lead_to_the_folder_of_the_run_are_no_change(
    tmp_path, monkeypatch, typed, left
):
    monkeypatch.chdir(tmp_path)
    assert without_own_folder(typed, tmp_path / "moved/renamed").keys() == set(left)
