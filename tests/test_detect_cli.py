import itertools
import re
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import detect
from models import load_model
from tests.test_sources import Files, break_frame, mjpeg_handler, serve, write_image, write_video
from utils import sources, window
from utils.backends import Network
from utils.image_files import read_image


class WhiteFinder(Network):
    """Finds the white rectangle in each image as class 1, its left half as class 2."""

    names = ("disc", "Tür/1", "bar")
    stride = 32
    imgsz_hw = batch_size = None
    precision = torch.float32
    format = "fake"

    def forward(self, images):
        rows = []
        for image in images:
            y, x = (image[0] > 0.9).nonzero(as_tuple=True)
            row = torch.zeros(2, 8)
            if len(x):
                x1, y1, x2, y2 = (float(v) for v in (x.min(), y.min(), x.max() + 1, y.max() + 1))
                row[0] = torch.tensor(
                    [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, 0.9, 0, 1, 0]
                )
                row[1] = torch.tensor([x1 + 8, (y1 + y2) / 2, x2 - x1, y2 - y1, 0.5, 0, 0, 1])
            rows.append(row)
        return torch.stack(rows), []


def picture(hw=(96, 128), box=(40, 30, 100, 70)):
    image = np.zeros((*hw, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = 255
    return image


@pytest.fixture
def folder(tmp_path):
    """Two images in folders of their own, one more, a video of eight frames."""
    root = tmp_path / "in put"
    for name in ("eins/ä 1.png", "zwei/ä 1.png", "zwei/b.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(cv2.imencode(name[-4:], picture())[1].tobytes())
    writer = cv2.VideoWriter(
        str(root / "zwei/clip.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 12.5, (128, 96)
    )
    for shift in range(8):
        writer.write(picture(box=(10 + 4 * shift, 30, 60 + 4 * shift, 70)))
    writer.release()
    return root


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs detect.py in this process; returns the run folder."""
    monkeypatch.setattr(detect, "find_weights", lambda *_: "fake.pt")
    monkeypatch.setattr(detect, "load_network", lambda *_, **__: WhiteFinder())

    def run_main(source, *flags):
        name = str(time.monotonic_ns())
        given = ["--source", str(source), "--img", "128", "--device", "cpu", *flags]
        detect.main([*given, "--project", str(tmp_path / "runs"), "--name", name])
        return tmp_path / "runs" / name

    return run_main


def files_of(run_dir):
    names = {p.relative_to(run_dir).as_posix() for p in run_dir.rglob("*") if p.is_file()}
    return names - {"opt.yaml"}


def frames_of(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while capture.grab():
        frames.append(capture.retrieve()[1])
    return capture.get(cv2.CAP_PROP_FPS), frames


def test_a_run_that_saw_nothing_leaves_no_folder(run, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(OSError, match=r"nothing in it can be read: .*bad\.jpg"):
        run(tmp_path / "bad.jpg", "--save-txt")
    assert not (tmp_path / "runs").exists()


# ----------------------------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --source"),
        (["--source", " "], "--source is empty"),
        (["--source", "x", "--conf-thres", "1.5"], "--conf-thres is 1.5, expected 0 to 1"),
        (["--source", "x", "--iou-thres", "nan"], "--iou-thres is nan"),
        (["--source", "x", "--img", "8"], "--imgsz is 8, expected at least 32"),
        (["--source", "x", "--max-det", "0"], "--max-det is 0"),
        (["--source", "x", "--classes", "1", "-1"], "--classes is -1"),
        (["--source", "x", "--vid-stride", "0"], "--vid-stride is 0, expected at least 1"),
        (["--source", "x", "--line-thickness", "0"], "--line-thickness is 0"),
        (["--source", "x", "--save-conf"], "--save-conf acts only with --save-txt"),
        (["--source", "x", "--nosave", "--hide-conf"], "--hide-conf does not act with --nosave"),
        (["--source", "x", "--nosave", "--line-thickness", "2"], "--line-thickness does not act"),
        (["--source", "x", "--device", "mars"], "--device mars: expected cpu"),
    ],
)
def test_bad_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        detect.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--source", "none.jpg"], FileNotFoundError, "none.jpg: no such file or folder"),
        (["--source", "{image}", "--weights", "none.pt"], FileNotFoundError, "none.pt: no such f"),
        (["--source", "{image}", "--vid-stride", "2"], ValueError, "acts on videos and streams"),
    ],
)
def test_bad_values(folder, tmp_path, flags, error, message):
    image = str(folder / "zwei/b.jpg")
    given = [flag.format(image=image) for flag in flags]
    with pytest.raises(error, match=message):
        detect.main([*given, "--device", "cpu", "--project", str(tmp_path / "runs")])
    assert not (tmp_path / "runs").exists()


def test_half_where_the_best_device_is_a_cpu(folder, monkeypatch):
    monkeypatch.setattr(detect, "select_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(detect, "find_weights", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match="half needs a GPU"):
        detect.main(["--source", str(folder / "zwei/b.jpg"), "--half"])


def test_a_camera_that_is_off_leaves_no_folder(run, tmp_path):
    with pytest.raises(OSError, match="camera 97: cannot be opened"):
        run("97")
    assert not (tmp_path / "runs").exists()


def test_unknown_class(run, folder):
    with pytest.raises(ValueError, match="no class 3; the network knows 0 disc, 1 Tür/1, 2 bar"):
        run(folder / "zwei", "--classes", "3")


# ----------------------------------------------------------------------------------------- results
def test_everything_is_saved(run, folder, caplog):
    caplog.set_level("INFO")
    run_dir = run(f"{folder}/**/*", "--save-txt", "--save-conf", "--save-crop")
    images = ["eins_ä 1", "zwei_ä 1", "b"]
    clips = [f"clip_{number}" for number in range(1, 9)]
    assert files_of(run_dir) == (
        {"eins_ä 1.png", "zwei_ä 1.png", "b.jpg", "clip.mp4"}
        | {f"labels/{stem}.txt" for stem in images + clips}
        | {f"crops/Tür_1/{stem}_1.jpg" for stem in images + clips}
        | {f"crops/bar/{stem}_2.jpg" for stem in images + clips}
    )
    lines = (run_dir / "labels/eins_ä 1.txt").read_text().splitlines()
    expected = [[1, 70 / 128, 50 / 96, 60 / 128, 40 / 96, 0.9], [2, 48 / 128, 50 / 96]]
    assert list(map(float, lines[0].split())) == pytest.approx(expected[0], abs=1e-4)
    assert list(map(float, lines[1].split()))[:3] == pytest.approx(expected[1], abs=1e-4)
    crop = read_image(run_dir / "crops/Tür_1/b_1.jpg")
    assert crop.shape == (40, 60, 3)
    assert crop.mean() > 250  # nothing is drawn into crops
    for text in (
        "3 images and 8 video frames in", "22 detections: Tür/1 11, bar 11", "ms pre-process",
        "ms network", "per second", f"results in {run_dir}",
    ):  # fmt: skip
        assert text in caplog.text
    options = yaml.safe_load((run_dir / "opt.yaml").read_text("utf-8"))
    assert (options["conf_thres"], options["imgsz"]) == (0.25, 128)


def test_nothing_found_still_gives_files(run, tmp_path):
    image = write_image(tmp_path / "a.jpg", 10)
    run_dir = run(image, "--save-txt", "--save-crop")
    assert files_of(run_dir) == {"a.jpg", "labels/a.txt"}
    assert (run_dir / "labels/a.txt").read_text() == ""
    assert abs(read_image(run_dir / "a.jpg").astype(int) - 10).max() <= 2


def test_long_class_names_make_folders_of_their_own(tmp_path):
    """A checkpoint may hold any; beyond 255 bytes "File name too long" ended the run."""
    folders = detect.choose_folders(["x" * 299 + "a", "x" * 299 + "b", "dog"])
    for folder in folders:
        (tmp_path / folder).mkdir()
    assert folders[2] == "dog"


# File names that are legal on Linux; without suffix.
ODD_NAMES = {
    "spaces": "  a  b ", "quotes": "it's \"so\" `x` $HOME", "unicode": "ä 漢字 e\u0301",
    "newline": "one\ntwo", "dash": "-rf", "percent": "100%d %s {0}", "pattern": "a[1]*?",
    "escape": "a\x1b[31mb\tc", "bytes": "caf\udce9", "dots": "a.b..", "colon": "C:\\x:y",
}  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="others allow fewer names")
@pytest.mark.parametrize("suffix", [".jpg", ".avi"])
@pytest.mark.parametrize("kind", ODD_NAMES)
def test_odd_file_names(run, folder, tmp_path, caplog, kind, suffix):
    caplog.set_level("INFO")
    stem = ODD_NAMES[kind]
    path = tmp_path / f"in {stem}" / f"{stem}{suffix}"
    path.parent.mkdir()
    source = {".jpg": "zwei/b.jpg", ".avi": "zwei/clip.avi"}[suffix]
    path.write_bytes((folder / source).read_bytes())
    ends = [""] if suffix == ".jpg" else [f"_{number}" for number in range(1, 9)]
    expected = {f"{stem}{'.mp4' if suffix == '.avi' else suffix}"}
    expected |= {f"labels/{stem}{end}.txt" for end in ends}
    expected |= {f"crops/{cls}/{stem}{end}_{n}.jpg" for end in ends
                 for n, cls in enumerate(("Tür_1", "bar"), 1)}  # fmt: skip
    if (kind, suffix) == ("bytes", ".avi"):
        with pytest.raises(OSError, match="videos need a name in UTF-8; rename it"):
            run(path)
        return
    for source in (path, path.parent):
        run_dir = run(source, "--save-txt", "--save-crop")
        assert files_of(run_dir) == expected
    assert yaml.safe_load((run_dir / "opt.yaml").read_text("utf-8"))["source"] == str(path.parent)
    (path.parent / f"damaged {stem}.jpg").write_bytes(b"no image")
    run(path.parent)
    said = [line for line in caplog.messages if "damaged" in line]
    assert len(said) == 1


def test_a_video_keeps_rate_and_length(run, folder):
    source = folder / "zwei/clip.avi"
    fps, frames = frames_of(run(source) / "clip.mp4")
    assert (fps, len(frames)) == (12.5, 8)
    originals = frames_of(source)[1]
    for frame, original in zip(frames, originals, strict=True):
        assert abs(frame.astype(int) - original)[75:].mean() < 6  # below the boxes
    fps, frames = frames_of(run(source, "--vid-stride", "3") / "clip.mp4")
    assert (fps, len(frames)) == (pytest.approx(12.5 / 3, rel=1e-3), 3)


def test_a_broken_frame_keeps_its_place(run, folder, caplog):
    source = break_frame(folder / "zwei/clip.avi", 4, 5)
    run_dir = run(source, "--save-txt")
    _, frames = frames_of(run_dir / "clip.mp4")
    assert len(frames) == 8
    assert abs(frames[2].astype(int) - frames[4]).mean() < 2
    assert "clip.avi: frames 4 to 5 cannot be decoded" in caplog.text
    assert not (run_dir / "labels/clip_4.txt").exists()


def test_damaged_files_are_named_and_passed_over(run, folder, caplog):
    (folder / "zwei/b.jpg").write_bytes(b"no image")
    (folder / "zwei/clip.avi").write_bytes(b"no video")
    run_dir = run(folder / "zwei")
    assert files_of(run_dir) == {"ä 1.png"}
    assert "b.jpg: not an image; expected a whole JPEG" in caplog.text
    assert "clip.avi: not a video, or a damaged one" in caplog.text
    (folder / "zwei/ä 1.png").write_bytes(b"")
    with pytest.raises(OSError, match=r"zwei: nothing in it can be read: .*b.jpg.* \(and 2 more\)"):
        run(folder / "zwei")


def test_frames_of_a_video_hit_no_image(run, folder):
    image = (folder / "zwei/b.jpg").rename(folder / "zwei/clip_3.jpg")
    run_dir = run(image.parent, "--save-txt")
    assert {"labels/clip_3.txt", "labels/clip_video_3.txt"} <= files_of(run_dir)
    assert {"clip_3.jpg", "clip_video.mp4"} <= files_of(run_dir)


def test_orientation(run, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture()).save(tmp_path / "a.jpg", exif=exif)
    run_dir = run(tmp_path / "a.jpg", "--save-txt")
    assert read_image(run_dir / "a.jpg").shape == (128, 96, 3)
    numbers = (run_dir / "labels/a.txt").read_text().split()[:5]
    assert list(map(float, numbers)) == pytest.approx(
        [1, 46 / 96, 70 / 128, 40 / 96, 60 / 128], abs=0.01
    )


# -------------------------------------------------------------------------------------- flags act
def labels(run_dir, stem="b"):
    return [line.split() for line in (run_dir / f"labels/{stem}.txt").read_text().splitlines()]


@pytest.mark.parametrize(
    ("flags", "classes"),
    [
        ([], ["1", "2"]),
        (["--conf-thres", "0.6"], ["1"]),
        (["--max-det", "1"], ["1"]),
        (["--classes", "2"], ["2"]),
        (["--agnostic-nms"], ["1"]),
        (["--agnostic-nms", "--iou-thres", "0.9"], ["1", "2"]),
    ],
)
def test_flags_of_detection(run, folder, flags, classes):
    rows = labels(run(folder / "zwei/b.jpg", "--save-txt", *flags))
    assert [row[0] for row in rows] == classes
    assert {len(row) for row in rows} == {5}


def test_flags_of_the_input(run, folder, monkeypatch):
    seen = []
    forward = WhiteFinder.forward
    monkeypatch.setattr(
        WhiteFinder, "forward", lambda self, x: seen.append(tuple(x.shape)) or forward(self, x)
    )
    image = folder / "zwei/b.jpg"
    for flags in ([], ["--img", "64"], ["--augment"]):
        run(image, *flags)
    plain = (1, 3, 128, 160)
    assert seen == [plain, (1, 3, 64, 96), plain, (1, 3, 96, 128), (1, 3, 96, 128)]


def test_flags_of_drawing(run, folder):
    image = folder / "eins/ä 1.png"
    flags = ([], ["--hide-conf"], ["--hide-labels"], ["--line-thickness", "6"])
    drawn = [read_image(run(image, *given) / "ä 1.png") for given in flags]
    changed = [int((one != picture()).any(2).sum()) for one in drawn]
    default, no_conf, no_labels, thick = changed
    assert 0 < no_labels < no_conf < default < thick


def test_nosave(run, folder):
    assert files_of(run(folder / "zwei", "--nosave")) == set()
    assert files_of(run(folder / "zwei/b.jpg", "--nosave", "--save-txt")) == {"labels/b.txt"}


def test_exist_ok(run, folder, tmp_path):
    for number, flags in ((1, []), (2, []), (2, ["--exist-ok"])):
        run(folder / "zwei/b.jpg")
        detect.main(
            ["--source", str(folder / "zwei/b.jpg"), "--project", str(tmp_path / "p"), *flags]
        )
        assert len(list((tmp_path / "p").iterdir())) == number


def test_view_img_without_a_display(run, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(ValueError, match="--view-img: no window can be opened here"):
        run(folder / "zwei", "--view-img")
    assert not (tmp_path / "runs").exists()


def test_view_img(run, folder, monkeypatch):
    """An image waits for a key, a video does not; q ends the run."""
    shown, keys = [], iter([32, -1, -1, ord("q")])
    monkeypatch.setattr(detect, "check_display", lambda: None)
    monkeypatch.setattr(window.cv2, "namedWindow", lambda *_: None)
    monkeypatch.setattr(window.cv2, "getWindowProperty", lambda *_: 1)
    monkeypatch.setattr(window.cv2, "imshow", lambda title, image: shown.append((title, image)))
    monkeypatch.setattr(window.cv2, "waitKey", lambda _: next(keys))
    run_dir = run(f"{folder}/zwei/[bc]*", "--view-img")
    assert [title for title, _ in shown] == ["b.jpg (q ends)"] + ["clip.avi (q ends)"] * 3
    assert (shown[0][1] != picture()).any()
    assert len(frames_of(run_dir / "clip.mp4")[1]) == 3


# ----------------------------------------------------------------------------------------- streams
def test_an_image_elsewhere_is_an_image(run, folder, monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.chdir(folder / "zwei")
    with serve(Files) as address:
        run_dir = run(address.replace("stream", "b.jpg?size=2"), "--save-txt")
    assert files_of(run_dir) == {"b.jpg", "labels/b.txt"}
    assert "1 images and 0 video frames" in caplog.text
    assert "Ctrl-C" not in caplog.text


def test_a_stream_is_written_at_its_pace(run, monkeypatch, caplog):
    monkeypatch.setattr(sources, "RECONNECT_WAITS_S", (0.01,))
    monkeypatch.setattr(sources, "_frame_rate", lambda _: 20.0)
    with serve(mjpeg_handler([[50] * 12, [200] * 12], 0.05)) as address:
        run_dir = run(address, "--save-txt")
    (video,) = run_dir.glob("*.mp4")
    assert (
        video.name == f"{address.removeprefix('http://').replace(':', '_').replace('/', '_')}.mp4"
    )
    fps, frames = frames_of(video)
    assert fps == 20
    assert 18 <= len(frames) <= 45  # 24 frames in about 1.2 s, more on a busy machine
    assert {round(frame.mean() / 50) * 50 for frame in frames} == {50, 200}
    assert "lost, 1 attempts did not bring it back" in caplog.text


def test_ctrl_c_ends_a_stream_cleanly(run, monkeypatch, caplog):
    caplog.set_level("INFO")
    calls = itertools.count()

    def interrupted(self, images):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return torch.zeros(1, 1, 8), []

    monkeypatch.setattr(WhiteFinder, "forward", interrupted)
    with serve(mjpeg_handler([itertools.repeat(100)])) as address:
        run_dir = run(address)
    (video,) = run_dir.glob("*.mp4")
    assert len(frames_of(video)[1]) >= 1
    assert "\ninterrupted" in caplog.text
    assert "0 images and 4 video frames" in caplog.text


def test_ctrl_c_in_a_file_leaves_a_whole_video(run, folder, monkeypatch, tmp_path):
    calls = itertools.count()

    def interrupted(self, images):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return torch.zeros(1, 1, 8), []

    monkeypatch.setattr(WhiteFinder, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(folder / "zwei/clip.avi")
    (video,) = (tmp_path / "runs").rglob("clip.mp4")
    assert len(frames_of(video)[1]) == 4


def test_passwords_are_kept_from_files(run, monkeypatch):
    monkeypatch.setattr(sources, "RECONNECT_WAITS_S", ())
    with serve(mjpeg_handler([[100] * 5])) as address:
        run_dir = run(address.replace("://", "://me:secret@") + "?key=hidden", "--save-txt")
    saved = (run_dir / "opt.yaml").read_text() + " ".join(files_of(run_dir))
    assert re.search(r"stream_\d\.txt", saved)  # the newest of five frames, or more of them
    assert "secret" not in saved
    assert "hidden" not in saved


# -------------------------------------------------------------------------- real network, commands
@pytest.mark.data
def test_python_and_command_agree(shared_dir, tmp_path):
    weights = str(shared_dir / "weights/yolov5n.pt")
    images = sorted((shared_dir / "data/coco128/images").rglob("*.jpg"))[:3]
    (tmp_path / "list.txt").write_text("\n".join(map(str, images)))
    detect.main(
        ["--weights", weights, "--source", str(tmp_path / "list.txt"), "--img", "320", "--save-txt",
         "--save-conf", "--nosave", "--device", "cpu", "--project", str(tmp_path)]
    )  # fmt: skip
    model = load_model(weights, "cpu", imgsz=320)
    num_found = 0
    for path, found in zip(images, model(images), strict=True):
        height, width = read_image(path).shape[:2]
        rows = [list(map(float, row)) for row in labels(tmp_path / "exp", path.stem)]
        for (cls, cx, cy, w, h, conf), box in zip(rows, found.table, strict=True):
            assert (cls, conf) == (box["class"], pytest.approx(box["score"], abs=1e-4))
            expected = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
            actual = [box["x1"] / width, box["y1"] / height, box["x2"] / width, box["y2"] / height]
            assert actual == pytest.approx(expected, abs=1e-4)
            num_found += 1
    assert num_found > 3


@pytest.mark.slow
@pytest.mark.data
def test_as_a_command(run_script, shared_dir, tmp_path, request):
    """Exit status; and what `timeout` sends, which ends a run as Ctrl-C does."""
    flags = ["--weights", str(shared_dir / "weights/yolov5n.pt"), "--project", str(tmp_path)]
    flags += ["--device", "cpu"]
    done = run_script("detect.py", *flags, "--source", "none")
    assert done.returncode == 1
    assert done.stderr.startswith("error: none: no such file or folder; expected an image")
    clip = write_video(tmp_path / "clip.mp4")
    done = run_script("detect.py", *flags, "--source", clip, "--img", "64")
    assert (done.returncode, done.stderr) == (0, "")
    script = [sys.executable, str(request.config.rootpath / "detect.py"), *flags]
    assert len(frames_of(tmp_path / "exp/clip.mp4")[1]) == 10
    with serve(mjpeg_handler([itertools.repeat(100)])) as address:
        process = subprocess.Popen(
            [*script, "--source", address, "--img", "64", "--save-txt"],
            stdout=subprocess.PIPE,
            text=True,
        )
        while "Ctrl-C ends the run" not in process.stdout.readline():
            assert process.poll() is None
        while len(list(tmp_path.glob("exp2/labels/*.txt"))) < 4:
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        output = process.communicate(timeout=30)[0]
    assert process.returncode == 0, output
    assert "ended by SIGTERM" in output
    (video,) = (tmp_path / "exp2").glob("*.mp4")
    assert len(frames_of(video)[1]) > 0  # as many as the time between the first and the last
