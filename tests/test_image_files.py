"""Image files: suffixes, orientation, kinds of pixels, damage."""

import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from utils.image_files import image_hw, is_image_name, read_image


def picture(height: int = 40, width: int = 60) -> np.ndarray:
    """A smooth BGR picture that tells all its sides apart."""
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = np.linspace(0, 250, width, dtype=np.uint8)
    image[..., 1] = np.linspace(250, 0, height, dtype=np.uint8)[:, None]
    image[: height // 2, : width // 2, 2] = 200
    return image


def save(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    ok, content = cv2.imencode(path.suffix, image)
    assert ok
    path.write_bytes(content.tobytes())
    return path


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.jpg", True), ("a.JPEG", True), ("a.Png", True), ("a.bmp", True), ("a.webp", True),
     ("a.tif", True), ("a.TIFF", True), ("a.b.jpg", True), ("._a.jpg", False), ("a.txt", False),
     ("jpg", False), ("a.gif", False), (".jpg", False)],
)  # fmt: skip
def test_is_image_name(name, expected):
    assert is_image_name(name) == expected


def with_exif(jpeg: bytes, orientation: int, order: str = "<") -> bytes:
    """Put an EXIF block with an orientation behind the start marker."""
    pack = {"<": "little", ">": "big"}[order]

    def number(value: int, size: int) -> bytes:
        return value.to_bytes(size, pack)

    entry = number(0x0112, 2) + number(3, 2) + number(1, 4) + number(orientation, 2) + b"\0\0"
    tiff = {"<": b"II", ">": b"MM"}[order] + number(42, 2) + number(8, 4) + number(1, 2) + entry
    block = b"Exif\0\0" + tiff + b"\0\0\0\0"
    return jpeg[:2] + b"\xff\xe1" + (len(block) + 2).to_bytes(2, "big") + block + jpeg[2:]


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_jpeg_orientation_is_applied_and_known_from_the_header(tmp_path, orientation, order):
    path = save(tmp_path / "a.jpg", picture())
    path.write_bytes(with_exif(path.read_bytes(), orientation, order))
    expected = (60, 40) if 5 <= orientation <= 8 else (40, 60)
    assert image_hw(path) == expected
    image = read_image(path)
    assert image.shape == (*expected, 3)
    # The red corner of the stored picture is upper left; this is where it goes.
    corner = {2: (0, -1), 3: (-1, -1), 4: (-1, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
    row, column = corner.get(orientation, (0, 0))
    assert image[row, column, 2] > 150


@pytest.mark.parametrize(
    ("orientations", "swaps"),
    [
        pytest.param((1, 6), (), id="the first counts, unturned"),
        pytest.param((6, 1), (), id="the first counts, turned"),
        pytest.param((9, 6), (), id="the first counts, senseless"),
        pytest.param((6,), ((b"MM\0*", b"MM\0\0"),), id="not TIFF"),
        pytest.param((6,), ((b"MM\0*", b"XX\0*"),), id="an unknown order of bytes"),
        pytest.param((6,), ((b"\0\x08\0\x01", b"\0\x08\0\0"),), id="an empty directory"),
    ],
)
def test_odd_exif_blocks_mean_what_the_decoder_takes_them_for(tmp_path, orientations, swaps):
    path = save(tmp_path / "a.jpg", picture())
    content = path.read_bytes()
    for orientation in reversed(orientations):
        content = with_exif(content, orientation, ">")
    for good, odd in swaps:
        assert good in content
        content = content.replace(good, odd)
    path.write_bytes(content)
    assert image_hw(path) == read_image(path).shape[:2]


@pytest.mark.parametrize("suffix", [".jpg", ".JPG", ".png", ".bmp", ".webp", ".tif", ".tiff"])
def test_formats(tmp_path, suffix):
    path = save(tmp_path / f"größe 'a' {suffix.lower()}", picture()).rename(tmp_path / f"ä{suffix}")
    assert image_hw(path) == (40, 60)
    image = read_image(path)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - picture()).mean() < 8


GREY_PICTURE = picture()[..., 0]


@pytest.mark.parametrize(
    ("suffix", "stored", "expected"),
    [
        pytest.param(".png", GREY_PICTURE, GREY_PICTURE[..., None], id="grey"),
        pytest.param(".jpg", GREY_PICTURE, GREY_PICTURE[..., None], id="grey jpeg"),
        pytest.param(
            ".png", np.dstack([picture(), GREY_PICTURE]), picture(), id="alpha is dropped"
        ),
        pytest.param(".png", picture().astype(np.uint16) * 257, picture(), id="16 bit"),
        pytest.param(".tif", picture().astype(np.uint16) * 257, picture(), id="16 bit tiff"),
        pytest.param(
            ".png", GREY_PICTURE.astype(np.uint16) * 257, GREY_PICTURE[..., None], id="16 bit grey"
        ),
    ],
)
def test_kinds_of_pixels(tmp_path, suffix, stored, expected):
    path = save(tmp_path / f"a{suffix}", stored)
    image = read_image(path)
    assert image.shape == (40, 60, 3)
    assert np.abs(image.astype(int) - expected).max() <= 6
    assert image_hw(path) == (40, 60)


def test_palette_png(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    path = tmp_path / "a.png"
    image_module.fromarray(picture()[..., ::-1]).convert("P").save(path)
    image = read_image(path)
    assert image.shape == (40, 60, 3)
    assert np.abs(image.astype(int) - picture()).mean() < 25
    assert image_hw(path) == (40, 60)


def test_jpeg_with_a_long_profile_before_its_header(tmp_path):
    path = save(tmp_path / "a.jpg", picture())
    content = path.read_bytes()
    block = b"\xff\xe2" + (60000).to_bytes(2, "big") + bytes(59998)
    path.write_bytes(content[:2] + block * 3 + content[2:])
    assert image_hw(path) == read_image(path).shape[:2] == (40, 60)


def test_jpeg_with_bytes_behind_its_end(tmp_path):
    path = save(tmp_path / "a.jpg", picture())
    path.write_bytes(path.read_bytes() + b"made by a phone")
    assert image_hw(path) == (40, 60)


BAD_CONTENT = [
    pytest.param(".jpg", lambda content: b"", id="zero bytes"),
    pytest.param(".png", lambda content: b"", id="zero bytes png"),
    pytest.param(".jpg", lambda content: b"not an image at all", id="text"),
    pytest.param(".jpg", lambda content: content[: len(content) // 2], id="half a jpeg"),
    pytest.param(".jpg", lambda content: content[:-2], id="jpeg without end"),
    pytest.param(".jpg", lambda content: content[:30], id="jpeg of its start"),
    pytest.param(".png", lambda content: content[: len(content) // 2], id="half a png"),
    pytest.param(".bmp", lambda content: content[: len(content) // 2], id="half a bmp"),
    pytest.param(".webp", lambda content: content[: len(content) // 2], id="half a webp"),
    pytest.param(".tif", lambda content: content[: len(content) // 2], id="half a tiff"),
]


@pytest.mark.parametrize(("suffix", "damage"), BAD_CONTENT)
def test_damaged_images_are_told(tmp_path, suffix, damage):
    path = save(tmp_path / f"a{suffix}", picture(200, 300))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(OSError, match=rf"a\{suffix}"):
        image_hw(path)


def png_bomb(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(100_000)))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def jpeg_bomb(width: int, height: int) -> bytes:
    content = cv2.imencode(".jpg", picture(16, 16))[1].tobytes()
    at = content.index(b"\xff\xc0") + 5
    return content[:at] + struct.pack(">HH", height, width) + content[at + 4 :]


def bmp_bomb(width: int, height: int) -> bytes:
    content = cv2.imencode(".bmp", picture(16, 16))[1].tobytes()
    return content[:18] + struct.pack("<ii", width, -height) + content[26:]


def tiff_bomb(width: int, height: int, order: str = "<", is_big: bool = False) -> bytes:
    """Only a directory with two entries."""
    start = {"<": b"II", ">": b"MM"}[order] + struct.pack(f"{order}H", 43 if is_big else 42)
    start += struct.pack(f"{order}HHQQ", 8, 0, 16, 2) if is_big else struct.pack(f"{order}IH", 8, 2)
    entry, kind = (f"{order}HHQQ", 16) if is_big else (f"{order}HHII", 4)
    sides = ((256, width), (257, height))
    return start + b"".join(struct.pack(entry, tag, kind, 1, side) for tag, side in sides)


def webp_bomb(kind: bytes) -> bytes:
    """States the largest size there can be."""
    start = b"RIFF\xff\xff\0\0WEBP" + kind + bytes(4)
    return start + {
        b"VP8X": bytes(4) + b"\xff" * 6,
        b"VP8L": b"\x2f" + b"\xff" * 4 + bytes(9),
    }.get(kind, bytes(6) + b"\xff\xff" * 2)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        pytest.param("a.jpg", jpeg_bomb(30000, 30000), "30000 x 30000 pixels, more", id="jpeg"),
        pytest.param("a.jpg", jpeg_bomb(9000, 9000), "truncated JPEG file", id="short jpeg"),
        pytest.param("a.png", png_bomb(32000, 32000), "32000 x 32000 pixels, more", id="png"),
        pytest.param("a.jpg", png_bomb(32000, 32000), "32000 x 32000 pixels, more", id="as jpeg"),
        pytest.param("a.png", png_bomb(0, 5), "0 x 5 pixels", id="empty png"),
        pytest.param("a.bmp", bmp_bomb(30000, 20000), "30000 x 20000 pixels, more", id="bmp"),
        pytest.param("a.webp", webp_bomb(b"VP8X"), "16777216 x 16777216 pixels", id="webp"),
        pytest.param("a.webp", webp_bomb(b"VP8L"), "WebP|damaged", id="webp lossless"),
        pytest.param("a.webp", webp_bomb(b"VP8 "), "WebP|damaged", id="webp lossy"),
        pytest.param("a.tif", tiff_bomb(60000, 50000), "60000 x 50000 pixels, more", id="tiff"),
        pytest.param("a.tif", tiff_bomb(60000, 50000, ">"), "60000 x 50000", id="tiff motorola"),
        pytest.param("a.tif", tiff_bomb(2**40, 9, is_big=True), f"{2**40} x 9", id="big tiff"),
        pytest.param("a.tif", b"II*\0\xff\xff\xff\xff", "not an image", id="tiff without size"),
        pytest.param("a.jpg", b"GIF89a" + bytes(50), "not an image; expected", id="gif as jpeg"),
        pytest.param("a.png", b"P6 30000 30000 255\n", "not an image; expected", id="other format"),
    ],
)
def test_bombs_and_strangers_take_neither_time_nor_memory(tmp_path, name, content, complaint):
    path = tmp_path / name
    path.write_bytes(content)
    for function in (image_hw, read_image):
        start = time.process_time()
        with pytest.raises(OSError, match=complaint):
            function(path)
        assert time.process_time() - start < 0.5


@pytest.mark.skipif(os.name != "posix", reason="pipes in folders")
@pytest.mark.parametrize("kind", ["pipe", "device", "huge"])
def test_what_is_no_file_is_not_waited_for(tmp_path, kind):
    path = tmp_path / "a.jpg"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.touch()
        os.truncate(path, 10**12)  # sparse
    code = f"""
from utils.image_files import image_hw, read_image
for function in (image_hw, read_image):
    try:
        function({str(path)!r})
    except OSError as error:
        print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    expected = "1000000000000 bytes" if kind == "huge" else "not a regular file"
    assert done.stdout.count(expected) == 2


def test_missing_image(tmp_path):
    for function in (image_hw, read_image):
        with pytest.raises(FileNotFoundError):
            function(tmp_path / "a.jpg")


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("reduction", [2, 4, 8])
def test_a_reduced_image_is_the_image_averaged(tmp_path, orientation, reduction):
    path = save(tmp_path / "a.jpg", picture(120, 179))
    path.write_bytes(with_exif(path.read_bytes(), orientation))
    whole, small = read_image(path), read_image(path, reduction)
    height, width = whole.shape[:2]
    assert small.shape == (-(-height // reduction), -(-width // reduction), 3)
    rows, columns = height // reduction, width // reduction
    cut = whole[: rows * reduction, : columns * reduction].astype(float)
    blocks = cut.reshape(rows, reduction, columns, reduction, 3).mean((1, 3))
    assert np.abs(blocks - small[:rows, :columns]).mean() < 4


def test_only_jpeg_files_are_reduced(tmp_path):
    path = save(tmp_path / "a.png", picture(120, 179))
    assert np.array_equal(read_image(path, 4), picture(120, 179))
