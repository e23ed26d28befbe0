"""Inputs nobody would write: whatever a file holds, it is read rightly or told in one line.

In the suite each test tries a few dozen of them, always the same. For a long search, with other
inputs every time, and the counts at its end:

    FUZZ_EXAMPLES=20000 python -m pytest tests/test_fuzz.py -s
"""

import json
import logging
import math
import os
import re
import sys
import time
import warnings
import zipfile
import zlib
from collections import Counter
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import train
from models import Model, ModelSpec
from tests.test_backends import export
from utils import image_files
from utils.backends import load_network
from utils.checkpoint import build_checkpoint, load_detector
from utils.config import load_dataset_spec, load_hyperparameters, load_yaml
from utils.evolve import read_history
from utils.image_cache import DiskCache
from utils.run_dir import read_results
from utils.scan import parse_labels, scan_split

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
NUM_EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 0))
SLOWEST_S = 20  # of CPU time, for one input; the machine may be busy
TRIED: Counter[str] = Counter()


def fuzz(strategy, share: float = 1.0):
    """Try inputs of a strategy: `share` of the usual number."""

    def decorate(test):
        return settings(
            max_examples=max(int((NUM_EXAMPLES or 60) * share), 1),
            derandomize=not NUM_EXAMPLES,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )(given(strategy)(test))

    return decorate


@pytest.fixture(autouse=True, scope="module")
def _counts():
    yield
    print(f"\n{TRIED.total()} inputs tried: {dict(TRIED)}", file=sys.__stderr__)


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def is_told(kind: str, read, path: Path) -> object:
    """What `read` gives; None after a complaint of one line that names the file."""
    TRIED[kind] += 1
    start = time.process_time()
    value, complaint = None, path.name
    try:
        value = read()
    except (ValueError, OSError) as error:
        complaint = str(error)
    assert path.name in complaint
    assert "\n" not in complaint
    assert len(complaint) < 20_000
    assert time.process_time() - start < SLOWEST_S
    return value


# --------------------------------------------------------------------------------------- mutations
TOKENS = [
    *(b"", b"\0", b"\n", b"\r", b"\t", b" ", b"-", b"'", b'"', b"\xff", b"\xef\xbb\xbf"),
    *(b"nan", b"inf", b"-inf", b"1e999", b"1e-999", b"0x" + b"f" * 40, b"9" * 5000, b"1_0"),
    *(b"&a [*a]", b"*a", b"&a ", b"!!int ", b"!!bool x", b"!!python/name:os.system", b"<<: "),
    *(b"{", b"}", b"[", b"]", b",", b": ", b"#", b"|", b">", b"%", b"@", b"`", b"~nobody/"),
    *(b"[" * 200, b"- " * 200, b"x" * 5000, b"2024-99-99", b"null", b"\xf0\x9f\x98\x80"),
    *(b"\0" * 4, b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x01", b"\x80\x02", b"PK\x03\x04", b"../"),
]

edits = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["put", "replace", "cut", "repeat", "end", "flip"]),
        st.one_of(st.sampled_from(TOKENS), st.binary(max_size=8)),
        st.integers(1, 64),
    ),
    min_size=1,
    max_size=4,
)


def mutated(content: bytes, changes) -> bytes:
    for place, what, token, length in changes:
        at = int(place * len(content))
        head, tail = content[:at], content[at:]
        if what == "put":
            content = head + token + tail
        elif what == "replace":
            content = head + token + tail[len(token) :]
        elif what == "cut":
            content = head + tail[length:]
        elif what == "repeat":
            content = head + tail[:length] * 3 + tail
        elif what == "end":
            content = head
        elif tail:
            content = head + bytes([tail[0] ^ (1 << length % 8)]) + tail[1:]
    return content


# ------------------------------------------------------------------------------------ label files
numbers = st.one_of(
    st.floats(-0.002, 1.002).map(repr),
    st.floats(0, 1).map(lambda value: f"{value:.6f}"),
    st.floats().map(repr),
    st.integers(-3, 12).map(str),
    st.sampled_from(["0", "1", "0.5", ".5", "5.", "+.5", "-0.0", "1e-9", "1e-12", "1e-320", "e1"]),
    st.sampled_from(["1.001", "-0.001", "1_0", "0x1", "1e"]),
    st.sampled_from(["\u0661", "--1", "1,0", "\u2212" + "1", "Infinity", "\0"]),
)
label_lines = st.one_of(
    st.lists(numbers, min_size=5, max_size=5),
    st.lists(numbers, max_size=11),
    st.tuples(st.integers(0, 3).map(str), *[st.floats(0, 1).map(repr)] * 4).map(list),
    st.tuples(st.integers(0, 3).map(str), *[st.floats(0, 1).map(repr)] * 6).map(list),
).map(" ".join)
label_texts = st.one_of(
    st.lists(label_lines, max_size=6).map("\n".join),
    st.lists(st.one_of(label_lines, st.text(max_size=20)), max_size=6).map("\n".join),
)

NUMBER = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
TOO_CLOSE = object()  # rounding decides


def slow_box(line: str, num_classes: int) -> object:
    """The obvious way, in exact fractions: (class, x1, y1, x2, y2), None for a bad line."""
    fields = line.split()
    if not all(NUMBER.fullmatch(field) for field in fields):
        return None
    values = [float(field) for field in fields]
    if len(values) < 5 or len(values) % 2 == 0 or any(abs(value) > 1e300 for value in values):
        return None
    cls, *rest = (Fraction(value) for value in values)
    if cls not in range(num_classes) or any(not -0.001 <= float(c) <= 1.001 for c in rest):
        return None
    if len(rest) == 4:
        if rest[2] <= 0 or rest[3] <= 0:
            return None
        x1, y1, x2, y2 = (rest[i] + sign * rest[i + 2] / 2 for sign in (-1, 1) for i in (0, 1))
    else:
        x1, y1, x2, y2 = min(rest[::2]), min(rest[1::2]), max(rest[::2]), max(rest[1::2])
    x1, y1, x2, y2 = (min(max(side, Fraction(0)), Fraction(1)) for side in (x1, y1, x2, y2))
    least, unsure = Fraction(1, 10**9), Fraction(1, 10**6 if len(rest) > 4 else 10**12)
    sides = (x2 - x1, y2 - y1)
    if any(abs(side - least) < unsure for side in sides):
        return TOO_CLOSE
    return None if min(sides) < least else (cls, x1, y1, x2, y2)


def assert_same_boxes(text: str, labels: np.ndarray, num_duplicates: int) -> None:
    boxes = [slow_box(line, 3) for line in text.split("\n") if line.split()]
    if TOO_CLOSE in boxes:
        return
    expected = [tuple(map(float, box)) for box in boxes if box is not None]
    assert len(labels) + num_duplicates == len(expected)
    found = np.array([(c, cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
                      for c, cx, cy, w, h in labels.astype(float)]).reshape(-1, 5)  # fmt: skip
    for box in expected:
        assert (np.abs(found - box) < 1e-6).all(1).any(), (box, found)
    for row in found:
        assert any(np.abs(row - box).max() < 1e-6 for box in expected), (row, expected)


@fuzz(label_texts, share=4)
def test_label_lines(text):
    TRIED["label texts"] += 1
    parsed = parse_labels(text, "a.txt", 3)
    assert_same_boxes(text, parsed.labels, parsed.num_duplicates)
    assert np.isfinite(parsed.labels).all()
    assert (parsed.labels[:, 3:] > 0).all()
    assert len(parsed.segments) == len(parsed.labels)
    for problem in parsed.problems:
        assert re.match(r"a\.txt:\d+: ", problem)
        assert "\n" not in problem


GOOD_LABELS = b"0 0.5 0.5 0.2 0.4\n1 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5\r\n2 0.25 0.75 0.1 0.1\n"


@pytest.fixture(scope="module")
def one_image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "images"
    folder.mkdir()
    cv2.imwrite(str(folder / "a.png"), np.zeros((8, 8, 3), np.uint8))
    (folder.parent / "labels").mkdir()
    return folder


def test_label_files(one_image):
    labels = one_image.parent / "labels" / "a.txt"

    @fuzz(st.one_of(edits.map(lambda c: mutated(GOOD_LABELS, c)), st.binary(max_size=60)))
    def check(content):
        labels.write_bytes(content)
        split = is_told(
            "label files",
            lambda: scan_split([one_image], "abc", cache=False, require_labels=False, workers=1),
            labels,
        )
        if split is not None:
            text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
            assert_same_boxes(text, split.labels[0], split.report.num_duplicate_boxes)

    check()


# ------------------------------------------------------------------------------------------- yaml
YAMLS = [
    *sorted((ROOT / "data").glob("*.yaml")),
    *sorted((ROOT / "data/hyps").glob("hyp.scratch*.yaml")),
    ROOT / "models/yolov5n.yaml",
]


@pytest.mark.parametrize("kind", ["data", "hyps", "models"])
def test_yaml_files(tmp_path, kind):
    path = tmp_path / "x.yaml"
    sources = [file.read_bytes() for file in YAMLS if file.parent.name == kind]

    def read():
        if kind == "data":
            spec = load_dataset_spec(path, tmp_path)
            assert all(isinstance(name, str) for name in spec.names)
            spec.missing()
        elif kind == "hyps":
            values = load_hyperparameters(path).to_dict().values()
            assert all(-1e3 <= value <= 1e3 for value in values)
        else:
            Model(ModelSpec.from_dict(load_yaml(path), str(path)), max_weights=3_000_000)

    @fuzz(st.tuples(st.sampled_from(sources), edits), share=1 / 2)
    def check(case):
        path.write_bytes(mutated(*case))
        is_told(f"{kind} yaml", read, path)

    check()


# ----------------------------------------------------------------------------------------- images
def test_images(tmp_path, monkeypatch):
    monkeypatch.setattr(image_files, "MAX_PIXELS", 1 << 22)  # each decoded picture takes memory
    picture = np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8)
    suffixes = [".jpg", ".png", ".bmp", ".webp", ".tif"]
    contents = [cv2.imencode(suffix, picture)[1].tobytes() for suffix in suffixes]
    for orientation in (1, 6):
        tag = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0" + bytes(
            [orientation, 0, 0]
        )
        block = b"\xff\xe1" + (len(tag) + 6).to_bytes(2, "big") + tag + bytes(4)
        contents.append(contents[0][:2] + block + contents[0][2:])
        contents.append(b"\xff\xd8" + block * 2 + contents[0][2:])

    @fuzz(st.tuples(st.sampled_from(contents), edits, st.sampled_from(suffixes)), share=4)
    def check(case):
        content, changes, suffix = case
        path = tmp_path / f"x{suffix}"
        path.write_bytes(mutated(content, changes))
        with image_files.silent_decoder():
            stated = is_told("images", lambda: image_files.image_hw(path), path)
            image = is_told("images", lambda: image_files.read_image(path), path)
        if stated is not None and image is not None:
            assert image.shape[:2] == stated, "the header says what the decoder gives"

    check()


# ------------------------------------------------------------------------------------------- csv
EVOLVE = ROOT / "data/hyps/hyp.scratch-low.yaml"


def assert_same_columns(text: str, columns: dict[str, list[float]]) -> None:
    """Against commas alone; quotes are left to the csv module."""
    head, *rows = [[cell.strip() for cell in line.split(",")] for line in text.split("\n") if line]
    assert set(columns) == set(head)
    for name, values in columns.items():
        places = [place for place, title in enumerate(head) if title == name]
        # Of several of the same name the last counts that the row has.
        cells = [[row[place] for place in places if place < len(row)] for row in rows]
        cells = [found[-1] if found else "" for found in cells]
        expected = [float(cell) if is_float(cell) else math.nan for cell in cells]
        assert np.array_equal(values, expected, equal_nan=True), (name, values, expected)


def is_float(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def test_csv_files(tmp_path):
    hyp = load_yaml(EVOLVE)
    head = ["generation", "fitness", "mAP_0.5", "mAP_0.5:0.95", *hyp]
    rows = [[n, 0.1 * n, 0.2, 0.1, *hyp.values()] for n in range(3)]
    evolve = "".join(",".join(map(str, row)) + "\n" for row in [head, *rows]).encode()
    results = b"epoch,train/box_loss,metrics/mAP_0.5\n0,0.1,0.2\n1,0.05,nan\n2,,0.3\n"

    @fuzz(st.tuples(st.booleans(), edits))
    def check(case):
        is_evolve, changes = case
        path = tmp_path / "x.csv"
        path.write_bytes(mutated(evolve if is_evolve else results, changes))
        if is_evolve:
            history = is_told("evolve.csv", lambda: read_history(path), path) or []
            for number, generation in enumerate(history):
                assert generation.number == number
                assert np.isfinite(generation.score).all()
        else:
            columns = is_told("results.csv", lambda: read_results(path), path) or {}
            assert len({len(values) for values in columns.values()}) <= 1
            if columns and not set(path.read_bytes()) & set(b'"\r'):
                assert_same_columns(path.read_text(encoding="utf-8"), columns)

    check()


# ---------------------------------------------------------------------------------------- caches
def test_scan_caches(one_image):
    labels = one_image.parent / "labels" / "a.txt"
    labels.write_bytes(GOOD_LABELS)
    cache = one_image.parent / "labels.scan.npz"
    cache.unlink(missing_ok=True)

    def scan():
        return scan_split([one_image], "abc", workers=1)

    fresh = scan()
    good = cache.read_bytes()
    with np.load(cache) as file:
        arrays = {name: file[name] for name in file.files}
    odd_arrays = st.one_of(
        st.lists(st.integers(-5, 300), max_size=6).map(lambda v: np.array(v, np.int64)),
        st.lists(st.floats(width=32), max_size=15).map(lambda v: np.array(v, np.float32)),
        st.binary(max_size=40).map(lambda v: np.frombuffer(v, np.uint8)),
        st.sampled_from(
            [np.zeros((3, 5), np.float32), np.zeros(()), np.array("x"), np.zeros((0, 5))]
        ),
    )
    swaps = st.dictionaries(st.sampled_from([*arrays, "more"]), odd_arrays, min_size=1, max_size=2)

    @fuzz(st.one_of(edits, swaps))
    def check(case):
        if isinstance(case, dict):
            np.savez(cache, **{**arrays, **case})
        else:
            cache.write_bytes(mutated(good, case))
        split = is_told("scan caches", scan, cache)
        assert split is not None
        assert split.paths == fresh.paths
        if not isinstance(case, dict):  # what others wrote may be possible, and is believed
            assert np.array_equal(split.labels.flat, fresh.labels.flat)
            assert np.array_equal(split.segments.polygons.flat, fresh.segments.polygons.flat)
        assert (np.abs(split.labels.flat[:, 1:3] - 0.5) <= 0.5).all()
        assert set(split.labels.flat[:, 0]) <= {0, 1, 2}

    check()


def test_picture_caches(tmp_path):
    path = tmp_path / "x.npy"
    picture = np.full((4, 6, 3), 7, np.uint8)
    np.save(path, picture)
    good = path.read_bytes() + zlib.crc32(picture.tobytes()).to_bytes(4, "little")
    path.write_bytes(good)
    cache = DiskCache([path], np.array([[4, 6]]))
    assert (cache.get(0) == 7).all()

    @fuzz(edits)
    def check(changes):
        path.write_bytes(mutated(good, changes))
        TRIED["picture caches"] += 1
        image = DiskCache([path], np.array([[4, 6]])).get(0)
        assert image is None or np.array_equal(image, picture)

    check()


# ------------------------------------------------------------------------------------ checkpoints
def test_checkpoints(tiny_spec, tmp_path):
    path = tmp_path / "x.pt"
    torch.save(build_checkpoint(Model(ModelSpec.from_dict(tiny_spec)), ["a", "b", "c"]), path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in parts if name.endswith("data.pkl"))

    @fuzz(st.tuples(st.booleans(), edits), share=1 / 2)
    def check(case):
        is_pickle, changes = case
        if is_pickle:
            with zipfile.ZipFile(path, "w") as archive:
                for name, content in {**parts, pickled: mutated(parts[pickled], changes)}.items():
                    archive.writestr(name, content)
        else:
            path.write_bytes(mutated(whole, changes))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            is_told("checkpoints", lambda: load_detector(path), path)

    check()


# ------------------------------------------------------------------------------- exported networks
# What stands between quotation marks in an OpenVINO description, and must not.
ODD_WORDS = [
    *(b"", b"0", b"-1", b"x", b"nan", b"9" * 40, b"4294967296", b"18446744073709551615"),
    *(b"1,3,-5", b"1,3,1000000,1000000", b"string", b"boolean", b"u1", b"f64"),
    *(b"Const", b"Result", b"Parameter", b"Loop", b"TensorIterator"),
]
swaps = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from(ODD_WORDS)),
    min_size=1,
    max_size=3,
)


def with_swaps(xml: bytes, changes) -> bytes:
    for place, value in changes:
        spans = [match.span(1) for match in re.finditer(rb'"([^"]*)"', xml)]
        start, end = spans[int(place * len(spans))]
        xml = xml[:start] + value + xml[end:]
    return xml


def test_openvino_descriptions(tiny_spec, tmp_path):
    model = Model(ModelSpec.from_dict(tiny_spec)).eval()
    folder = export(model, "openvino", tmp_path)
    path = folder / "x.xml"
    whole = path.read_bytes()

    def read():
        with torch.no_grad():
            return load_network(path, torch.device("cpu"))(torch.zeros(1, 3, 64, 64))

    for good, bad in ((b'"Result"', b'"Relu"'), (b"float32", b"\xff")):
        path.write_bytes(whole.replace(good, bad))
        assert is_told("OpenVINO", read, path) is None

    @fuzz(st.tuples(st.booleans(), swaps, edits), share=1 / 2)
    def check(case):
        are_values, values, changes = case
        path.write_bytes(with_swaps(whole, values) if are_values else mutated(whole, changes))
        is_told("OpenVINO", read, path)

    check()


# ----------------------------------------------------------------------------- runs to be resumed
ODD_VALUES = st.one_of(
    st.sampled_from([None, True, False, -5, 0, 1, 3, 10**9, 10**70, -0.5, 0.5, 1e300, math.nan]),
    st.sampled_from(["", "x", "5", b"x", [], [0.5], {}, {"x": 1}, [[1]], (), {1: {2: 3}}]),
    st.sampled_from([(), (3,), (1, 1)]).map(torch.zeros),
    st.just(torch.full((3,), math.nan)),
    st.just(torch.zeros(3, dtype=torch.int64)),
)
odd_places = st.lists(
    st.tuples(
        st.sampled_from(["training", "training", "options", "hyp", "spec"]),
        st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=4),
        st.one_of(st.just("delete"), ODD_VALUES),
    ),
    min_size=1,
    max_size=2,
)


def put_odd(part, way, value) -> None:
    """Replace or delete what lies that way in nested lists and mappings."""
    keys = list(part) if isinstance(part, dict) else range(len(part))
    if not len(keys):
        return
    key = keys[int(way[0] * len(keys))]
    inner = part[key]
    if len(way) > 1 and isinstance(inner, dict | list) and len(inner):
        put_odd(inner, way[1:], value)
    elif isinstance(value, str) and value == "delete":
        del part[key]
    else:
        part[key] = value


def test_runs_to_be_resumed(tiny_spec, tiny_dataset, tmp_path, monkeypatch):
    """Resumed for an epoch, or told what is damaged: a state that is odd may well be a good one."""
    monkeypatch.setattr("utils.training.report.draw", lambda *_: None)
    monkeypatch.setattr(train, "finish", lambda *_: None)
    monkeypatch.setattr(train, "give_verdict", lambda *_: None)
    cfg = tmp_path / "tiny.yaml"
    cfg.write_text(json.dumps(tiny_spec))
    train.main([
        *("--data", str(tiny_dataset.yaml), "--cfg", str(cfg), "--weights", "", "--img", "32"),
        *("--batch", "2", "--nominal-batch", "2", "--epochs", "1", "--project", str(tmp_path)),
        *("--device", "cpu", "--amp", "off", "--bn_sparsity", "--noautoanchor", "--workers", "0"),
        *("--cache", "off", "--optimizer", "AdamW", "--sparsity_rate", "auto", "--noval"),
    ])  # fmt: skip
    run_dir = tmp_path / "exp"
    path = run_dir / "weights" / "last.pt"
    whole = path.read_bytes()

    def resume():
        try:
            train.main(["--resume", str(run_dir), "--workers", "0", "--device", "cpu"])
        except (ValueError, OSError, FloatingPointError) as error:  # it may be of other files
            raise ValueError(f"{path}: {error}") from None

    @fuzz(odd_places, share=1 / 3)
    def check(places):
        path.write_bytes(whole)
        content = torch.load(path)
        content["training"] |= {"epoch": -1, "is_last": False}
        content["options"]["noval"] = True
        for part, way, value in places:
            put_odd(content[part], way, value)
        torch.save(content, path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            is_told("runs to be resumed", resume, path)

    check()
