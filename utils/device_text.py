"""What `--device` may say; whether there is such a device is known to torch (device.py)."""

from __future__ import annotations


def gpu_indices(text: str) -> list[int]:
    """`0,1` or `cuda:0` as numbers; empty for `''`, `cpu`, `mps`.

    Raises:
        ValueError: anything else.
    """
    name = text.strip().lower().removeprefix("cuda:")
    if name in ("", "cpu", "mps"):
        return []
    parts = [part.strip() for part in name.split(",")]
    if name == "cuda":
        parts = ["0"]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise ValueError(f"--device {text}: expected cpu, mps, a GPU number such as 0, or 0,1")
    return [int(part) for part in parts]
