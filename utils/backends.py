"""A detector in any format: our checkpoints, public .pt files, and what export.py writes.

    network = load_network("x.onnx", torch.device("cpu"))
    predictions, logits = network(images)

Each runtime is imported when one of its files is opened, so that none is needed for the others.
"""

from __future__ import annotations

import importlib
import json
import re
import struct
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.yolo import Model
from utils.checkpoint import load_detector
from utils.command import is_out_of_memory
from utils.export_metadata import ExportMetadata
from utils.regular_file import read_regular
from utils.torchscript_check import check_torchscript

OPENVINO_SUFFIX = "_openvino_model"
OPENVINO_INFO = "yolov5_slim"  # our section of the rt_info
TORCHSCRIPT_EXTRA = "config.txt"  # the name under which stock YOLOv5 programs look
ENGINE_LENGTH = struct.Struct("<I")  # an engine file: length, metadata as JSON, the engine
# What runtimes say that have no class of error for it, or hide it in one of another kind.
OUT_OF_MEMORY = ("out of memory", "Failed to allocate memory", "bad_alloc", "bad allocation")
MAX_FILE_BYTES = 1 << 40
FORMATS = "a .pt, .onnx, .torchscript or .engine file or a *_openvino_model folder"


def load_network(path: str | Path, device: torch.device, *, half: bool = False) -> Network:
    """Open a network, ready for inference.

    Args:
        path: .pt (ours or public YOLOv5; batch normalisation is folded), .onnx, .torchscript,
            .engine, or an OpenVINO folder or the .xml in it.
        device: where it computes, if its runtime can.
        half: compute in float16; .pt files only, of the others the file says in what.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, foreign, or its runtime is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such weights file")
    suffix = _suffix(path)
    if suffix == ".pt":
        return PytorchNetwork(path, device, half)
    if half:
        raise ValueError(f"{path}: computes in what it was exported with; leave --half away here")
    network_class = _EXPORTED.get(suffix)
    if network_class is None:
        raise ValueError(f"{path}: not a known format; expected {FORMATS}")
    return network_class(path, device)


def is_exported(path: str | Path) -> bool:
    """Whether the name is that of an exported file or folder."""
    return _suffix(Path(path)) in _EXPORTED


def _suffix(path: Path) -> str:
    """What tells the format."""
    is_openvino = path.name.endswith(OPENVINO_SUFFIX) or path.suffix == ".xml"
    return OPENVINO_SUFFIX if is_openvino else path.suffix.lower()


def import_runtime(name: str, needed_by: str | Path) -> Any:
    """Import an optional package.

    Raises:
        ValueError: it is not installed, or does not load; says how to get it.
    """
    if name == "openvino":
        # It would report each use to Google Analytics, unasked, from forks of this process: beside
        # threads one may come to hang, and Python waits for it at the end.
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module(name)
    except ImportError as error:
        top = name.partition(".")[0]
        is_missing = isinstance(error, ModuleNotFoundError) and error.name == top
        problem = f"needs {top}" if is_missing else f"{top} does not load here ({error})"
        remedy = ": pip install -r requirements-export.txt"
        if top == "tensorrt":
            remedy = ", which comes from NVIDIA: see the installation guide of TensorRT"
        raise ValueError(f"{needed_by}: {problem}{remedy}") from None


class Network(nn.Module):
    """A detector in any format: images in, predictions out."""

    names: tuple[str, ...]  # classes
    stride: int  # input sides are multiples of it
    imgsz_hw: tuple[int, int] | None  # the only input size; None: any multiple of the stride
    batch_size: int | None  # images its runtime takes at once; None: any. `forward` takes any
    precision: torch.dtype  # of the images it takes
    format: str  # "pytorch", "onnx", "torchscript", "openvino" or "engine"
    has_nms: bool = False  # gives detections [B, M, 6], rows of padding with confidence 0

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Detect in images `[B, 3, H, W]`, RGB in 0-1.

        Returns:
            Predictions `[B, N, 5+K]` (cx, cy, w, h in pixels, scores 0-1) or, if `has_nms`,
            detections `[B, M, 6]`; and the logits, [] where the format does not give them.
        """
        raise NotImplementedError


class PytorchNetwork(Network):
    """A checkpoint, with folded batch normalisation."""

    format = "pytorch"

    def __init__(self, path: Path, device: torch.device, half: bool = False) -> None:
        super().__init__()
        detector = load_detector(path, device)
        self.precision = torch.float16 if half else torch.float32
        self.model: Model = detector.model.fuse().to(self.precision)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.names, self.stride = detector.names, self.model.max_stride
        self.imgsz_hw = self.batch_size = None
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See `Network.forward`."""
        return self.model(images)


class InferenceError(ValueError):
    """An exported file was loaded and fails when it is used; `problem` says how."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"{path}: {problem}; damaged, or changed since export.py wrote it: export the .pt file "
            "again"
        )
        self.problem = problem


class ExportedNetwork(Network):
    """What all exported formats share: their metadata, and batches cut and padded to fit."""

    metadata: ExportMetadata
    precision = torch.float32

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def accept(self, text: dict[str, str]) -> None:
        """Take over what the file says about itself."""
        metadata = self.metadata = ExportMetadata.from_text(text, str(self.path))
        self.names, self.stride, self.has_nms = metadata.names, metadata.stride, metadata.has_nms
        self.imgsz_hw = None if metadata.dynamic else metadata.imgsz_hw
        self.batch_size = None if metadata.batch_is_free else metadata.batch_size
        self.eval()

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """See `Network.forward`; where the batch is fixed, the last one is padded with black."""
        height, width = images.shape[2:]
        if self.imgsz_hw is not None and (height, width) != self.imgsz_hw:
            raise ValueError(
                f"{self.path}: takes images of {self.imgsz_hw[1]} x {self.imgsz_hw[0]} pixels "
                f"(width x height), not {width} x {height}; export with another --imgsz, or with "
                "--dynamic"
            )
        images = images.contiguous()  # channels last is torch's affair
        size = self.batch_size
        if size is None or size == len(images):
            return self._answer(images), []
        outputs = []
        for part in images.split(size):
            padding = part.new_zeros(size - len(part), *part.shape[1:])
            outputs.append(self._answer(torch.cat((part, padding)))[: len(part)])
        return torch.cat(outputs), []

    def _answer(self, images: Tensor) -> Tensor:
        """What the runtime makes of images; InferenceError unless that is what a detector gives."""
        try:
            output = self.infer(images)
        except Exception as error:  # each runtime has errors of its own
            if isinstance(error, MemoryError) or is_out_of_memory(error):
                raise
            words = _last_words(error)
            if any(sign in str(error) for sign in OUT_OF_MEMORY):
                raise MemoryError(
                    f"{self.path}: memory does not suffice ({words}); "
                    "try a smaller --batch-size or --imgsz"
                ) from error
            raise InferenceError(self.path, f"its runtime fails ({words})") from error
        if not isinstance(output, Tensor):
            kind = type(output).__name__
            raise InferenceError(self.path, f"gives a {kind} where one tensor is expected")
        size, width = len(images), 6 if self.has_nms else 5 + len(self.names)
        shape = list(output.shape)
        if shape != [size, *shape[1:2], width] or output.dtype != torch.float32:
            kind = str(output.dtype).removeprefix("torch.")
            expected = f"float32 [{size}, {'M' if self.has_nms else 'N'}, {width}]"
            raise InferenceError(self.path, f"gives {kind} {shape} where {expected} is expected")
        if self.has_nms and not _are_classes(output[..., 5], len(self.names)):
            raise InferenceError(self.path, "gives classes that it has no names for")
        return output

    def infer(self, images: Tensor) -> Tensor:
        """One call of the runtime."""
        raise NotImplementedError


class OnnxNetwork(ExportedNetwork):
    """ONNX Runtime: on the GPU if it was installed for it, else on the CPU."""

    format = "onnx"

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__(path)
        runtime = import_runtime("onnxruntime", path)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # what is fatal; errors are raised too
        providers = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in runtime.get_available_providers():
            providers.insert(0, "CUDAExecutionProvider")
        try:
            content = _self_contained(path)
            # Its second try without the GPU is announced on the screen: not where there is none.
            self.session = runtime.InferenceSession(
                content, options, providers=providers, enable_fallback=len(providers) > 1
            )
        except Exception as error:  # noqa: BLE001 (its error classes are private)
            raise _unreadable(path, "ONNX file", error) from None
        inputs = self.session.get_inputs()
        _check_ends(path, inputs, self.session.get_outputs())
        self.accept(self.session.get_modelmeta().custom_metadata_map)
        self.input_name = inputs[0].name

    def infer(self, images: Tensor) -> Tensor:
        """See `ExportedNetwork.infer`."""
        (output,) = self.session.run(None, {self.input_name: images.cpu().numpy()})
        return torch.from_numpy(output).to(images.device)


class OpenVinoNetwork(ExportedNetwork):
    """OpenVINO on the CPU."""

    format = "openvino"

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__(path)
        runtime = import_runtime("openvino", path)
        xml = path if path.suffix == ".xml" else next(iter(sorted(path.glob("*.xml"))), None)
        if xml is None:
            raise ValueError(f"{path}: no .xml file in this folder; export again")
        # Without a hint the runtime would round float32 networks to bfloat16 where that is fast.
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,  # a pinned thread waits for whatever else has its core
            "INFERENCE_PRECISION_HINT": "f32",
        }
        try:
            core = runtime.Core()
            _check_is_xml(xml)
            model = core.read_model(xml)
            _check_ends(path, model.inputs, model.outputs)
            text = _openvino_metadata(model)
            if text.get("precision") == "float16":
                del settings["INFERENCE_PRECISION_HINT"]
            # Its CPU plugin gives the thread that loads it a signal stack of its own, and with two
            # networks alive leaves freed memory behind as such: the next signal then ends Python.
            with ThreadPoolExecutor(1) as thread:
                self.compiled = thread.submit(core.compile_model, model, "CPU", settings).result()
        except (RuntimeError, UnicodeDecodeError) as error:
            raise _unreadable(path, "OpenVINO model", error) from None
        self.accept(text)

    def infer(self, images: Tensor) -> Tensor:
        """See `ExportedNetwork.infer`."""
        output = self.compiled(images.cpu().numpy())[0]
        return torch.from_numpy(np.array(output)).to(images.device)  # the buffer is used again


class TorchScriptNetwork(ExportedNetwork):
    """torch.jit."""

    format = "torchscript"

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__(path)
        import_runtime("torchvision", path)  # registers the NMS that a script may call
        check_torchscript(path)
        extra: dict[str, Any] = {TORCHSCRIPT_EXTRA: ""}
        try:
            with warnings.catch_warnings(), path.open("rb") as file:  # the name may be no UTF-8
                warnings.simplefilter("ignore", FutureWarning)  # deprecated, and widely used
                script = torch.jit.load(file, map_location=device, _extra_files=extra)
        except (RuntimeError, ValueError) as error:
            raise _unreadable(path, "TorchScript file", error) from None
        self.accept(metadata_from_json(extra[TORCHSCRIPT_EXTRA], path))
        # The method alone: as a submodule it would be cast and laid out with this module.
        self._script = script.eval().forward

    def infer(self, images: Tensor) -> Tensor:
        """See `ExportedNetwork.infer`."""
        return self._script(images)


class EngineNetwork(ExportedNetwork):
    """TensorRT, on an NVIDIA GPU."""

    format = "engine"

    def __init__(self, path: Path, device: torch.device) -> None:
        super().__init__(path)
        if device.type != "cuda":
            raise ValueError(f"{path}: a TensorRT engine needs an NVIDIA GPU, not {device.type}")
        runtime = import_runtime("tensorrt", path)
        content = read_regular(path, MAX_FILE_BYTES)
        start = ENGINE_LENGTH.size
        length = ENGINE_LENGTH.unpack_from(content)[0] if len(content) > start else 0
        self.accept(metadata_from_json(content[start : start + length], path))
        self.runtime = runtime.Runtime(runtime.Logger(runtime.Logger.WARNING))
        self.engine = self.runtime.deserialize_cuda_engine(content[start + length :])
        if self.engine is None:
            raise ValueError(
                f"{path}: this TensorRT ({runtime.__version__}) cannot read the engine; engines "
                "belong to one version and one GPU, so export it here"
            )
        self.context = self.engine.create_execution_context()
        self.input_name, self.output_name = map(self.engine.get_tensor_name, range(2))

    def infer(self, images: Tensor) -> Tensor:
        """See `ExportedNetwork.infer`."""
        shape = tuple(self.context.get_tensor_shape(self.output_name))
        output = torch.empty(shape, dtype=torch.float32, device=images.device)
        self.context.set_tensor_address(self.input_name, images.data_ptr())
        self.context.set_tensor_address(self.output_name, output.data_ptr())
        stream = torch.cuda.current_stream(images.device)
        self.context.execute_async_v3(stream.cuda_stream)
        return output


_EXPORTED: dict[str, Any] = {
    ".onnx": OnnxNetwork,
    OPENVINO_SUFFIX: OpenVinoNetwork,
    ".torchscript": TorchScriptNetwork,
    ".engine": EngineNetwork,
}


def metadata_from_json(content: str | bytes, path: Path) -> dict[str, str]:
    """Metadata of a file that has no key-value pairs of its own; {} if there is none."""
    try:
        text = json.loads(content or "{}")
        names = text.pop("names", None)
        if names is not None:
            text["names"] = repr({int(number): name for number, name in names.items()})
        return {str(key): str(value) for key, value in text.items()}
    except (ValueError, TypeError, AttributeError):  # UnicodeDecodeError is a ValueError
        raise ValueError(f"{path}: damaged, or not written by export.py of this toolkit") from None


def metadata_to_json(metadata: ExportMetadata) -> str:
    """As `metadata_from_json` reads it, and stock YOLOv5 programs too: names are a mapping."""
    return json.dumps({**metadata.to_text(), "names": dict(enumerate(metadata.names))})


def _openvino_metadata(model: Any) -> dict[str, str]:
    info = model.get_rt_info()
    if OPENVINO_INFO not in info:
        return {}
    entries = {key: v for key, v in info[OPENVINO_INFO].items() if not isinstance(v, dict)}
    return {key: str(value.astype(str)) for key, value in entries.items()}


def _self_contained(path: Path) -> bytes:
    """An ONNX file, if all its weights are in it: it may name any other file to read them from."""
    content = read_regular(path, MAX_FILE_BYTES)
    if _ONNX_LOCATION.search(content):
        raise RuntimeError("keeps weights in other files, as export.py never does")
    return content


# How protobuf spells the key `location` of an entry, in all ways that its numbers may be written.
_ONNX_LOCATION = re.compile(rb"(?:\x0a|\x8a\x80*\x00)(?:\x08|\x88\x80*\x00)location")


def _check_is_xml(path: Path) -> None:
    """OpenVINO reads other formats too, whatever they are called: ONNX with weights elsewhere."""
    content = read_regular(path, MAX_FILE_BYTES)[:64]
    if not content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith((b"<?xml", b"<net")):
        raise RuntimeError("no XML")


def _check_ends(path: Path, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
    if len(inputs) != 1 or len(outputs) != 1:
        raise ValueError(
            f"{path}: has {len(inputs)} inputs and {len(outputs)} outputs, a detector has one of "
            "each; damaged, or not written by export.py of this toolkit"
        )


def _are_classes(numbers: Tensor, num_classes: int) -> bool:
    is_whole = numbers == numbers.floor()
    return bool((is_whole & (numbers >= 0) & (numbers < num_classes)).all())


def _last_words(error: Exception) -> str:
    """The first sentence of the last line: before it runtimes name places in their programs."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    words = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[-1]) if lines else repr(error)
    # ONNX Runtime names the node first; and the place in its program, of which it is the last part.
    words = words.partition("Status Message: ")[2] or words
    return words.split(". ")[0][:200]


def _unreadable(path: Path, kind: str, error: Exception) -> ValueError:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # OpenVINO begins with the places in its program.
    lines = [line for line in lines if not line.startswith("Exception from ")]
    return ValueError(f"{path}: not a readable {kind} ({lines[0][:200] if lines else error!r})")
