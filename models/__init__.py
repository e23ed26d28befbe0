"""The YOLOv5 v6 network; loadable with torch alone. And the front door: `load_model`."""

from typing import TYPE_CHECKING, Any

from models.spec import ModelSpec
from models.yolo import Model

if TYPE_CHECKING:
    from utils.detector import load_model

__all__ = ["Model", "ModelSpec", "load_model"]


def __getattr__(name: str) -> Any:
    # Users know this name here. It belongs to utils, which builds on this package, so it is looked
    # up when it is asked for: `import models` stays free of utils. tests/test_imports.py allows
    # this one name, and checks that nothing else comes with it.
    if name == "load_model":
        from utils.detector import load_model

        return load_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
