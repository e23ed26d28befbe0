"""Checkpoints made to run code, to fill the memory or to go on for ever: all are refused."""

import io
import os
import pickle
import struct
import tarfile
import time
import zipfile
from collections import OrderedDict

import pytest
import torch

from models import Model, ModelSpec
from utils.checkpoint import build_checkpoint, load_checkpoint, load_detector

PROTO, STOP = b"\x80\x02", b"."


def write_archive(path, pickled: bytes, records=(), compression=zipfile.ZIP_STORED) -> None:
    """A file as torch.save writes it, around this pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        for name, content in records:
            archive.writestr(f"archive/{name}", content)
        archive.writestr("archive/version", "3\n")


def assert_refused(path, words: str = ".") -> None:
    """One line with the name of the file, at once."""
    for read in (load_detector, load_checkpoint):
        start = time.process_time()
        with pytest.raises((OSError, ValueError), match=words) as caught:
            read(path)
        assert time.process_time() - start < 10
        assert "\n" not in str(caught.value)
        assert path.name in str(caught.value)
        assert len(str(caught.value)) < 600


# ------------------------------------------------------------------------------------ running code
CALLS = {
    "os.system": "os system",
    "posix": "posix system",
    "Windows": "nt system",
    "Popen": "subprocess Popen",
    "check_output": "subprocess check_output",
    "eval": "builtins eval",
    "exec": "builtins exec",
    "Python 2": "__builtin__ eval",
    "getattr": "builtins getattr",
    "import": "builtins __import__",
    "compile": "builtins compile",
    "open": "builtins open",
    "import_module": "importlib import_module",
    "run_path": "runpy run_path",
    "partial": "functools partial",
    "reduce": "functools reduce",
    "attrgetter": "operator attrgetter",
    "methodcaller": "operator methodcaller",
    "code": "types CodeType",
    "marshal": "marshal loads",
    "pickle": "pickle loads",
    "ctypes": "ctypes CDLL",
    "pty": "pty spawn",
    "rmtree": "shutil rmtree",
    "timeit": "timeit timeit",
    "webbrowser": "webbrowser open",
    "socket": "socket create_connection",
    "exit": "sys exit",
    "torch.load": "torch load",
    "torch.jit.load": "torch.jit load",
    "torch.hub": "torch.hub load",
    "torch.save": "torch save",
    "storage from bytes": "torch.storage _load_from_bytes",
    "inductor": "torch._inductor.codecache _reload_python_module",
    "compiled": "torch.utils.collect_env run",
    "through a list": "builtins map",
    # Below a name on the list: nothing of it is looked up, so nothing is found there either.
    "inside models": "models.experimental os.system",
    "inside utils": "utils.general subprocess.Popen",
    "inside pathlib": "pathlib os.system",
    "inside numpy": "numpy.testing._private.utils runstring",
    "inside torch.nn": "torch.nn.modules.module torch.os.system",
}


def call(name: str, argument: str, way: str) -> bytes:
    """Opcodes that call a function with one text."""
    module, function = name.split()
    text = b"X" + struct.pack("<I", len(argument)) + argument.encode()
    if way == "REDUCE":
        return f"c{module}\n{function}\n".encode() + text + b"\x85R"
    if way == "STACK_GLOBAL":
        names = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in name.split())
        return names + b"\x93" + text + b"\x85R"
    if way == "NEWOBJ":
        return f"c{module}\n{function}\n".encode() + text + b"\x85\x81"
    if way == "OBJ":
        return b"(" + f"c{module}\n{function}\n".encode() + text + b"o"
    return b"(" + text + f"i{module}\n{function}\n".encode()  # INST


WAYS = ["STACK_GLOBAL", "NEWOBJ", "OBJ", "INST"]
# Who refuses what: words of our own, not those of a call that has failed.
OPCODES = r"or a damaged one \(Unsupported operand "
NAMES = "refused, the file wants to call .*nothing of it was run|holds pickled objects"
STAND_INS = "not a YOLOv5 checkpoint, it holds no model|holds pickled objects"


def refusal(name: str, way: str) -> str:
    if way not in ("REDUCE", "NEWOBJ"):
        return OPCODES
    return STAND_INS if name in [CALLS[key] for key in CALLS if "inside" in key] else NAMES


@pytest.mark.parametrize(
    ("name", "way"),
    [pytest.param(name, "REDUCE", id=key) for key, name in CALLS.items()]
    + [(CALLS[key], way) for key in ("os.system", "eval", "inside pathlib") for way in WAYS],
)
def test_no_call_is_made(tmp_path, name, way):
    proof, path = tmp_path / "ran", tmp_path / "hostile.pt"
    argument = f"__import__('pathlib').Path({str(proof)!r}).touch()"
    if "system" in name or "Popen" in name or "check_output" in name:
        argument = f"touch {proof}"
    attack = call(name, argument, way)
    write_archive(path, PROTO + attack + STOP)
    assert_refused(path, refusal(name, way))
    beside = b"}X\x05\x00\x00\x00modelNsX\x01\x00\x00\x00x" + attack + b"s"
    write_archive(path, PROTO + beside + STOP)
    assert_refused(path, refusal(name, way))
    assert not proof.exists()


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(
            {"__class__": 1, "__reduce__": 2, "_modules": 3, "_parameters": 4}, id="names"
        ),
        pytest.param({"yaml": [[]], "names": 5, "stride": "x"}, id="kinds"),
        pytest.param({1: 2, None: 3}, id="keys"),
        pytest.param({"_modules": {5: 6}, "_buffers": {"anchors": 7}}, id="modules"),
    ],
)
def test_states_of_stand_ins_do_nothing(tmp_path, state):
    attack = b"cmodels.yolo\nModel\n)\x81" + pickle.dumps(state, 2)[2:-1] + b"b"
    write_archive(tmp_path / "a.pt", PROTO + b"}X\x05\x00\x00\x00model" + attack + b"s" + STOP)
    assert_refused(tmp_path / "a.pt")


# ------------------------------------------------------------------------------ shapes of the file
def tar_file(path):
    """The format before PyTorch 0.2, which once ran code in spite of the allow-list."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "tensors", "storages"):
            info = tarfile.TarInfo(name)
            content = pickle.dumps({name: 1})
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def old_format(path):
    torch.save({"model": torch.zeros(3)}, path, _use_new_zipfile_serialization=False)


def plain_pickle(path):
    path.write_bytes(pickle.dumps({"model": 1}))


def torchscript(path):
    torch.jit.save(torch.jit.trace(torch.nn.Identity(), torch.zeros(1)), path)


def nested_zip(path):
    inner = io.BytesIO()
    torch.save({"model": torch.zeros(3)}, inner)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl/archive/data.pkl", inner.getvalue())


def compressed(path):
    pickled = b"X" + struct.pack("<I", 500_000_000)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as member:
            member.write(PROTO + pickled)
            for _ in range(100):
                member.write(bytes(1_000_000))
        archive.writestr("archive/version", "3\n")


def overlapping(path):
    """A thousand names for the same megabyte."""
    write_archive(path, PROTO + b"}" + STOP, [("data/0", bytes(1_000_000))])
    with zipfile.ZipFile(path, "a") as archive:
        (one,) = (info for info in archive.infolist() if info.filename.endswith("data/0"))
        for number in range(1, 1000):
            info = zipfile.ZipInfo(f"archive/data/{number}")
            for field in ("file_size", "compress_size", "CRC", "header_offset"):
                setattr(info, field, getattr(one, field))
            archive.filelist.append(info)
        archive._didModify = True


def twice(path):
    with pytest.warns(UserWarning, match="Duplicate name"):
        write_archive(path, PROTO + b"}" + STOP, [("data.pkl", PROTO + b"N" + STOP)])


def big_pickle(path):
    write_archive(path, PROTO + b"N0" * (5 << 20) + b"N" + STOP)


def strange_byte_order(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", PROTO + b"}" + STOP)
        archive.writestr("archive/byteorder", "middle")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        pytest.param(lambda path: path.write_bytes(b""), "not a checkpoint", id="empty"),
        pytest.param(tar_file, "not a checkpoint", id="tar"),
        pytest.param(old_format, "since PyTorch 1.6", id="old format"),
        pytest.param(plain_pickle, "not a checkpoint", id="plain pickle"),
        pytest.param(torchscript, "torchscript|compressed", id="torchscript"),
        pytest.param(nested_zip, "not a checkpoint", id="nested zip"),
        pytest.param(compressed, "refused, its parts are compressed", id="zip bomb"),
        pytest.param(overlapping, "refused, its parts overlap", id="overlapping"),
        pytest.param(twice, "refused, two of its parts", id="two pickles"),
        pytest.param(big_pickle, "refused, its pickle has more than 8 MiB", id="big pickle"),
        pytest.param(strange_byte_order, "not a checkpoint", id="byte order"),
    ],
)
def test_archives_that_are_no_checkpoint(tmp_path, make, words):
    path = tmp_path / "x.pt"
    make(path)
    assert_refused(path, words)


# ------------------------------------------------------------------------------- shapes of the data
def doubled(levels: int, leaf: bytes = b"]") -> bytes:
    """[[leaf, leaf], [leaf, leaf]] and so on: a few bytes, 2 ** levels leaves."""
    twice = (b"q" + bytes([n]) + b"ah" + bytes([n]) + b"a" for n in range(levels))
    return b"]" * levels + leaf + b"".join(twice)


def storage(count: bytes) -> bytes:
    """Persistent id of a float storage with so many elements."""
    return (
        b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x00zX\x03\x00\x00\x00cpu"
        + (count + b"tQ")
    )


def tensor(count: bytes, size: bytes, stride: bytes) -> bytes:
    parts = storage(count) + b"K\x00" + size + b"\x85" + stride + b"\x85" + b"\x89"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + parts + b"ccollections\nOrderedDict\n)RtR"


ENDLESS = "refused, its data is nested or repeated without end"
LARGER = "refused, it holds a tensor larger than its bytes"
STRANGE_KEY = "refused, it holds a mapping with a strange key"
DAMAGED = "not a checkpoint that torch.save writes, or a damaged one"

DATA = {
    "list of itself": (b"]q\x01h\x01a", ENDLESS),
    "mapping of itself": (b"}q\x01K\x01h\x01s", ENDLESS),
    "doubled 60 times": (doubled(60), ENDLESS),
    "nested 5000 deep": (b"]" * 5000 + b"a" * 4999, ENDLESS),
    "huge number": (b"\x8b" + struct.pack("<I", 100_000) + b"\x7f" * 100_000, DAMAGED),
    "no such memo": (b"j\xff\xff\xff\x00", DAMAGED),
    "empty stack": (b"00000", DAMAGED),
    "text of 4 GB": (b"X\xff\xff\xff\xff", DAMAGED),
    "extension": (b"\x82\x01", DAMAGED),
    "set": (b"c__builtin__\nset\n](K\x01e\x85R", "refused, it holds a set"),
    "strange key": (b"}N]s", STRANGE_KEY),
    "key of tensors": (b"}" + tensor(b"K\x04", b"K\x04", b"K\x01") + b"K\x01s", STRANGE_KEY),
    "lying storage": (tensor(b"J\x00\x00\x00\x40", b"K\x04", b"K\x01"), f"{DAMAGED}|{LARGER}"),
    "negative storage": (tensor(b"J\xff\xff\xff\xff", b"K\x04", b"K\x01"), DAMAGED),
    "expanded tensor": (tensor(b"K\x04", b"J\x00\x00\x00\x40", b"K\x00"), LARGER),
    "tensor beyond its storage": (tensor(b"K\x04", b"J\x00\x00\x00\x40", b"K\x01"), DAMAGED),
    "text on a tensor": (
        tensor(b"K\x04", b"K\x04", b"K\x01") + b"X\x01\x00\x00\x00aK\x01s", DAMAGED
    ),
    "state of a tensor": (
        tensor(b"K\x04", b"K\x04", b"K\x01") + b"}X\x04\x00\x00\x00dataK\x01sb", DAMAGED
    ),
    "storage of no type": (
        storage(b"K\x04").replace(b"ctorch\nFloatStorage\n", b"N"), DAMAGED
    ),
    "missing storage": (storage(b"K\x04").replace(b"\x00\x00\x00z", b"\x00\x00\x00y"), DAMAGED),
    "dtype for data": (b"ctorch\nfloat32\n", "refused, it holds a dtype"),
}  # fmt: skip


@pytest.fixture
def whole_parts(tiny_spec):
    """The parts of a checkpoint that is read without complaint."""
    buffer = io.BytesIO()
    torch.save(build_checkpoint(Model(ModelSpec.from_dict(tiny_spec)), ["a", "b", "c"]), buffer)
    with zipfile.ZipFile(buffer) as archive:
        return {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}


def write_whole(path, parts, more: bytes) -> None:
    """A checkpoint with one more key, whose value these opcodes make."""
    pickled = parts["data.pkl"].removesuffix(STOP)
    records = [(n, c) for n, c in parts.items() if n.startswith("data/")]
    key = b"X\x01\x00\x00\x00x"
    write_archive(path, pickled + key + more + b"s" + STOP, [*records, ("data/z", bytes(16))])


@pytest.mark.parametrize("name", DATA)
def test_data_that_is_not_plain(whole_parts, tmp_path, name):
    path = tmp_path / "x.pt"
    write_whole(path, whole_parts, b"K\x01")
    load_detector(path)  # with a number in this place it is good
    value, words = DATA[name]
    write_whole(path, whole_parts, value)
    assert_refused(path, words)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(b"]r\xff\xff\xff\x7f", [], id="memo of 2 ** 31"),
        pytest.param(
            b"ccollections\nOrderedDict\n)R}X\x05\x00\x00\x00itemsK\x01sb",
            {},
            id="mapping that lies",
        ),
    ],
)
def test_odd_data_that_does_no_harm(whole_parts, tmp_path, value, expected):
    write_whole(tmp_path / "x.pt", whole_parts, value)
    found = load_checkpoint(tmp_path / "x.pt")["x"]
    assert (type(found), found) == (type(expected), expected)


def test_other_tensors(tmp_path):
    path = tmp_path / "x.pt"
    for odd in (
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.zeros(3, device="meta"),
        torch.zeros(1).expand(1 << 40),
        torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
    ):
        torch.save({"format": "yolov5-slim", "version": 1, "model": {"a": odd}}, path)
        assert_refused(path, "refused, it holds a tensor")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"spec": None}, "expected a mapping of keys", id="no spec"),
        pytest.param({"spec": {"nc": 3}}, "missing depth_multiple", id="half a spec"),
        pytest.param({"names": 5}, "names of the wrong kind", id="names"),
        pytest.param({"names": [["a"]] * 3}, "names of the wrong kind", id="nested names"),
        pytest.param({"model": [1]}, "model of the wrong kind", id="model list"),
        pytest.param({"model": {"a": 1}}, "model of the wrong kind", id="no tensors"),
        pytest.param({"options": "x", "hyp": 1}, "options, hyp of the wrong kind", id="options"),
        pytest.param({"epoch": "x"}, "epoch of the wrong kind", id="epoch"),
        pytest.param({"training": []}, "training of the wrong kind", id="training"),
        pytest.param({"version": [[]]}, "version", id="version"),
    ],
)
def test_parts_of_the_wrong_kind(tiny_spec, tmp_path, change, words):
    path = tmp_path / "x.pt"
    model = Model(ModelSpec.from_dict(tiny_spec))
    torch.save(build_checkpoint(model, ["a", "b", "c"]) | change, path)
    with pytest.raises(ValueError, match=words) as caught:
        load_detector(path)
    assert "x.pt" in str(caught.value)


def test_a_small_file_cannot_ask_for_a_large_network(tiny_spec, tmp_path):
    path = tmp_path / "x.pt"
    model = Model(ModelSpec.from_dict(tiny_spec))
    content = build_checkpoint(model, ["a", "b", "c"])
    content["spec"]["widths"] = dict.fromkeys(("0", "1"), 9000)  # 729 million weights, 3 GB
    torch.save(content, path)
    with pytest.raises(
        ValueError, match=r"x.pt: backbone row 1: up to here the network has 729972000 weights"
    ):
        load_detector(path)


def test_modules_that_hold_themselves(tmp_path):
    path = tmp_path / "x.pt"
    new = b"cmodels.yolo\nModel\n)\x81"
    children, a, b = b"}X\x08\x00\x00\x00_modules}", b"X\x01\x00\x00\x00a", b"X\x01\x00\x00\x00b"
    itself = new + b"q\x01" + children + a + b"h\x01ssb"
    twice = (b"q" + bytes([n]) + b"s" + b + b"h" + bytes([n]) + b"ssb" for n in range(60))
    doubled = (new + children + a) * 60 + new + b"".join(twice)
    for module in (itself, doubled):
        write_archive(path, PROTO + b"}X\x05\x00\x00\x00model" + module + b"s" + STOP)
        with pytest.raises(ValueError, match="nested or repeated without end"):
            load_detector(path)


def test_mappings_from_old_files_are_read_in_spite_of_their_attributes(tiny_spec, tmp_path):
    """A state dict is an OrderedDict with an attribute, which must not get in the way."""
    path = tmp_path / "x.pt"
    model = Model(ModelSpec.from_dict(tiny_spec))
    state = OrderedDict(model.state_dict())
    state._metadata = 5
    torch.save({**build_checkpoint(model, ["a", "b", "c"]), "model": state}, path)
    loaded = load_detector(path).model.state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
def test_pipes_are_not_waited_for(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    os.mkfifo(path)
    assert_refused(path, "not a regular file but a pipe or a device")
    # It may take the place of a file that has just been seen.
    monkeypatch.setattr(type(path), "is_file", lambda _: True)
    assert_refused(path, "x.pt: not a regular file but a pipe or a device")
