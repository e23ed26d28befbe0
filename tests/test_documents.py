"""What README and docs tell people to type is understood, and leads to files that are there."""

import importlib
import itertools
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# What stands for something else: the settings that a table of results has in common.
SHORT_FORMS = {"C": "--data bccd.yaml --img 320 --batch 16 --nominal-batch 16 --optimizer AdamW"}


def commands():
    for page in PAGES:
        for number, line in enumerate(page.read_text("utf-8").splitlines(), 1):
            for text in re.findall(r"(?:^ {4,}|`)((?:python )?\w+\.py [^`]*)", line):
                if not {"...", "<", "--help"} & set(re.findall(r"\.\.\.|<|--help", text)):
                    yield pytest.param(text.strip(), id=f"{page.name}:{number}")


def test_there_are_commands():
    assert len(list(commands())) >= 15


@pytest.mark.parametrize("text", list(commands()))
def test_command_is_understood(text):
    for short, long in SHORT_FORMS.items():
        text = re.sub(rf"(?<= ){short}(?= )", long, text)
    words = shlex.split(text.removeprefix("python "))
    script = ROOT / words[0]
    assert script.is_file()
    parser = importlib.import_module(f"utils.flags.{script.stem}")
    parser.parse_args(words[1:])
    for flag, folder in (("--hyp", "data/hyps"), ("--data", "data"), ("--cfg", "models")):
        for value in (v for f, v in itertools.pairwise(words) if f == flag):
            if "/" not in value:
                assert (ROOT / folder / value).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_modules_exist(page):
    text = page.read_text("utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert target.startswith("https://") or (page.parent / target).exists(), target
    for module in re.findall(r"python -m ((?:data|benchmarks)[\w.]+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
