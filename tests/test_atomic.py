"""Files that appear complete or not at all."""

import os
import time

import pytest

from utils import atomic
from utils.atomic import atomic_write, move_into_place, name_in_errors, staging_folder


def test_the_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "a.bin"
    with atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
        assert len(list(tmp_path.iterdir())) == 1, "the temporary file lies in the same folder"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_the_content_is_on_the_disk_before_the_name_changes(tmp_path, monkeypatch):
    path = tmp_path / "a.bin"
    seen = []
    monkeypatch.setattr(atomic.os, "fsync", lambda _: seen.append(path.exists()))
    with atomic_write(str(path)) as file:
        file.write(b"new")
    assert seen == [False]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_the_previous_file(tmp_path, error):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write_half() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_writers_do_not_mix_their_bytes(tmp_path):
    """Even with the same process number, as in two containers that share a drive."""
    path = tmp_path / "a.bin"
    with atomic_write(path) as first:
        first.write(b"first")
        first.flush()
        with atomic_write(path) as second:
            second.write(b"2nd")
        assert path.read_bytes() == b"2nd"
    assert path.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "absent" / "a.bin"):
        pass


def test_a_full_disk_names_the_file_and_leaves_the_previous_one(tmp_path, full_disk):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    too_large = pytest.raises(OSError, match="too large")
    with full_disk(), too_large as caught, atomic_write(path) as file:
        file.write(bytes(100_000))
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_of_other_files_and_messages_stay_as_they_are(tmp_path):
    other = str(tmp_path / "other")
    for error in (OSError(2, "gone", other), OSError("a message")):
        with pytest.raises(OSError, match=r"gone|a message") as caught, name_in_errors(tmp_path):
            raise error
        assert caught.value is error
    with pytest.raises(OSError, match="full") as caught, name_in_errors(tmp_path):
        raise OSError(28, "full")
    assert (caught.value.errno, caught.value.filename) == (28, str(tmp_path))


def test_a_file_in_a_temporary_folder_is_named_where_it_shall_be(tmp_path):
    inside = str(tmp_path / "staging/model/a.bin")
    full = pytest.raises(OSError, match="full")
    with full as caught, name_in_errors(tmp_path, tmp_path / "staging"):
        raise OSError(28, "full", inside)
    assert caught.value.filename == str(tmp_path / "model/a.bin")


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_a_staging_folder_goes_with_what_is_left_in_it(tmp_path, error):
    def work():
        with staging_folder(tmp_path) as folder:
            (folder / "part.bin").write_bytes(b"x")
            (folder / "done.bin").write_bytes(b"y")
            move_into_place(folder / "done.bin", tmp_path / "done.bin")
            if error:
                raise error

    if error:
        with pytest.raises(error):
            work()
    else:
        work()
    assert [path.name for path in tmp_path.iterdir()] == ["done.bin"]


def test_what_a_killed_process_has_left_goes_a_day_later(tmp_path):
    """Not before: another process may be at work in it."""
    outside = make_folder(tmp_path / "outside", "kept")
    for name, age_h in (("old", 25), ("new", 23)):
        folder = make_folder(tmp_path / f".staging-{name}", "part.bin")
        os.utime(folder, (time.time() - age_h * 3600,) * 2)
    (tmp_path / ".staging-link").symlink_to(outside)
    os.utime(outside, (0, 0))
    with staging_folder(tmp_path):
        pass
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".staging-link", ".staging-new", "outside"]
    assert (outside / "kept").exists()


def make_folder(path, name):
    path.mkdir()
    (path / name).write_text(name)
    return path


def test_a_folder_takes_the_place_of_another(tmp_path):
    old = make_folder(tmp_path / "model", "old")
    move_into_place(make_folder(tmp_path / "new", "new"), old)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in old.iterdir()] == ["new"]


def test_a_folder_set_aside_by_a_killed_process_is_not_in_the_way(tmp_path):
    left_over = make_folder(tmp_path / f"model.{os.getpid()}.old", "other")
    old = make_folder(tmp_path / "model", "old")
    move_into_place(make_folder(tmp_path / "new", "new"), old)
    assert [path.name for path in old.iterdir()] == ["new"]
    assert [path.name for path in left_over.iterdir()] == ["other"]


def test_a_folder_that_cannot_be_moved_leaves_the_other(tmp_path, monkeypatch):
    old = make_folder(tmp_path / "model", "old")
    new = make_folder(tmp_path / "new", "new")
    real = atomic.Path.replace

    def replace(self, target):
        if self == new:
            raise OSError("no")
        return real(self, target)

    monkeypatch.setattr(atomic.Path, "replace", replace)
    with pytest.raises(OSError, match="no"):
        move_into_place(new, old)
    assert [path.name for path in old.iterdir()] == ["old"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "new"]
