"""Image files: which files count as images, their size after rotation, and decoding them.

An image is always a uint8 BGR array [H, W, 3]: grey and palette images are expanded, 16-bit
images reduced to 8 bits, an EXIF orientation is applied, and an alpha channel is dropped (the
stored colours count, transparent or not).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from utils.regular_file import open_regular, read_regular

# A small file can say that it has billions of pixels, which would be gigabytes in memory.
MAX_PIXELS = 1 << 28
MAX_FILE_BYTES = 1 << 30
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
# What `read_image` can divide the sides by, and how OpenCV calls it.
REDUCTIONS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}

_HEAD_BYTES = 1 << 16  # enough to hold everything before the pixels in nearly all JPEG files
_JPEG_START, _JPEG_END = b"\xff\xd8", b"\xff\xd9"
_JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # SOF0 to SOF15
_JPEG_SCAN_MARKER = 0xDA
_JPEG_APP1_MARKER = 0xE1
_EXIF_START, _TIFF_MAGIC = b"Exif\0\0", 42
_EXIF_ORIENTATION_TAG = 0x0112
_TURNED_BY_90_DEGREES = frozenset({5, 6, 7, 8})


def is_image_name(name: str) -> bool:
    """True for a supported suffix in any letter case; hidden files (`._a.jpg`) are no images."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122 (called for each of millions of names)


def is_unicode(path: str | Path) -> bool:
    """Whether the name can be given to OpenCV, whose videos crash where Python kept odd bytes."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_image(path: str | Path, reduction: int = 1) -> np.ndarray:
    """Decode a file to uint8 BGR [H, W, 3].

    Args:
        path: the file.
        reduction: a key of `REDUCTIONS`: the sides of a JPEG image are divided by this and rounded
            up. It is not decoded any further than that, so half the sides take a quarter of the
            time. Other files have no such short cut and stay as they are.

    Raises:
        OSError: the file cannot be read, is empty or no whole image, or has absurdly many pixels.
    """
    # Not cv2.imread: it fails on file names outside the code page on Windows, and OpenCV 5.0
    # fails there on TIFF files with an orientation.
    content = read_regular(path, MAX_FILE_BYTES)
    if not content:
        raise OSError(f"{path}: the file is empty")
    _check_stated_size(path, _stated_wh(content), len(content), content.startswith(_JPEG_START))
    scale = REDUCTIONS[reduction if content.startswith(_JPEG_START) else 1]
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), scale)
    except cv2.error as error:
        raise OSError(f"{path}: cannot be decoded: {_one_line(error)}") from error
    if image is None:
        raise OSError(f"{path}: not an image, or a damaged one")
    return image


def image_hw(path: str | Path) -> tuple[int, int]:
    """Height and width of the image that `read_image` would return, checking that it is whole.

    JPEG files, the bulk of every large data set, are judged by their header and by the end marker
    that a truncated file lacks: reading 64 KiB instead of decoding is some 30 times faster. The
    price is that damage in the midst of a JPEG's pixels passes. All other files are decoded.

    Raises:
        OSError: as `read_image`.
    """
    with open_regular(path, MAX_FILE_BYTES) as file:
        head = file.read(_HEAD_BYTES)
        if not head.startswith(_JPEG_START):
            height, width = read_image(path).shape[:2]
            return height, width
        header = _jpeg_header(head)
        if header is None:  # a large preview or colour profile comes first
            head += file.read()
            header = _jpeg_header(head)
        if header is None:
            raise OSError(f"{path}: a JPEG file without a header, or a truncated one")
        height, width, orientation, pixels_at = header
        if not _jpeg_is_whole(file, pixels_at):
            raise OSError(f"{path}: a truncated JPEG file")
        _check_stated_size(path, (width, height), file.seek(0, os.SEEK_END), is_jpeg=True)
    return (width, height) if orientation in _TURNED_BY_90_DEGREES else (height, width)


@contextmanager
def silent_decoder() -> Iterator[None]:
    """Keep OpenCV from writing to stderr about damaged files, which we report ourselves."""
    logging = getattr(cv2.utils, "logging", cv2)  # OpenCV 4 has the functions at the top
    level = logging.getLogLevel()
    logging.setLogLevel(0)  # silent
    try:
        yield
    finally:
        logging.setLogLevel(level)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_stated_size(
    path: str | Path, size_wh: tuple[int, int] | None, num_bytes: int, is_jpeg: bool
) -> None:
    """Refuse, before any memory is taken, what cannot be an image or cannot be handled.

    Raises:
        OSError: says what is wrong.
    """
    if size_wh is None:
        raise OSError(f"{path}: not an image; expected a whole JPEG, PNG, BMP, WebP or TIFF file")
    width, height = size_wh
    if width < 1 or height < 1:
        raise OSError(f"{path}: an image of {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise OSError(
            f"{path}: says that it has {width} x {height} pixels, more than {MAX_PIXELS}; cut it "
            "into tiles or remove it"
        )
    # A JPEG file has at least one bit for each block of 8 x 8 pixels.
    if is_jpeg and width * height > 512 * num_bytes:
        raise OSError(f"{path}: a truncated JPEG file, {num_bytes} bytes for {width} x {height}")


def _stated_wh(content: bytes) -> tuple[int, int] | None:
    """Width and height that an image file states; None where it states none that we know."""
    try:
        if content.startswith(_JPEG_START):
            header = _jpeg_header(content)
            return None if header is None else (header[1], header[0])
        if content.startswith(b"\x89PNG\r\n\x1a\n"):
            return struct.unpack_from(">II", content, 16)
        if content.startswith(b"BM"):
            is_old = struct.unpack_from("<I", content, 14) == (12,)
            width, height = struct.unpack_from("<HH" if is_old else "<ii", content, 18)
            return width, abs(height)  # negative: the rows go from top to bottom
        if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
            return _webp_wh(content)
        if content[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
            return _tiff_wh(content)
    except (struct.error, OverflowError):  # the file ends before that
        pass
    return None


def _webp_wh(content: bytes) -> tuple[int, int] | None:
    kind = content[12:16]
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", content, 26)
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", content, 21)
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X" and len(content) >= 30:
        width, height = (int.from_bytes(content[at : at + 3], "little") for at in (24, 27))
        return width + 1, height + 1
    return None


def _tiff_wh(content: bytes) -> tuple[int, int] | None:
    """From the first directory: tags 256 and 257, whole numbers of 2, 4 or (BigTIFF) 8 bytes."""
    order = "<" if content.startswith(b"II") else ">"
    is_big = b"+" in content[:4]
    (at,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}I", content, 8 if is_big else 4)
    (num_entries,) = struct.unpack_from(f"{order}Q" if is_big else f"{order}H", content, at)
    entry_bytes, value_at = (20, 12) if is_big else (12, 8)
    at += 8 if is_big else 2
    sides = {}
    for entry in range(at, min(at + num_entries * entry_bytes, len(content)), entry_bytes):
        tag, kind = struct.unpack_from(f"{order}HH", content, entry)
        if tag in (256, 257) and kind in _TIFF_NUMBERS:
            (sides[tag],) = struct.unpack_from(
                order + _TIFF_NUMBERS[kind], content, entry + value_at
            )
    return (sides[256], sides[257]) if len(sides) == 2 else None


_TIFF_NUMBERS = {3: "H", 4: "I", 16: "Q"}


def _jpeg_header(head: bytes) -> tuple[int, int, int, int] | None:
    """Walk the JPEG segments up to the pixels.

    Returns:
        Height, width, EXIF orientation (1 where there is none) and the position of the first
        pixel data; None when `head` ends before that.
    """
    size_hw, orientation, position = None, None, 2
    while position + 4 <= len(head):
        if head[position] != 0xFF:
            return None
        marker = head[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without content
            position += 2
            continue
        (length,) = struct.unpack_from(">H", head, position + 2)
        content = head[position + 4 : position + 2 + length]
        if marker in _JPEG_SIZE_MARKERS and len(content) >= 5:
            size_hw = struct.unpack_from(">HH", content, 1)
        elif marker == _JPEG_APP1_MARKER and orientation is None:
            orientation = _exif_orientation(content)  # the first block that has one counts
        position += 2 + length
        if marker == _JPEG_SCAN_MARKER:
            return None if size_hw is None else (*size_hw, orientation or 1, position)
    return None


def _exif_orientation(block: bytes) -> int | None:
    """What the first directory of an EXIF block states; None if it is none or has no such entry.

    What is not in the order of Intel is read in the other, as OpenCV does.
    """
    tiff = block[len(_EXIF_START) :]
    if not block.startswith(_EXIF_START) or len(tiff) < 8:
        return None
    order = "<" if tiff.startswith(b"II") else ">"
    if struct.unpack_from(f"{order}H", tiff, 2) != (_TIFF_MAGIC,):
        return None
    (directory,) = struct.unpack_from(f"{order}I", tiff, 4)
    if directory + 2 > len(tiff):
        return None
    (num_entries,) = struct.unpack_from(f"{order}H", tiff, directory)
    for index in range(num_entries):
        entry = directory + 2 + 12 * index
        if entry + 12 > len(tiff):
            break
        tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
        if tag == _EXIF_ORIENTATION_TAG:
            return value
    return None


def _jpeg_is_whole(file, pixels_at: int) -> bool:
    """True if an end marker follows the pixels; bytes behind it (some phones add them) are fine."""
    file.seek(0, os.SEEK_END)
    if file.tell() < pixels_at + 2:
        return False
    file.seek(-2, os.SEEK_END)
    if file.read() == _JPEG_END:
        return True
    file.seek(pixels_at)  # within the pixels FF is never followed by D9, so this search is exact
    return _JPEG_END in file.read()
