"""File names for results, so that no two inputs write into the same file."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

MAX_NAME_BYTES = 230  # file systems take 255; numbers and a suffix may follow
_NOT_IN_FILE_NAMES = re.compile(r'[<>:"/\\|?*\x00-\x1f\x7f]+')


def unique_stems(paths: Sequence[str]) -> dict[str, str]:
    """A file name without suffix for each path: its own stem, if no other path has it.

    Where stems repeat, the folders (below the one that all files are in) come in front, and where
    that is not enough a number behind. Upper and lower case count as equal, because some file
    systems see it so.
    """
    counts = Counter(Path(path).stem.casefold() for path in paths)
    levels = zip(*{Path(path).parent.parts for path in paths}, strict=False)
    num_common = sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, levels))
    taken = {stem for stem, count in counts.items() if count == 1}
    stems = {}
    for path in paths:
        stem = Path(path).stem
        if counts[stem.casefold()] > 1:
            parts = [part.strip(":/\\") for part in Path(path).parent.parts[num_common:]]
            first = "_".join([*parts, stem])
            candidates = itertools.chain([first], (f"{first}_{n}" for n in itertools.count(2)))
            stem = next(name for name in candidates if name.casefold() not in taken)
            taken.add(stem.casefold())
        stems[path] = stem
    return stems


def stem_for_numbers(stem: str, others: Collection[str]) -> str:
    """The stem, changed if `<stem>_<number>` could be the name of something else."""
    folded = [other.casefold() for other in others]
    while any(re.fullmatch(re.escape(stem.casefold()) + r"_\d+", other) for other in folded):
        stem += "_video"
    return stem


def safe_name(text: str) -> str:
    """Text as the name of a file or folder on any system; cut if it is too long for one."""
    name = _NOT_IN_FILE_NAMES.sub("_", text).strip(". ")[:MAX_NAME_BYTES]
    while len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        name = name[:-1]
    return name.rstrip(". ") or "_"
