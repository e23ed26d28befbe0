"""What README and docs tell people to type is understood, works, and leads to files that are there.

The commands run in the order of the pages, in a copy of the project beside tiny data and with tiny
weights under the names that the pages use: each finds what those before it wrote.
"""

import argparse
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import pytest
import torch
from torch.distributed.run import get_args_parser

from models import Model, ModelSpec
from utils.checkpoint import build_checkpoint, save_checkpoint
from utils.config import load_yaml
from utils.lookup import find_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BENCHMARKS = [path for path in ROOT.glob("benchmarks/**/*.*") if path.suffix in (".md", ".py")]
SCRIPTS = ("train", "prune", "val", "detect", "export")

# What stands for something longer in a table of results.
SHORT_FORMS = {
    "C": "--data bccd.yaml --img 320 --batch 16 --nominal-batch 16 --optimizer AdamW --epochs 60",
    "P": "--weights runs/train/sparse/weights/last.pt --data bccd.yaml --img 320",
}
# With these words a line of a block is a command; other blocks show output or programs.
COMMAND_WORDS = (
    "python", "python3", "py", "pip", "git", "cd", "make", ".", r".venv\Scripts\activate",
    "torchrun",
)  # fmt: skip

# What makes a command cheap: flags and what follows them instead, or in addition.
CHEAP = {
    "train.py": {"--epochs": "1", "--img": "64", "--device": "cpu"},
    "prune.py": {"--img": "64", "--device": "cpu", "--latency-batch": "1"},
    "val.py": {"--img": "64", "--device": "cpu"},
    "detect.py": {"--img": "64", "--device": "cpu"},
    "export.py": {"--img": "64"},
    "benchmarks.formats": {"--img": "64", "--repeats": "1", "--precisions": "float32"},
    "data.scripts.make_shapes": {"--train": "4", "--val": "2", "--size": "64"},
}
ROUND_TO = ("--round-to", "2")  # instead of another number: the layers have eight channels or so
# What cannot run in a test. Each must be on the pages, or the line has to go.
NOT_RUN = {
    r"pip install|pip uninstall": "installs packages",
    r"git clone|cd yolov5-slim": "fetches the project",
    r"-m venv|activate$": "makes an environment",
    r"make demo|python demo\.py": "takes ten minutes; test_demo.py runs its stages",
    r"make test|make lint|-m pytest": "is what runs this",
    r"-m tests\.kill_loop": "takes eight minutes; test_train.py looks at what it compares",
    r"--source 0": "needs a camera",
    r"rtsp://": "needs a stream",
    r"^torchrun": "starts several processes, on several machines; test_ranks.py does so",
    r"data\.scripts\.get_": "downloads; test_data_scripts.py runs them",
}


SLURM_FLAGS = {
    *("--nodes", "--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--mem"),
    *("--requeue", "--open-mode", "--signal"),
}
PYTEST_FLAGS = {"--dist", "--pdb"}


class Command(NamedTuple):
    """What is to be typed, and where it is written."""

    text: str
    place: str

    @property
    def reason_not_to_run(self) -> str | None:
        return next((why for kind, why in NOT_RUN.items() if re.search(kind, self.text)), None)


def find_commands(page):
    """Those of blocks, of table cells, and what begins with `python` within a sentence."""
    text = page.read_text("utf-8")
    for found in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        place = f"{page.name}:{text[: found.start()].count(chr(10)) + 1}"
        yield Command(shlex.join(["python", "-c", found[1]]), place)
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        place = f"{page.name}:{number}"
        fenced ^= line.lstrip().startswith("```")
        words = line.split()
        if not fenced and re.match(" {4}", line) and words and words[0] in COMMAND_WORDS:
            yield Command(line.strip(), place)
        elif not fenced:
            start = r"(?:python |\w+\.py )" if line.startswith("|") else "python "
            for inline in re.findall(rf"`({start}[^`]*)`", line):
                yield Command(inline, place)


COMMANDS = [command for page in PAGES for command in find_commands(page)]
RUN = list({c.text: c for c in COMMANDS if not c.reason_not_to_run}.values())  # each once


def by_place(commands):
    return [pytest.param(command, id=command.place) for command in commands]


def full_words(text):
    """The words of a command, with what short forms stand for and with `python`."""
    for short, long in SHORT_FORMS.items():
        text = re.sub(rf"(?<= ){short}(?= |$)", long, text)
    words = shlex.split(text, comments=True)
    return words if words[0] in COMMAND_WORDS else ["python", *words]


def cheap_words(text):
    words = full_words(text)
    kind = words[2] if words[1] == "-m" else words[1]
    if ROUND_TO[0] in words:
        words += ROUND_TO
    for flag, value in CHEAP.get(kind, {}).items():
        if "--resume" in words and flag != "--device":
            continue
        if flag in words:
            words[words.index(flag) + 1] = value
        elif "--help" not in words:
            words += [flag, value]
    return words


# ------------------------------------------------------------------------------------ on paper
def test_there_are_commands():
    assert len(RUN) >= 25
    for kind in NOT_RUN:
        assert any(re.search(kind, command.text) for command in COMMANDS), kind


@pytest.mark.parametrize("command", by_place(COMMANDS))
def test_command_is_understood(command):
    words = full_words(command.text)
    if words[0] == "torchrun":
        started = get_args_parser().parse_args(words[1:])
        words = ["python", started.training_script, *started.training_script_args]
    if words[1].endswith(".py"):
        assert (ROOT / words[1]).is_file()
        if "--help" not in words:
            importlib.import_module(f"utils.flags.{words[1][:-3]}").parse_args(words[2:])
    if words[:2] == ["python", "-m"] and words[2] not in ("venv", "pytest"):
        assert (ROOT / (words[2].replace(".", "/") + ".py")).is_file()
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    folders = {"--hyp": "data/hyps", "--data": "data", "--cfg": "models", "-r": "."}
    for flag, value in itertools.pairwise(words):
        if flag in folders and "/" not in value:
            assert (ROOT / folders[flag] / value).is_file()


class Parsed(Exception):
    """Raised where a program has read its flags."""


def find_benchmarks():
    """Commands of hours, which are not run: on the pages of the benchmarks and in what they run."""
    for page in BENCHMARKS:
        text = " ".join(page.read_text("utf-8").splitlines())
        kinds = r"`(python -m benchmarks\.[^`]*)`", r" {4}(python -m benchmarks\.[^`]*?)(?= {2})"
        for command in re.findall(kinds[page.suffix == ".py"], text):
            if not re.search(r"[A-Z]{2}", command):  # MODULE stands for one
                yield pytest.param(shlex.split(command), id=f"{page.name}: {command}")


def test_benchmarks_are_found():
    assert {command.values[0][2] for command in find_benchmarks()} >= {
        f"benchmarks.{name}"
        for name in ("formats", "loader", "peak", "scaling", "slimming", "training", "validation")
    }


@pytest.mark.parametrize("words", list(find_benchmarks()))
def test_benchmark_is_understood(words, monkeypatch):
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, argv):
        options = parse_args(parser, argv)
        data = getattr(options, "data", None)
        assert data is None or find_config(data, ["data"], ROOT).is_file()
        raise Parsed

    module = importlib.import_module(words[2])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        module.main(words[3:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_exist(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text("utf-8")):
        if target.startswith("https://"):
            continue
        name, _, heading = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        assert not heading or heading in find_headings(path), target


def find_headings(page):
    """As links name them."""
    lines = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page):
    """Also those of sentences and tables, as `--round-to 8`."""
    parsers = [importlib.import_module(f"utils.flags.{name}").build_parser() for name in SCRIPTS]
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    modules = [ROOT / "tests/kill_loop.py", *(ROOT / "benchmarks").glob("*.py")]
    modules += (ROOT / "data/scripts").glob("*.py")
    known |= set(get_args_parser()._option_string_actions) | SLURM_FLAGS | PYTEST_FLAGS
    others = "".join(module.read_text("utf-8") for module in modules)
    for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text("utf-8")):
        assert flag in known or f'"{flag}"' in others, flag


def test_messages_are_those_of_the_scripts():
    """What the page on trouble quotes in bold, but for the figures (`...`), is what they print."""
    scripts = [ROOT / f"{name}.py" for name in SCRIPTS]
    sources = [*scripts, *(ROOT / "utils").rglob("*.py")]
    # Texts that go on in the next line of the program are one.
    said = re.sub(r'"\s*\n\s*f?"', "", "".join(path.read_text("utf-8") for path in sources))
    page = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    quoted = re.findall(r"\*\*`([^`]+)`", page)
    assert len(quoted) >= 10
    for part in (part for text in quoted for part in text.split("...")):
        assert " ".join(part.split()) in said, part


# ------------------------------------------------------------------------------------ in earnest
def write_dataset(root, splits):
    """A few pictures, each of one object that fills it; every split the same."""
    rng = np.random.default_rng(0)
    for split in splits:
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for number in range(4):
            image = rng.integers(90, 130, (64, 64, 3), dtype=np.uint8)
            assert cv2.imwrite(str(root / f"images/{split}/{number}.jpg"), image)
            (root / f"labels/{split}/{number}.txt").write_text("0 0.5 0.5 1 1\n")


def write_clip(path):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 10, (64, 64))
    for value in range(4):
        writer.write(np.full((64, 64, 3), 60 * value, np.uint8))
    writer.release()


def write_weights(path):
    """A network of few channels that sees large objects of class 0 everywhere."""
    torch.manual_seed(0)
    small = {"nc": 3, "depth_multiple": 0.1, "width_multiple": 0.02}
    spec = load_yaml(ROOT / "models/yolov5n.yaml") | small
    model = Model(ModelSpec.from_dict(spec))
    bias = model.head.m[-1].bias.data.view(model.head.num_anchors, -1)
    bias[:, 4] = bias[:, 5] = 5.0
    save_checkpoint(path, build_checkpoint(model, ("a", "b", "c")))


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project as a user has it, the data set beside it, small things inside."""
    folder = tmp_path_factory.mktemp("documents")
    project = folder / "yolov5-slim"
    project.mkdir()
    for name in ("models", "utils", "data", "benchmarks"):
        skipped = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / name, project / name, ignore=skipped)
    for name in (f"{script}.py" for script in SCRIPTS):
        shutil.copy(ROOT / name, project)
    write_dataset(folder / "datasets/bccd", ("train", "val", "test"))
    shutil.copy(folder / "datasets/bccd/images/val/1.jpg", project / "street.jpg")
    write_clip(project / "clip.mp4")
    empty = {"images": [], "categories": [], "annotations": []}
    (project / "instances.json").write_text(json.dumps(empty))
    (project / "weights").mkdir()
    for name in ("yolov5n.pt", "yolov5s.pt"):
        write_weights(project / "weights" / name)
    return project


WRONG = "python val.py --weights nowhere.pt --data bccd.yaml"


@pytest.fixture(scope="module")
def results(project):
    """What came of each command: `{"code", "output"}` by its text."""
    texts = [*(command.text for command in RUN), WRONG]
    (project / "commands.json").write_text(json.dumps([cheap_words(text) for text in texts]))
    runner = [sys.executable, str(ROOT / "tests/run_commands.py"), "commands.json", "results.json"]
    environment = {**os.environ, "PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(runner, cwd=project, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(texts, json.loads((project / "results.json").read_text()), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("command", by_place(RUN))
def test_command_runs(command, results):
    result = results[command.text]
    assert result["code"] == 0, f"{command.text}\n{result['output'][-3000:]}"


@pytest.mark.slow
def test_a_command_that_fails_is_noticed(results):
    assert results[WRONG]["code"] == 1
    assert "nowhere.pt: no such file" in results[WRONG]["output"]


@pytest.mark.slow
def test_the_program_for_opencv_runs(project, results, monkeypatch):
    page = (ROOT / "docs/export.md").read_text("utf-8")
    lines = re.search(r"(?:^ {4}.*cv2.*\n)(?:^ {4}.*\n)*", page, re.MULTILINE)[0].splitlines()
    program = "\n".join(line.strip() for line in lines)
    monkeypatch.chdir(project / "runs/train/finetuned/weights")  # where export left best.onnx
    shutil.copy(project / "street.jpg", "cells.jpg")
    found = {}
    exec(program.replace("(320, 320)", "(64, 64)"), found)
    assert found["predictions"].shape == (3 * (8 * 8 + 4 * 4 + 2 * 2), 5 + 3)
    assert np.isfinite(found["predictions"]).all()
