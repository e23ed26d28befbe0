"""How every command ends: well, with one line that says what is wrong, or interrupted."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import unicodedata
from collections.abc import Callable

from utils.lasting_output import lasting_output
from utils.stopping import cause_of, describe_interruption, heeding_signals

# What to do about an error of the system.
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some space there, or write elsewhere"),
    errno.ENOMEM: "free some memory; try a smaller --batch-size or --imgsz, or fewer --workers",
    errno.EMFILE: "allow more (see ulimit -n), or take fewer --workers",
    errno.EAGAIN: "allow more processes (see ulimit -u), or take fewer --workers",
    errno.EFBIG: "files of this size are not allowed there (see ulimit -f)",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "see to the permission"),
    **dict.fromkeys(
        (errno.ENOENT, errno.EIO, errno.ENODEV, errno.ENXIO, errno.ENOTCONN, errno.ESTALE),
        "if it lies on a drive or a share, connect it again",
    ),
}


TURNS = "\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

OLDEST_TORCH = (2, 6)

# What is raised where memory is short or limited (ulimit -v), besides what has a class.
STARVED = (
    "can't start new thread",
    "could not create a primitive",
    "bad_alloc",
    "failed to map segment",
    "Cannot allocate memory",
)
REMEDY_OF_MEMORY = "free some, see ulimit -v and -u, or try a smaller --batch-size or --imgsz"
CPU_ALLOCATOR = "DefaultCPUAllocator: "  # torch's, when there is no memory
# What libraries say of a full GPU; torch's own allocator has a class for it.
GPU_IS_FULL = (
    "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip

NOT_FINITE = 3  # exit status of a run whose numbers ran away, which is no fault of its surroundings


def run_command(main: Callable[[], None], advice: str = "") -> None:
    """Call the main function of a script; problems of users become one line and exit status 1.

    That of a FloatingPointError is `NOT_FINITE`.

    What is not caught here is a mistake of ours, and its traceback should be seen.

    Args:
        main: raises OSError, ValueError, FloatingPointError or MemoryError, with a message for
            users.
        advice: what is said after Ctrl-C, or another signal that asks to end, besides that; the
            exit status is 130, or what shells know for that signal.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not what a terminal cannot show ends a run
            stream.reconfigure(errors="backslashreplace")
    logging.setLogRecordFactory(PrintableRecord)
    check_torch()
    try:
        with lasting_output():
            _call(main, advice)
    except OSError as error:
        raise SystemExit(f"error: {printable(describe_os_error(error))}") from None
    except FloatingPointError as error:
        print(f"error: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(NOT_FINITE) from None
    except Exception as error:
        if is_out_of_memory(error) or is_opencv_out_of_memory(error):
            raise SystemExit(f"error: {out_of_memory_advice(error)}") from None
        if is_starved(error):
            reason = printable(str(error).partition("\n")[0]) or type(error).__name__
            raise SystemExit(
                f"error: memory does not suffice ({reason}); {REMEDY_OF_MEMORY}"
            ) from None
        if not isinstance(error, ValueError | MemoryError):
            raise
        raise SystemExit(f"error: {printable(str(error))}") from None


def _call(main: Callable[[], None], advice: str) -> None:
    """Until it ends, or is asked to."""
    try:
        with heeding_signals():
            main()
    except KeyboardInterrupt as error:
        print(f"\n{describe_interruption(error)}{advice and f'; {advice}'}", flush=True)
        raise SystemExit(128 + cause_of(error)) from None


def check_torch() -> None:
    """Stop if the torch that is loaded, if any, is too old to read files from others safely."""
    torch = sys.modules.get("torch")
    found = torch.__version__ if torch is not None else "99.0"
    if tuple(map(int, found.split(".")[:2])) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise SystemExit(
            f"error: torch {oldest} or newer is needed; this is {found}; pip install -r "
            "requirements.txt brings it"
        )


def describe_os_error(error: OSError) -> str:
    """One line: which file, what is wrong, and what to do; a message of our own as it is."""
    if error.errno is None or error.strerror is None:
        return str(error)
    place = f"{error.filename}: " if error.filename is not None else ""
    remedy = REMEDIES.get(error.errno)
    return f"{place}{error.strerror}{f'; {remedy}' if remedy else ''}"


def printable(text: str) -> str:
    """In one line: what a terminal would obey in a file name is written with a backslash."""
    if text.isprintable():
        return text
    return "".join(c.encode("unicode_escape").decode() if _is_obeyed(c) else c for c in text)


def _is_obeyed(character: str) -> bool:
    """Control characters, ends of lines and of paragraphs, and what turns the direction of text."""
    kinds = ("Cc", "Cs", "Zl", "Zp")
    return unicodedata.category(character) in kinds or character in TURNS


class PrintableRecord(logging.LogRecord):
    """A line of the log, whatever the names of files and classes in it hold.

    What it is made from stays in its line, so that a text of several lines is logged line by line.
    """

    def getMessage(self) -> str:
        """The text, of which a terminal obeys nothing but the ends of lines in the format."""
        args = self.args
        if isinstance(args, tuple):
            texts = str | os.PathLike | BaseException
            args = tuple(printable(str(a)) if isinstance(a, texts) else a for a in args)
        text = str(self.msg) % args if args else str(self.msg)
        return "\n".join(map(printable, text.split("\n")))


def is_opencv_out_of_memory(error: Exception) -> bool:
    """Whether OpenCV says so; its errors are of a class of its own."""
    return type(error).__module__ == "cv2" and "Insufficient memory" in str(error)


def is_starved(error: Exception) -> bool:
    """Whether Python or a library says that it gets no memory, in its own words."""
    if isinstance(error, MemoryError):
        return not str(error) or any(words in str(error) for words in STARVED)
    return not isinstance(error, ValueError) and any(words in str(error) for words in STARVED)


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch says so; what has not loaded torch need not do so to ask."""
    is_torchs = "torch" in sys.modules and isinstance(error, RuntimeError)
    return is_torchs and (is_gpu_out_of_memory(error) or CPU_ALLOCATOR in str(error))


def is_gpu_out_of_memory(error: Exception) -> bool:
    """Whether torch or one of its libraries says so."""
    is_class = isinstance(error, sys.modules["torch"].OutOfMemoryError)
    return is_class or any(words in str(error) for words in GPU_IS_FULL)


def out_of_memory_advice(error: Exception) -> str:
    """One line: what happened, in the first sentences of the error, and what to do."""
    text = str(error)
    text = text[max(text.find(CPU_ALLOCATOR), 0) :]
    reason = ". ".join(text.split(". ")[:2]).strip().rstrip(".").partition("\n")[0]
    return f"{reason or 'the device is out of memory'}; try a smaller --batch-size or --imgsz"
