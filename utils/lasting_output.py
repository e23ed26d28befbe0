"""Output of a long run, which goes on when nobody reads it any more."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

# Of a pipe whose reader has ended, and of a terminal that was closed.
GONE = (errno.EPIPE, errno.EIO)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within the block (or a function) output that nobody can get is lost, and nothing else is.

    A training that was started with `| tee log` would otherwise end by the first word after the
    end of tee, which Ctrl-C ends as well: before it has saved anything.
    """
    with redirect_stdout(_Lasting(sys.stdout)), redirect_stderr(_Lasting(sys.stderr)):
        yield


class _Lasting:
    """A text stream that is turned to nowhere once its reader has gone."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """As a stream does."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._turn_away(error)
            return len(text)

    def flush(self) -> None:
        """As a stream does."""
        try:
            self._stream.flush()
        except OSError as error:
            self._turn_away(error)

    def _turn_away(self, error: OSError) -> None:
        """Let the file lead nowhere, also for what is in the buffer and what does not write here.

        Python flushes the stream itself when it ends, and would change the exit status.
        """
        if error.errno not in GONE:
            raise error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
