"""The YOLOv5 v6 network; loadable with torch alone."""

from models.spec import ModelSpec
from models.yolo import Model

__all__ = ["Model", "ModelSpec"]
