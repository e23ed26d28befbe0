"""Files that others made: read, or said to be none, by name."""

import os
import socket
from pathlib import Path

import pytest

from utils.config import load_yaml
from utils.downloads import find_weights
from utils.lookup import find_config
from utils.regular_file import read_regular, why_no_file
from utils.sources import find_sources

# Linux has a file that is regular by its looks and cannot be read from its beginning.
FAILING = Path("/proc/self/mem")


def make(kind: str, path: Path) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "circle":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(path.with_name("nothing"))
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX has them")
@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("nothing", "no such file"),
        ("folder", "a folder, not a file"),
        ("pipe", "not a regular file but a pipe or a device"),
        ("endless", "not a regular file but a pipe or a device"),
        ("socket", "not a regular file but a pipe or a device"),
        ("circle", "a link that leads to no file"),
        ("dangling", "a link that leads to no file"),
    ],
)
def test_what_is_no_file_is_said_not_waited_for(tmp_path, monkeypatch, kind, problem):
    monkeypatch.chdir(tmp_path)  # the name of a socket must be short
    for name in ("x.yaml", "x.pt", "x.onnx", "x.mp4", "x.txt"):
        make(kind, Path(name))
        assert why_no_file(Path(name)) == problem
    for find in (load_yaml, lambda name: find_config(name, [], tmp_path)):
        with pytest.raises(FileNotFoundError, match=rf"x\.yaml: {problem}"):
            find("x.yaml")
    for name in ("x.pt", "x.onnx"):
        with pytest.raises(FileNotFoundError, match=rf"{name}: {problem}"):
            find_weights(name, tmp_path)
    for name in ("x.mp4", "x.txt"):
        words = f"{name}: (no image and no video|{problem})"
        with pytest.raises((FileNotFoundError, ValueError), match=words):
            find_sources(name)


@pytest.mark.skipif(not FAILING.exists(), reason="Linux has it")
def test_a_file_that_fails_to_be_read_is_named(tmp_path):
    readers = {"x": lambda path: read_regular(path, 1), "x.yaml": load_yaml, "x.txt": find_sources}
    for name, read in readers.items():
        (tmp_path / name).symlink_to(FAILING)
        with pytest.raises(OSError, match="Input/output") as caught:
            read(str(tmp_path / name))
        assert caught.value.filename == str(tmp_path / name)


def test_folders_that_cannot_be_looked_into_are_passed_over(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    walk = os.walk

    def walk_while_it_goes(folder):
        (tmp_path / "a").rmdir()
        return walk(folder)

    monkeypatch.setattr(os, "walk", walk_while_it_goes)
    with pytest.raises(ValueError, match="no image and no video there"):
        find_sources(str(tmp_path))
