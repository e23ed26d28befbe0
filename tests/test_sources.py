import base64
import itertools
import socketserver
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from utils import sources
from utils.sources import FrameReader, Sources, describe_address, find_sources


def grey(value, hw=(48, 64)):
    return np.full((*hw, 3), value, np.uint8)


def write_image(path, value=100, hw=(48, 64)):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix, grey(value, hw))[1].tobytes())
    return path


def write_video(path, num_frames=10, fps=12.5):
    """Frame n (from 1) has the grey value 10 * n."""
    codec = "MJPG" if path.suffix == ".avi" else "mp4v"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), fps, (64, 48))
    for number in range(1, num_frames + 1):
        writer.write(grey(10 * number))
    writer.release()
    return path


def break_frame(path, *numbers):
    """Overwrite the pixels of frames (from 1) of an MJPG AVI."""
    content = bytearray(path.read_bytes())
    at = content.find(b"movi")
    for number in itertools.count(1):
        at = content.find(b"00dc", at + 4)
        size = int.from_bytes(content[at + 4 : at + 8], "little")
        if number in numbers:
            content[at + 8 : at + 8 + size] = bytes(size)
        if number == max(numbers):
            break
        at += size
    path.write_bytes(content)
    return path


def values(frames):
    """Number, grey value and whether it is a copy, of each frame."""
    return [(f.number, round(float(f.image.mean()) / 10) * 10, f.is_repeat) for f in frames]


# ----------------------------------------------------------------------------------- what is there
def test_files_are_found(tmp_path, monkeypatch):
    first = write_image(tmp_path / "Bilder 1" / "ä b.jpg")
    second = write_image(tmp_path / "Bilder 1" / "c[1].PNG".lower())
    clip = write_video(tmp_path / "Bilder 1" / "clip.mp4")
    (tmp_path / "Bilder 1" / "notes.md").write_text("no picture")
    (tmp_path / "Bilder 1" / "._a.jpg").write_text("hidden")
    deep = write_image(tmp_path / "Bilder 1" / "deep" / "d.webp")
    folder = tmp_path / "Bilder 1"
    listed = tmp_path / "list.txt"
    listed.write_text("\ufeffBilder 1/ä b.jpg\n\nBilder 1/none.jpg\nBilder 1/ä b.jpg\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    assert find_sources(str(first)) == Sources((first,))
    assert find_sources(str(second)) == Sources((second,))  # exists, so it is no pattern
    assert find_sources(str(folder)) == Sources((second, clip, first))
    assert find_sources(f"{folder}/*.jpg").files == (first,)
    assert find_sources("Bilder 1/**/*").files == tuple(
        path.relative_to(tmp_path) for path in sorted([first, second, clip, deep])
    )
    assert find_sources(str(listed)).files == (first, folder / "none.jpg")
    assert find_sources(str(clip)).has_clips
    assert not find_sources(str(first)).has_clips


def test_a_list_may_be_relative_to_the_working_directory(tmp_path, monkeypatch):
    write_image(tmp_path / "a.jpg")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists/all.txt").write_text("a.jpg\n")
    monkeypatch.chdir(tmp_path)
    assert find_sources("lists/all.txt").files == (Path("a.jpg"),)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0", 0),
        ("12", 12),
        ("rtsp://user:secret@host:554/one?key=1", "rtsp://user:secret@host:554/one?key=1"),
        ("HTTP://host/video", "HTTP://host/video"),
    ],
)
def test_addresses(text, address):
    assert find_sources(text) == Sources(address=address)
    assert find_sources(text).has_clips


def test_addresses_are_shown_without_secrets():
    assert describe_address("rtsp://user:secret@host:554/one?key=1") == "rtsp://host:554/one"
    assert describe_address(3) == "camera 3"


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("none.jpg", FileNotFoundError, "none.jpg: no such file or folder; expected an image, a"),
        ("none", FileNotFoundError, "no such file or folder"),
        ("*.jpg", FileNotFoundError, r"\*.jpg: no file fits this pattern"),
        ("*.md", ValueError, r"\*.md: no image and no video there; expected files of .*\.jpg"),
        ("notes.md", ValueError, "notes.md: neither an image nor a video; expected an image"),
        ("empty", ValueError, "empty: no image and no video there"),
        ("outer", ValueError, r"outer: has images and videos in subfolders only; .*'outer/\*\*/"),
        ("empty.txt", ValueError, "empty.txt: an empty list"),
        ("wrong.txt", ValueError, r"wrong.txt:2: 'rtsp://host/a' has no suffix of an image"),
        ("latin.txt", ValueError, "latin.txt: not a text file in UTF-8"),
        ("9" * 30, FileNotFoundError, f"{'9' * 30}: no such file or folder"),
        ("rtsp://user:x@[::1", ValueError, r"^rtsp://\[::1: not an address \(Invalid IPv6 URL\)$"),
        ("gopher://host/a", ValueError, "gopher://host/a: unknown kind of address gopher://"),
    ],
)
def test_nothing_to_do_is_said(tmp_path, monkeypatch, text, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.md").write_text("")
    (tmp_path / "empty").mkdir()
    write_image(tmp_path / "outer/inner/a.jpg")
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "wrong.txt").write_text("a.jpg\nrtsp://host/a\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe4.jpg\n")
    with pytest.raises(error, match=message):
        find_sources(text)


# ------------------------------------------------------------------------------------------- files
def test_images_are_read_and_damaged_ones_passed_over(tmp_path, caplog):
    whole = write_image(tmp_path / "a.png")
    for name, content in (("b.jpg", b""), ("c.png", whole.read_bytes()[:60]), ("d.jpg", b"text")):
        (tmp_path / name).write_bytes(content)
    reader = FrameReader(Sources((*sorted(tmp_path.iterdir()), tmp_path / "gone.jpg")))
    assert reader.count() == 5
    (frame,) = reader
    assert (frame.origin, frame.number, frame.image.shape) == (str(whole), None, (48, 64, 3))
    assert len(reader.problems) == 4
    for name in ("b.jpg: the file is empty", "c.png: ", "d.jpg: not an image", "gone.jpg: No such"):
        assert any(name in problem for problem in reader.problems)
        assert name in caplog.text


def test_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg", exif=exif)
    (frame,) = FrameReader(Sources((tmp_path / "a.jpg",)))
    assert frame.image.shape == (64, 48, 3)


@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
@pytest.mark.parametrize("stride", [1, 3, 20])
def test_frames_of_a_video(tmp_path, suffix, stride):
    path = write_video(tmp_path / f"ein Clip{suffix}")
    reader = FrameReader(Sources((path,)), stride)
    frames = list(reader)
    numbers = range(1, 11, stride)
    assert values(frames) == [(number, 10 * number, False) for number in numbers]
    assert reader.count() == len(numbers)
    assert {frame.fps for frame in frames} == {12.5 / stride}
    assert reader.problems == []


@pytest.mark.parametrize(
    ("broken", "stride", "expected", "problem"),
    [
        ((4,), 1, [1, 2, 3, -3, 5, 6, 7, 8, 9, 10], "frame 4 cannot be decoded"),
        ((4, 5, 6), 1, [1, 2, 3, -3, -3, -3, 7, 8, 9, 10], "frames 4 to 6 cannot be decoded"),
        ((1, 2), 1, [3, -3, -3, 4, 5, 6, 7, 8, 9, 10], "frames 1 to 2 cannot be decoded"),
        ((4,), 3, [1, -1, 7, 10], "frame 4 cannot be decoded"),
        ((5,), 3, [1, 4, 7, 10], "frame 5 cannot be decoded"),
        ((9, 10), 1, [1, 2, 3, 4, 5, 6, 7, 8], "ends after frame 8 of 10"),
        (tuple(range(1, 11)), 1, [], "no frame can be decoded"),
    ],
)
def test_a_broken_frame_is_replaced_by_its_neighbour(tmp_path, broken, stride, expected, problem):
    path = break_frame(write_video(tmp_path / "a.avi"), *broken)
    reader = FrameReader(Sources((path,)), stride)
    found = [-value // 10 if copy else value // 10 for _, value, copy in values(reader)]
    assert found == expected
    assert reader.problems == [f"{path}: {problem}"]


@pytest.mark.parametrize("content", [b"", b"no video at all"])
def test_a_damaged_video_is_passed_over(tmp_path, content):
    (tmp_path / "a.mp4").write_bytes(content)
    image = write_image(tmp_path / "b.jpg")
    reader = FrameReader(Sources((tmp_path / "a.mp4", image)))
    assert [frame.origin for frame in reader] == [str(image)]
    assert reader.problems == [f"{tmp_path / 'a.mp4'}: not a video, or a damaged one"]


def test_a_truncated_video_is_read_as_far_as_it_goes(tmp_path):
    path = write_video(tmp_path / "a.avi")
    content = path.read_bytes()
    path.write_bytes(content[: content.find(b"movi") + 1200])
    reader = FrameReader(Sources((path,)))
    assert 0 < len(list(reader)) < 10
    assert "ends after frame" in reader.problems[0]


@pytest.fixture
def state(monkeypatch):
    """A function: let all videos state such figures."""

    def state(**figures):
        stated = {getattr(cv2, f"CAP_PROP_{name}"): value for name, value in figures.items()}
        captures = cv2.VideoCapture

        class Stating:
            def __init__(self, *source):
                self._capture = captures(*source)

            def __getattr__(self, name):
                return getattr(self._capture, name)

            def get(self, what):
                return stated[what] if what in stated else self._capture.get(what)

        monkeypatch.setattr(cv2, "VideoCapture", Stating)

    return state


@pytest.mark.parametrize("stated", [-9.2e18, -1, 0, 5, 9, 11, 1e15, 9.2e18, np.inf, np.nan])
def test_a_wrong_number_of_frames_is_no_damage(tmp_path, state, stated):
    path = write_video(tmp_path / "a.avi")
    state(FRAME_COUNT=stated)
    reader = FrameReader(Sources((path,)))
    assert len(list(reader)) == 10
    assert reader.problems == []
    assert reader.count() == (stated if stated in (5, 9, 11) else None)


@pytest.mark.parametrize("stated", [-1, 2, 5])
def test_a_broken_frame_is_not_the_end_where_no_more_are_stated(tmp_path, state, stated):
    path = break_frame(write_video(tmp_path / "a.avi"), 5, 6)
    state(FRAME_COUNT=stated)
    reader = FrameReader(Sources((path,)))
    assert [frame.number for frame in reader] == list(range(1, 11))
    assert reader.problems == [f"{path}: frames 5 to 6 cannot be decoded"]


@pytest.mark.parametrize(("last_ms", "is_short"), [(3900, False), (720, True), (0, True)])
def test_a_video_of_varying_distances_ends_when_its_time_is_over(
    tmp_path, state, last_ms, is_short
):
    """It states 50 frames, four seconds at 12.5 a second, and has 10."""
    path = write_video(tmp_path / "a.avi")
    state(FRAME_COUNT=50, POS_MSEC=last_ms)
    reader = FrameReader(Sources((path,)))
    assert len(list(reader)) == 10
    assert reader.problems == ([f"{path}: ends after frame 10 of 50"] if is_short else [])


# ----------------------------------------------------------------------------------------- streams
@contextmanager
def serve(handler):
    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True

        def handle_error(self, request, client_address):
            """A client that goes away is no error."""

    with Server(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}/stream"
        finally:
            server.shutdown()
            thread.join()


def mjpeg_handler(connections, wait_s=0.01):
    """An MJPEG camera: the grey values it shows at the first, second, ... connection; then none."""
    remaining = iter(connections)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            shown = next(remaining, None)
            if shown is None:
                self.send_error(503)
                return
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            for value in shown:
                jpeg = b"broken" if value is None else cv2.imencode(".jpg", grey(value))[1]
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
                self.wfile.write(head.encode() + bytes(jpeg) + b"\r\n")
                time.sleep(wait_s)

        def log_message(self, *args):
            """Quiet."""

    return Handler


@pytest.fixture
def _quick(monkeypatch):
    monkeypatch.setattr(sources, "RECONNECT_WAITS_S", (0.01, 0.02))


@pytest.mark.usefixtures("_quick")
def test_a_stream_is_read_and_its_end_is_said(caplog):
    caplog.set_level("INFO")
    with serve(mjpeg_handler([range(50, 250, 10)])) as address:
        reader = FrameReader(Sources(address=address))
        assert reader.count() is None
        frames = list(reader)
    numbers = [frame.number for frame in frames]
    assert numbers == sorted(set(numbers))
    assert all(abs(f.image.mean() - (40 + 10 * f.number)) < 4 for f in frames)
    times = [frame.time_s for frame in frames]
    assert times[0] == 0
    assert times == sorted(times)
    assert "lost; trying again in 0.01 s" in caplog.text
    assert reader.problems == [f"{address}: lost, 2 attempts did not bring it back"]


@pytest.mark.usefixtures("_quick")
def test_a_lost_stream_is_taken_up_again(caplog):
    with serve(mjpeg_handler([[50] * 10, [200] * 10])) as address:
        found = {round(f.image.mean(), -1) for f in FrameReader(Sources(address=address))}
    assert found == {50, 200}
    assert caplog.text.count("lost; trying again") == 3  # once, and twice in vain


@pytest.mark.usefixtures("_quick")
def test_only_the_newest_frame_of_a_stream_is_kept():
    with serve(mjpeg_handler([range(10, 250, 4)], 0.005)) as address:
        numbers = []
        for frame in FrameReader(Sources(address=address)):
            numbers.append(frame.number)
            time.sleep(0.1)
    assert numbers[-1] >= 50  # of 60; the end of the stream does not take the last one away
    assert len(numbers) < 20


@pytest.mark.usefixtures("_quick")
def test_every_nth_frame_of_a_stream():
    with serve(mjpeg_handler([range(10, 250, 10)])) as address:
        frames = list(FrameReader(Sources(address=address), vid_stride=4))
    assert {frame.number % 4 for frame in frames} == {1}
    assert all(abs(f.image.mean() - 10 * f.number) < 4 for f in frames)


@pytest.mark.usefixtures("_quick")
def test_a_broken_frame_of_a_stream_is_survived():
    with serve(mjpeg_handler([[50] * 5 + [None] + [200] * 5])) as address:
        found = {round(f.image.mean(), -1) for f in FrameReader(Sources(address=address))}
    assert found == {50, 200}


def test_a_stream_may_be_left_at_any_time():
    with serve(mjpeg_handler([itertools.repeat(100)])) as address:
        frames = iter(FrameReader(Sources(address=address)))
        next(frames)
        num_threads = threading.active_count()
        frames.close()
        assert threading.active_count() < num_threads


@pytest.mark.parametrize(
    ("address", "shown"),
    [("http://127.0.0.1:1/a?key=1", "http://127.0.0.1:1/a"), (97, "camera 97")],
)
def test_what_cannot_be_opened_is_said(address, shown):
    with pytest.raises(OSError, match=f"^{shown}: cannot be opened; expected a camera"):
        FrameReader(Sources(address=address))


def test_an_address_with_an_end_is_read_whole(tmp_path, monkeypatch):
    write_video(tmp_path / "a.avi")
    monkeypatch.chdir(tmp_path)

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            """Quiet."""

    with serve(Handler) as address:
        reader = FrameReader(Sources(address=address.replace("stream", "a.avi")))
        assert len(list(reader)) == 10
    assert reader.problems == []


class Files(SimpleHTTPRequestHandler):
    """The working directory; what has `locked` in its name asks for a password."""

    def do_GET(self):
        expected = "Basic " + base64.b64encode(b"me:s/cret").decode()
        if "locked" in self.path and self.headers["Authorization"] != expected:
            self.send_response(401)
            self.send_header("WWW-Authenticate", 'Basic realm="here"')
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *args):
        """Quiet."""


def test_an_image_elsewhere_is_seen_once(tmp_path, monkeypatch):
    """It was taken for a stream that is lost after each frame, and asked for again for ever."""
    monkeypatch.chdir(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48), (90, 90, 90)).save(tmp_path / "locked ä.JPG", exif=exif)
    (tmp_path / "b.jpg").write_bytes(b"no image")
    with serve(Files) as address:
        secret = address.replace("//", "//me:s%2Fcret@").replace("stream", "locked ä.JPG?a=1")
        found = find_sources(secret)
        assert (found.has_clips, found.is_image_address) == (False, True)
        reader = FrameReader(found)
        assert reader.count() == 1
        (frame,) = reader
        assert frame.image.shape == (64, 48, 3)  # upright
        assert (frame.origin, frame.number) == (address.replace("stream", "locked ä.JPG"), None)
        for name, reason in (
            ("b.jpg", "not an image, or a damaged one"),
            ("none.jpg", "cannot be fetched: File not found"),
            ("locked ä.JPG", "cannot be fetched: .+"),
        ):
            elsewhere = address.replace("stream", name)
            with pytest.raises(OSError, match=f"^{elsewhere}: {reason}"):
                FrameReader(find_sources(elsewhere))


@pytest.mark.parametrize("name", ["a.gif", "b.gif", "c.avi"])
def test_a_short_clip_elsewhere_ends(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name == "c.avi":
        write_video(tmp_path / name, 1)
    else:
        first, *more = [Image.new("L", (64, 48), value) for value in range(10, 60, 10)]
        first.save(tmp_path / name, save_all=True, append_images=more if name == "a.gif" else [])
    with serve(Files) as address:
        reader = FrameReader(Sources(address=address.replace("stream", name)))
        assert len(list(reader)) == (5 if name == "a.gif" else 1)
    assert reader.problems == []


@pytest.mark.usefixtures("_quick")
def test_a_picture_under_another_name_comes_to_an_end(tmp_path, monkeypatch):
    """Each connection gives one frame: a few are enough to see that there is no more."""
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path / "a.png").rename(tmp_path / "snapshot")
    with serve(Files) as address:
        frames = list(FrameReader(Sources(address=address.replace("stream", "snapshot"))))
    assert 1 <= len(frames) <= 3  # of the first connection and of each attempt


def test_a_video_that_does_not_say_how_long_it_is(tmp_path):
    path = tmp_path / "a.h263"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"H263"), 25, (176, 144))
    for number in range(1, 11):
        writer.write(grey(10 * number, (144, 176)))
    writer.release()
    reader = FrameReader(Sources((path.rename(tmp_path / "a.mpg"),)))
    assert len(list(reader)) == 10
    assert reader.problems == []
