import csv
import errno
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml

from utils.run_dir import (
    ResultsCsv,
    check_run_dir,
    forget_replaced,
    new_run_dir,
    open_run_dir,
    read_results,
    save_options,
)


@pytest.mark.parametrize(
    ("existing", "expected"),
    [
        pytest.param([], "exp", id="first"),
        pytest.param(["exp"], "exp2", id="second"),
        pytest.param(["exp", "exp2", "exp10"], "exp11", id="above the highest, not the gap"),
        pytest.param(["exp7"], "exp8", id="first was deleted"),
        pytest.param(["expo", "exp_2", "my-exp", "exp0"], "exp", id="other names do not count"),
    ],
)
def test_new_run_dir_counts_up(tmp_path, existing, expected):
    for name in existing:
        (tmp_path / name).mkdir()
    made = new_run_dir(tmp_path, "exp")
    assert made == tmp_path / expected
    assert made.is_dir()


@pytest.mark.parametrize("fill", [None, lambda folder: (folder / "file").touch()])
def test_new_run_dir_takes_the_name_itself_with_exist_ok(tmp_path, fill):
    """Also where there are later numbers of it."""
    (tmp_path / "exp2").mkdir()
    for _ in range(2):
        assert new_run_dir(tmp_path, exist_ok=True, fill=fill) == tmp_path / "exp"


def test_new_run_dir_reuses_with_exist_ok(tmp_path):
    first = new_run_dir(tmp_path / "runs" / "train", "coco", exist_ok=True)
    again = new_run_dir(tmp_path / "runs" / "train", "coco", exist_ok=True)
    assert first == again == tmp_path / "runs" / "train" / "coco"


def test_new_run_dir_takes_names_with_special_characters(tmp_path):
    assert new_run_dir(tmp_path, "a+b (1)").name == "a+b (1)"
    assert new_run_dir(tmp_path, "a+b (1)").name == "a+b (1)2"


@pytest.mark.parametrize("fill", [None, lambda folder: (folder / "file").touch()])
def test_new_run_dir_gives_each_thread_its_own(tmp_path, fill):
    made: list[Path] = []
    threads = [
        threading.Thread(target=lambda: made.append(new_run_dir(tmp_path, fill=fill)))
        for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 16
    assert set(tmp_path.iterdir()) == set(made)
    assert all((folder / "file").exists() for folder in made) == (fill is not None)


def test_a_folder_that_cannot_be_filled_is_named_as_it_was_to_be(tmp_path):
    def fill(folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "last.pt"))

    with pytest.raises(
        OSError, match=r"write to .*/runs/exp: No space left on device; free some s"
    ):
        new_run_dir(tmp_path / "runs", fill=fill)
    assert list((tmp_path / "runs").iterdir()) == []


def test_what_is_said_of_a_busy_folder_stays_as_it_is(tmp_path):
    """Another --project is no remedy, and the folder needs no second mention."""
    (tmp_path / "exp").mkdir()

    def fill(folder):
        raise OSError(f"{folder}: process 1 on host is writing there; wait until it has ended")

    with pytest.raises(OSError, match=rf"^{tmp_path}/exp: process 1 .* it has ended$"):
        new_run_dir(tmp_path, exist_ok=True, fill=fill)


@pytest.fixture
def renames_no_folder(monkeypatch):
    """As some network shares, and Windows while a file in it is open."""
    rename = Path.rename

    def refuse(path, target):
        if path.is_dir():
            raise PermissionError(errno.EACCES, "Access is denied", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)


@pytest.mark.usefixtures("renames_no_folder")
def test_a_folder_that_cannot_be_renamed_is_filled_in_its_place(tmp_path):
    for expected in ("exp", "exp2"):
        made = new_run_dir(tmp_path, fill=lambda folder: (folder / "file").touch())
        assert made == tmp_path / expected
        assert (made / "file").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exp", "exp2"]


@pytest.mark.usefixtures("renames_no_folder")
def test_nothing_is_left_where_that_fails_too(tmp_path):
    def fill(folder):
        if folder.parent == tmp_path:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / "last.pt"))

    with pytest.raises(OSError, match=r"write to .*/exp: No space left on device; free some space"):
        new_run_dir(tmp_path, fill=fill)
    assert list(tmp_path.iterdir()) == []


def test_new_run_dir_errors_name_the_reason(tmp_path):
    with pytest.raises(ValueError, match="--name is empty"):
        new_run_dir(tmp_path, " ")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        new_run_dir(tmp_path / "file")


@pytest.mark.parametrize("make", [new_run_dir, check_run_dir])
@pytest.mark.parametrize("name", [".", "..", "a/..", "/"])
def test_a_name_that_names_no_folder_is_refused(tmp_path, make, name):
    with pytest.raises(ValueError, match=f"--name {name}: expected the name of a folder"):
        make(tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [new_run_dir, check_run_dir])
@pytest.mark.parametrize("project", ["file", "file/a/b"])
def test_a_file_in_the_way_is_named(tmp_path, make, project):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"cannot write to .*{project}/exp: .*/file is no folder"):
        make(tmp_path / project)


@pytest.mark.parametrize(
    ("name", "exist_ok", "tried"),
    [("exp", False, "runs"), ("exp", True, "runs/exp"), ("new", True, "runs"), ("a/b", False, ".")],
)
def test_where_a_run_folder_cannot_be_made_is_seen_without_making_one(
    tmp_path, monkeypatch, name, exist_ok, tried
):
    (tmp_path / "runs/exp").mkdir(parents=True)
    project = tmp_path / ("runs" if "/" not in name else "absent")
    before = sorted(tmp_path.rglob("*"))
    check_run_dir(project, name, exist_ok)
    assert sorted(tmp_path.rglob("*")) == before

    def refuse(dir):
        assert dir == tmp_path / tried
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    monkeypatch.setattr("utils.run_dir.tempfile.TemporaryFile", refuse)
    with pytest.raises(OSError, match=f"cannot write to {project / name}: Permission denied; see"):
        check_run_dir(project, name, exist_ok)


@pytest.mark.parametrize(
    ("files", "left"),
    [
        pytest.param([], [], id="nothing"),
        pytest.param(["opt.yaml"], [], id="options alone"),
        pytest.param(["opt.yaml", "labels/"], [], id="and an empty folder"),
        pytest.param(["opt.yaml", "labels/a.txt"], ["labels", "opt.yaml"], id="a result"),
        pytest.param(["a.jpg"], ["a.jpg"], id="a picture"),
    ],
)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_run_that_fails_leaves_no_empty_folder(tmp_path, files, left, error):
    def fail():
        with open_run_dir(tmp_path / "runs" / "val") as run_dir:
            for name in files:
                path = run_dir / name
                path.parent.mkdir(exist_ok=True)
                path.mkdir() if name.endswith("/") else path.write_text("")
            raise error

    with pytest.raises(error):
        fail()
    found = sorted(path.name for path in tmp_path.glob("runs/val/exp/*"))
    assert found == left
    assert (tmp_path / "runs").exists() == bool(left)


def test_options_alone_are_enough_of_a_run_that_ends_well(tmp_path):
    with open_run_dir(tmp_path) as run_dir:
        (run_dir / "opt.yaml").write_text("")
    assert (run_dir / "opt.yaml").exists()


def test_save_options_writes_plain_readable_yaml(tmp_path):
    options = {
        "weights": Path("a") / "b.pt",
        "imgsz": 640,
        "lr0": np.float64(0.01),
        "freeze": (0, np.int64(1)),
        "cache": None,
        "rect": False,
        "name": "größe: 1",
    }
    save_options(tmp_path / "opt.yaml", options)
    text = (tmp_path / "opt.yaml").read_text(encoding="utf-8")
    assert text.startswith("weights: ")
    assert yaml.safe_load(text) == {
        "weights": str(Path("a") / "b.pt"),
        "imgsz": 640,
        "lr0": 0.01,
        "freeze": [0, 1],
        "cache": None,
        "rect": False,
        "name": "größe: 1",
    }
    assert [entry.name for entry in tmp_path.iterdir()] == ["opt.yaml"]


def test_results_csv_has_a_row_per_epoch(tmp_path):
    results = ResultsCsv(tmp_path / "results.csv", ["train/box_loss", "metrics/mAP_0.5"])
    assert read_results(tmp_path / "results.csv") == {
        "epoch": [],
        "train/box_loss": [],
        "metrics/mAP_0.5": [],
    }
    results.append(0, {"metrics/mAP_0.5": 0.1234567, "train/box_loss": 5e-05})
    results.append(1, {"train/box_loss": None, "metrics/mAP_0.5": float("nan"), "late": 3})
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines == [
        "epoch,train/box_loss,metrics/mAP_0.5,late",
        "0,5e-05,0.123457,",
        "1,,nan,3",
    ]
    np.testing.assert_equal(read_results(tmp_path / "results.csv")["late"], [float("nan"), 3.0])


@pytest.mark.parametrize(
    ("resume_epoch", "expected"), [(0, []), (2, [0, 1]), (3, [0, 1, 2]), (None, [])]
)
def test_results_csv_resume_drops_later_rows(tmp_path, resume_epoch, expected):
    first = ResultsCsv(tmp_path / "results.csv", ["x"])
    for epoch in range(3):
        first.append(epoch, {"x": epoch / 10})
    resumed = ResultsCsv(tmp_path / "results.csv", ["x", "new"], resume_epoch=resume_epoch)
    assert read_results(tmp_path / "results.csv")["epoch"] == expected
    resumed.append(5, {"x": 1.0, "new": 2})
    assert read_results(tmp_path / "results.csv")["epoch"] == [*expected, 5]


def test_results_csv_replaces_a_repeated_epoch(tmp_path):
    results = ResultsCsv(tmp_path / "results.csv")
    results.append(0, {"x": 1})
    results.append(0, {"x": 2})
    assert read_results(tmp_path / "results.csv") == {"epoch": [0.0], "x": [2.0]}


def test_results_csv_names_the_file_when_a_row_has_no_epoch(tmp_path):
    (tmp_path / "results.csv").write_text("epoch,x\nhello,1\n")
    with pytest.raises(ValueError, match=r"results\.csv.*'hello'"):
        ResultsCsv(tmp_path / "results.csv", resume_epoch=1)


def test_read_results_takes_padded_columns_and_short_rows(tmp_path):
    (tmp_path / "results.csv").write_text("  epoch,   x , y\n 0, 1.5, 2\n\n 1, \n")
    values = read_results(tmp_path / "results.csv")
    np.testing.assert_equal(values["x"], [1.5, float("nan")])
    np.testing.assert_equal(values["y"], [2.0, float("nan")])


_ENDLESS_WRITER = """
import sys
from utils.run_dir import ResultsCsv
results = ResultsCsv(sys.argv[1], ["a", "b"])
for epoch in range(10**6):
    results.append(epoch, {"a": epoch, "b": epoch / 3})
    print(epoch, flush=True)
"""


def test_results_csv_is_whole_after_a_kill(tmp_path):
    path = tmp_path / "results.csv"
    root = Path(__file__).resolve().parents[1]
    for last_seen in (3, 20, 41):
        with subprocess.Popen(
            [sys.executable, "-c", _ENDLESS_WRITER, str(path)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
        ) as writer:
            assert writer.stdout is not None
            while int(writer.stdout.readline()) < last_seen:
                pass
            writer.kill()
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["epoch"]) for row in rows] == list(range(len(rows)))
        assert len(rows) > last_seen
        assert all(float(row["b"]) >= 0 for row in rows)


@pytest.mark.parametrize("is_run", [False, True])
def test_only_a_run_that_was_replaced_is_forgotten(tmp_path, is_run):
    (tmp_path / "replaced").mkdir()
    (tmp_path / "replaced" / ("opt.yaml" if is_run else "notes.txt")).touch()
    forget_replaced(tmp_path)
    assert (tmp_path / "replaced").exists() == (not is_run)
