"""Draw the data set of `data/shapes.yaml`: geometric shapes that are not easy to find.

    python -m data.scripts.make_shapes
    python -m data.scripts.make_shapes --out datasets/shapes-large --train 4000 --size 640

Every image depends on the seed, its split and its number alone, so a larger data set begins with
the images of the smaller one.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.random import Generator

from utils.atomic import staging_folder

PROJECT_ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "val")
CLASS_NAMES = ("circle", "square", "triangle", "star", "ring", "cross")

MIN_VISIBLE = 0.45  # less of a shape than this is never left, so every shape has a label
MIN_INSIDE = 0.7  # share of a shape that lies inside the image
SMALLEST, LARGEST = 0.07, 0.5  # side of a shape, as a share of the image side
MAX_SHAPES = 8


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Draw the data set of data/shapes.yaml.")
    parser.add_argument(
        "--out",
        type=Path,
        default=PROJECT_ROOT / "datasets" / "shapes",
        help="folder to make; must not exist",
    )
    parser.add_argument("--seed", type=int, default=0, help="same seed, same images; 0 or more")
    parser.add_argument("--train", type=int, default=400, help="number of training images")
    parser.add_argument("--val", type=int, default=100, help="number of validation images")
    parser.add_argument("--size", type=int, default=320, help="side of the square images, pixels")
    args = parser.parse_args()
    if min(args.seed, args.train, args.val) < 0 or args.size < 32:
        parser.error("--seed, --train and --val must be 0 or more, --size at least 32")
    if args.out.exists():
        parser.error(f"{args.out} exists; delete it or choose another folder with --out")
    return args


def main() -> None:
    """Make the data set and say where it lies."""
    args = parse_args()
    num_boxes = make_dataset(args.out, args.seed, (args.train, args.val), args.size)
    print(
        f"{args.out}: {args.train} training and {args.val} validation images of "
        f"{args.size}x{args.size} pixels, {num_boxes} boxes of {len(CLASS_NAMES)} classes"
    )


def make_dataset(out: Path, seed: int, num_images: tuple[int, int], size: int) -> int:
    """Write images and labels of both splits in YOLO layout; return the number of boxes.

    Everything is written in a temporary folder, so `out` is complete or absent.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(out.parent) as staging:
        unfinished = staging / out.name
        num_boxes = sum(
            _write_split(unfinished, split, seed, count, size)
            for split, count in zip(SPLITS, num_images, strict=True)
        )
        unfinished.rename(out)
    return num_boxes


def _write_split(root: Path, split: str, seed: int, count: int, size: int) -> int:
    images, labels = root / "images" / split, root / "labels" / split
    images.mkdir(parents=True)
    labels.mkdir(parents=True)
    num_boxes = 0
    for index in range(count):
        rng = np.random.default_rng((seed, SPLITS.index(split), index))
        image, boxes = draw_image(rng, size)
        quality = int(rng.integers(70, 96))
        _, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        (images / f"{index:05d}.jpg").write_bytes(encoded.tobytes())
        lines = [f"{cls:.0f} {cx:.6f} {cy:.6f} {w:.6f} {h:.6f}\n" for cls, cx, cy, w, h in boxes]
        (labels / f"{index:05d}.txt").write_text("".join(lines), encoding="utf-8")
        num_boxes += len(boxes)
    return num_boxes


def draw_image(rng: Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw one picture.

    Returns:
        uint8 [size, size, 3] BGR, and the boxes of what is visible of each shape: float64
        [n, 5], class, cx, cy, w, h normalised. n may be 0.
    """
    canvas = draw_background(rng, size)
    for _ in range(rng.integers(1, 6)):
        _draw_clutter(rng, canvas)
    shapes: list[Shape] = []
    for _ in range(_num_shapes(rng)):
        shape = _place_shape(rng, size, shapes)
        if shape is not None:
            _paint(rng, canvas, shape)
            _hide_behind(shape.mask, shapes)
            shapes.append(shape)
    _draw_bars_on_top(rng, canvas, shapes)
    boxes = np.array([_box_of(shape) for shape in shapes]).reshape(-1, 5)
    return _take_photograph(rng, canvas), boxes


def _num_shapes(rng: Generator) -> int:
    """One image in twenty shows none."""
    return 0 if rng.random() < 0.05 else int(rng.integers(1, MAX_SHAPES + 1))


# --- backgrounds ----------------------------------------------------------------------------


def draw_background(rng: Generator, size: int) -> np.ndarray:
    """A gradient between two colours, noise of several scales, often stripes; float32 BGR."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size
    ramp = (np.cos(angle) * x + np.sin(angle) * y + 1) / 2.5
    dark, light = _dull_colour(rng), _dull_colour(rng)
    canvas = dark + (light - dark) * ramp[..., None]
    noise = _noise_octaves(rng, size)
    noise = 0.3 * noise + 0.7 * noise[..., :1]
    canvas += noise * rng.uniform(8, 32)
    if rng.random() < 0.5:
        period = rng.uniform(0.03, 0.25)
        angle = rng.uniform(0, np.pi)
        wave = np.sin(2 * np.pi * (np.cos(angle) * x + np.sin(angle) * y) / period)
        stripes = np.sign(wave) if rng.random() < 0.5 else wave
        canvas += stripes[..., None] * (rng.uniform(-25, 25) + rng.normal(0, 5, 3))
    return canvas.clip(0, 255).astype(np.float32)


def _dull_colour(rng: Generator) -> np.ndarray:
    """A grey with a slight tint, [3]."""
    return (rng.uniform(30, 220) + rng.normal(0, 12, 3)).astype(np.float32)


def _vivid_colour(rng: Generator, hue: float) -> np.ndarray:
    """A bright colour, [3] BGR; `hue` in shares of the colour circle."""
    hsv = np.array([[[hue % 1 * 180, rng.uniform(90, 255), rng.uniform(90, 255)]]]).astype(np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float32)


def _noise_octaves(rng: Generator, size: int) -> np.ndarray:
    """Random grids from coarse to fine, enlarged smoothly and added; about -1 to 1, [h, w, 3]."""
    total = np.zeros((size, size, 3), np.float32)
    weight = 1.0
    for cells in (3, 8, 20, 50):
        grid = rng.uniform(-1, 1, (cells, cells, 3)).astype(np.float32)
        total += weight * cv2.resize(grid, (size, size), interpolation=cv2.INTER_CUBIC)
        weight *= rng.uniform(0.4, 0.9)
    return total


def _draw_clutter(rng: Generator, canvas: np.ndarray) -> None:
    """Things that look a little like shapes: strokes, open arcs, irregular blobs. No labels."""
    size = len(canvas)
    layer = np.zeros((size, size), np.uint8)
    centre = rng.integers(0, size, 2)
    extent = size * rng.uniform(0.04, 0.25)
    thickness = int(rng.integers(1, max(2, size // 60) + 1))
    kind = rng.integers(3)
    if kind == 0:
        points = centre + rng.normal(0, extent, (int(rng.integers(2, 6)), 2))
        cv2.polylines(layer, [points.astype(np.int32)], False, 255, thickness, cv2.LINE_AA)
    elif kind == 1:
        axes = (max(2, int(extent)), max(2, int(extent * rng.uniform(0.5, 1))))
        start = int(rng.integers(360))
        middle = (int(centre[0]), int(centre[1]))
        end = start + int(rng.integers(60, 200))
        cv2.ellipse(layer, middle, axes, start, 0, end - start, 255, thickness, cv2.LINE_AA)
    else:
        angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(5, 10))))
        radii = extent * rng.uniform(0.3, 1, len(angles))
        points = centre + np.stack([np.cos(angles) * radii, np.sin(angles) * radii], 1)
        cv2.fillPoly(layer, [points.astype(np.int32)], 255, cv2.LINE_AA)
    colour = _vivid_colour(rng, rng.random()) if rng.random() < 0.3 else _dull_colour(rng)
    _blend(canvas, layer, colour, rng.uniform(0.3, 0.9))


def _blend(canvas: np.ndarray, mask: np.ndarray, colour: np.ndarray, opacity: float) -> None:
    """Paint `colour`, [3] or [h, w, 3], where the mask is set; soft at its antialiased edge."""
    x, y, width, height = cv2.boundingRect(mask)
    part = np.s_[y : y + height, x : x + width]
    alpha = (mask[part].astype(np.float32) * np.float32(opacity / 255))[..., None]
    colour = colour.astype(np.float32)
    canvas[part] += ((colour[part] if colour.ndim == 3 else colour) - canvas[part]) * alpha


# --- shapes ---------------------------------------------------------------------------------


class Shape(NamedTuple):
    """What is left to see of one shape (uint8 mask of the image) and its area when whole."""

    cls: int
    mask: np.ndarray
    whole_area: int

    def share_left(self, on_top: np.ndarray) -> float:
        """Share of the whole shape that is visible once `on_top` lies over it."""
        return np.count_nonzero((self.mask > 127) & (on_top <= 127)) / self.whole_area


def _hide_behind(on_top: np.ndarray, shapes: list[Shape]) -> None:
    for shape in shapes:
        shape.mask[on_top > 127] = 0


def _circle(_: Generator) -> list[np.ndarray]:
    angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    return [np.stack([np.cos(angles), np.sin(angles)], 1)]


def _square(_: Generator) -> list[np.ndarray]:
    return [np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.85]


def _triangle(rng: Generator) -> list[np.ndarray]:
    return [np.array([[rng.uniform(-0.4, 0.4), -1], [0.95, 0.8], [-0.95, 0.8]])]


def _star(rng: Generator) -> list[np.ndarray]:
    num_points = int(rng.integers(5, 7))
    angles = np.arange(2 * num_points) * np.pi / num_points
    radii = np.where(np.arange(2 * num_points) % 2, rng.uniform(0.38, 0.5), 1.0)
    return [np.stack([np.cos(angles) * radii, np.sin(angles) * radii], 1)]


def _ring(rng: Generator) -> list[np.ndarray]:
    outer = _circle(rng)[0]
    return [outer, outer * rng.uniform(0.45, 0.7)]


def _cross(rng: Generator) -> list[np.ndarray]:
    arm = rng.uniform(0.22, 0.36)
    corner = np.array([[arm, -1], [arm, -arm], [1, -arm]])
    turns = [np.linalg.matrix_power(np.array([[0, 1], [-1, 0]]), turn) for turn in range(4)]
    return [np.concatenate([corner @ turn for turn in turns])]


# In the order of CLASS_NAMES; each gives closed outlines about the origin, within -1 to 1.
_OUTLINES: tuple[Callable[[Generator], list[np.ndarray]], ...] = (
    _circle,
    _square,
    _triangle,
    _star,
    _ring,
    _cross,
)


def _place_shape(rng: Generator, size: int, shapes: list[Shape]) -> Shape | None:
    """A shape at a random place that hides no earlier one too much, or None after ten tries."""
    cls = int(rng.integers(len(CLASS_NAMES)))
    side = size * np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST)))
    outlines = _OUTLINES[cls](rng)
    margin = size // 2
    for _ in range(10):
        placed = _turn_and_move(rng, outlines, side, size)
        whole = _mask_of(placed, size, margin)
        mask = whole[margin : margin + size, margin : margin + size].copy()
        area = np.count_nonzero(whole > 127)
        if not area or np.count_nonzero(mask > 127) < MIN_INSIDE * area:
            continue
        if all(earlier.share_left(mask) >= MIN_VISIBLE for earlier in shapes):
            return Shape(cls, mask, area)
    return None


def _turn_and_move(
    rng: Generator, outlines: list[np.ndarray], side: float, size: int
) -> list[np.ndarray]:
    """Stretch a little, turn, scale to `side` and put somewhere; points in pixels."""
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    stretch = np.diag([1.0, rng.uniform(0.7, 1.0)])
    centre = rng.uniform(0, size, 2)
    return [points @ stretch @ turn * (side / 2) + centre for points in outlines]


def _mask_of(outlines: list[np.ndarray], size: int, margin: int) -> np.ndarray:
    """Antialiased mask of size + 2 * margin; an outline inside another is a hole."""
    mask = np.zeros((size + 2 * margin, size + 2 * margin), np.uint8)
    fixed = [np.round((points + margin) * 16).astype(np.int32) for points in outlines]
    cv2.fillPoly(mask, fixed, 255, cv2.LINE_AA, shift=4)
    return mask


def _paint(rng: Generator, canvas: np.ndarray, shape: Shape) -> None:
    """Fill a shape with a textured colour; its hue tells most of the time which class it is.

    Without that hint a network trained from nothing needs more steps than ten minutes have.
    """
    mask = shape.mask
    colour = _vivid_colour(rng, shape.cls / len(CLASS_NAMES) + rng.normal(0, 0.05))
    blur = len(canvas) / 100
    x, y, width, height = cv2.boundingRect(mask)
    margin = int(4 * blur) + 3  # as far as the shadow reaches
    part = np.s_[max(y - margin, 0) : y + height + margin, max(x - margin, 0) : x + width + margin]
    canvas, mask = canvas[part], mask[part]
    texture = _noise_octaves(rng, max(mask.shape))[: mask.shape[0], : mask.shape[1]]
    shadow = np.roll(cv2.GaussianBlur(mask, (0, 0), blur), (2, 2), (0, 1))
    _blend(canvas, shadow, np.zeros(3), rng.uniform(0, 0.35))
    _blend(canvas, mask, (colour + texture * rng.uniform(0, 22)).clip(0, 255), rng.uniform(0.75, 1))


def _draw_bars_on_top(rng: Generator, canvas: np.ndarray, shapes: list[Shape]) -> None:
    """Up to three bars in front of everything; the visible parts shrink accordingly."""
    size = len(canvas)
    for _ in range(rng.integers(0, 4)):
        layer = np.zeros((size, size), np.uint8)
        ends = [(int(x), int(y)) for x, y in rng.uniform(-0.2, 1.2, (2, 2)) * size]
        cv2.line(layer, *ends, 255, int(rng.integers(2, max(4, size // 20))), cv2.LINE_AA)
        if all(shape.share_left(layer) >= MIN_VISIBLE for shape in shapes):
            _blend(canvas, layer, _dull_colour(rng), 1.0)
            _hide_behind(layer, shapes)


def _box_of(shape: Shape) -> tuple[float, float, float, float, float]:
    """Class, cx, cy, w, h of the visible pixels, normalised."""
    size = len(shape.mask)
    visible = shape.mask > 127
    rows, columns = np.nonzero(visible.any(1))[0], np.nonzero(visible.any(0))[0]
    x1, x2, y1, y2 = np.array([columns[0], columns[-1] + 1, rows[0], rows[-1] + 1]) / size
    return shape.cls, (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1


# --- camera ---------------------------------------------------------------------------------


def _take_photograph(rng: Generator, canvas: np.ndarray) -> np.ndarray:
    """Exposure, blur and sensor noise; uint8."""
    image = (canvas - 128) * rng.uniform(0.6, 1.1) + 128 + rng.uniform(-25, 25)
    if rng.random() < 0.5:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.8))
    if rng.random() < 0.2:
        image = _motion_blur(rng, image)
    noise = rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(1, 12))
    return (image + noise).round().clip(0, 255).astype(np.uint8)


def _motion_blur(rng: Generator, image: np.ndarray) -> np.ndarray:
    length = 2 * int(rng.integers(1, 4)) + 1
    kernel = np.zeros((length, length), np.float32)
    angle = rng.uniform(0, np.pi)
    reach = np.array([np.cos(angle), np.sin(angle)]) * length / 2
    middle = length // 2
    ends = [tuple(round(middle + sign * step) for step in reach) for sign in (-1, 1)]
    cv2.line(kernel, *ends, 1.0, 1)
    return cv2.filter2D(image, -1, kernel / kernel.sum())


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
