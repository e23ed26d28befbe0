"""Downloads from a server of our own on 127.0.0.1, archives, data sets, named weights."""

import bz2
import hashlib
import http.server
import io
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils import downloads
from utils.config import load_dataset_spec
from utils.downloads import (
    CHECKSUM_FILE,
    download,
    ensure_dataset,
    file_sha256,
    find_weights,
    named_weights,
    read_checksums,
    record_checksum,
    unpack,
)

CONTENT = np.random.default_rng(0).bytes(300_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; `cut` ends the first transfers early, `ranges` lets them go on."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cut: list[int] = []
        self.ranges = True
        self.validators = True
        self.requests: list[tuple[str, str | None]] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def handle_error(self, request, client_address):
        pass  # a client that goes away in the middle is part of the tests


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        wanted = self.headers.get("Range")
        self.server.requests.append((self.path, wanted))
        content = self.server.files.get(self.path.lstrip("/"))
        if content is None:
            self.send_error(404)
            return
        etag = f'"{hashlib.sha256(content).hexdigest()[:8]}"'
        start = 0
        if wanted and self.server.ranges and self.headers.get("If-Range") == etag:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.server.validators:
            self.send_header("ETag", etag)
        body = content[start:]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cut.pop(0)] if self.server.cut else body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        running.files["file.bin"] = CONTENT
        yield running
        running.shutdown()
        thread.join()


def names_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ---------------------------------------------------------------------------------------- one file
def test_download(server, tmp_path):
    path = download(server.url("file.bin"), tmp_path / "sub" / "file.bin", SHA256)
    assert path.read_bytes() == CONTENT
    assert names_in(path.parent) == ["file.bin"]
    download(server.url("file.bin"), path, SHA256.upper())
    assert len(server.requests) == 1, "a file that is there is not fetched again"


@pytest.mark.parametrize(
    ("ranges", "validators"), [(True, True), (False, True), (True, False)]
)  # with and without a server that can go on
def test_broken_transfer_goes_on_within_one_call(server, tmp_path, ranges, validators):
    server.ranges, server.validators, server.cut = ranges, validators, [100_000, 120_000]
    path = download(server.url("file.bin"), tmp_path / "file.bin", SHA256)
    assert path.read_bytes() == CONTENT
    wanted = [range_ for _, range_ in server.requests]
    if ranges and validators:
        assert wanted == [None, "bytes=100000-", "bytes=220000-"]
    assert names_in(tmp_path) == ["file.bin"]


def test_broken_transfer_goes_on_in_the_next_call(server, tmp_path):
    path = tmp_path / "file.bin"
    server.cut = [50_000]
    with pytest.raises(OSError, match="ended after 50000 of 300000 bytes; run again") as caught:
        download(server.url("file.bin"), path, attempts=1)
    assert server.url("file.bin") in str(caught.value)
    assert not path.exists()
    assert names_in(tmp_path) == ["file.bin.part", "file.bin.part.etag"]
    download(server.url("file.bin"), path, SHA256)
    assert server.requests[-1][1] == "bytes=50000-"
    assert path.read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(server, tmp_path):
    server.cut = [50_000]
    with pytest.raises(OSError, match="ended after"):
        download(server.url("file.bin"), tmp_path / "file.bin", attempts=1)
    server.files["file.bin"] = new = CONTENT[::-1]
    assert download(server.url("file.bin"), tmp_path / "file.bin").read_bytes() == new


def test_a_part_longer_than_the_file_is_dropped(server, tmp_path):
    etag = f'"{SHA256[:8]}"'
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")
    (tmp_path / "file.bin.part.etag").write_text(etag)
    assert download(server.url("file.bin"), tmp_path / "file.bin").read_bytes() == CONTENT


def test_wrong_checksum_discards_the_file(server, tmp_path):
    with pytest.raises(OSError, match=f"sha256 is {SHA256}, expected {'0' * 64}; .* discarded"):
        download(server.url("file.bin"), tmp_path / "file.bin", "0" * 64)
    assert names_in(tmp_path) == []


def test_wrong_checksum_of_a_file_that_is_there(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"other")
    with pytest.raises(OSError, match=r"file\.bin: sha256 is not .*; delete the file"):
        download(server.url("file.bin"), tmp_path / "file.bin", SHA256)
    assert (tmp_path / "file.bin").read_bytes() == b"other"
    assert server.requests == []


def test_no_such_file(server, tmp_path):
    with pytest.raises(OSError, match=r"absent\.bin: the server answers 404"):
        download(server.url("absent.bin"), tmp_path / "file.bin")
    assert names_in(tmp_path) == []


def test_no_connection(server, tmp_path):
    url = server.url("file.bin")
    server.shutdown()
    server.server_close()
    with pytest.raises(OSError, match="cannot download") as caught:
        download(url, tmp_path / "file.bin")
    message = str(caught.value)
    assert url in message
    assert f"without internet, put the file at {tmp_path / 'file.bin'}" in message
    assert "\n" not in message


@pytest.mark.parametrize("url", ["file:///etc/hostname", "ftp://127.0.0.1/a", "a.zip", ""])
def test_only_http(url, tmp_path):
    with pytest.raises(ValueError, match="only http and https"):
        download(url, tmp_path / "a")


def test_an_answer_without_an_end(tmp_path):
    endless = io.BytesIO(bytes(5 << 20))
    with (tmp_path / "a.part").open("wb") as file, pytest.raises(OSError, match="has no end"):
        downloads._copy(endless, file, 0, None, limit=3 << 20)
    assert (tmp_path / "a.part").stat().st_size == 3 << 20


def test_full_disk(server, tmp_path, monkeypatch):
    usage = downloads.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="GiB are needed"):
        download(server.url("file.bin"), tmp_path / "file.bin")


# ---------------------------------------------------------------------------------------- archives
def zip_of(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def tar_of(path: Path, members: dict[str, bytes | tarfile.TarInfo]) -> Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, content in members.items():
            if isinstance(content, tarfile.TarInfo):
                archive.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return path


def tar_link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("make", "name"),
    [(zip_of, "a.zip"), (tar_of, "a.tar"), (tar_of, "a.tar.gz"), (zip_of, "named.tar")],
)
def test_unpack(tmp_path, make, name):
    members = {"set/a b.txt": b"1", "set/deep/ü.txt": b"22", "c.txt": b""}
    folder = unpack(make(tmp_path / name, members), tmp_path / "out")
    for member, content in members.items():
        assert (folder / member).read_bytes() == content
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 3


@pytest.mark.parametrize(
    "name",
    ["../evil.txt", "a/../../evil.txt", "/evil.txt", "..\\evil.txt", "C:\\evil.txt", "C:/evil.txt",
     "\\\\host\\share\\evil.txt"],
)  # fmt: skip
@pytest.mark.parametrize("make", [zip_of, tar_of])
def test_no_member_leaves_the_folder(tmp_path, make, name):
    archive = make(tmp_path / "a.archive", {"good.txt": b"1", name: b"2"})
    with pytest.raises(ValueError, match="would be written outside of"):
        unpack(archive, tmp_path / "in" / "out")
    assert names_in(tmp_path) == ["a.archive"], "nothing at all is written"


@pytest.mark.parametrize(
    "link",
    [
        pytest.param(tar_link("a", "/etc", tarfile.SYMTYPE), id="symbolic"),
        pytest.param(tar_link("a", "../x", tarfile.LNKTYPE), id="hard"),
        pytest.param(tar_link("a", "", tarfile.FIFOTYPE), id="pipe"),
        pytest.param(tar_link("a", "", tarfile.CHRTYPE), id="device"),
    ],
)
def test_no_links_or_devices_in_tar(tmp_path, link):
    archive = tar_of(tmp_path / "a.tar", {"a": link, "a/evil.txt": b"2"})
    with pytest.raises(ValueError, match="member 'a' is a link or a device"):
        unpack(archive, tmp_path / "out")
    assert names_in(tmp_path) == ["a.tar"]


def test_no_links_in_zip(tmp_path):
    info = zipfile.ZipInfo("a")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(info, "/etc")
    with pytest.raises(ValueError, match="member 'a' is a link or a device"):
        unpack(tmp_path / "a.zip", tmp_path / "out")


def test_no_way_out_through_a_link_that_was_there(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to(tmp_path / "outside")
    archive = zip_of(tmp_path / "a.zip", {"a/evil.txt": b"2"})
    with pytest.raises(ValueError, match="leads outside of"):
        unpack(archive, tmp_path / "out")
    assert names_in(tmp_path / "outside") == []


def test_a_link_in_the_place_of_a_file_is_replaced(tmp_path):
    (tmp_path / "outside.txt").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").symlink_to(tmp_path / "outside.txt")
    unpack(zip_of(tmp_path / "a.zip", {"a.txt": b"2"}), tmp_path / "out")
    assert (tmp_path / "outside.txt").read_text() == "mine"
    assert (tmp_path / "out" / "a.txt").read_bytes() == b"2"


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: b"<html>not found</html>", id="html"),
        pytest.param(lambda content: content[: len(content) // 2], id="half"),
        pytest.param(
            lambda content: content.replace(b"0123456789" * 20, b"0123456780" * 20), id="bit rot"
        ),
    ],
)
def test_damaged_archives(tmp_path, damage):
    archive = zip_of(tmp_path / "a.zip", {"a.txt": b"0123456789" * 100})
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(ValueError, match=r"a\.zip: (neither|a damaged)"):
        unpack(archive, tmp_path / "out")


def encrypted(path: Path) -> Path:
    content = bytearray(zip_of(path, {"a.txt": b"hello" * 99}).read_bytes())
    content[6] |= 1  # the flag, in the member and in the directory
    content[content.rfind(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    return path


def broken_stream(path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", b"hello" * 999)
    content = bytearray(path.read_bytes())
    content[45:55] = b"\xff" * 10
    path.write_bytes(content)
    return path


def zip_bomb(path: Path) -> Path:
    """A thousand times its size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.txt", bytes(5_000_000))
    return path


def tar_bomb(path: Path) -> Path:
    """The head says 1 PB; what follows would be read on and on."""
    info = tarfile.TarInfo("a.txt")
    info.size = 10**15
    path.write_bytes(bz2.compress(info.tobuf() + bytes(1_000_000)))
    return path


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        pytest.param(encrypted, "needs a password", id="password"),
        pytest.param(broken_stream, "a damaged archive", id="broken stream"),
        pytest.param(zip_bomb, "over 200 times its size", id="zip bomb"),
        pytest.param(tar_bomb, "over 200 times its size", id="tar bomb"),
        pytest.param(
            lambda path: zip_of(path, {"d/" * 2000 + "a.txt": b"1"}), "lies in 2001", id="nested"
        ),
    ],
)
def test_archives_that_cannot_be_unpacked(tmp_path, make, complaint, monkeypatch):
    monkeypatch.setattr(downloads, "LITTLE_BYTES", 1_000_000)
    with pytest.raises(ValueError, match=complaint) as caught:
        unpack(make(tmp_path / "a.zip"), tmp_path / "in" / "out")
    assert str(tmp_path / "a.zip") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path for path in tmp_path.rglob("*.txt") if path.stat().st_size] == []


def test_an_archive_larger_than_the_disk(tmp_path, monkeypatch):
    archive = zip_of(tmp_path / "a.zip", {"a.txt": b"0" * 100_000})
    usage = downloads.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="has room for"):
        unpack(archive, tmp_path / "out")


# --------------------------------------------------------------------------------------- data sets
def dataset_members(prefix: str) -> dict[str, bytes]:
    ok, jpeg = cv2.imencode(".jpg", np.zeros((20, 30, 3), np.uint8))
    assert ok
    return {
        f"{prefix}images/train/a.jpg": jpeg.tobytes(),
        f"{prefix}labels/train/a.txt": b"0 0.5 0.5 0.2 0.2\n",
        f"{prefix}LICENSE": b"free",
    }


def write_yaml(path: Path, download_entry: str | None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "path: ../sets/mine\ntrain: images/train\nval: images/train\nnames: [a]\n"
    path.write_text(text + (f"download: {download_entry}\n" if download_entry else ""))
    return path


@pytest.mark.parametrize("prefix", ["", "mine/", "mine-master/data/"])
def test_ensure_dataset_from_a_url(server, tmp_path, prefix):
    server.files["mine.zip"] = zip_of(tmp_path / "x.zip", dataset_members(prefix)).read_bytes()
    root = tmp_path / "project"
    path = write_yaml(root / "data.yaml", server.url("mine.zip?raw=1"))
    server.files["mine.zip?raw=1"] = server.files["mine.zip"]
    ensure_dataset(load_dataset_spec(path, root), root=root)
    folder = tmp_path / "sets" / "mine"
    assert (folder / "images" / "train" / "a.jpg").is_file()
    assert (folder / "labels" / "train" / "a.txt").is_file()
    assert (folder / "LICENSE").is_file()
    assert [path.name for path in (tmp_path / "sets").iterdir()] == ["mine"]
    ensure_dataset(load_dataset_spec(path, root), root=root)
    assert len(server.requests) == 1


def test_ensure_dataset_tells_when_the_archive_holds_something_else(server, tmp_path):
    server.files["mine.zip"] = zip_of(tmp_path / "x.zip", {"other/a.txt": b"1"}).read_bytes()
    path = write_yaml(tmp_path / "project" / "data.yaml", server.url("mine.zip"))
    spec = load_dataset_spec(path, tmp_path / "project")
    with pytest.raises(FileNotFoundError, match=r"images/train is not in the archive.*a\.txt"):
        ensure_dataset(spec)


@pytest.mark.parametrize("folder", [..., ".", "..", "{root}"])
def test_ensure_dataset_keeps_archives_out_of_the_project(server, tmp_path, folder):
    server.files["mine.zip"] = zip_of(tmp_path / "x.zip", dataset_members("")).read_bytes()
    root = tmp_path / "project"
    root.mkdir()
    (root / "LICENSE").write_text("mine")
    text = "train: images/train\nval: images/train\nnames: [a]\n"
    text += "" if folder is ... else f"path: {folder.format(root=root)}\n"
    path = tmp_path / "sets" / "mine.yaml"
    path.parent.mkdir()
    path.write_text(f"{text}download: {server.url('mine.zip')}\n")
    with pytest.raises(ValueError, match=r"mine\.yaml: .*folder of its own with 'path:'"):
        ensure_dataset(load_dataset_spec(path, root), root=root)
    assert names_in(root) == ["LICENSE"]
    assert server.requests == []


@pytest.mark.parametrize(
    "taken",
    [
        pytest.param(lambda folder: (folder / "LICENSE").write_text("mine"), id="file"),
        pytest.param(lambda folder: (folder / "labels").write_text("mine"), id="not a folder"),
        pytest.param(lambda folder: (folder / "LICENSE").mkdir(), id="folder"),
        pytest.param(lambda folder: (folder / "LICENSE").symlink_to("nowhere"), id="dead link"),
    ],
)
def test_ensure_dataset_replaces_nothing(server, tmp_path, taken):
    server.files["mine.zip"] = zip_of(tmp_path / "x.zip", dataset_members("")).read_bytes()
    path = write_yaml(tmp_path / "project" / "data.yaml", server.url("mine.zip"))
    folder = tmp_path / "sets" / "mine"
    folder.mkdir(parents=True)
    taken(folder)
    (blocked,) = names_in(folder)
    with pytest.raises(FileExistsError, match="nothing was unpacked; move it away") as caught:
        ensure_dataset(load_dataset_spec(path, tmp_path / "project"))
    assert str(caught.value).startswith(f"{folder / blocked}: ")
    assert names_in(folder) == [blocked]

    (folder / blocked).rename(folder / "moved away")
    (folder / "LICENSE").write_bytes(b"free")  # the same as in the archive: no conflict
    ensure_dataset(load_dataset_spec(path, tmp_path / "project"))
    assert len(server.requests) == 1, "the archive has been kept"
    assert (folder / "moved away").exists() or (folder / "moved away").is_symlink()
    assert (folder / "labels" / "train" / "a.txt").is_file()


@pytest.mark.parametrize("folder", ["{tmp}/elsewhere", "../.config/autostart", "{tmp}/my/.ssh"])
def test_ensure_dataset_does_not_let_a_yaml_choose_any_folder(server, tmp_path, folder):
    server.files["mine.zip"] = zip_of(tmp_path / "x.zip", dataset_members("")).read_bytes()
    path = write_yaml(tmp_path / "my" / "project" / "data.yaml", server.url("mine.zip"))
    folder = folder.format(tmp=tmp_path)
    path.write_text(path.read_text().replace("../sets/mine", folder))
    spec = load_dataset_spec(path, tmp_path / "my" / "project")
    with pytest.raises(PermissionError, match=r"data.yaml: .*would be unpacked into.*--allow-down"):
        ensure_dataset(spec, root=tmp_path / "my" / "project")
    assert server.requests == []
    ensure_dataset(spec, root=tmp_path / "my" / "project", allow_scripts=True)
    assert spec.missing() == ()


def test_ensure_dataset_takes_no_programs_over(server, tmp_path, caplog):
    """`path: yaml` and a file `__init__.py` would be imported in place of the package."""
    members = dataset_members("") | {
        "__init__.py": b"1",
        "images/run.sh": b"2",
        ".bashrc": b"3",
        "labels/train/x.so": b"4",
    }
    server.files["mine.zip"] = zip_of(tmp_path / "x.zip", members).read_bytes()
    path = write_yaml(tmp_path / "project" / "data.yaml", server.url("mine.zip"))
    with caplog.at_level("INFO"):
        ensure_dataset(load_dataset_spec(path, tmp_path / "project"))
    found = {file.name for file in (tmp_path / "sets" / "mine").rglob("*") if file.is_file()}
    assert found == {"a.jpg", "a.txt", "LICENSE"}
    assert "4 files that are neither images, labels nor texts are left out" in caplog.text


def test_ensure_dataset_keeps_a_file_of_the_same_name(server, tmp_path):
    (tmp_path / "sets").mkdir()
    mine = zip_of(tmp_path / "sets" / "mine.zip", dataset_members(""))
    path = write_yaml(tmp_path / "project" / "data.yaml", server.url("mine.zip"))
    ensure_dataset(load_dataset_spec(path, tmp_path / "project"))
    assert mine.exists(), "it was there before, so it is not ours to delete"


@pytest.mark.parametrize("is_right", [True, False])
def test_ensure_dataset_checks_the_sum_that_the_yaml_gives(server, tmp_path, is_right):
    server.files["mine.zip"] = zip_of(tmp_path / "x.zip", dataset_members("")).read_bytes()
    known = hashlib.sha256(server.files["mine.zip"]).hexdigest() if is_right else "0" * 64
    entry = f"{server.url('mine.zip')}#sha256={known}"
    path = write_yaml(tmp_path / "project" / "data.yaml", entry)
    spec = load_dataset_spec(path, tmp_path / "project")
    if is_right:
        ensure_dataset(spec)
    else:
        with pytest.raises(OSError, match=r"expected 0000.*the file was discarded"):
            ensure_dataset(spec)


@pytest.mark.parametrize("name", ["..", "%2e%2e", "a%00b", "x%0ay"])
def test_odd_names_in_addresses(server, tmp_path, name):
    path = write_yaml(tmp_path / "project" / "data.yaml", f'"{server.url(name)}"')
    with pytest.raises(OSError, match=r"404|cannot download"):
        ensure_dataset(load_dataset_spec(path, tmp_path / "project"))


def test_ensure_dataset_cannot_fill_a_folder_outside_of_path(server, tmp_path):
    server.files["mine.zip"] = zip_of(tmp_path / "x.zip", dataset_members("")).read_bytes()
    path = write_yaml(tmp_path / "project" / "data.yaml", server.url("mine.zip"))
    path.write_text(path.read_text().replace("images/train", "/nowhere/images"))
    with pytest.raises(FileNotFoundError, match="/nowhere/images is not there, and no archive can"):
        ensure_dataset(load_dataset_spec(path, tmp_path / "project"))


def test_ensure_dataset_without_a_download(tmp_path):
    path = write_yaml(tmp_path / "project" / "data.yaml", None)
    spec = load_dataset_spec(path, tmp_path / "project")
    with pytest.raises(FileNotFoundError, match="images not found; tried"):
        ensure_dataset(spec)
    (tmp_path / "sets" / "mine" / "images" / "train").mkdir(parents=True)
    ensure_dataset(load_dataset_spec(path, tmp_path / "project"))


SCRIPT = """
from pathlib import Path
Path("../sets/mine/images/train").mkdir(parents=True)
Path("ran.txt").write_text("yes")
"""


def test_commands_run_for_shipped_data_sets_only(tmp_path):
    root = tmp_path / "project"
    (root / "data" / "scripts").mkdir(parents=True)
    (root / "data" / "scripts" / "get.py").write_text(SCRIPT)
    command = "python -m data.scripts.get"
    foreign = load_dataset_spec(write_yaml(root / "mine" / "data.yaml", command), root)
    with pytest.raises(PermissionError, match="--allow-download-scripts") as caught:
        ensure_dataset(foreign, root=root)
    assert repr(command) in str(caught.value)
    assert not (root / "ran.txt").exists()

    for other in (f"{command} --dest /", f"{command}; touch x", "python data/scripts/get.py"):
        put_there = load_dataset_spec(write_yaml(root / "data" / "put.yaml", f'"{other}"'), root)
        with pytest.raises(PermissionError, match="--allow-download-scripts"):
            ensure_dataset(put_there, root=root)
    assert not (root / "ran.txt").exists()

    shipped = load_dataset_spec(write_yaml(root / "data" / "mine.yaml", command), root)
    ensure_dataset(shipped, root=root)
    assert (root / "ran.txt").exists()
    assert shipped.missing() == ()

    (root / "ran.txt").unlink()
    ensure_dataset(foreign, root=root)
    assert not (root / "ran.txt").exists(), "nothing to do when the images are there"


def test_foreign_commands_run_when_allowed(tmp_path):
    root = tmp_path / "project"
    root.mkdir()
    (root / "get.py").write_text(SCRIPT)
    spec = load_dataset_spec(write_yaml(root / "data.yaml", f"{sys.executable} get.py"), root)
    ensure_dataset(spec, allow_scripts=True, root=root)
    assert spec.missing() == ()


@pytest.mark.parametrize(
    ("command", "error", "complaint"),
    [
        ("python -c 'raise SystemExit(3)'", OSError, "failed with status 3"),
        ("no-such-program --x", OSError, "cannot run 'no-such-program --x'"),
        ("python -c pass", FileNotFoundError, "images not found"),
        ("python -c 'unclosed", ValueError, r"mine\.yaml:5: .*unclosed\": No closing quotation"),
        (r"import os\nprint(1)", ValueError, r"mine\.yaml:5: .*one command line.*several lines"),
        (
            "python -c 'raise SystemExit(chr(10).join((chr(49), chr(50))))'",
            OSError,
            r"mine\.yaml: .* failed with status 1: 2$",
        ),
        ("python get.py", OSError, r"mine\.yaml: 'python get\.py' failed with status 1: no net$"),
    ],
)
def test_commands_that_fail(tmp_path, command, error, complaint):
    root = tmp_path / "project"
    spec = load_dataset_spec(write_yaml(root / "data" / "mine.yaml", f'"{command}"'), root)
    (root / "get.py").write_text("raise SystemExit('error: no net')")
    with pytest.raises(error, match=complaint) as caught:
        ensure_dataset(spec, root=root, allow_scripts=True)
    assert "\n" not in str(caught.value)


def test_commands_are_heard(tmp_path, capfd):
    root = tmp_path / "project"
    command = "\"python -c 'import sys; print(1); print(2, file=sys.stderr)'\""
    spec = load_dataset_spec(write_yaml(root / "data" / "mine.yaml", command), root)
    with pytest.raises(FileNotFoundError):
        ensure_dataset(spec, root=root, allow_scripts=True)
    assert capfd.readouterr() == ("1\n", "2\n")


# ----------------------------------------------------------------------------------------- weights
@pytest.fixture
def weights_server(server, tmp_path):
    server.files["yolov5n.pt"] = zip_of(
        tmp_path / "w.zip", {"archive/data.pkl": b"1" * 500}
    ).read_bytes()
    return server


def test_named_weights_are_fetched_once_and_recorded(weights_server, tmp_path):
    folder = tmp_path / "weights"
    path = named_weights("yolov5n.pt", folder, weights_server.url(""))
    assert path == folder / "yolov5n.pt"
    assert read_checksums(folder / "SHA256SUMS") == {"yolov5n.pt": file_sha256(path)}
    assert named_weights("yolov5n.pt", folder, weights_server.url("")) == path
    assert len(weights_server.requests) == 1


def test_named_weights_must_match_the_record(weights_server, tmp_path):
    folder = tmp_path / "weights"
    path = named_weights("yolov5n.pt", folder, weights_server.url(""))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(OSError, match=r"yolov5n\.pt: sha256 is not"):
        named_weights("yolov5n.pt", folder, weights_server.url(""))
    path.unlink()
    named_weights("yolov5n.pt", folder, weights_server.url(""))
    path.unlink()
    weights_server.files["yolov5n.pt"] += b"y"
    with pytest.raises(OSError, match="the file was discarded"):
        named_weights("yolov5n.pt", folder, weights_server.url(""))


def test_named_weights_must_be_an_archive(weights_server, tmp_path):
    weights_server.files["yolov5n.pt"] = b"<html>sign in first</html>"
    with pytest.raises(OSError, match="not a weights file"):
        named_weights("yolov5n.pt", tmp_path / "weights", weights_server.url(""))
    assert names_in(tmp_path / "weights") == []


def test_find_weights(tmp_path, monkeypatch):
    root = tmp_path / "project"
    (root / "weights").mkdir(parents=True)
    (root / "weights" / "mine.pt").write_bytes(b"1")
    (root / "weights" / "yolov5s.pt").write_bytes(b"1")
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(downloads, "named_weights", lambda name, folder: asked.append(name))
    assert find_weights("mine.pt", root) == root / "weights" / "mine.pt"
    assert find_weights("weights/mine.pt", root) == root / "weights" / "mine.pt"
    assert find_weights(root / "weights" / "mine.pt", root) == root / "weights" / "mine.pt"
    assert find_weights("yolov5s.pt", root) == root / "weights" / "yolov5s.pt"
    for name in ("yolov5x6.pt", "weights/yolov5n.pt"):
        find_weights(name, root)
    assert asked == ["yolov5x6.pt", "yolov5n.pt"]
    for name in ("absent.pt", "runs/train/exp/weights/yolov5n.pt", "yolov5z.pt"):
        with pytest.raises(FileNotFoundError, match="tried") as caught:
            find_weights(name, root)
        assert "yolov5s.pt" in str(caught.value)


def test_unknown_name(tmp_path):
    with pytest.raises(ValueError, match=r"resnet\.pt: not a released name"):
        named_weights("resnet.pt", tmp_path)


def test_checksum_file(tmp_path):
    path = tmp_path / "SHA256SUMS"
    assert read_checksums(path) == {}
    record_checksum(path, "b.pt", "2" * 64)
    record_checksum(path, "a.pt", "1" * 64)
    record_checksum(path, "b.pt", "3" * 64)
    assert path.read_text() == f"{'1' * 64}  a.pt\n{'3' * 64}  b.pt\n"
    assert names_in(tmp_path) == ["SHA256SUMS"]


def test_weights_that_changed_after_their_download_are_refused(tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "yolov5n.pt").write_bytes(b"as released")
    record_checksum(weights / CHECKSUM_FILE, "yolov5n.pt", file_sha256(weights / "yolov5n.pt"))
    assert find_weights("yolov5n.pt", tmp_path) == weights / "yolov5n.pt"
    (weights / "yolov5n.pt").write_bytes(b"something else")
    with pytest.raises(OSError, match=r"yolov5n\.pt: has changed since its download"):
        find_weights("yolov5n.pt", tmp_path)
