"""Detect objects in images, videos, cameras and streams.

    python detect.py --weights yolov5s.pt --source street.jpg
    python detect.py --weights runs/train/exp/weights/best.pt --source '../datasets/bccd/**/*.jpg'
    python detect.py --weights yolov5n.pt --source clip.mp4 --vid-stride 2 --classes 0 2
    python detect.py --weights yolov5n.pt --source rtsp://camera.local/stream1 --nosave --save-txt
    python detect.py --weights yolov5n.pt --source 0 --view-img

Results are in runs/detect/exp*: pictures and videos with boxes, labels, crops.
"""

from __future__ import annotations

from utils.stopping import end_at_ctrl_c

if __name__ == "__main__":
    end_at_ctrl_c()  # from here on, as an import can lose it

from utils.flags.answer import answer_early
from utils.flags.detect import parse_args

if __name__ == "__main__":
    answer_early(parse_args, __doc__)  # help and mistakes, before torch is loaded

import argparse
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from torch import Tensor
from tqdm import tqdm

from utils.atomic import name_in_errors
from utils.backends import load_network
from utils.command import run_command
from utils.device import describe_device, select_device
from utils.downloads import find_weights
from utils.output_names import safe_name, stem_for_numbers, unique_stems
from utils.pipeline import DetectionSettings, Pipeline, check_half
from utils.plots.images import annotate
from utils.run_dir import open_run_dir, save_options
from utils.sources import Frame, FrameReader, Sources, describe_address, find_sources
from utils.stopping import describe_interruption
from utils.video_writer import VideoWriter
from utils.window import check_display, show
from utils.yolo_text import write_text

ROOT = Path(__file__).resolve().parent
LOGGER = logging.getLogger("detect")


def main(argv: Sequence[str] | None = None) -> None:
    """Run one detection from its options to its files."""
    options = parse_args(argv, __doc__)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    if options.view_img:
        check_display()
    sources = find_sources(options.source)
    if options.vid_stride > 1 and not sources.has_clips:
        raise ValueError(f"--vid-stride acts on videos and streams, {options.source} has none")
    device = select_device(options.device)
    check_half(options.half, device)
    weights = find_weights(options.weights, ROOT)
    network = load_network(weights, device, half=options.half)
    pipeline = Pipeline(network, device, settings(options))
    LOGGER.info("%s network on %s", network.format, describe_device(device))
    reader = FrameReader(sources, options.vid_stride)
    if isinstance(sources.address, str):
        options.source = describe_address(sources.address)  # opt.yaml must not tell a password
    with open_run_dir(options.project, options.name, options.exist_ok) as run_dir:
        save_options(run_dir / "opt.yaml", vars(options))
        results = ResultWriter(run_dir, sources, network.names, options)
        started = time.perf_counter()
        detect(reader, pipeline, results, options)
        seconds = time.perf_counter() - started
        check_something_was_read(reader, results, options.source)
    print_summary(reader, pipeline, results, seconds)
    LOGGER.info("results in %s", run_dir)


def settings(options: argparse.Namespace) -> DetectionSettings:
    """What the options say about detecting."""
    return DetectionSettings(
        imgsz=options.imgsz,
        conf_thres=options.conf_thres,
        iou_thres=options.iou_thres,
        max_det=options.max_det,
        classes=tuple(options.classes) if options.classes else None,
        agnostic=options.agnostic_nms,
        augment=options.augment,
    )


def detect(
    reader: FrameReader, pipeline: Pipeline, results: ResultWriter, options: argparse.Namespace
) -> None:
    """Take picture after picture; whatever ends this, the files written so far are complete."""
    frames = iter(reader)
    is_live = reader.sources.address is not None and reader.sources.has_clips
    if is_live:
        LOGGER.info("Ctrl-C ends the run")
    try:
        for frame in tqdm(frames, total=reader.count(), unit=" images", disable=None):
            if frame.is_repeat:
                results.repeat(frame)
                continue
            (detections,) = pipeline([frame.image])
            picture = results.add(frame, detections)
            if options.view_img:
                title = f"{Path(frame.origin).name} (q ends)"
                if not show(title, picture, wait=frame.number is None):
                    break
    except KeyboardInterrupt as error:
        if not is_live:
            raise
        LOGGER.info("\n%s", describe_interruption(error))
    finally:
        frames.close()
        results.close()


class ResultWriter:
    """What is written while detection goes on, and the counts of it.

    Names of files begin with the stem of the source: `street.jpg`, `labels/street.txt`,
    `crops/car/street_1.jpg`; of a video also with the number of the frame: `labels/clip_12.txt`,
    `crops/car/clip_12_1.jpg`.
    """

    def __init__(
        self, run_dir: Path, sources: Sources, names: tuple[str, ...], options: argparse.Namespace
    ) -> None:
        self.run_dir, self.names, self.options = run_dir, names, options
        self.num_images = 0
        self.num_clip_frames = 0
        self.num_per_class: Counter[int] = Counter()
        self._stems = choose_stems(sources)
        self._folders = choose_folders(names)
        self._video: VideoWriter | None = None
        self._has_drawing = options.view_img or not options.nosave
        if options.save_txt:
            (run_dir / "labels").mkdir(exist_ok=True)

    def add(self, frame: Frame, detections: Tensor) -> np.ndarray:
        """Save what the options ask for; returns the picture with its boxes, BGR."""
        if frame.number is None:
            self.num_images += 1
        else:
            self.num_clip_frames += 1
        self.num_per_class.update(detections[:, 5].int().tolist())
        stem = self._stems[frame.origin]
        numbered = stem if frame.number is None else f"{stem}_{frame.number}"
        if self.options.save_txt:
            path = self.run_dir / "labels" / f"{numbered}.txt"
            write_text(path, detections, frame.image.shape[:2], self.options.save_conf)
        if self.options.save_crop:
            self._save_crops(frame.image, detections, numbered)
        if not self._has_drawing:
            return frame.image
        picture = self._draw(frame.image, detections)
        if not self.options.nosave:
            self._save(frame, picture, stem)
        return picture

    def repeat(self, frame: Frame) -> None:
        """Hold the last picture of a video for one frame more."""
        if self._video is not None:
            self._video.repeat()

    def close(self) -> None:
        """Complete the video that is being written."""
        if self._video is not None:
            self._video.close()
            self._video = None

    def _draw(self, image: np.ndarray, detections: Tensor) -> np.ndarray:
        drawn = annotate(
            cv2.cvtColor(image, cv2.COLOR_BGR2RGB),
            detections,
            self.names,
            line_width=self.options.line_thickness,
            show_names=not self.options.hide_labels,
            show_conf=not self.options.hide_conf,
        )
        return cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR)

    def _save(self, frame: Frame, picture: np.ndarray, stem: str) -> None:
        if frame.number is None:
            write_image(self.run_dir / f"{stem}{Path(frame.origin).suffix.lower()}", picture)
            return
        path = self.run_dir / f"{stem}.mp4"
        if self._video is None or self._video.path != path:
            self.close()
            self._video = VideoWriter(path, frame.fps)
        self._video.write(picture, frame.time_s)

    def _save_crops(self, image: np.ndarray, detections: Tensor, numbered: str) -> None:
        height, width = image.shape[:2]
        for number, (x1, y1, x2, y2, _, cls) in enumerate(detections.tolist(), 1):
            left, top = min(math.floor(x1), width - 1), min(math.floor(y1), height - 1)
            right, bottom = max(math.ceil(x2), left + 1), max(math.ceil(y2), top + 1)
            folder = self.run_dir / "crops" / self._folders[int(cls)]
            folder.mkdir(parents=True, exist_ok=True)
            write_image(folder / f"{numbered}_{number}.jpg", image[top:bottom, left:right])


def choose_stems(sources: Sources) -> dict[str, str]:
    """By origin, how the names of its files begin; no two files get the same name."""
    if sources.address is not None:
        origin = describe_address(sources.address)
        name = Path(origin).stem if sources.is_image_address else origin.rpartition("://")[2]
        return {origin: safe_name(name).replace(" ", "_")}
    clips = Sources(tuple(path for path in sources.files if Sources((path,)).has_clips))
    stems = unique_stems([str(path) for path in sources.files])
    for path in map(str, clips.files):
        stems[path] = stem_for_numbers(stems[path], stems.values())
    return stems


def choose_folders(names: Sequence[str]) -> list[str]:
    """A folder name for each class; where names collide on some system, with its number."""
    folders = [safe_name(name) for name in names]
    counts = Counter(folder.casefold() for folder in folders)
    return [
        folder if counts[folder.casefold()] == 1 else f"{folder}_{cls}"
        for cls, folder in enumerate(folders)
    ]


def write_image(path: Path, image: np.ndarray) -> None:
    """Encode by the suffix. Not cv2.imwrite: it fails on some file names on Windows."""
    is_encoded, content = cv2.imencode(path.suffix, image)
    if not is_encoded:
        raise OSError(f"{path}: OpenCV cannot write an image of {image.shape[1::-1]} pixels so")
    with name_in_errors(path):
        path.write_bytes(content.tobytes())


def check_something_was_read(reader: FrameReader, results: ResultWriter, source: str) -> None:
    """A run that saw nothing is an error."""
    if results.num_images + results.num_clip_frames or not reader.problems:
        return
    more = f" (and {len(reader.problems) - 1} more)" if len(reader.problems) > 1 else ""
    raise OSError(f"{source}: nothing in it can be read: {reader.problems[0]}{more}")


def print_summary(
    reader: FrameReader, pipeline: Pipeline, results: ResultWriter, seconds: float
) -> None:
    """What was seen and found, and how long it took."""
    num_seen = results.num_images + results.num_clip_frames
    LOGGER.info(
        "%d images and %d video frames in %.1f s: %.1f per second",
        results.num_images, results.num_clip_frames, seconds, num_seen / max(seconds, 1e-9),
    )  # fmt: skip
    if reader.problems:
        LOGGER.warning("%d problems, see above", len(reader.problems))
    found = (
        f"{results.names[cls]} {count}" for cls, count in sorted(results.num_per_class.items())
    )
    total = results.num_per_class.total()
    LOGGER.info("%d detections%s", total, f": {', '.join(found)}" if total else "")
    LOGGER.info(
        "per image at %d px: %.1f ms pre-process, %.1f ms network, %.1f ms NMS",
        pipeline.imgsz, *pipeline.ms_per_image(),
    )  # fmt: skip


if __name__ == "__main__":
    run_command(main)
