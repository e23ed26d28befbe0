"""Imports point one way: scripts -> utils -> models -> torch (by AST, nothing is imported here)."""

import ast
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

import models
from utils.detector import load_model

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} | {"train", "val", "prune", "detect", "export"}
WITHOUT_SIBLINGS = {"utils/atomic.py", "utils/boxes.py", "utils/config.py", "utils/device.py"}
# What is loaded before a command line is read: the standard library and each other.
LIGHT = {"utils/choices.py", "utils/command.py", "utils/device_text.py", "utils/pruning/targets.py"}
LIGHT |= {"utils/lasting_output.py", "utils/lookup.py", "utils/regular_file.py"}
LIGHT |= {"utils/stopping.py"}
LIGHT |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "utils/flags").glob("*.py")}
LIGHT |= {path.relative_to(ROOT).as_posix() for path in (ROOT / "utils").rglob("__init__.py")}
# `from models import load_model` is what users type; models/__init__.py looks this one name up in
# utils when it is asked for, so that `import models` still needs torch alone (tested below).
FRONT_DOOR = ("models/__init__.py", {"utils.detector", "utils.detector.load_model"})


def _package_files(package: str) -> list[str]:
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py"))


def _sources() -> list[str]:
    """All our Python files: the scripts, the packages, data/scripts, tests."""
    folders = ("models", "utils", "data", "benchmarks", "tests")
    scripts = sorted(path.name for path in ROOT.glob("*.py"))
    return scripts + [name for folder in folders for name in _package_files(folder)]


def _imported(source: str) -> dict[str, int]:
    """Absolute dotted names of the modules a file imports, with the line."""
    tree = ast.parse((ROOT / source).read_text(encoding="utf-8"), filename=source)
    package = source.removesuffix(".py").split("/")[:-1]
    names: dict[str, int] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name: node.lineno for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names[module] = node.lineno
            names |= {f"{module}.{alias.name}": node.lineno for alias in node.names}
    return names


def _offences(source: str, is_forbidden) -> list[str]:
    return [
        f"{source}:{line} imports {name}"
        for name, line in _imported(source).items()
        if is_forbidden(name)
    ]


def _top(name: str) -> str:
    return name.split(".")[0]


def _is_light(name: str) -> bool:
    """Whether a dotted name is a light module of ours, something in it, or standard library."""
    modules = {source.removesuffix(".py").replace("/", ".") for source in LIGHT}
    is_ours = any(f"{name}.".startswith(f"{module}.") for module in modules)
    return is_ours or _top(name) in sys.stdlib_module_names


def test_the_walk_finds_the_project():
    sources = _sources()
    assert "utils/run_dir.py" in sources
    assert "tests/test_imports.py" in sources


@pytest.mark.parametrize("source", _package_files("models"))
def test_models_know_neither_utils_nor_scripts(source):
    allowed = FRONT_DOOR[1] if source == FRONT_DOOR[0] else set()
    forbidden = {"utils", *SCRIPTS}
    assert _offences(source, lambda name: _top(name) in forbidden and name not in allowed) == []


def test_the_front_door_of_models_stays_shut_until_it_is_used():
    code = """
import json, sys, models
print(json.dumps([name for name in sys.modules if name.split(".")[0] in ("utils", "cv2", "PIL")]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert json.loads(done.stdout) == []
    assert models.load_model is load_model


def test_models_has_no_other_lazy_names():
    with pytest.raises(AttributeError, match="no attribute 'load_modle'"):
        getattr(models, "load_modle")  # noqa: B009 (the type checker would see the mistake)


@pytest.mark.parametrize("source", _package_files("utils"))
def test_utils_know_no_script(source):
    assert _offences(source, lambda name: _top(name) in SCRIPTS) == []


@pytest.mark.parametrize("source", sorted(WITHOUT_SIBLINGS))
def test_ground_floor_of_utils_has_no_siblings(source):
    if not (ROOT / source).exists():
        pytest.fail(f"{source} is missing")
    ours = {"utils", "models"}
    assert _offences(source, lambda name: _top(name) in ours and not _is_light(name)) == []


@pytest.mark.parametrize("source", sorted(LIGHT))
def test_what_a_command_line_needs_imports_nothing_heavy(source):
    assert _offences(source, lambda name: not _is_light(name)) == []


@pytest.mark.parametrize("source", sorted(path.name for path in ROOT.glob("*.py")))
def test_scripts_read_the_command_line_before_they_import_the_rest(source):
    """Docstring, then light imports and two calls, the first of them as early as can be."""
    _, *first = itertools.takewhile(
        lambda node: not isinstance(node, ast.Import), _tree(source).body
    )
    begin, answer = [node for node in first if isinstance(node, ast.If)]
    light = ["__future__", "utils.stopping", "utils.flags.answer", f"utils.flags.{source[:-3]}"]
    imports = [node for node in first if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in imports] == light
    assert first == [*imports[:2], begin, *imports[2:], answer]
    is_script = "if __name__ == '__main__':\n    "
    assert ast.unparse(begin) == f"{is_script}end_at_ctrl_c()"
    assert ast.unparse(answer) == f"{is_script}answer_early(parse_args, __doc__)"


@pytest.mark.parametrize("source", sorted(path.name for path in ROOT.glob("*.py")))
def test_scripts_do_not_know_each_other(source):
    assert _offences(source, lambda name: _top(name) in SCRIPTS) == []


@pytest.mark.parametrize(
    ("module", "owners"),
    [
        ("matplotlib", {*_package_files("utils/plots"), "benchmarks/plain.py"}),
        ("thop", {"utils/profile.py"}),
        ("seaborn", set()),
        ("pandas", set()),
        ("pkg_resources", set()),
        ("ultralytics", set()),
    ],
)
def test_some_packages_have_one_place_or_none(module, owners):
    product = [source for source in _sources() if not source.startswith("tests/")]
    offences = [
        line
        for source in product
        if source not in owners
        for line in _offences(source, lambda name: _top(name) == module)
    ]
    assert offences == []


def test_config_does_not_need_torch():
    assert _offences("utils/config.py", lambda name: _top(name) in {"torch", "torchvision"}) == []


@pytest.mark.parametrize("source", _sources())
def test_no_import_hides_in_a_function_to_dodge_a_cycle(source):
    """Imports of our own modules stand at the top, where the direction can be read."""
    tree = ast.parse((ROOT / source).read_text(encoding="utf-8"))
    hidden = [
        f"{source}:{inner.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
        if isinstance(inner, ast.ImportFrom)
        and _top(inner.module or "utils") in {"utils", "models"}
        and (source, inner.module) != (FRONT_DOOR[0], "utils.detector")
    ]
    assert hidden == []


@pytest.mark.parametrize("source", _sources())
def test_no_sys_path_edits(source):
    tree = ast.parse((ROOT / source).read_text(encoding="utf-8"))
    edits = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "path"
        and isinstance(node.value, ast.Name)
        and node.value.id == "sys"
    ]
    assert edits == []


def _product() -> list[str]:
    return [source for source in _sources() if not source.startswith("tests/")]


def _tree(source: str) -> ast.Module:
    return ast.parse((ROOT / source).read_text(encoding="utf-8"), filename=source)


def _hard_coded_cuda(tree: ast.AST) -> list[int]:
    """Lines with `.cuda()` or a device 'cuda...'; asking `device.type == "cuda"` is no choice."""
    asked = {
        id(constant)
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare)
        and isinstance(node.left, ast.Attribute)
        and node.left.attr == "type"
        for constant in ast.walk(node)
    }
    return [
        node.lineno
        for node in ast.walk(tree)
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "cuda"
        )
        or (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith("cuda")
            and id(node) not in asked
        )
    ]


@pytest.mark.parametrize(
    ("code", "offends"),
    [
        ("model.cuda()", True),
        ("torch.device('cuda')", True),
        ("x.to('cuda:1')", True),
        ("device.type == 'cuda'", False),
        ("name == 'cuda'", True),
        ("torch.cuda.is_available()", False),
        ("'no CUDA here'", False),
    ],
)
def test_hard_coded_cuda_is_seen(code, offends):
    assert bool(_hard_coded_cuda(ast.parse(code))) == offends


@pytest.mark.parametrize(
    "source", sorted({*_product()} - {"utils/device.py", "utils/device_text.py"})
)
def test_only_the_device_modules_choose_cuda(source):
    assert _hard_coded_cuda(_tree(source)) == []


_INSTALLERS = {"pip", "pip3", "ensurepip", "easy_install", "conda", "uv"}


def _installs(tree: ast.AST) -> list[int]:
    """Lines with the name of an installer, alone or as the start of a command line."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and (
            (words := node.value.split())[:1] != []
            and (words[0] in _INSTALLERS or "-m pip" in node.value)
        )
    ]


@pytest.mark.parametrize(
    ("code", "offends"),
    [
        ("subprocess.run([sys.executable, '-m', 'pip', 'install', 'thop'])", True),
        ("os.system('pip install thop')", True),
        ("subprocess.check_call(f'{sys.executable} -m pip install thop', shell=True)", True),
        ("ValueError('thop is missing: pip install -r requirements.txt')", False),
        ("''", False),
    ],
)
def test_installing_is_seen(code, offends):
    assert bool(_installs(ast.parse(code))) == offends


@pytest.mark.parametrize("source", _product())
def test_no_script_installs_packages(source):
    assert _installs(_tree(source)) == []
    assert _offences(source, lambda name: _top(name) in _INSTALLERS) == []


def test_no_import_cycle():
    graph = {
        source.removesuffix(".py").removesuffix("/__init__").replace("/", "."): set(
            _imported(source)
        )
        for source in _package_files("utils") + _package_files("models")
    }
    graph = {name: {other for other in seen if other in graph} for name, seen in graph.items()}
    while leaves := [name for name, seen in graph.items() if not seen]:
        graph = {name: seen - set(leaves) for name, seen in graph.items() if name not in leaves}
    assert graph == {}, "these modules import each other in a circle"


def test_nothing_generated_is_tracked():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    generated = (".pt", ".onnx", ".cache", ".pyc")
    tracked = listed.stdout.splitlines()
    assert [name for name in tracked if name.endswith(generated)] == []
    assert [name for name in tracked if name.startswith(("runs/", "datasets/", ".venv/"))] == []
