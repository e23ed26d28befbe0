"""Ending a long run when it is asked to: by Ctrl-C, SIGTERM or a terminal that closes."""

from __future__ import annotations

import os
import signal
import time
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

# The last is what a process gets when its terminal goes; Windows has none.
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
PASSED_ON = 0.5  # seconds within which a signal that comes again is the same one


class Stopped(Exception):
    """The run was asked to end, and stands where it can be saved."""


def end_at_ctrl_c() -> None:
    """Until a command begins, Ctrl-C ends the program at once and without a word.

    A KeyboardInterrupt can be lost while a library is imported, which is half loaded then.
    What the caller has told the program to ignore stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, or another signal that asks to end: what has begun is tidied up in the same way."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextmanager
def heeding_signals() -> Iterator[None]:
    """Within the block, the whole of a command, signals that would end it raise `Interrupted`.

    What the caller has told the program to ignore stays ignored. One of several processes heeds
    Ctrl-C alone, and ends at once by the others: it may wait for the rest of them in a library,
    where Python hears of no signal.

    What comes while an `Interrupted` is on its way out does not disturb what is tidied up there,
    nor does Ctrl-C what Python tidies up after a block that one, or SystemExit, has ended.
    """
    heeded = SIGNALS[:1] if "RANK" in os.environ else SIGNALS
    numbers = [getattr(signal, name) for name in heeded if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    changed = {number: old for number, old in before.items() if old not in (signal.SIG_IGN, None)}

    last: list[weakref.ref[Interrupted]] = []  # dead once it has arrived, or a library has lost it

    def remembered(error: Interrupted) -> Interrupted:
        last[:] = [weakref.ref(error)]
        return error

    def interrupt(number: int, _: FrameType | None) -> None:
        if not last or last[0]() is None:
            raise remembered(Interrupted(number))

    for number in changed:
        signal.signal(number, interrupt)
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        if signal.SIGINT in changed:
            changed[signal.SIGINT] = signal.SIG_IGN
        raise
    finally:
        for number, handler in changed.items():
            signal.signal(number, handler)


def cause_of(error: KeyboardInterrupt) -> signal.Signals:
    """The signal that asked to end."""
    return error.signal if isinstance(error, Interrupted) else signal.SIGINT


def describe_interruption(error: KeyboardInterrupt) -> str:
    """What has happened, in a word or three."""
    cause = cause_of(error)
    return "interrupted" if cause == signal.SIGINT else f"ended by {cause.name}"


class StopRequest:
    """Between `with` and the end of the block, signals that would end the program are noted.

    The run looks at `signal` where it can stop without loss. A second Ctrl-C interrupts at once,
    but not within half a second: what starts several processes passes on what a terminal has
    sent them already. Of the other signals more than one may come, as batch systems signal every
    process they see.
    What the caller has told the program to ignore (`nohup`) stays ignored.
    """

    def __init__(self, is_quiet: bool = False) -> None:
        """`is_quiet`: another process speaks."""
        self.is_quiet = is_quiet
        self._noted_at = 0.0
        self.signal: signal.Signals | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._noted_at = signal.Signals(number), time.monotonic()
            # Not print: the signal may have come in the middle of one. Nor need anybody read it:
            # Ctrl-C ends what is behind a pipe too, and the terminal may have been closed.
            with suppress(OSError):
                if not self.is_quiet:
                    os.write(2, b"\nstopping after this step; Ctrl-C (again) ends at once\n")
        elif number == signal.SIGINT and time.monotonic() > self._noted_at + PASSED_ON:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Go on.

        Raises:
            Stopped: the program was asked to end.
        """
        if self.signal is not None:
            raise Stopped

    def watch(self, items: Iterable[T]) -> Iterator[T]:
        """The items, until the program is asked to end; `signal` then tells."""
        for item in items:
            if self.signal is not None:
                return
            yield item
