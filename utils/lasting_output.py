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

    Raises:
        OSError: at the end of a block that ended well, if output was lost for another reason than
            that nobody was there: into a file on a full disk.
    """
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123 (a name, no path)
        # None: closed before we began, which others do not expect.
        output, errors = _Lasting(sys.stdout or nowhere), _Lasting(sys.stderr or nowhere)
        with redirect_stdout(output), redirect_stderr(errors):
            try:
                yield
            except SystemExit as end:
                if not end.code:  # as after `--help`
                    _check(output, errors)
                raise
            _check(output, errors)


def _check(output: _Lasting, errors: _Lasting) -> None:
    for name, stream in (("standard output", output), ("standard error", errors)):
        stream.flush()
        if stream.lost is not None:
            raise OSError(stream.lost.errno, stream.lost.strerror, name)


class _Lasting:
    """A text stream that is turned to nowhere once it cannot be written to."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None  # why nothing more arrives, unless nobody reads it

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
            self.lost = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
