"""Help and mistakes are answered by the flags alone: nothing that takes seconds to load is."""

import argparse
import importlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from utils.flags.answer import check_files

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train", "prune", "val", "detect", "export", "demo")
HEAVY = {"torch", "torchvision", "cv2", "matplotlib", "scipy", "thop", "numpy", "pycocotools"}

# Runs a script as a command would and, where it ends, says what it has loaded in a last line.
PROBE = """
import json, runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("\\n" + json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def run(code, *arguments):
    """Exit status, both outputs, and the heavy packages that `code` leaves loaded."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    output, _, loaded = done.stdout.rstrip().rpartition("\n")
    return done.returncode, output, done.stderr, HEAVY & set(json.loads(loaded))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_nothing_heavy(script):
    code, output, errors, heavy = run(PROBE, f"{script}.py", "--help")
    assert (code, errors, heavy) == (0, "", set())
    assert f"usage: {script}.py" in output
    assert f"    python {script}.py" in output  # the commands to copy, from the docstring
    assert "--device" in output


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_the_same_when_main_is_called(script, capsys):
    module = importlib.import_module(script)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    assert module.__doc__.strip() in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train.py --nonsense", "unrecognized arguments: --nonsense"),
        ("train.py --epochs 0", "--epochs is 0, expected at least 1"),
        ("train.py --freeze 2 -1", "--freeze is -1, expected at least 0"),
        ("train.py --optimizer Lion", "--optimizer: invalid choice: 'Lion'"),
        ("train.py --bn_sparsity --ft_pruned_model", "are different stages; give one of them"),
        ("train.py --resume --evolve 3", "--resume goes on with one; give one"),
        ("train.py --device mars", "--device mars: expected cpu, mps, a GPU number"),
        ("train.py --amp fp16 --device cpu", "--amp fp16 needs a CUDA GPU, not cpu"),
        ("train.py --amp fp16 --device MPS", "--amp fp16 needs a CUDA GPU, not MPS"),
        ("prune.py --percent 0.5", "the following arguments are required: --weights"),
        ("prune.py --weights x.pt --percent 0.5 --nonsense", "unrecognized arguments: --nonsense"),
        ("prune.py --weights x.pt --percent 50", "for 50 % type 0.5"),
        ("prune.py --weights x.pt --percent 0.5 --sweep", "exclude each other"),
        ("prune.py --weights x.pt --target-gflops half", "is no number and no share"),
        ("prune.py --weights x.pt --percent 0.5 --device 0,", "--device 0,: expected cpu"),
        ("val.py --nonsense", "unrecognized arguments: --nonsense"),
        ("val.py --conf-thres 1.5", "--conf-thres is 1.5, expected 0 to 1"),
        ("val.py --task study --img 640", "--imgsz does not act with --task study"),
        ("val.py --device mars", "--device mars: expected cpu, mps, a GPU number"),
        ("val.py --half --device cpu", "--half needs a GPU: float16 on a CPU is emulated"),
        ("detect.py", "the following arguments are required: --source"),
        ("detect.py --source x --nonsense", "unrecognized arguments: --nonsense"),
        ("detect.py --source x --save-conf", "--save-conf acts only with --save-txt"),
        ("detect.py --source x --device mars", "--device mars: expected cpu, mps, a GPU number"),
        ("detect.py --source x --half --device cpu", "--half needs a GPU: float16 on a CPU"),
        ("demo.py --nonsense", "unrecognized arguments: --nonsense"),
        ("demo.py --epochs 1 0 1", "--epochs is 0, expected at least 1"),
        ("demo.py --percent 50", "--percent is 50, expected more than 0 and less than 1"),
    ],
)
def test_a_mistake_loads_nothing_heavy(command, message):
    script, *flags = command.split()
    code, _, errors, heavy = run(PROBE, script, *flags)
    assert (code, heavy) == (2, set())
    assert errors.startswith(f"usage: {script}")
    assert errors.splitlines()[-1].startswith(f"{script}: error: ")
    assert message in errors.splitlines()[-1]


# Runs a script that gets a Ctrl-C when it begins to import a module, in which it is lost.
CTRL_C = """
import contextlib, os, runpy, signal, sys
_, module, handler, *sys.argv = sys.argv
signal.signal(signal.SIGINT, getattr(signal, handler))
class Finder:
    def find_spec(name, *_):
        if name == module:
            with contextlib.suppress(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            sys.exit("goes on")
sys.meta_path.insert(0, Finder)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
COMMANDS = {
    "train": ("--cfg", "yolov5n.yaml", "--weights", "", "--data", "data/bccd.yaml"),
    "prune": ("--weights", "yolov5n.pt", "--percent", "0.5"),
    "detect": ("--source", "tests"),
}


@pytest.mark.skipif(sys.platform == "win32", reason="os.kill ends a process there")
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("module", "handler", "end"),
    [
        ("utils.flags.answer", "default_int_handler", (-signal.SIGINT, "")),
        ("torch", "default_int_handler", (-signal.SIGINT, "")),
        ("torch", "SIG_IGN", (1, "goes on\n")),  # as in the background, or with nohup
    ],
)
def test_ctrl_c_is_not_lost_in_an_import(script, module, handler, end):
    """Where Python code of a library calls C code that does, it was, and half a library is left."""
    words = [f"{script}.py", *COMMANDS.get(script, ())]
    done = subprocess.run(
        [sys.executable, "-c", CTRL_C, module, handler, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == end
    assert done.stdout == ""


WEIGHTS = "yolov5n.pt"  # a released name is not looked for any further


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("train.py --weights nope.pt", "nope.pt: no such file; tried nope.pt, "),
        ("train.py --data nope.yaml", "nope.yaml: no such file; tried nope.yaml, "),
        ("train.py --hyp hyp.scrtch-low.yaml", "did you mean 'hyp.scratch-low.yaml'"),
        ("train.py --cfg yolov5q", "yolov5q: no such file; tried yolov5q, yolov5q.yaml, "),
        ("train.py --teacher nope.pt", "--teacher nope.pt: no such file; tried nope.pt, "),
        ("train.py --resume nope", "/nope: no such checkpoint"),
        ("prune.py --weights nope.pt --percent 0.5", "nope.pt: no such file; tried nope.pt, "),
        (f"prune.py --weights {WEIGHTS} --percent 0.5 --data nope", "nope: no such file; tried "),
        (f"prune.py --weights {WEIGHTS} --percent 0.5 --cfg nope", "nope: no such file; tried "),
        ("val.py --weights nope.onnx", "nope.onnx: no such file; tried nope.onnx, "),
        (f"val.py --task study --weights {WEIGHTS} nope.pt", "nope.pt: no such file; tried "),
        ("val.py --data nope.yaml", "nope.yaml: no such file; tried nope.yaml, "),
        ("detect.py --source nope.jpg", "nope.jpg: no such file or folder; expected an image, a"),
        ("detect.py --source tests --weights nope_openvino_model", "nope_openvino_model: no such"),
        ("export.py --weights nope.pt", "nope.pt: no such file; tried nope.pt, "),
        ("export.py --data nope.yaml", "nope.yaml: no such file; tried nope.yaml, "),
        ("demo.py --data nope.yaml", "nope.yaml: no such file; tried nope.yaml, "),
        ("demo.py --hyp nope.yaml", "nope.yaml: no such file; tried nope.yaml, "),
    ],
)
def test_a_missing_file_loads_nothing_heavy(command, message):
    code, _, errors, heavy = run(PROBE, *command.split())
    assert (code, heavy) == (1, set())
    assert errors.startswith("error: ")
    assert len(errors.splitlines()) == 1
    assert message in errors


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "", "cfg": "yolov5n.yaml", "data": "bccd", "hyp": "hyp.finetune.yaml"},
        {"weights": ["yolov5s6.pt", "weights/yolov5n.pt"], "data": "data/coco128.yaml"},
        {"weights": WEIGHTS, "data": None, "teacher": WEIGHTS},
        {"resume": True, "weights": "nope.pt"},
        *({"source": text} for text in ("0", "rtsp://camera/1", "*.nope", str(ROOT))),
    ],
)
def test_what_is_there_or_can_be_fetched_passes(options):
    check_files(argparse.Namespace(**options))


def test_one_of_several_processes_need_not_have_the_files(monkeypatch):
    missing = argparse.Namespace(weights="nope.pt")
    with pytest.raises(FileNotFoundError):
        check_files(missing)
    monkeypatch.setenv("RANK", "1")
    check_files(missing)


SUPPRESS = """
import json, sys, torch, train
from utils.nms import non_max_suppression
{}
(found,) = non_max_suppression(torch.tensor([[[9, 9, 4, 4, 1, 1], [9, 9, 4, 4, 1, 0.9]]]))
print(len(found))
print(json.dumps(list(sys.modules)))
"""


@pytest.mark.parametrize(
    ("before", "loaded"),
    [("", set()), ("import pathlib; pathlib.Path.glob = lambda *_: []", {"torchvision"})],
    ids=["library", "package"],
)
def test_training_loads_what_draws_and_suppresses_when_it_is_used(before, loaded):
    """Of torchvision it is a library, where that can be found."""
    _, output, _, heavy = run(SUPPRESS.format(before))
    assert output.splitlines()[-1] == "1"
    assert "torch" in heavy
    assert heavy & {"matplotlib", "torchvision"} == loaded
