"""Whether a TorchScript file does nothing but compute a detector.

Such a file is a program: as soon as torch opens it, it may call any of torch's operators, and some
of them write files. So its source, which lies in the file as text, is read first, and refused
unless it is what tracing a detector gives: straight lines that call operators from a list.
"""

from __future__ import annotations

import ast
import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

_DAMAGED = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error)
MAX_UNPACKED_BYTES = 64 << 20  # of the compressed parts, which are source and notes for debugging
_METHOD = re.compile(r"forward\d*")
# What neither hides anything from Python's parser nor means something else to torch's.
_TEXT = re.compile(r"[\n\x20-\x22\x24-\x5b\x5d-\x7e]*")
_FUNCTIONS = frozenset({"annotate", "bool", "float", "getattr", "int", "list", "uninitialized"})
_NAMES = """
    _convolution abs add add_ arange avg_pool2d batch_norm bool cat chunk clamp contiguous conv2d
    detach device div div_ dropout eq exp expand expand_as flatten floor_divide full ge gt hardswish
    hardswish_ hardtanh hardtanh_ index index_select leaky_relu leaky_relu_ len lt masked_select max
    max_pool2d meshgrid minimum mish mish_ mul mul_ narrow neg new_full new_zeros nonzero numel ones
    permute pow relu relu6 relu_ reshape rsub select sigmoid sigmoid_ silu silu_ size slice softplus
    split split_with_sizes squeeze stack sub sub_ tanh tensor to topk transpose type_as unbind
    unsqueeze upsample_bilinear2d upsample_nearest2d view where zeros zeros_like
"""
_OPERATORS = frozenset(_NAMES.split())
_OTHERS = frozenset({"ops.prim.NumToTensor", "ops.prim.data", "ops.torchvision.nms"})
_STATEMENTS = (ast.ClassDef, ast.FunctionDef, ast.Assign, ast.AnnAssign, ast.Return, ast.Pass)


def check_torchscript(path: Path) -> None:
    """Refuse what is more than a traced detector; nothing of the file runs.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no TorchScript file, damaged, or does something else.
    """
    try:
        with path.open("rb") as file, zipfile.ZipFile(file) as archive:
            file.seek(0)
            if file.read(2) != b"PK":
                raise ValueError("it does not begin as an archive")
            members = archive.infolist()
            unpacked = sum(m.file_size for m in members if m.compress_type != zipfile.ZIP_STORED)
            if unpacked > MAX_UNPACKED_BYTES or len({m.filename for m in members}) < len(members):
                raise ValueError("it unfolds to too much, or has two parts of one name")
            texts = {name: archive.read(name) for name in archive.namelist() if _is_read(name)}
    except _DAMAGED as error:
        raise ValueError(f"{path}: not a readable TorchScript file ({error})") from None
    except ValueError as error:
        raise ValueError(f"{path}: refused, {error}") from None
    for name, content in texts.items():
        problem = _problem_of_code(content) if name.endswith(".py") else _problem_of_data(content)
        if problem:
            raise ValueError(
                f"{path}: refused before any of it ran: {name.partition('/')[2]} holds {problem}, "
                "which no detector needs; export the .pt file again"
            )


def _is_read(name: str) -> bool:
    return name.endswith((".py", ".pkl"))


def _problem_of_data(content: bytes) -> str:
    return "an object of C++" if b"torch.classes" in content else ""


def _problem_of_code(content: bytes) -> str:
    text = content.decode("latin-1")
    if not _TEXT.fullmatch(text):
        return "unusual characters"
    try:
        tree = ast.parse(text)
        return next(_problems(tree), "")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return "source that is no straight program"


def _problems(tree: ast.Module) -> Iterator[str]:
    in_chain: set[int] = set()  # names that begin an operator on the list
    for node in ast.walk(tree):
        if isinstance(node, ast.stmt) and not isinstance(node, _STATEMENTS):
            yield f"the statement {type(node).__name__}"
        if isinstance(node, ast.FunctionDef) and not _METHOD.fullmatch(node.name):
            yield f"the method {node.name[:40]}"
        if isinstance(node, (ast.Lambda, ast.comprehension, ast.NamedExpr, ast.Await)):
            yield f"a {type(node).__name__}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            first = called.partition(".")[0]
            is_method = isinstance(node.func, ast.Attribute) and _METHOD.fullmatch(node.func.attr)
            if first in ("torch", "ops"):
                if called.removeprefix("torch.") not in _OPERATORS and called not in _OTHERS:
                    yield f"a call of {called[:60]}"
                in_chain |= {id(part) for part in ast.walk(node.func)}
            elif called not in _FUNCTIONS and (not is_method or first == "__torch__"):
                yield f"a call of {called[:60]}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in ("torch", "ops") and id(node) not in in_chain:
            yield f"{node.id} by itself"
