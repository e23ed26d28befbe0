import errno
import importlib
import io
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch

import utils.flags
from utils.command import OLDEST_TORCH, out_of_memory_advice, printable, run_command


@pytest.mark.parametrize(
    ("message", "advice"),
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...",
         "CUDA out of memory. Tried to allocate 2.00 GiB; try a smaller --batch-size or --imgsz"),
        ("", "the device is out of memory; try a smaller --batch-size or --imgsz"),
    ],
)  # fmt: skip
def test_advice_where_memory_is_short(message, advice):
    assert out_of_memory_advice(torch.OutOfMemoryError(message)) == advice


def test_memory_of_a_cpu_runs_out_in_one_line():
    """Torch has no class of its own for it."""
    with pytest.raises(SystemExit) as caught:
        run_command(lambda: torch.empty(10**16))
    assert re.fullmatch(
        r"error: DefaultCPUAllocator: .* 40000000000000000 bytes.*; try a smaller --batch-size .*",
        str(caught.value),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb\x1b[2J\x9b\udce9", r"a\nb\x1b[2J\x9b\udce9"),
        ("exe\u202egpj\u2028", r"exe\u202egpj\u2028"),
        # Names that people give: of macOS, Japanese, Persian, a family.
        *[
            (name, name)
            for name in (
                "9.41\u202fAM",
                "\u732b\u3000x",
                "\u0645\u06cc\u200c\u0631",
                "\U0001f468\u200d\U0001f467",
            )
        ],
    ],
)
def test_only_what_a_terminal_obeys_is_escaped(text, expected):
    assert printable(text) == expected


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError("x.yaml: no such file"), "error: x.yaml: no such file"),
        (
            OSError(errno.ENOSPC, "No space left on device", "runs/last.pt"),
            "error: runs/last.pt: No space left on device; free some space there, or write",
        ),
        (
            OSError(errno.EROFS, "Read-only file system", "r.csv"),
            "error: r.csv: Read-only file system; see to the permission",
        ),
        (
            OSError(errno.ESTALE, "Stale file handle", "/mnt/a.jpg"),
            "error: /mnt/a.jpg: Stale file handle; if it lies on a drive or a share, connect",
        ),
        (OSError(errno.EBUSY, "Device or resource busy"), "error: Device or resource busy"),
        (ValueError("percent is 50"), "error: percent is 50"),
        (torch.OutOfMemoryError("CUDA out of memory"), "try a smaller --batch-size"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            "error: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`; try a sm",
        ),
        (cv2.error("alloc.cpp: error: (-4:Insufficient memory) in OutOfMemoryError"), "try a smal"),
        (MemoryError(), "error: memory does not suffice (MemoryError); free some, see ulimit"),
        (MemoryError("std::bad_alloc"), "error: memory does not suffice (std::bad_alloc); free"),
        (MemoryError("x.onnx: too little"), "error: x.onnx: too little"),
        (
            RuntimeError("can't start new thread"),
            "suffice (can't start new thread); free some, see",
        ),
        (RuntimeError("could not create a primitive"), "suffice (could not create a primitive); f"),
        (ImportError("a.so: failed to map segment from shared object"), "suffice (a.so: failed to"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory; free some memory; try a small"),
        (
            OSError(errno.EMFILE, "Too many open files", "a.jpg"),
            "a.jpg: Too many open files; allow",
        ),
        (OSError(errno.EIO, "I/O error", "a\nb\x1b.jpg"), r"error: a\nb\x1b.jpg: I/O error; if"),
        (ValueError("na\udcefve.txt:1: class 7"), r"error: na\udcefve.txt:1: class 7"),
    ],
)
def test_problems_of_users_become_one_line(error, words):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_numbers_that_run_away_have_a_status_of_their_own(capsys):
    def main():
        raise FloatingPointError("the loss is nan")

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == 3
    assert capsys.readouterr().err == "error: the loss is nan\n"


@pytest.mark.parametrize(
    "error", [KeyError("names"), RuntimeError("shapes differ"), cv2.error("bad")]
)
def test_mistakes_of_ours_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)) as caught:
        run_command(main)
    assert caught.value is error


def test_torch_need_not_be_loaded(monkeypatch):
    def main():
        raise RuntimeError("out of memory")

    monkeypatch.delitem(sys.modules, "torch")
    with pytest.raises(RuntimeError, match="out of memory"):
        run_command(main)
    assert "torch" not in sys.modules


@pytest.mark.parametrize(
    ("version", "words"),
    [("2.5.1+cu124", "2.6 or newer is needed; this is 2.5.1"), ("1.13.0a0", "this is 1.13.0a0")],
)
def test_an_old_torch_is_refused(monkeypatch, version, words):
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(SystemExit, match=re.escape(words)):
        run_command(lambda: None)


def test_the_torch_that_is_needed_is_that_of_the_requirements(pytestconfig):
    requirements = (pytestconfig.rootpath / "requirements.txt").read_text(encoding="utf-8")
    assert f"\ntorch>={'.'.join(map(str, OLDEST_TORCH))}.0\n" in requirements
    for version in ("2.6.0", "2.10.1+cpu", "3.0.0.dev20300101"):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch, "__version__", version)
            run_command(lambda: None)


def test_an_old_python_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 18))
    with pytest.raises(SystemExit, match=r"Python 3\.10 or newer is needed; this is 3\."):
        importlib.reload(utils.flags)


HOSTILE = "a\nb\r\x1b]0;x\x07\x9b2J\u202e.jpg"
SHOWN = r"a\nb\r\x1b]0;x\x07\x9b2J\u202e.jpg"


@pytest.mark.parametrize(
    ("message", "args", "shown"),
    [
        ("\n%s: %d", (HOSTILE, 3), f"\n{SHOWN}: 3"),
        ("%s", (Path(HOSTILE),), SHOWN),
        ("%s", (OSError(HOSTILE),), SHOWN),
        ("%22s%5.1f", (HOSTILE[:3], 0.25), " " * 18 + r"a\nb" + "  0.2"),
        ("%r", ([1, "x"],), "[1, 'x']"),
        (HOSTILE, (), SHOWN.replace(r"\n", "\n", 1)),
        ("%(a)s", ({"a": "\x1b"},), r"\x1b"),
        ("100 %", (), "100 %"),
        ("caf\u00e9 %s", ("\u6f22",), "caf\u00e9 \u6f22"),
    ],
)
def test_names_in_the_log_obey_nothing(caplog, message, args, shown):
    run_command(lambda: logging.getLogger("x").warning(message, *args))
    assert [record.getMessage() for record in caplog.records] == [shown]


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_what_a_terminal_cannot_show_is_shown_in_figures(monkeypatch, encoding):
    output = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding))
    run_command(lambda: print("caf\udce9 \u6f22", flush=True))
    assert output.getvalue().decode(encoding).strip() in ("caf\\udce9 \\u6f22", "caf\\udce9 \u6f22")


def test_interruption(capsys):
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        run_command(main, "go on with --resume")
    assert caught.value.code == 130
    assert capsys.readouterr().out == "\ninterrupted; go on with --resume\n"


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends a process there")
@pytest.mark.parametrize(
    ("name", "code", "word"),
    [
        ("SIGINT", 130, "interrupted"),
        ("SIGTERM", 143, "ended by SIGTERM"),
        ("SIGHUP", 129, "ended by SIGHUP"),
    ],
)
def test_signals_end_a_command_in_one_line(capsys, name, code, word):
    tidied = []

    def main():
        try:
            os.kill(os.getpid(), signal.Signals[name])
        finally:
            tidied.append(name)

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == code
    assert capsys.readouterr() == (f"\n{word}\n", "")
    assert tidied == [name]


def test_a_terminal_that_has_gone_changes_no_exit_status(pytestconfig):
    program = (
        "import os, signal\n"
        "from utils.command import run_command\n"
        "run_command(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
    )
    shell = f'set -o pipefail; "{sys.executable}" -c "$0" | true'
    ended = subprocess.run(
        ["bash", "-c", shell, program], cwd=pytestconfig.rootpath, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (143, "")


def test_one_of_several_processes_ends_at_once(monkeypatch):
    """It may wait for the others where Python hears of no signal."""
    monkeypatch.setenv("RANK", "1")
    before = signal.getsignal(signal.SIGTERM)
    seen = []
    run_command(lambda: seen.extend(map(signal.getsignal, (signal.SIGTERM, signal.SIGINT))))
    assert seen[0] is before
    assert seen[1] is not signal.default_int_handler


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has it")
@pytest.mark.parametrize("reader", ["full disk", "gone", "closed"])
def test_output_that_cannot_be_written_costs_no_work(tmp_path, pytestconfig, reader):
    """Neither its work nor its last word: one line, where there is somebody to read it."""
    program = (
        "import logging, pathlib, sys\n"
        "from utils.command import run_command\n"
        "def main():\n"
        "    logging.basicConfig(level=logging.INFO, stream=sys.stdout)\n"
        "    for number in range(3):\n"
        "        logging.info('line %d', number)\n"
        "        print('word', flush=True)\n"
        f"    pathlib.Path({str(tmp_path / 'done')!r}).touch()\n"
        "run_command(main)\n"
    )
    redirection = {"full disk": ">/dev/full", "gone": "| true", "closed": ">&-"}[reader]
    shell = f'set -o pipefail; "{sys.executable}" -c "$0" {redirection}'
    ended = subprocess.run(
        ["bash", "-c", shell, program], cwd=pytestconfig.rootpath, capture_output=True, text=True
    )
    assert (tmp_path / "done").exists()
    if reader == "full disk":
        assert ended.returncode == 1
        expected = (
            "error: standard output: No space left on device; free some space there, or write"
        )
        assert ended.stderr.startswith(expected)
        assert ended.stderr.count("\n") == 1
    else:
        assert ended.returncode == 0
        assert "Traceback" not in ended.stderr
        assert "ignored" not in ended.stderr
