"""Augmentation: arrays in, arrays out, every random draw from the generator that is passed in.

A `Sample` is an image with its objects in pixels. Pixels are measured on the continuous image
plane (see `utils.boxes`); objects may hang over the border until `warp` cuts them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np

from utils.config import Hyperparameters

GREY = 114  # fills what no image covers
MIN_SIDE = 2.0  # px: a warped box with a shorter side is dropped
MIN_VISIBLE = 0.1  # share of a warped box that must remain in the picture
MAX_ASPECT = 100.0  # long side : short side of a warped box
MAX_COVERED = 0.3  # share of an object that a pasted one may cover
MIXUP_CONCENTRATION = 32.0  # both parameters of the Beta distribution of the blend ratio


class Sample(NamedTuple):
    """An image and its objects."""

    image: np.ndarray  # uint8 BGR [H, W, 3]
    labels: np.ndarray  # float32 [n, 5]: class, x1, y1, x2, y2 in pixels
    segments: list[np.ndarray]  # per label float32 [k, 2] in pixels; k = 0 for a plain box

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.image.shape[0], self.image.shape[1]


# ------------------------------------------------------------------------------ size and padding
def resize_long_side(image: np.ndarray, side: int, *, smooth: bool) -> np.ndarray:
    """Scale an image so that its long side is `side` pixels.

    Args:
        image: [H, W, 3].
        side: length in pixels.
        smooth: average over areas when shrinking, for evaluation. Otherwise (training, where
            speed counts) and for enlarging, interpolate linearly.
    """
    height, width = image.shape[:2]
    long_side = max(height, width)
    shape_hw = (max(round(height * side / long_side), 1), max(round(width * side / long_side), 1))
    method = cv2.INTER_AREA if smooth and long_side > side else cv2.INTER_LINEAR
    return image if long_side == side else resize(image, shape_hw, method)


def resize(image: np.ndarray, shape_hw: tuple[int, int], method: int) -> np.ndarray:
    """Scale an image [H, W, 3] to a shape; the image itself if it has it already."""
    if image.shape[:2] == shape_hw:
        return image
    return cv2.resize(image, shape_hw[::-1], interpolation=method)


def letterbox(
    image: np.ndarray, shape_hw: tuple[int, int], *, enlarge: bool = False
) -> tuple[np.ndarray, tuple[float, float], tuple[int, int]]:
    """Fit an image into a shape and pad it evenly with grey.

    Args:
        image: [H, W, 3].
        shape_hw: shape of the result.
        enlarge: scale small images up; otherwise they are only padded.

    Returns:
        The image, the scale (w, h), and the padding at the left and the top in pixels.
    """
    height, width = image.shape[:2]
    ratio = min(shape_hw[0] / height, shape_hw[1] / width)
    ratio = ratio if enlarge else min(ratio, 1.0)
    new_h, new_w = max(round(height * ratio), 1), max(round(width * ratio), 1)
    if (new_h, new_w) != (height, width):
        image = cv2.resize(image, (new_w, new_h), interpolation=cv2.INTER_LINEAR)
    spare_h, spare_w = shape_hw[0] - new_h, shape_hw[1] - new_w
    left, top = spare_w // 2, spare_h // 2  # an odd pixel goes to the right and the bottom
    if spare_h or spare_w:
        image = cv2.copyMakeBorder(
            image, top, spare_h - top, left, spare_w - left, cv2.BORDER_CONSTANT, value=(GREY,) * 3
        )
    return image, (new_w / width, new_h / height), (left, top)


def letterbox_sample(sample: Sample, shape_hw: tuple[int, int]) -> Sample:
    """Fit a sample into a shape, scaling it up or down, objects included."""
    image, ratio_wh, pad_wh = letterbox(sample.image, shape_hw, enlarge=True)
    labels, segments = move_objects(sample.labels, sample.segments, ratio_wh, pad_wh)
    return Sample(image, labels, segments)


def move_objects(
    labels: np.ndarray,
    segments: list[np.ndarray],
    ratio_wh: tuple[float, float],
    offset_wh: tuple[float, float],
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Scale labels [n, 5] (class, xyxy) and segments, then shift them."""
    ratio, offset = np.array(ratio_wh, np.float32), np.array(offset_wh, np.float32)
    moved = labels.copy()
    for corner in (slice(1, 3), slice(3, 5)):
        moved[:, corner] = labels[:, corner] * ratio + offset
    if any(map(len, segments)):
        segments = [points * ratio + offset for points in segments]
    return moved, segments


# -------------------------------------------------------------------------------- composing images
# Of the four tiles of a mosaic: whether they lie left of the centre, and above it.
_INSIDE_OF_CENTRE = np.array([[1, 1], [0, 1], [1, 0], [0, 0]])


class Collage(NamedTuple):
    """Images laid out on a grey canvas that is never painted; `warp` takes each to its place."""

    hw: tuple[int, int]  # of the canvas
    centre_xy: tuple[int, int]  # where the images meet
    images: list[np.ndarray]  # uint8 BGR, without what hangs over the border of the canvas
    corners_xy: list[tuple[int, int]]  # of the upper left pixel of each image on the canvas
    labels: np.ndarray  # of all, as those of a Sample of the canvas
    segments: list[np.ndarray]

    def paint(self) -> Sample:
        """The canvas as one image."""
        canvas = np.full((*self.hw, 3), GREY, np.uint8)
        for image, (left, top) in zip(self.images, self.corners_xy, strict=True):
            canvas[top : top + image.shape[0], left : left + image.shape[1]] = image
        return Sample(canvas, self.labels, self.segments)


def draw_mosaic_centre(side: int, rng: np.random.Generator) -> tuple[int, int]:
    """The point (x, y) where four images meet on a canvas of twice the side: in its middle half."""
    x, y = rng.integers(side // 2, side + side // 2 + 1, 2).tolist()
    return x, y


def find_visible_tiles(
    centre_xy: tuple[int, int], side: int, matrix: np.ndarray, out_hw: tuple[int, int]
) -> list[bool]:
    """Which of the four tiles of a mosaic the output can show.

    Args:
        centre_xy: where they meet.
        side: half the side of the canvas.
        matrix: from canvas to output, [3, 3].
        out_hw: of the output.
    """
    middle = np.array(centre_xy, np.float64)
    starts = (middle - side * _INSIDE_OF_CENTRE).clip(0)  # upper left corner of each tile [4, 2]
    ends = (middle + side * (1 - _INSIDE_OF_CENTRE)).clip(None, 2 * side)
    quads = _map_points(_corners(starts, ends), matrix)
    shows = (quads.max(1) > 0) & (quads.min(1) < out_hw[::-1])
    return shows.all(1).tolist()


def mosaic(tiles: Sequence[Sample | None], side: int, centre_xy: tuple[int, int]) -> Collage:
    """Lay four samples around a point of a canvas of twice the side.

    Args:
        tiles: four samples, long side at most `side` pixels, or None for one that is left out.
            They go to the upper left, upper right, lower left, lower right of the point, with
            their inner corner on it.
        side: half the side of the canvas.
        centre_xy: the point.

    Returns:
        The canvas; objects may hang over its border.
    """
    collage = Collage((2 * side,) * 2, centre_xy, [], [], np.zeros((0, 5), np.float32), [])
    labels = [collage.labels]
    for position, tile in enumerate(tiles):
        if tile is None:
            continue
        height, width = tile.hw
        left = centre_xy[0] - width * (position % 2 == 0)
        top = centre_xy[1] - height * (position < 2)
        x1, y1 = max(left, 0), max(top, 0)
        x2, y2 = min(left + width, 2 * side), min(top + height, 2 * side)
        collage.images.append(tile.image[y1 - top : y2 - top, x1 - left : x2 - left])
        collage.corners_xy.append((x1, y1))
        moved, moved_segments = move_objects(tile.labels, tile.segments, (1, 1), (left, top))
        labels.append(moved)
        collage.segments.extend(moved_segments)
    return collage._replace(labels=np.concatenate(labels))


def mixup(first: Sample, second: Sample, rng: np.random.Generator) -> Sample:
    """Blend two samples of one shape; the objects of both count.

    Reference: Zhang et al. 2018, mixup, arXiv:1710.09412; ratio near one half as detection needs.
    """
    ratio = rng.beta(MIXUP_CONCENTRATION, MIXUP_CONCENTRATION)
    image = cv2.addWeighted(first.image, ratio, second.image, 1 - ratio, 0)
    labels = np.concatenate([first.labels, second.labels])
    return Sample(image, labels, first.segments + second.segments)


def copy_paste(sample: Sample, share: float, rng: np.random.Generator) -> Sample:
    """Paste objects again at their mirrored place, cut out along their polygon.

    Args:
        sample: objects without a polygon are never pasted.
        share: probability of each polygon object to be chosen. A chosen one is left out where it
            would cover more than `MAX_COVERED` of another object.
        rng: for the choice.

    Reference: Ghiasi et al. 2021, Simple Copy-Paste, arXiv:2012.07177.
    """
    if not share or not any(map(len, sample.segments)):
        return sample
    width = sample.hw[1]
    image, labels, segments = sample.image.copy(), list(sample.labels), list(sample.segments)
    for index in np.flatnonzero(rng.random(len(sample.labels)) < share):
        polygon = sample.segments[index]
        if not len(polygon):
            continue
        cls, x1, y1, x2, y2 = sample.labels[index].tolist()
        mirrored = np.array([cls, width - x2, y1, width - x1, y2], np.float32)
        if _covered_share(mirrored[1:], np.stack(labels)[:, 1:]).max() > MAX_COVERED:
            continue
        new_polygon = np.stack([width - polygon[:, 0], polygon[:, 1]], 1)
        _paste_mirrored(sample.image, image, new_polygon)
        labels.append(mirrored)
        segments.append(new_polygon)
    return Sample(image, np.stack(labels), segments)


def _covered_share(box_xyxy: np.ndarray, others_xyxy: np.ndarray) -> np.ndarray:
    """Share of each other box that the box covers, [n]."""
    overlap_wh = np.minimum(box_xyxy[2:], others_xyxy[:, 2:]) - np.maximum(
        box_xyxy[:2], others_xyxy[:, :2]
    )
    overlap = overlap_wh.clip(0).prod(1)
    return overlap / (others_xyxy[:, 2:] - others_xyxy[:, :2]).prod(1).clip(1e-9)


def _paste_mirrored(source: np.ndarray, target: np.ndarray, polygon: np.ndarray) -> None:
    """Copy the mirror image of `source` into `target` (in place) inside a polygon [k, 2]."""
    height, width = source.shape[:2]
    x1, y1 = np.floor(polygon.min(0)).astype(int).clip(0).tolist()
    x2, y2 = np.ceil(polygon.max(0)).astype(int).tolist()
    x2, y2 = min(x2, width), min(y2, height)
    if x2 <= x1 or y2 <= y1:
        return
    inside = np.zeros((y2 - y1, x2 - x1), np.uint8)
    corners = np.rint(polygon - 0.5).astype(np.int32) - np.array([x1, y1], np.int32)
    cv2.fillPoly(inside, [corners], 1)
    mirrored = source[y1:y2, width - x2 : width - x1][:, ::-1]
    region = target[y1:y2, x1:x2]
    np.copyto(region, mirrored, where=inside[..., None].astype(bool))


# --------------------------------------------------------------------------------------- geometry
def draw_warp(
    canvas_hw: tuple[int, int],
    out_hw: tuple[int, int],
    hyp: Hyperparameters,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw the map from canvas to output: [3, 3], acting on (x, y, 1).

    Around the canvas centre: perspective, rotation and zoom, shear; then the centre moves to the
    output centre plus the shift. Uses degrees, translate, scale, shear and perspective of `hyp`.
    """
    canvas_h, canvas_w = canvas_hw
    centring = np.array([[1, 0, -canvas_w / 2], [0, 1, -canvas_h / 2], [0, 0, 1]])
    tilt_x, tilt_y = rng.uniform(-hyp.perspective, hyp.perspective, 2)
    # Where the denominator nears 0 lies the horizon: keep it, and what is behind, off the canvas.
    reach = abs(tilt_x) * canvas_w / 2 + abs(tilt_y) * canvas_h / 2
    limit = min(1.0, 0.9 / reach) if reach else 1.0
    perspective = np.array([[1, 0, 0], [0, 1, 0], [tilt_x * limit, tilt_y * limit, 1]])
    angle = math.radians(rng.uniform(-hyp.degrees, hyp.degrees))
    zoom = rng.uniform(1 - hyp.scale, 1 + hyp.scale)
    cos, sin = zoom * math.cos(angle), zoom * math.sin(angle)
    rotation = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    shear_x, shear_y = np.tan(np.radians(rng.uniform(-hyp.shear, hyp.shear, 2)))
    shearing = np.array([[1, shear_x, 0], [shear_y, 1, 0], [0, 0, 1]])
    shift_x, shift_y = rng.uniform(0.5 - hyp.translate, 0.5 + hyp.translate, 2)
    shifting = np.array([[1, 0, shift_x * out_hw[1]], [0, 1, shift_y * out_hw[0]], [0, 0, 1]])
    return shifting @ shearing @ rotation @ perspective @ centring


def warp(sample: Sample | Collage, matrix: np.ndarray, out_hw: tuple[int, int]) -> Sample:
    """Map a sample by a matrix [3, 3] and cut it to the output.

    A box becomes the box around its mapped corners, or around its mapped polygon where there is
    one, cut to the output. Boxes are dropped that keep less than `MIN_VISIBLE` of their area, have
    a side below `MIN_SIDE` or an aspect ratio of `MAX_ASPECT` or more.

    Returns:
        The new sample; its polygons are gone (all k = 0), the boxes hold what they said.
    """
    if isinstance(sample, Collage):
        image = _warp_collage(sample, matrix, out_hw)
    else:
        image = _warp_image(sample.image, matrix, out_hw)
    boxes, visible = _warp_boxes(sample.labels[:, 1:], matrix, sample.hw, out_hw)
    for index, polygon in enumerate(sample.segments):
        if len(polygon):
            boxes[index], visible[index] = _warp_polygon(polygon, matrix, sample.hw, out_hw)
    sides = (boxes[:, 2:] - boxes[:, :2]).clip(1e-9)
    aspect = sides.max(1) / sides.min(1) if len(sides) else np.zeros(0)
    keep = (visible > MIN_VISIBLE) & (sides.min(1, initial=np.inf) >= MIN_SIDE)
    keep &= aspect < MAX_ASPECT
    labels = np.concatenate([sample.labels[:, :1], boxes], 1)[keep].astype(np.float32)
    return Sample(image, labels, [_NO_POLYGON] * len(labels))


_NO_POLYGON = np.zeros((0, 2), np.float32)
_HALF_PIXEL = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
_HALF_PIXEL_BACK = np.array([[1, 0, -0.5], [0, 1, -0.5], [0, 0, 1]])


def _warp_image(image: np.ndarray, matrix: np.ndarray, out_hw: tuple[int, int]) -> np.ndarray:
    if image.shape[:2] == out_hw and np.allclose(matrix, np.eye(3), atol=1e-9):
        return image
    return _interpolate(image, matrix, out_hw, cv2.BORDER_CONSTANT)


def _interpolate(
    image: np.ndarray, matrix: np.ndarray, out_hw: tuple[int, int], border: int
) -> np.ndarray:
    # OpenCV counts from the centre of the first pixel, boxes from its corner.
    matrix = _HALF_PIXEL_BACK @ matrix @ _HALF_PIXEL
    size_wh, grey = (out_hw[1], out_hw[0]), (GREY,) * 3
    if matrix[2, 0] or matrix[2, 1]:
        return cv2.warpPerspective(image, matrix, size_wh, borderMode=border, borderValue=grey)
    affine = matrix[:2] / matrix[2, 2]
    return cv2.warpAffine(image, affine, size_wh, borderMode=border, borderValue=grey)


def _warp_collage(collage: Collage, matrix: np.ndarray, out_hw: tuple[int, int]) -> np.ndarray:
    """The image that warping the painted canvas gives, but with sharp seams.

    A pixel of the output shows the image that its centre falls on.
    """
    out = np.full((*out_hw, 3), GREY, np.uint8)
    starts = np.array(collage.corners_xy, np.float64).reshape(-1, 2)
    sizes_wh = np.array([image.shape[1::-1] for image in collage.images]).reshape(-1, 2)
    quads = _map_points(_corners(starts, starts + sizes_wh), matrix)
    # The first pixel whose centre is inside, and the first behind.
    firsts = np.ceil(quads.min(1) - 0.5).clip(0).astype(int)
    lasts = np.ceil(quads.max(1) - 0.5).clip(None, out_hw[::-1]).astype(int)
    seen = ((lasts > firsts) & (sizes_wh > 0)).all(1)
    mapped = _map_points(np.array(collage.centre_xy, np.float64), matrix)
    centre_xy = np.rint(mapped)
    is_snapped = is_upright(matrix) and np.abs(mapped - centre_xy).max() < 1e-6
    for number in np.flatnonzero(seen).tolist():
        image, (left, top) = collage.images[number], collage.corners_xy[number]
        (x1, y1), (x2, y2) = firsts[number].tolist(), lasts[number].tolist()
        region = out[y1:y2, x1:x2]
        if is_snapped:
            ends_there = starts[number] + sizes_wh[number] == collage.centre_xy
            skipped = np.where(ends_there, centre_xy - (x2, y2), (x1, y1) - centre_xy)
            zoom = (matrix[0, 0] / matrix[2, 2], matrix[1, 1] / matrix[2, 2])
            if _scale_from_corner(image, zoom, ends_there.tolist(), skipped.astype(int), region):
                continue
        to_region = matrix @ np.array([[1, 0, left], [0, 1, top], [0, 0, 1]])
        to_region = np.array([[1, 0, -x1], [0, 1, -y1], [0, 0, 1]]) @ to_region
        part = _interpolate(image, to_region, region.shape[:2], cv2.BORDER_REPLICATE)
        cv2.copyTo(part, _inside(to_region, image.shape[:2], region.shape[:2]), region)
    return out


def is_upright(matrix: np.ndarray) -> bool:
    """Whether a map [3, 3] zooms and shifts and does nothing else."""
    return not (matrix[0, 1] or matrix[1, 0] or matrix[2, 0] or matrix[2, 1])


def snap(matrix: np.ndarray, point_xy: tuple[int, int]) -> np.ndarray:
    """Shift an upright map by half a pixel at most, so that a point falls on the corner of pixels.

    A mosaic is warped faster then: from their common corner its images are only scaled.
    """
    if not is_upright(matrix):
        return matrix
    mapped = _map_points(np.array(point_xy, np.float64), matrix)
    snapped = matrix.copy()
    snapped[:2, 2] += (np.rint(mapped) - mapped) * matrix[2, 2]
    return snapped


def _scale_from_corner(
    image: np.ndarray,
    zoom_xy: tuple[float, float],
    is_at_end: tuple[bool, bool],
    skipped_xy: np.ndarray,
    region: np.ndarray,
) -> bool:
    """Scale an image from one of its corners, which falls on the corner of pixels.

    Args:
        image: [H, W, 3].
        zoom_xy: output pixels per pixel.
        is_at_end: whether it is the right corner, and the lower.
        skipped_xy: pixels of the output between that corner and the region.
        region: what is filled.

    Returns:
        Whether it could be done: OpenCV does not scale by less than half a pixel, and may round the
        size down where it lies halfway between two.
    """
    height, width = region.shape[:2]
    needed_xy = (skipped_xy + np.array([width, height])).tolist()
    columns, rows = (
        # Two more, so that no pixel that is kept lies at a border that is none.
        min(length, math.ceil(needed / zoom) + 2)
        for length, needed, zoom in zip(image.shape[1::-1], needed_xy, zoom_xy, strict=True)
    )
    at_right, at_bottom = is_at_end
    part = image[-rows:] if at_bottom else image[:rows]
    part = part[:, -columns:] if at_right else part[:, :columns]
    flip = {(True, True): -1, (True, False): 1, (False, True): 0}.get((at_right, at_bottom))
    if flip is not None:
        part = cv2.flip(part, flip)
    scaled = cv2.resize(part, None, fx=zoom_xy[0], fy=zoom_xy[1], interpolation=cv2.INTER_LINEAR)
    x, y = skipped_xy.tolist()
    is_copy = scaled.shape == part.shape and zoom_xy != (1.0, 1.0)
    part = scaled[y : y + height, x : x + width]
    if is_copy or part.shape != region.shape:
        return False
    region[:] = part if flip is None else cv2.flip(part, flip)
    return True


def _inside(matrix: np.ndarray, in_hw: tuple[int, int], out_hw: tuple[int, int]) -> np.ndarray:
    """Which pixels of an output, uint8 [H, W], have their centre on the mapped input."""
    back = np.linalg.inv(matrix)
    x, y = np.arange(out_hw[1]) + 0.5, np.arange(out_hw[0])[:, None] + 0.5
    in_x, in_y, depth = (row[0] * x + row[1] * y + row[2] for row in back)
    height, width = in_hw
    on_x = (in_x >= 0) & (in_x < width * depth)
    return (on_x & (in_y >= 0) & (in_y < height * depth)).astype(np.uint8)


def _corners(starts_xy: np.ndarray, ends_xy: np.ndarray) -> np.ndarray:
    """Corners [n, 4, 2] of boxes between two corners [n, 2] each."""
    boxes = np.concatenate([starts_xy, ends_xy], 1)
    return boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)


def _map_points(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """Map points [..., 2] by a matrix [3, 3]."""
    mapped = points @ matrix[:, :2].T + matrix[:, 2]
    return mapped[..., :2] / mapped[..., 2:]


def _areas(boxes_xyxy: np.ndarray) -> np.ndarray:
    return (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).clip(0).prod(-1)


def _clip(boxes_xyxy: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    return np.clip(boxes_xyxy, 0, [hw[1], hw[0], hw[1], hw[0]])


def _warp_boxes(
    boxes_xyxy: np.ndarray, matrix: np.ndarray, in_hw: tuple[int, int], out_hw: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Mapped boxes [n, 4], cut to the output, and the share of each that is still seen [n]."""
    boxes_xyxy = boxes_xyxy.astype(np.float64)
    on_canvas = _clip(boxes_xyxy, in_hw)
    corners = _map_points(_corners(on_canvas[:, :2], on_canvas[:, 2:]), matrix)
    whole = np.concatenate([corners.min(1), corners.max(1)], 1)
    cut = _clip(whole, out_hw)
    seen_on_canvas = _areas(on_canvas) / _areas(boxes_xyxy).clip(1e-9)
    return cut, seen_on_canvas * _areas(cut) / _areas(whole).clip(1e-9)


def _warp_polygon(
    polygon: np.ndarray, matrix: np.ndarray, in_hw: tuple[int, int], out_hw: tuple[int, int]
) -> tuple[np.ndarray, float]:
    """Box [4] around the mapped polygon, cut to the output, and the share that is still seen."""
    points = polygon.astype(np.float64)
    whole_area = _areas(_extent(points))
    points = clip_polygon(points, in_hw)
    if not len(points):
        return np.zeros(4), 0.0
    seen = _areas(_extent(points)) / max(whole_area, 1e-9)
    mapped = _map_points(points, matrix)
    mapped_area = _areas(_extent(mapped))
    mapped = clip_polygon(mapped, out_hw)
    if not len(mapped):
        return np.zeros(4), 0.0
    box = _extent(mapped)
    return box, float(seen * _areas(box) / max(mapped_area, 1e-9))


def _extent(points: np.ndarray) -> np.ndarray:
    return np.concatenate([points.min(0), points.max(0)])


def clip_polygon(points: np.ndarray, hw: tuple[int, int]) -> np.ndarray:
    """Cut a polygon [k, 2] to an image; the result has 0 points where nothing is left.

    Reference: Sutherland and Hodgman 1974, Reentrant Polygon Clipping.
    """
    for axis, bound in ((0, hw[1]), (1, hw[0])):
        points = _cut_half_plane(points, points[:, axis])
        points = _cut_half_plane(points, bound - points[:, axis])
    return points


def _cut_half_plane(points: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Keep the part of a polygon where the signed distance of its points is >= 0."""
    inside = distance >= 0
    if inside.all():
        return points
    following, next_distance = np.roll(points, -1, 0), np.roll(distance, -1)
    crosses = inside != np.roll(inside, -1)
    span = np.where(crosses, distance - next_distance, 1.0)
    crossing = points + (distance / span)[:, None] * (following - points)
    # Each point, if inside, is followed by the crossing on the edge that leaves it, if any.
    return np.stack([points, crossing], 1)[np.stack([inside, crosses], 1)]


def flip_left_right(sample: Sample) -> Sample:
    """Mirror a sample horizontally."""
    width = sample.hw[1]
    labels = sample.labels.copy()
    labels[:, [1, 3]] = width - sample.labels[:, [3, 1]]
    segments = [p * (-1, 1) + (width, 0) if len(p) else p for p in sample.segments]
    return Sample(cv2.flip(sample.image, 1), labels, segments)


def flip_up_down(sample: Sample) -> Sample:
    """Mirror a sample vertically."""
    height = sample.hw[0]
    labels = sample.labels.copy()
    labels[:, [2, 4]] = height - sample.labels[:, [4, 2]]
    segments = [p * (1, -1) + (0, height) if len(p) else p for p in sample.segments]
    return Sample(cv2.flip(sample.image, 0), labels, segments)


# ----------------------------------------------------------------------------------------- colour
def jitter_hsv(
    image: np.ndarray, hue: float, saturation: float, value: float, rng: np.random.Generator
) -> np.ndarray:
    """Turn the hue and scale saturation and brightness at random.

    Args:
        image: uint8 BGR; not changed.
        hue: largest turn, as a share of the colour circle.
        saturation: gain in [1 - this, 1 + this].
        value: gain of the brightness, likewise.
        rng: three draws.
    """
    draws = rng.uniform(-1, 1, 3)
    if not (hue or saturation or value):
        return image
    levels = np.arange(256, dtype=np.float64)
    # OpenCV keeps the hue of 8-bit images in steps of 2 degrees, 0 to 179.
    hue_table = np.mod(np.rint(levels + draws[0] * hue * 180), 180)
    saturation_table = np.clip(np.rint(levels * (1 + draws[1] * saturation)), 0, 255)
    value_table = np.clip(np.rint(levels * (1 + draws[2] * value)), 0, 255)
    tables = np.stack([hue_table, saturation_table, value_table]).astype(np.uint8)
    # Channel by channel: one table for all three takes a third longer.
    channels = cv2.split(cv2.cvtColor(image, cv2.COLOR_BGR2HSV))
    moved = [cv2.LUT(channel, table) for channel, table in zip(channels, tables, strict=True)]
    return cv2.cvtColor(cv2.merge(moved), cv2.COLOR_HSV2BGR)


# -------------------------------------------------------------------------------------- the recipe
def augment_colour_and_flip(
    sample: Sample, hyp: Hyperparameters, rng: np.random.Generator
) -> Sample:
    """Last steps of every augmented sample: HSV, up-down flip, left-right flip."""
    image = jitter_hsv(sample.image, hyp.hsv_h, hyp.hsv_s, hyp.hsv_v, rng)
    sample = sample._replace(image=image)
    if rng.random() < hyp.flipud:
        sample = flip_up_down(sample)
    if rng.random() < hyp.fliplr:
        sample = flip_left_right(sample)
    return sample
