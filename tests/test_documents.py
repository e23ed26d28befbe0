"""What README and docs tell people to type is understood, and leads to files that are there."""

import importlib
import itertools
import re
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = ("train", "prune", "val", "detect", "export")

# What stands for something longer in a table of results.
SHORT_FORMS = {
    "C": "--data bccd.yaml --img 320 --batch 16 --nominal-batch 16 --optimizer AdamW --epochs 60",
    "P": "--weights runs/train/sparse/weights/last.pt --data bccd.yaml --img 320",
}
# With these words a line of a block is a command; other blocks show output or programs.
COMMAND_WORDS = (
    "python", "python3", "py", "pip", "git", "cd", "make", ".", r".venv\Scripts\activate",
)  # fmt: skip

# What cannot run in a test. Each must be on the pages, or the line has to go.
NOT_RUN = {
    r"pip install|pip uninstall": "installs packages",
    r"git clone|cd yolov5-slim": "fetches the project",
    r"-m venv|activate$": "makes an environment",
    r"make demo|python demo\.py": "takes ten minutes; test_demo.py runs its stages",
    r"make test|make lint|-m pytest": "is what runs this",
    r"--source 0": "needs a camera",
    r"rtsp://": "needs a stream",
    r"data\.scripts\.get_": "downloads; test_data_scripts.py runs them",
}


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


def test_there_are_commands():
    assert len(RUN) >= 25
    for kind in NOT_RUN:
        assert any(re.search(kind, command.text) for command in COMMANDS), kind


@pytest.mark.parametrize("command", by_place(COMMANDS))
def test_command_is_understood(command):
    words = full_words(command.text)
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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_exist(page):
    """Also those of sentences and tables, as `--round-to 8`."""
    parsers = [importlib.import_module(f"utils.flags.{name}").build_parser() for name in SCRIPTS]
    known = {flag for parser in parsers for flag in parser._option_string_actions}
    modules = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "data/scripts").glob("*.py")]
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
