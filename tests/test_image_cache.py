"""Decoded images kept in memory and on disk."""

import logging
import os
import shutil
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch

from utils import device as devices
from utils import image_cache
from utils.config import load_hyperparameters
from utils.dataset import DetectionDataset, build_loader
from utils.scan import scan_split

ROOT = Path(__file__).resolve().parents[1]
LOW = load_hyperparameters(ROOT / "data" / "hyps" / "hyp.scratch-low.yaml")
HIGH = load_hyperparameters(ROOT / "data" / "hyps" / "hyp.scratch-high.yaml")
NAMES = ("disc", "box", "bar")


@pytest.fixture
def split(tiny_dataset):
    return scan_split([tiny_dataset.images], tiny_dataset.names)


def collect(loader) -> list[torch.Tensor]:
    loader.set_epoch(0)
    return [part for batch in loader for part in (batch.images, batch.targets)]


def are_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("kind", ["ram", "disk"])
@pytest.mark.parametrize("hyp", [None, HIGH])
@pytest.mark.parametrize("workers", [0, 1])
def test_pixel_caches_give_the_same_images(split, kind, hyp, workers, caplog):
    plain = build_loader(DetectionDataset(split, 64, hyp=hyp), 2)
    with caplog.at_level(logging.INFO):
        dataset = DetectionDataset(split, 64, hyp=hyp, cache=kind)
    assert "4 images need 0.00 GiB" in caplog.text
    cached = build_loader(dataset, 2, workers=workers)
    expected = collect(plain)
    for path in split.paths:
        Path(path).write_bytes(b"gone")  # whoever still reads the files gets grey
    assert are_equal(collect(cached), expected)
    assert are_equal(collect(cached), expected), "the cache is not written to"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_few_images_are_read_once(split, workers, caplog):
    expected = collect(build_loader(DetectionDataset(split, 64, hyp=HIGH), 2))
    with caplog.at_level(logging.INFO):
        dataset = DetectionDataset(split, 64, hyp=HIGH, cache="auto")
    assert "4 images stay in memory once they are read" in caplog.text
    assert not dataset._cache.filled.any(), "nothing is read before it is needed"
    cached = build_loader(dataset, 2, workers=workers)
    assert are_equal(collect(cached), expected)
    assert dataset._cache.filled.any(), "this process sees what its workers have read"
    filled = np.flatnonzero(dataset._cache.filled)
    for index in filled:
        Path(split.paths[index]).write_bytes(b"gone")
    assert are_equal(collect(cached), expected)


@pytest.mark.parametrize(("room", "is_kept"), [(10 * 2**20, True), (500_000, False), (None, False)])
def test_many_images_are_read_again(split, room, is_kept, monkeypatch, caplog):
    monkeypatch.setattr(image_cache, "available_memory", lambda: room)
    dataset = DetectionDataset(split, 64, cache="auto")  # 36,864 bytes
    assert (dataset._cache is not None) == is_kept
    monkeypatch.setattr(image_cache, "SMALL_BYTES", 36_000)
    assert DetectionDataset(split, 64, cache="auto")._cache is None
    assert DetectionDataset(split, 64, cache="off")._cache is None
    assert caplog.text == "", "no warning: nobody has asked for it"


def test_ram_cache_is_refused_where_it_does_not_fit(split, monkeypatch, caplog):
    monkeypatch.setattr(image_cache, "available_memory", lambda: 40_000)
    expected = DetectionDataset(split, 64)[0].image
    dataset = DetectionDataset(split, 64, cache="ram")
    assert "no image cache: 4 images need 0.00 GiB of memory, only" in caplog.text
    assert torch.equal(dataset[0].image, expected)


def test_ram_cache_is_refused_where_nobody_knows_what_fits(split, monkeypatch, caplog):
    monkeypatch.setattr(image_cache, "available_memory", lambda: None)
    expected = DetectionDataset(split, 64)[0].image
    dataset = DetectionDataset(split, 64, cache="ram")
    assert dataset._cache is None
    assert "this system does not say how much is free; --cache disk needs none" in caplog.text
    assert torch.equal(dataset[0].image, expected)


def disk_files(tiny_dataset) -> list[Path]:
    return sorted((tiny_dataset.root / "image_cache" / "train").glob("*"))


def test_disk_cache_is_kept_and_notices_changed_images(tiny_dataset, split, caplog):
    DetectionDataset(split, 64, cache="disk")
    files = disk_files(tiny_dataset)
    assert len(files) == 4
    assert all(file.suffix == ".npy" for file in files)
    times = [file.stat().st_mtime_ns for file in files]
    DetectionDataset(split, 64, cache="disk")
    assert [file.stat().st_mtime_ns for file in disk_files(tiny_dataset)] == times

    cv2.imwrite(str(tiny_dataset.images / "a.jpg"), np.full((96, 128, 3), 255, np.uint8))
    split = scan_split([tiny_dataset.images], NAMES)
    dataset = DetectionDataset(split, 64, cache="disk")
    assert len(disk_files(tiny_dataset)) == 4, "the file of the old state has gone"
    assert dataset[0].image[:, 32, 32].min() > 250

    DetectionDataset(split, 96, cache="disk")
    DetectionDataset(split, 64, hyp=LOW, cache="disk")  # resized in another way
    assert len(disk_files(tiny_dataset)) == 12


def test_damaged_disk_cache_is_passed_over(tiny_dataset, split):
    dataset = DetectionDataset(split, 64, cache="disk")
    expected = dataset[0].image
    first = disk_files(tiny_dataset)[0]
    for content in (b"", first.read_bytes()[:200], b"nonsense"):
        first.write_bytes(content)
        assert torch.equal(dataset[0].image, expected)
    np.save(first, np.zeros((3, 3)))
    assert torch.equal(dataset[0].image, expected)
    np.savez(first.with_suffix(""), image=np.zeros(3))  # NumPy opens it, whatever its suffix
    first.with_suffix(".npz").replace(first)
    assert torch.equal(dataset[0].image, expected)
    with first.open("wb") as file:  # says that it holds 300 TB
        shape = {"descr": "|u1", "fortran_order": False, "shape": (10**7, 10**7, 3)}
        np.lib.format.write_array_header_1_0(file, shape)
        file.write(bytes(48 * 64 * 3))
    assert torch.equal(dataset[0].image, expected)
    write_cached(first, np.full((48, 64, 3), 7, np.uint8))
    assert (dataset[0].image[:, 32, 32] == 7).all(), "a good one is read"
    assert (np.load(first) == 7).all()


def write_cached(path, image) -> None:
    with path.open("wb") as file:
        np.save(file, image)
        file.write(zlib.crc32(image.tobytes()).to_bytes(4, "little"))


def test_disk_cache_in_a_read_only_place(tiny_dataset, split, caplog):
    tiny_dataset.root.chmod(0o555)
    try:
        dataset = DetectionDataset(split, 64, cache="disk")
    finally:
        tiny_dataset.root.chmod(0o755)
    assert "no image cache" in caplog.text
    assert len(dataset[0].targets) == 2


def test_disk_cache_on_a_full_disk(tiny_dataset, split, monkeypatch, caplog):
    usage = shutil.disk_usage(tiny_dataset.root)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    dataset = DetectionDataset(split, 64, cache="disk")
    assert "are free" in caplog.text
    assert disk_files(tiny_dataset) == []
    assert len(dataset[0].targets) == 2


def test_a_damaged_image_is_not_cached(tiny_dataset, split, caplog):
    path = tiny_dataset.images / "b.png"
    path.write_bytes(path.read_bytes()[:300])
    for kind in ("auto", "ram", "disk"):
        image, targets, *_ = DetectionDataset(split, 64, cache=kind)[1]
        assert (image == 114).all()
        assert len(targets) == 0
    assert len(disk_files(tiny_dataset)) == 3
    assert caplog.text == "", "it is named where it is used"


@pytest.mark.parametrize(
    ("kind", "ranks", "expected"), [("ram", 1, 6), ("ram", 3, 2), ("disk", 3, 6)]
)
def test_all_cores_fill_the_cache(split, kind, ranks, expected, monkeypatch):
    """That in memory each process fills for itself, that on disk one after the other."""
    assert 1 <= devices.num_usable_cores() <= (os.cpu_count() or 1)
    used = []
    for module in (devices, image_cache):
        monkeypatch.setattr(module, "num_usable_cores", lambda: 6)
    monkeypatch.setattr(image_cache, "_for_each", lambda *given: used.append(given[2]))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    DetectionDataset(split, 64, cache=kind)
    assert used[-1] == expected


def test_the_disk_cache_leaves_no_half_files(tiny_dataset, split, monkeypatch):
    def fail(file, image, **_):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(image_cache.np, "save", fail)
    DetectionDataset(split, 64, cache="disk")
    assert disk_files(tiny_dataset) == []


def test_filling_the_disk_cache_waits_for_no_disk(split, monkeypatch):
    """Where it did, it took most of the time."""
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("waited"))
    assert DetectionDataset(split, 64, cache="disk")._cache is not None


def test_what_a_power_cut_has_shortened_is_written_again(tiny_dataset, split):
    DetectionDataset(split, 64, cache="disk")
    contents = {file: file.read_bytes() for file in disk_files(tiny_dataset)}
    for file, length in zip(contents, (0, 100, 5000, 9000), strict=True):
        file.write_bytes(contents[file][:length])
    DetectionDataset(split, 64, cache="disk")
    assert {file: file.read_bytes() for file in disk_files(tiny_dataset)} == contents


DAMAGES = {
    "zeros at the end": lambda content: content[:5000] + bytes(len(content) - 5000),
    "zeros only": lambda content: bytes(len(content)),
    "zeros for pixels": lambda content: content[:128] + bytes(len(content) - 128),
    "zeros within": lambda content: content[:4096] + bytes(512) + content[4608:],
    "a bit": lambda content: content[:4096] + bytes([content[4096] ^ 4]) + content[4097:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_a_power_cut_has_emptied_is_seen_and_written_again(tiny_dataset, split, damage):
    expected = DetectionDataset(split, 64)[0].image
    DetectionDataset(split, 64, cache="disk")
    first = disk_files(tiny_dataset)[0]
    whole = first.read_bytes()
    first.write_bytes(DAMAGES[damage](whole))
    assert len(first.read_bytes()) == len(whole)
    dataset = DetectionDataset(split, 64, cache="disk")
    assert torch.equal(dataset[0].image, expected)
    DetectionDataset(split, 64, cache="disk")
    assert first.read_bytes() == whole


def test_several_files_are_looked_at_at_a_time(split, monkeypatch):
    """On a network drive each look takes a round trip."""
    all_look = threading.Barrier(4)
    name_file = image_cache._cache_file

    def look(*arguments):
        all_look.wait(10)
        return name_file(*arguments)

    DetectionDataset(split, 64, cache="disk")
    monkeypatch.setattr(image_cache, "_cache_file", look)
    assert DetectionDataset(split, 64, cache="disk")._cache is not None


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("/data/images/train/a.jpg", "/data/image_cache/train/a.jpg.64.5-7.npy"),
        ("/images/train/a.jpg", "/image_cache/train/a.jpg.64.5-7.npy"),
        ("/images/x/images/a.jpg", "/images/x/image_cache/a.jpg.64.5-7.npy"),
        ("/data/a.b.jpg", "/data/image_cache/a.b.jpg.64.5-7.npy"),
        ("/a.jpg", "/image_cache/a.jpg.64.5-7.npy"),
    ],
)
def test_names_of_cached_files(monkeypatch, image, expected):
    status = SimpleNamespace(st_size=5, st_mtime_ns=7)
    monkeypatch.setattr(image_cache, "os", SimpleNamespace(stat=lambda _: status, sep="/"))
    assert image_cache._cache_file(image, "64") == expected


def test_work_is_taken_one_by_one():
    """A million images that are queued take a gigabyte."""
    taken, done = [], []

    def indices():
        for index in range(50):
            taken.append(index)
            yield index

    def act(index):
        assert len(taken) == len(done) + 1
        done.append(index)

    image_cache._for_each(act, indices(), 1)
    assert done == list(range(50))


def test_an_error_ends_the_work():
    """It is raised, and those that work beside it do not go on to the end."""
    done = []

    def act(index):
        if index == 3:
            raise OSError("disk full")
        done.append(index)

    with pytest.raises(OSError, match="disk full"):
        image_cache._for_each(act, range(10_000_000), 2)
    assert len(done) < 5_000_000


@pytest.mark.parametrize("hw", [(71, 204), (853, 1280), (1280, 853)])
def test_reduced_images_of_odd_sizes_are_cached(tmp_path, hw):
    """The decoder rounds up, and the short side must not be a pixel off for that."""
    image = np.random.default_rng(0).integers(0, 255, (*hw, 3), np.uint8)
    (tmp_path / "a.jpg").write_bytes(cv2.imencode(".jpg", image)[1].tobytes())
    (tmp_path / "a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    split = scan_split([tmp_path], NAMES)
    dataset = DetectionDataset(split, 64, hyp=LOW, cache="ram")
    assert dataset._cache.filled.all()
    long_side = max(hw)
    assert dataset._load(0, {}).shape == (*(round(side * 64 / long_side) for side in hw), 3)
