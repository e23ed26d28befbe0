"""A picture at an address: `http://host/street.jpg`, where streams have addresses too."""

from __future__ import annotations

import http.client
import tempfile
import urllib.request
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

import numpy as np

from utils.image_files import is_image_name, read_image, silent_decoder

TIMEOUT_S = 10
MAX_BYTES = 100 * 2**20  # what is longer is no picture but something without an end


def is_image_address(address: str) -> bool:
    """Whether the address is that of an image file."""
    parts = urlsplit(address)
    name = PurePosixPath(parts.path).name
    return parts.scheme.lower() in ("http", "https") and is_image_name(name)


def read_image_address(address: str) -> np.ndarray:
    """Fetch and decode, as `read_image` does.

    Args:
        address: may hold a user and a password.

    Raises:
        OSError: it cannot be fetched, or is no image; the message does not hold the address.
    """
    try:
        content = _fetch(address)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise OSError(f"cannot be fetched: {getattr(error, 'reason', error)}") from None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "picture"
        path.write_bytes(content)
        try:
            with silent_decoder():
                return read_image(path)
        except OSError:
            raise OSError("not an image, or a damaged one") from None


def _fetch(address: str) -> bytes:
    parts = urlsplit(address)
    host = parts.netloc.rpartition("@")[2]
    path = quote(parts.path, safe="/%:;,+=@&~!*'()$")
    plain = parts._replace(netloc=host, path=path).geturl()
    passwords = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    if parts.username is not None:
        user, password = unquote(parts.username), unquote(parts.password or "")
        passwords.add_password(None, plain, user, password)
    opener = urllib.request.build_opener(
        urllib.request.HTTPBasicAuthHandler(passwords),
        urllib.request.HTTPDigestAuthHandler(passwords),
    )
    with opener.open(plain, timeout=TIMEOUT_S) as response:
        return response.read(MAX_BYTES)
