"""What a command line alone answers: help, mistakes, and files that are not there."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from utils.command import run_command
from utils.flags.checks import ROOT
from utils.lookup import (
    expand_home,
    find_config,
    is_source,
    locate_checkpoint,
    locate_weights,
    no_such_source,
)

CONFIG_FOLDERS = {"hyp": "data/hyps", "cfg": "models", "data": "data"}  # where bare names lie


def answer_early(parse_args: Callable[[None, str | None], Any], description: str | None) -> None:
    """End the program where its command line says enough for that, before torch is loaded.

    Args:
        parse_args: of a script; gives options, or these and more.
        description: what `--help` says above the flags.
    """

    def look() -> None:
        parsed = parse_args(None, description)
        check_files(parsed[0] if isinstance(parsed, tuple) else parsed)

    run_command(look)


def check_files(options: argparse.Namespace) -> None:
    """See that what the options name is there, or can be fetched; the script looks again.

    One of several processes does not: the first finds the files, and tells the others.

    Raises:
        FileNotFoundError: as the script itself would.
    """
    given = vars(options)
    resume, weights, teacher = (given.get(name) for name in ("resume", "weights", "teacher"))
    if "RANK" in os.environ:
        return
    if resume:
        if resume is not True:
            locate_checkpoint(expand_home(resume), ROOT)
        return
    if "source" in given and not is_source(options.source):
        raise no_such_source(options.source)
    for name, folder in CONFIG_FOLDERS.items():
        if given.get(name):
            find_config(given[name], [folder], ROOT)
    for path in [weights] if isinstance(weights, str) else weights or []:
        if path:
            locate_weights(path, ROOT)
    try:
        if teacher:
            locate_weights(teacher, ROOT)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--teacher {error}") from None
