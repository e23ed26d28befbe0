"""The flags of the scripts, which load this before all else."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (what is older shall be told so)
    raise SystemExit(f"error: Python 3.10 or newer is needed; this is {sys.version.split()[0]}")
