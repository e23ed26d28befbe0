import cv2
import numpy as np
import pytest

from utils.video_writer import VideoWriter


def grey(value, hw=(48, 64)):
    return np.full((*hw, 3), value, np.uint8)


def read(path):
    """Frame rate, and the mean grey value of each frame."""
    capture = cv2.VideoCapture(str(path))
    values = []
    while capture.grab():
        values.append(round(capture.retrieve()[1].mean() / 10) * 10)
    return capture.get(cv2.CAP_PROP_FPS), values


def test_nothing_written_makes_no_file(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 25)
    writer.repeat()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_video_that_is_not_whole_is_an_error(tmp_path, full_disk):
    writer = VideoWriter(tmp_path / "a.mp4", 25)
    noise = np.random.default_rng(0).integers(0, 255, (240, 320, 3), np.uint8)
    with full_disk():
        for _ in range(9):
            writer.write(noise)
        with pytest.raises(OSError, match=r"a\.mp4: \d of 9 frames could be written; free some"):
            writer.close()


@pytest.mark.parametrize("fps", [12.5, 25, 30000 / 1001, 60, 1])
def test_rate_and_length(tmp_path, fps):
    path = tmp_path / "höhe 1.mp4"
    writer = VideoWriter(path, fps)
    for value in (10, 100, 200):
        writer.write(grey(value))
    writer.repeat()
    writer.close()
    found, values = read(path)
    assert found == pytest.approx(fps, rel=1e-3)
    assert values == [10, 100, 200, 200]


def test_frames_of_a_stream_keep_its_time(tmp_path):
    """At 10 per second: two too close together, then a pause."""
    writer = VideoWriter(tmp_path / "a.mp4", 10)
    for value, time_s in ((10, 0.0), (60, 0.11), (100, 0.14), (150, 0.55), (200, 0.6)):
        writer.write(grey(value), time_s)
    writer.close()
    assert read(tmp_path / "a.mp4")[1] == [10, 60, 100, 100, 100, 150, 200]


def test_a_picture_of_another_size_is_fitted_in(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 10)
    for hw in ((48, 64), (96, 128), (64, 48), (20, 20)):
        writer.write(grey(200, hw))
    writer.close()
    capture = cv2.VideoCapture(str(tmp_path / "a.mp4"))
    assert [capture.read()[1].shape for _ in range(4)] == [(48, 64, 3)] * 4


def test_what_cannot_be_written_is_said(tmp_path):
    with pytest.raises(OSError, match=r"none/a\.mp4: OpenCV cannot write a video of 64 x 48"):
        VideoWriter(tmp_path / "none" / "a.mp4", 10).write(grey(1))


def test_a_name_that_opencv_would_crash_on_is_refused(tmp_path):
    writer = VideoWriter(tmp_path / "caf\udce9.mp4", 25)
    with pytest.raises(OSError, match="need a name in UTF-8; choose another --project"):
        writer.write(grey(10))
