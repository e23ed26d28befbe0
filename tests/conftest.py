"""Fixtures shared by all tests: a tiny network, a four-image data set, the optional test data."""

import contextlib
import gc
import multiprocessing.forkserver
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import cv2
import numpy as np
import pytest

# The networks here are so small that a second thread waits more than it computes, and `make test`
# has a process for each core. Commands that tests start inherit this.
os.environ["OMP_NUM_THREADS"] = "1"
# On a busy machine threads that spin while they wait take the cores from those they wait for.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import torch

from utils import heap
from utils.stopping import SIGNALS

# What a test imports must not report that, from forks of this process: see `import_runtime`.
sys.modules["openvino_telemetry"] = None

PROJECT_ROOT = Path(__file__).resolve().parents[1]

HEEDED = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]

cv2.setNumThreads(1)
# What runs in the background, or under nohup, starts deaf to these, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class TinyDataset(NamedTuple):
    """Where the four images of `tiny_dataset` lie; `yaml` is what `--data` takes."""

    root: Path
    yaml: Path
    images: Path
    labels: Path
    names: tuple[str, ...]
    num_boxes: int


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put files with slow tests first, and skip what asks for a GPU where there is none.

    Of several processes, a file each, one would else end with a long file while the others wait.
    """
    slow_files = {item.path for item in items if "slow" in item.keywords}
    items.sort(key=lambda item: item.path not in slow_files)
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(no_gpu)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    """Escape what UTF-8 cannot hold, such as names of undecodable files: xdist cannot send it."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


# A full collection takes a quarter of a second among the objects of all libraries and tests, and
# `heap.settled` makes two for each training. So the fixture below does its work, once a file.
heap.gc = SimpleNamespace(collect=gc.collect, freeze=lambda: None, unfreeze=lambda: None)


@pytest.fixture(autouse=True, scope="module")
def _settled() -> None:
    """The garbage collector passes over all objects of before the file."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Let Python end with a collection of all: libraries report what is left as leaks."""
    gc.unfreeze()


@pytest.fixture
def tiny_spec() -> dict:
    """A complete network of 28 small convolutions: every block kind, two levels, three classes.

    Rows as a yaml file holds them (`"None"` is what yaml makes of an unquoted None).
    """
    return {
        "nc": 3,
        "depth_multiple": 1.0,
        "width_multiple": 1.0,
        "anchors": [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 60]],
        "backbone": [
            [-1, 1, "Conv", [8, 6, 2, 2]],  # 0: 1/2
            [-1, 1, "Conv", [16, 3, 2]],  # 1: 1/4
            [-1, 1, "C3", [16]],  # 2
            [-1, 1, "Conv", [16, 3, 2]],  # 3: 1/8
            [-1, 2, "C3", [16]],  # 4: two shortcuts in a row
            [-1, 1, "Conv", [32, 3, 2]],  # 5: 1/16
            [-1, 1, "SPPF", [32, 5]],  # 6
        ],
        "head": [
            [-1, 1, "Conv", [16, 1, 1]],  # 7
            [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],  # 8
            [[-1, 4], 1, "Concat", [1]],  # 9
            [-1, 1, "C3", [16, False]],  # 10: level of stride 8
            [-1, 1, "Conv", [16, 3, 2]],  # 11
            [[-1, 7], 1, "Concat", [1]],  # 12
            [-1, 1, "C3", [32, False]],  # 13: level of stride 16
            [[10, 13], 1, "Detect", ["nc", "anchors"]],  # 14
        ],
    }


_TINY_NAMES = ("disc", "box", "bar")
# file name, height, width, objects: class, centre x, centre y, width, height in pixels
_TINY_IMAGES = (
    ("a.jpg", 96, 128, ((0, 40, 40, 40, 40), (1, 96, 56, 36, 48))),
    ("b.png", 128, 96, ((2, 48, 90, 60, 16),)),
    ("c.jpg", 96, 96, ((0, 30, 60, 28, 28), (1, 64, 30, 30, 30), (2, 66, 78, 50, 14))),
    ("d.jpg", 64, 96, ()),  # background only
)
_TINY_COLOURS_BGR = ((60, 60, 220), (80, 200, 80), (220, 120, 60))


def _draw_tiny_image(height: int, width: int, objects: tuple) -> np.ndarray:
    """Grey noise with a filled disc, box or bar per object, BGR."""
    rng = np.random.default_rng(height * 1000 + width)
    image = rng.integers(90, 130, (height, width, 3), dtype=np.uint8)
    for cls, cx, cy, w, h in objects:
        colour = _TINY_COLOURS_BGR[cls]
        if cls == 0:
            cv2.circle(image, (cx, cy), w // 2, colour, -1)
        else:
            corner, opposite = (cx - w // 2, cy - h // 2), (cx + w // 2, cy + h // 2)
            cv2.rectangle(image, corner, opposite, colour, -1)
    return image


@pytest.fixture
def tiny_dataset(tmp_path: Path) -> TinyDataset:
    """Four images in YOLO layout, used as train and val: six boxes, one image without any."""
    root = tmp_path / "tiny"
    images, labels = root / "images" / "train", root / "labels" / "train"
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    for name, height, width, objects in _TINY_IMAGES:
        image = _draw_tiny_image(height, width, objects)
        assert cv2.imwrite(str(images / name), image)
        lines = [
            f"{cls} {cx / width:.6f} {cy / height:.6f} {w / width:.6f} {h / height:.6f}"
            for cls, cx, cy, w, h in objects
        ]
        (labels / name).with_suffix(".txt").write_text("\n".join(lines), encoding="utf-8")
    yaml = root / "tiny.yaml"
    yaml.write_text(
        f"path: {root.as_posix()}\ntrain: images/train\nval: images/train\n"
        f"nc: {len(_TINY_NAMES)}\nnames: [{', '.join(_TINY_NAMES)}]\n",
        encoding="utf-8",
    )
    num_boxes = sum(len(objects) for *_, objects in _TINY_IMAGES)
    return TinyDataset(root, yaml, images, labels, _TINY_NAMES, num_boxes)


@pytest.fixture
def two_threads():
    """For what must not depend on them."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fork_server():
    """A context whose processes are forks of one that has loaded torch, and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    # The last is what any optimizer imports, for two seconds.
    context.set_forkserver_preload(["tests.steps_of_ranks", "torch._dynamo"])
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(PROJECT_ROOT)  # where it finds the first
        multiprocessing.forkserver.ensure_running()
    yield context
    multiprocessing.forkserver._forkserver._stop()


@pytest.fixture(autouse=True)
def _heed_signals_as_before():
    """What a command that has ended leaves to its process is not left to the next test."""
    handlers = {cause: signal.getsignal(cause) for cause in HEEDED}
    yield
    for cause, handler in handlers.items():
        signal.signal(cause, handler)


class Ended(NamedTuple):
    """How a command ended, and what it said; logging goes to `caplog`."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run_script(monkeypatch, capfd):
    """Run a script of the project as typed, but in this process: torch, loaded once, takes 3 s."""

    def run(name: str, *arguments: object) -> Ended:
        path = PROJECT_ROOT / name
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            code = 1 if isinstance(stop.code, str) else stop.code or 0
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
        return Ended(code, *capfd.readouterr())

    return run


@pytest.fixture
def full_disk():
    """A context manager: within it no file of this process can grow beyond 16 KiB.

    It must end within the test, as pytest itself may write to a file.
    """
    resource = pytest.importorskip("resource")

    @contextlib.contextmanager
    def fill():
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return fill


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Optional test data: facts, real photographs, public weights. Tests skip where it is absent.

    `YOLOV5_SLIM_SHARED` names another folder than `../shared` beside the project.
    """
    folder = Path(os.environ.get("YOLOV5_SLIM_SHARED") or PROJECT_ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no test data in {folder} (set YOLOV5_SLIM_SHARED to where it lies)")
    return folder
