"""Augmentation: boxes follow their objects, every key acts, the same dice give the same picture."""

import dataclasses
import itertools
import math
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.augment import (
    GREY,
    Sample,
    augment_colour_and_flip,
    clip_polygon,
    copy_paste,
    draw_mosaic_centre,
    draw_warp,
    find_visible_tiles,
    flip_left_right,
    flip_up_down,
    jitter_hsv,
    letterbox,
    letterbox_sample,
    mixup,
    mosaic,
    resize_long_side,
    snap,
    warp,
)
from utils.config import load_hyperparameters

ROOT = Path(__file__).resolve().parents[1]
LOW = load_hyperparameters(ROOT / "data" / "hyps" / "hyp.scratch-low.yaml")
STILL = dataclasses.replace(
    LOW, hsv_h=0, hsv_s=0, hsv_v=0, degrees=0, translate=0, scale=0, shear=0, perspective=0,
    flipud=0, fliplr=0, mosaic=0, mixup=0, copy_paste=0,
)  # fmt: skip
NONE = np.zeros((0, 2), np.float32)
# Pure colours: interpolation with grey or black leaves their own channel on top.
COLOURS_BGR = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255))


def painted(
    height: int, width: int, boxes: list[tuple[int, int, int, int]], *, polygons: bool = False
) -> Sample:
    """Black picture with one rectangle of its own colour per box; class = number of the colour."""
    image = np.zeros((height, width, 3), np.uint8)
    labels = np.zeros((len(boxes), 5), np.float32)
    segments = []
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        image[y1:y2, x1:x2] = COLOURS_BGR[number]
        labels[number] = number, x1, y1, x2, y2
        corners = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], np.float32)
        segments.append(corners if polygons else NONE)
    return Sample(image, labels, segments)


def extent_of_colour(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray | None:
    """xyxy of the pixels that are nearly of this colour, on the continuous plane."""
    is_near = (np.abs(image.astype(int) - colour).max(2)) < 100
    ys, xs = np.nonzero(is_near)
    if not len(xs):
        return None
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])


def assert_boxes_follow(sample: Sample, *, tolerance: float = 1.5, tight: bool = True) -> int:
    """Each box encloses its colour, and tightly so; returns the number of boxes compared."""
    for label in sample.labels:
        seen = extent_of_colour(sample.image, COLOURS_BGR[int(label[0])])
        assert seen is not None, f"label {label} is on nothing"
        box = label[1:]
        assert (box[:2] <= seen[:2] + tolerance).all(), (label, seen)
        assert (box[2:] >= seen[2:] - tolerance).all(), (label, seen)
        if tight:
            np.testing.assert_allclose(box, seen, atol=tolerance)
    return len(sample.labels)


# ------------------------------------------------------------------------------ size and padding
@pytest.mark.parametrize(
    ("hw", "side", "expected"),
    [((480, 640), 320, (240, 320)), ((640, 480), 320, (320, 240)), ((100, 100), 320, (320, 320)),
     ((640, 640), 640, (640, 640)), ((2, 1000), 100, (1, 100))],
)  # fmt: skip
def test_resize_long_side(hw, side, expected):
    image = np.zeros((*hw, 3), np.uint8)
    for smooth in (True, False):
        assert resize_long_side(image, side, smooth=smooth).shape == (*expected, 3)


@pytest.mark.parametrize("enlarge", [False, True])
@pytest.mark.parametrize("hw", [(60, 90), (90, 60), (41, 64), (200, 300), (64, 96), (1, 300)])
def test_letterbox_places_the_image_where_it_says(hw, enlarge):
    image = np.full((*hw, 3), 255, np.uint8)
    boxed, ratio_wh, pad_wh = letterbox(image, (64, 96), enlarge=enlarge)
    assert boxed.shape == (64, 96, 3)
    seen = extent_of_colour(boxed, (255, 255, 255))
    size_wh = np.array([hw[1], hw[0]]) * ratio_wh
    np.testing.assert_allclose(seen, [*pad_wh, *(np.array(pad_wh) + size_wh)], atol=1e-6)
    outside = np.ones((64, 96), bool)
    outside[int(seen[1]) : int(seen[3]), int(seen[0]) : int(seen[2])] = False
    assert (boxed[outside] == GREY).all()
    if not enlarge:
        assert max(ratio_wh) <= 1


def test_letterbox_sample_moves_boxes_and_polygons():
    sample = painted(60, 120, [(10, 20, 50, 50), (60, 0, 120, 30)], polygons=True)
    boxed = letterbox_sample(sample, (320, 320))
    assert assert_boxes_follow(boxed) == 2
    for label, points in zip(boxed.labels, boxed.segments, strict=True):
        np.testing.assert_allclose([*points.min(0), *points.max(0)], label[1:], atol=1e-4)


# -------------------------------------------------------------------------------- composing images
@pytest.mark.parametrize("seed", range(6))
def test_mosaic_keeps_objects_and_boxes_together(seed):
    tiles = [
        painted(60, 80, [(5, 5, 40, 50)]),
        painted(80, 60, []),
        painted(40, 80, []),
        painted(80, 80, []),
    ]
    for number, tile in enumerate(tiles[1:], start=1):
        height, width = tile.hw
        box = (width // 4, height // 4, width * 3 // 4, height * 3 // 4)
        tile.image[box[1] : box[3], box[0] : box[2]] = COLOURS_BGR[number]
        label = np.array([[number, *box]], np.float32)
        tiles[number] = Sample(tile.image, label, [NONE])
    canvas = mosaic(tiles, 80, draw_mosaic_centre(80, np.random.default_rng(seed))).paint()
    assert canvas.image.shape == (160, 160, 3)
    assert len(canvas.labels) == len(canvas.segments) == 4
    cut = warp(canvas, np.eye(3), (160, 160))  # drops what the canvas cuts away
    assert assert_boxes_follow(cut) >= 2


def test_mosaic_without_any_object():
    canvas = mosaic([painted(32, 32, [])] * 4, 32, (30, 40))
    assert canvas.labels.shape == (0, 5)
    assert canvas.segments == []
    assert (canvas.paint().image == 0).any()
    warped = warp(canvas, draw_warp((64, 64), (32, 32), LOW, np.random.default_rng(0)), (32, 32))
    assert warped.labels.shape == (0, 5)
    assert warped.image.shape == (32, 32, 3)


def test_mixup_blends_and_keeps_all_labels():
    first, second = painted(40, 40, [(0, 0, 20, 20)]), painted(40, 40, [(10, 10, 40, 40)] * 2)
    mixed = mixup(first, second, np.random.default_rng(0))
    np.testing.assert_array_equal(mixed.labels, np.concatenate([first.labels, second.labels]))
    assert len(mixed.segments) == 3
    share = mixed.image[5, 5, 0] / 255  # blue over black
    assert 0.2 < share < 0.8
    expected = first.image * share + second.image * (1 - share)
    np.testing.assert_allclose(mixed.image, expected, atol=2)


def test_copy_paste_repeats_polygon_objects_mirrored():
    sample = painted(60, 100, [(5, 10, 25, 40)], polygons=True)
    pasted = copy_paste(sample, 1.0, np.random.default_rng(0))
    np.testing.assert_array_equal(pasted.labels, [[0, 5, 10, 25, 40], [0, 75, 10, 95, 40]])
    expected = sample.image.copy()
    expected[10:40, 75:95] = COLOURS_BGR[0]
    np.testing.assert_array_equal(pasted.image, expected)
    assert sample.image[20, 80].sum() == 0, "the input must stay as it is"
    np.testing.assert_array_equal(pasted.segments[1].min(0), [75, 10])


@pytest.mark.parametrize(
    ("boxes", "polygons", "share"),
    [
        pytest.param([], True, 1.0, id="no objects"),
        pytest.param([(5, 10, 25, 40)], False, 1.0, id="boxes without polygons"),
        pytest.param([(5, 10, 25, 40)], True, 0.0, id="switched off"),
        pytest.param([(30, 10, 70, 40)], True, 1.0, id="would cover itself"),
        pytest.param([(5, 10, 25, 40), (78, 12, 92, 38)], True, 1.0, id="would cover another"),
    ],
)
def test_copy_paste_leaves_alone(boxes, polygons, share):
    sample = painted(60, 100, boxes, polygons=polygons)
    pasted = copy_paste(sample, share, np.random.default_rng(0))
    if len(boxes) == 2:  # the second one still fits over the first: it would cover less of it
        pasted = Sample(pasted.image, pasted.labels[pasted.labels[:, 0] == 0], [])
        assert len(pasted.labels) == 1
        return
    np.testing.assert_array_equal(pasted.image, sample.image)
    np.testing.assert_array_equal(pasted.labels, sample.labels)


def test_copy_paste_cuts_along_the_polygon():
    image = np.zeros((60, 100, 3), np.uint8)
    triangle = np.array([[5, 40], [25, 40], [15, 10]], np.float32)
    cv2.fillPoly(image, [triangle.astype(np.int32)], COLOURS_BGR[1])
    image[45:, :] = 77  # below: must not be copied along
    sample = Sample(image, np.array([[1, 5, 10, 25, 40]], np.float32), [triangle])
    pasted = copy_paste(sample, 1.0, np.random.default_rng(0))
    copied = (pasted.image[:45, 70:] == COLOURS_BGR[1]).all(2).sum()
    original = (image[:45, :30] == COLOURS_BGR[1]).all(2).sum()
    assert copied == pytest.approx(original, rel=0.15)
    assert (pasted.image[12, 77] == 0).all(), "a corner of the box outside of the triangle"


# --------------------------------------------------------------------------------------- geometry
WARPS = [
    pytest.param({}, id="still"),
    pytest.param({"translate": 0.2}, id="translate"),
    pytest.param({"scale": 0.5}, id="scale"),
    pytest.param({"degrees": 30}, id="degrees"),
    pytest.param({"shear": 10}, id="shear"),
    pytest.param({"perspective": 0.001}, id="perspective"),
    pytest.param(
        {"translate": 0.1, "scale": 0.5, "degrees": 180, "shear": 5, "perspective": 0.0005},
        id="all",
    ),
]


@pytest.mark.parametrize("strengths", WARPS)
@pytest.mark.parametrize("polygons", [False, True])
def test_boxes_follow_their_objects_through_a_warp(strengths, polygons):
    hyp = dataclasses.replace(STILL, **strengths)
    boxes = [(40, 30, 90, 70), (150, 20, 190, 120), (30, 120, 100, 180), (120, 140, 180, 170)]
    sample = painted(200, 220, boxes, polygons=polygons)
    compared = 0
    turns = {"degrees", "shear", "perspective"} & set(strengths)
    for seed in range(8):
        matrix = draw_warp((200, 220), (160, 192), hyp, np.random.default_rng(seed))
        warped = warp(sample, matrix, (160, 192))
        assert warped.image.shape == (160, 192, 3)
        # A turned and cut box keeps the corners that its object has lost; its polygon does not.
        compared += assert_boxes_follow(warped, tight=polygons or not turns)
    assert compared >= 16


def test_warp_of_a_mosaic_follows_too():
    hyp = dataclasses.replace(STILL, scale=0.5, translate=0.1, degrees=10, shear=3)
    boxes = [(10, 10, 50, 50), (80, 20, 110, 100)]
    for seed in range(8):
        rng = np.random.default_rng(seed)
        tiles = [painted(128, 128, boxes, polygons=True)] + [painted(96, 128, [])] * 3
        canvas = mosaic(tiles, 128, draw_mosaic_centre(128, rng))
        warped = warp(canvas, draw_warp(canvas.hw, (128, 128), hyp, rng), (128, 128))
        assert_boxes_follow(warped)


@pytest.mark.parametrize("strengths", WARPS)
def test_tiles_that_are_said_to_be_out_of_sight_change_nothing(strengths):
    hyp = dataclasses.replace(STILL, **strengths)
    num_left_out = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        tiles = [painted(96, 64, [(0, 0, 64, 96), (10, 10, 60, 40)]), painted(64, 96, [])] * 2
        centre = draw_mosaic_centre(96, rng)
        matrix = draw_warp((192, 192), (96, 80), hyp, rng)
        shown = find_visible_tiles(centre, 96, matrix, (96, 80))
        num_left_out += shown.count(False)
        seen = [tile if show else None for tile, show in zip(tiles, shown, strict=True)]
        whole, part = (warp(mosaic(t, 96, centre), matrix, (96, 80)) for t in (tiles, seen))
        np.testing.assert_array_equal(whole.image, part.image)
        np.testing.assert_array_equal(whole.labels, part.labels)
    assert num_left_out >= 5


@pytest.mark.parametrize("strengths", WARPS)
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("is_snapped", [False, True])
def test_each_image_of_a_mosaic_is_warped_to_where_the_painted_canvas_has_it(
    strengths, seed, is_snapped
):
    rng = np.random.default_rng(seed)
    hyp = dataclasses.replace(STILL, **strengths)
    shapes = [(96, 128), (128, 90), (128, 128), (40, 128)]
    tiles = []
    for height, width in shapes:  # smooth pictures: interpolation hardly depends on rounding
        rough = rng.integers(0, 256, (3, 4, 3)).astype(np.uint8)
        image = cv2.resize(rough, (width, height), interpolation=cv2.INTER_CUBIC)
        tiles.append(Sample(image, np.zeros((0, 5), np.float32), []))
    collage = mosaic(tiles, 128, draw_mosaic_centre(128, rng))
    matrix = draw_warp(collage.hw, (128, 160), hyp, rng)
    matrix = snap(matrix, collage.centre_xy) if is_snapped else matrix
    ours = warp(collage, matrix, (128, 160)).image.astype(int)
    painted_first = warp(collage.paint(), matrix, (128, 160)).image.astype(int)
    # Which image, or none, the centre of each pixel falls on, and whether its neighbours agree.
    owner = np.full(collage.hw, -1)
    for number, (image, (left, top)) in enumerate(
        zip(collage.images, collage.corners_xy, strict=True)
    ):
        owner[top : top + image.shape[0], left : left + image.shape[1]] = number
    back, far_from_seams = np.linalg.inv(matrix), np.zeros((128, 160), bool)
    for row, column in np.ndindex(128, 160):
        x, y, depth = back @ (column + 0.5, row + 0.5, 1)
        x, y = math.floor(x / depth), math.floor(y / depth)
        inside = 0 <= x < collage.hw[1] and 0 <= y < collage.hw[0]
        mine = owner[y, x] if inside else -1
        if mine < 0:
            assert (ours[row, column] == GREY).all()
        near = owner[max(y - 2, 0) : max(y + 3, 0), max(x - 2, 0) : max(x + 3, 0)]
        at_border = not (2 <= x < collage.hw[1] - 2 and 2 <= y < collage.hw[0] - 2)
        far_from_seams[row, column] = not at_border and (near == mine).all()
    assert far_from_seams.mean() > 0.3
    assert np.abs(ours - painted_first)[far_from_seams].max() <= 6
    assert np.abs(ours - painted_first)[far_from_seams].mean() < 0.5


@pytest.mark.parametrize("seed", range(12))
def test_scaling_from_the_corner_equals_warping(seed, monkeypatch):
    """Also where OpenCV would copy instead of scaling by a little."""
    rng = np.random.default_rng(seed)
    hyp = dataclasses.replace(STILL, scale=(0.9, 0.05, 0.5)[seed % 3], translate=0.3)
    tiles = []
    for height, width in rng.integers(1, 65, (4, 2)).tolist():
        ramp = np.add.outer(np.arange(height) * 2, np.arange(width))  # linear: no seam hides
        image = np.stack([ramp, 2 * ramp, 255 - ramp], 2).clip(0, 255).astype(np.uint8)
        tiles.append(Sample(image, np.zeros((0, 5), np.float32), []))
    collage = mosaic(tiles, 64, draw_mosaic_centre(64, rng))
    matrix = snap(draw_warp(collage.hw, (64, 96), hyp, rng), collage.centre_xy)
    fast = warp(collage, matrix, (64, 96)).image.astype(int)
    monkeypatch.setattr("utils.augment._scale_from_corner", lambda *_: False)
    slow = warp(collage, matrix, (64, 96)).image.astype(int)
    assert np.abs(fast - slow).max() <= 3


def test_identity_warp_is_exact():
    sample = painted(64, 96, [(3, 4, 50, 60)])
    matrix = draw_warp((64, 96), (64, 96), STILL, np.random.default_rng(0))
    np.testing.assert_allclose(matrix, np.eye(3), atol=1e-12)
    warped = warp(sample, matrix, (64, 96))
    np.testing.assert_array_equal(warped.image, sample.image)
    np.testing.assert_array_equal(warped.labels, sample.labels)


def test_snapping_moves_an_upright_map_by_half_a_pixel_at_most():
    hyp = dataclasses.replace(STILL, scale=0.5, translate=0.1)
    for seed in range(20):
        matrix = draw_warp((640, 640), (320, 320), hyp, np.random.default_rng(seed))
        snapped = snap(matrix, (211, 432))
        np.testing.assert_array_equal(snapped[:, :2], matrix[:, :2])
        assert 0 < np.abs(snapped[:2, 2] - matrix[:2, 2]).max() <= 0.5
        x, y, _ = snapped @ (211, 432, 1)
        assert x == pytest.approx(round(x), abs=1e-9)
        assert y == pytest.approx(round(y), abs=1e-9)
    turned = draw_warp(
        (64, 64), (64, 64), dataclasses.replace(STILL, degrees=9), np.random.default_rng(0)
    )
    assert snap(turned, (3, 5)) is turned


def test_pixels_and_boxes_use_the_same_coordinates():
    """Zooming by 4 shows a half-pixel disagreement as two pixels."""
    sample = painted(20, 20, [(5, 8, 12, 15)])
    matrix = np.diag([4.0, 4.0, 1.0])
    image = warp(sample, matrix, (80, 80)).image
    weight = image[8:-8, 8:-8, 0].astype(float)  # without the rim that blends into the grey
    centre = (weight.sum(0) @ (np.arange(8, 72) + 0.5)) / weight.sum()
    assert centre == pytest.approx(4 * (5 + 12) / 2, abs=0.05)


def test_strong_perspective_never_shows_what_lies_behind_the_horizon():
    hyp = dataclasses.replace(STILL, perspective=0.01)
    sample = painted(640, 640, [(10, 10, 200, 200), (400, 400, 630, 630)])
    corners = np.array(list(itertools.product([0, 640], [0, 640], [1])), float)
    for seed in range(10):
        matrix = draw_warp((640, 640), (320, 320), hyp, np.random.default_rng(seed))
        assert ((corners @ matrix.T)[:, 2] > 0.05).all()
        warped = warp(sample, matrix, (320, 320))
        assert np.isfinite(warped.labels).all()
        assert_boxes_follow(warped, tight=False, tolerance=2.5)


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        pytest.param((10, 10, 12, 12), True, id="2 px"),
        pytest.param((10, 10, 11.9, 40), False, id="narrower than 2 px"),
        pytest.param((-80, 10, 20, 20), True, id="a fifth is left"),
        pytest.param((-95, 10, 5, 20), False, id="a twentieth is left"),
        pytest.param((0, 10, 250, 12.4), False, id="aspect above 100"),
        pytest.param((0, 10, 250, 13), True, id="aspect below 100"),
        pytest.param((-50, -50, -10, -10), False, id="outside"),
        pytest.param((20, 20, 20, 50), False, id="no width"),
    ],
)
def test_what_a_warp_drops(box, kept):
    sample = Sample(np.zeros((300, 300, 3), np.uint8), np.array([[0, *box]], np.float32), [NONE])
    assert len(warp(sample, np.eye(3), (300, 300)).labels) == kept


def test_polygon_gives_a_tighter_box_than_the_corners():
    diamond = np.array([[50, 10], [90, 50], [50, 90], [10, 50]], np.float32)
    label = np.array([[0, 10, 10, 90, 90]], np.float32)
    turn = np.array([[1, -1, 50], [1, 1, -50 + 0.001], [0, 0, 1]]) / [[2**0.5], [2**0.5], [1]]
    image = np.zeros((100, 100, 3), np.uint8)
    (box,) = warp(Sample(image, label, [NONE]), turn, (100, 100)).labels
    (tight,) = warp(Sample(image, label, [diamond]), turn, (100, 100)).labels
    assert (tight[3:] - tight[1:3]).prod() < 0.6 * (box[3:] - box[1:3]).prod()


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        pytest.param([[1, 1], [5, 1], [5, 5]], [1, 1, 5, 5], id="inside"),
        pytest.param([[-5, 2], [5, 2], [5, 4], [-5, 4]], [0, 2, 5, 4], id="over the left"),
        pytest.param([[-10, 5], [5, -10], [20, 5], [5, 20]], [0, 0, 10, 10], id="all around"),
        pytest.param([[0, -5], [5, 5], [-5, 5]], [0, 0, 5, 5], id="tip cut off"),
    ],
)
def test_clip_polygon(points, expected):
    cut = clip_polygon(np.array(points, float), (10, 10))
    np.testing.assert_allclose([*cut.min(0), *cut.max(0)], expected, atol=1e-9)


def test_clip_polygon_against_a_raster():
    rng = np.random.default_rng(0)
    for _ in range(20):
        angles = np.sort(rng.uniform(0, 2 * np.pi, 7))
        points = 60 * np.stack([np.cos(angles), np.sin(angles)], 1) + rng.uniform(20, 100, 2)
        points = np.rint(points)
        raster = np.zeros((300, 300), np.uint8)  # the polygon, moved by 100 to be all inside
        cv2.fillPoly(raster, [(points + 100).astype(np.int32)], 1)
        ys, xs = np.nonzero(raster[100:201, 100:201])
        cut = clip_polygon(points, (100, 100))
        if len(xs) > 4:
            seen = [xs.min(), ys.min(), xs.max(), ys.max()]
            np.testing.assert_allclose([*cut.min(0), *cut.max(0)], seen, atol=1.5)


def test_clip_polygon_outside_leaves_nothing():
    assert len(clip_polygon(np.array([[20.0, 20], [30, 20], [30, 30]]), (10, 10))) == 0


@pytest.mark.parametrize("flip", [flip_left_right, flip_up_down])
def test_flips(flip):
    sample = painted(40, 60, [(5, 4, 20, 30), (30, 10, 59, 20)], polygons=True)
    flipped = flip(sample)
    assert assert_boxes_follow(flipped, tolerance=0.01) == 2
    for label, points in zip(flipped.labels, flipped.segments, strict=True):
        np.testing.assert_allclose([*points.min(0), *points.max(0)], label[1:])
    again = flip(flipped)
    np.testing.assert_array_equal(again.image, sample.image)
    np.testing.assert_array_equal(again.labels, sample.labels)


# ----------------------------------------------------------------------------------------- colour
def mean_hsv(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_BGR2HSV).reshape(-1, 3).mean(0)


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_each_hsv_strength_moves_its_channel_alone(channel):
    image = np.full((8, 8, 3), (60, 120, 90), np.uint8)
    strengths = [0.0, 0.0, 0.0]
    strengths[channel] = 0.3
    moved = jitter_hsv(image, *strengths, np.random.default_rng(3))
    change = np.abs(mean_hsv(moved) - mean_hsv(image))
    assert change[channel] > 3
    assert np.delete(change, channel).max() <= 2
    assert (image == (60, 120, 90)).all(), "the input must stay as it is"


def test_hsv_switched_off_changes_nothing():
    image = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    np.testing.assert_array_equal(jitter_hsv(image, 0, 0, 0, np.random.default_rng(0)), image)


@pytest.mark.parametrize(("key", "flip"), [("flipud", flip_up_down), ("fliplr", flip_left_right)])
def test_flip_keys_act(key, flip):
    sample = painted(20, 30, [(2, 3, 10, 9)])
    hyp = dataclasses.replace(STILL, **{key: 1.0})
    flipped = augment_colour_and_flip(sample, hyp, np.random.default_rng(0))
    np.testing.assert_array_equal(flipped.image, flip(sample).image)
    still = augment_colour_and_flip(sample, STILL, np.random.default_rng(0))
    np.testing.assert_array_equal(still.image, sample.image)


@pytest.mark.parametrize("key", ["degrees", "translate", "scale", "shear", "perspective"])
def test_geometry_keys_act_within_their_range(key):
    strength = {"degrees": 20, "translate": 0.3, "scale": 0.4, "shear": 10, "perspective": 0.001}
    hyp = dataclasses.replace(STILL, **{key: strength[key]})
    draws = [draw_warp((100, 100), (100, 100), hyp, np.random.default_rng(i)) for i in range(200)]
    figures = {
        "degrees": lambda m: np.degrees(np.arctan2(m[0, 1], m[0, 0])),
        "translate": lambda m: (m @ [50, 50, 1])[0] / 100 - 0.5,
        "scale": lambda m: m[0, 0] - 1,
        "shear": lambda m: np.degrees(np.arctan(m[0, 1])),
        "perspective": lambda m: m[2, 0],
    }
    seen = np.array([figures[key](matrix) for matrix in draws])
    assert np.abs(seen).max() <= strength[key] + 1e-9
    assert np.abs(seen).max() > 0.9 * strength[key]
    assert abs(seen.mean()) < 0.15 * strength[key]
