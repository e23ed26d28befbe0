"""Run commands one after the other in this process, as if each had been typed.

    python run_commands.py commands.json results.json

with a project's folder as working directory and on PYTHONPATH. Torch is loaded once, not once a
command; pictures are of one pixel, and latency is that of five passes: these have tests of their
own. tests/test_documents.py uses it on a copy of the project.
"""

import _thread
import json
import os
import runpy
import signal
import sys
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

from PIL import Image

from utils import profile
from utils.plots import figures


def main() -> None:
    """Write a list of `{"code", "output"}`, one per command."""
    source, target = map(Path, sys.argv[1:])  # commands change sys.argv
    commands = json.loads(source.read_text(encoding="utf-8"))
    save_time()
    results = []
    for words in commands:
        if "--resume" in words:
            interrupt(training_behind(commands, words))
        results.append(run(words))
    target.write_text(json.dumps(results), encoding="utf-8")


def save_time() -> None:
    """Replace what takes most of the time of a short run."""
    compare_latency = profile.compare_latency

    def quick_latency(models: Any, **settings: Any) -> list[profile.Latency]:
        return compare_latency(models, **{**settings, "seconds": 0})

    def quick_picture(_: Any, *values: Any, **__: Any) -> None:
        Image.new("RGB", (1, 1)).save([value for value in values if isinstance(value, Path)][-1])

    profile.compare_latency, figures.draw = quick_latency, quick_picture


def run(words: list[str]) -> dict:
    """Run `python ...` and keep all that it says, children included."""
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(1), os.dup(2)]
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            code = execute(words)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in enumerate(kept, 1):
                os.dup2(original, descriptor)
                os.close(original)
        file.seek(0)
        output = file.read().decode(errors="replace")
    return {"code": code, "output": output}


def execute(words: list[str]) -> int:
    """The exit status of `python FILE ...`, `python -m MODULE ...` or `python -c PROGRAM`."""
    _, first, *rest = words
    # Background jobs ignore Ctrl-C, and so does what ends after one.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if first == "-c":
            exec(compile(rest[0], "<program>", "exec"), {"__name__": "__main__"})
        elif first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [first, *rest]
            runpy.run_path(first, run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
            return 1
        return stop.code or 0
    except Exception:  # noqa: BLE001 (the next command is to run all the same)
        traceback.print_exc()
        return 1
    return 0


def training_behind(commands: list[list[str]], resuming: list[str]) -> list[str]:
    """The training whose folder `--resume` names."""
    folder = Path(value_of(resuming, "--resume"))
    return next(w for w in commands if "--name" in w and value_of(w, "--name") == folder.name)


def value_of(words: list[str], flag: str) -> str:
    """What follows a flag."""
    return words[words.index(flag) + 1]


def interrupt(words: list[str]) -> None:
    """Run a training again, as a longer one, and press Ctrl-C after its first epoch."""
    folder = Path("runs/train") / value_of(words, "--name")
    (folder / "weights/last.pt").unlink(missing_ok=True)
    is_over = threading.Event()

    def wait_and_interrupt() -> None:
        while not is_over.wait(0.01):
            if (folder / "weights/last.pt").exists():
                _thread.interrupt_main()
                is_over.set()

    thread = threading.Thread(target=wait_and_interrupt)
    thread.start()
    run([*words, "--epochs", "3", "--exist-ok"])
    is_over.set()
    thread.join()


if __name__ == "__main__":
    main()
