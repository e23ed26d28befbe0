"""A network as a file for another runtime: ONNX, TorchScript, OpenVINO, TensorRT.

The graph takes images `images` [B, 3, H, W], RGB in 0-1, and gives `output0`: predictions
[B, N, 5+K], cx, cy, w, h in pixels and scores 0-1, as stock YOLOv5 programs expect them. Both are
float32, also where the weights are not, so that the files can stand in for each other.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import yaml
from torch import Tensor, nn

from models.yolo import Model
from utils.atomic import name_in_errors
from utils.backends import (
    ENGINE_LENGTH,
    OPENVINO_INFO,
    OPENVINO_SUFFIX,
    TORCHSCRIPT_EXTRA,
    import_runtime,
    metadata_to_json,
)
from utils.boxes import xyxy_from_cxcywh
from utils.export_metadata import ExportMetadata

INPUT, OUTPUT = "images", "output0"
SUFFIXES = {
    "onnx": ".onnx",
    "torchscript": ".torchscript",
    "openvino": OPENVINO_SUFFIX,
    "engine": ".engine",
}


class NmsSettings(NamedTuple):
    """Thresholds of NMS inside a graph; see `utils.nms.non_max_suppression`."""

    conf_thres: float
    iou_thres: float
    max_det: int


class ExportGraph(nn.Module):
    """What is traced: a detector with one output, decoded with constants where sizes are fixed."""

    def __init__(
        self, model: Model, imgsz_hw: tuple[int, int] | None, nms: NmsSettings | None = None
    ) -> None:
        """Wrap a network.

        Args:
            model: in eval mode with BN folded, in any precision.
            imgsz_hw: the only input size; None: any.
            nms: suppress inside the graph, which then gives [B, max_det, 6]: xyxy, confidence,
                class; the most confident first, then rows of zeros.
        """
        super().__init__()
        self.model, self.nms = model.eval(), nms
        if nms is not None:  # takes more than a second, and cannot be done while tracing
            self.suppress = import_runtime("torchvision.ops", "--nms").nms
        strides = model.head.strides.tolist() if imgsz_hw else []
        self.num_levels = len(strides)
        for level, stride in enumerate(strides):
            height, width = (int(side // stride) for side in cast(tuple, imgsz_hw))
            cells = model.head.cells(height, width, torch.float32, model.head.strides.device)
            self.register_buffer(f"cells{level}", cells)

    def forward(self, images: Tensor) -> Tensor:
        """Predictions `[B, N, 5+K]`, or detections `[B, max_det, 6]`."""
        head = self.model.head
        _, logits = self.model(images.to(cast(Tensor, head.m[0].weight).dtype))
        cells = [getattr(self, f"cells{level}") for level in range(self.num_levels)]
        predictions = head.decode(logits, cells)
        if self.nms is None:
            return predictions
        return torch.stack([self._detect(rows, self.nms) for rows in predictions])

    def _detect(self, predictions: Tensor, settings: NmsSettings) -> Tensor:
        """Predictions of one image, [N, 5+K], to detections [max_det, 6], in traceable steps.

        As `non_max_suppression` does with one label a box.
        """
        conf, cls = (predictions[:, 5:] * predictions[:, 4:5]).max(1)
        rows = torch.cat((predictions[:, :4], conf[:, None], cls[:, None].to(conf.dtype)), 1)
        # A row of padding comes first and is always taken, so that in an image without a box there
        # is something to take a maximum of: here, and where the ranges for 8 bits are looked for.
        rows = torch.cat((rows.new_zeros(1, 6), rows))
        likely = (rows[:, 4] > settings.conf_thres).nonzero()[:, 0]
        rows = rows[torch.cat((likely.new_zeros(1), likely))]
        boxes_xyxy, conf, cls = xyxy_from_cxcywh(rows[:, :4]), rows[:, 4], rows[:, 5]
        # Classes are laid side by side, twice the largest coordinate apart, so that boxes of two
        # classes never meet.
        reach = boxes_xyxy.abs().max() * 2 + 1
        keep_idx = self.suppress(boxes_xyxy + (cls * reach)[:, None], conf, settings.iou_thres)
        rows = torch.cat((boxes_xyxy, conf[:, None], cls[:, None]), 1)[keep_idx[: settings.max_det]]
        return torch.cat((rows, rows.new_zeros(settings.max_det, 6)))[: settings.max_det]


# ---------------------------------------------------------------------------------- writing a file
def write_torchscript(
    graph: ExportGraph, images: Tensor, metadata: ExportMetadata, path: Path
) -> None:
    """Trace and save, with the metadata as an extra file inside."""
    with _quiet():
        traced = torch.jit.trace(graph, images, check_trace=False)
        extra = {TORCHSCRIPT_EXTRA: metadata_to_json(metadata)}
        # Not to the file itself: where that fails, as on a full disk, torch ends the process.
        content = io.BytesIO()
        torch.jit.save(traced, content, _extra_files=extra)
    with name_in_errors(path):
        path.write_bytes(content.getbuffer())


def write_onnx(
    graph: ExportGraph,
    images: Tensor,
    metadata: ExportMetadata,
    path: Path,
    *,
    opset: int,
    simplify: bool = False,
) -> None:
    """Trace and save, with the metadata as the model's properties.

    The exporter that traces (`dynamo=False`): its graphs are the ones that OpenCV's DNN module
    and programs for YOLOv5 know, and it needs no further package.

    Args:
        graph: what to export.
        images: an input of the size that counts where it is fixed.
        metadata: says whether the sizes are fixed.
        path: where to.
        opset: version of the operators.
        simplify: let onnxslim fold and merge what it can.
    """
    onnx = import_runtime("onnx", path.name)
    axes: dict[str, dict[int, str]] = {}
    if metadata.dynamic:
        axes = {INPUT: {2: "height", 3: "width"}}
        if not metadata.has_nms:
            axes = {INPUT: {0: "batch"} | axes[INPUT], OUTPUT: {0: "batch", 1: "predictions"}}
    content = io.BytesIO()
    with _quiet():
        torch.onnx.export(
            graph,
            (images,),
            cast(Any, content),  # its types know files alone
            dynamo=False,
            opset_version=opset,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes=axes,
        )
    model = onnx.load_from_string(content.getvalue())
    if simplify:
        onnxslim = import_runtime("onnxslim", "--simplify")
        with _quiet():
            model = onnxslim.slim(model)
    onnx.helper.set_model_props(model, metadata.to_text())
    model.producer_name = "yolov5-slim"
    onnx.checker.check_model(model)
    with name_in_errors(path):
        path.write_bytes(model.SerializeToString())


def write_openvino(onnx_path: Path, metadata: ExportMetadata, folder: Path, stem: str) -> None:
    """Convert an ONNX file to a folder with `.xml` and `.bin`; in half precision if it says so.

    The `.yaml` beside them is where stock YOLOv5 programs look for names and stride.
    """
    openvino = import_runtime("openvino", folder.name)
    model = openvino.convert_model(str(onnx_path))
    for key, value in metadata.to_text().items():
        model.set_rt_info(value, [OPENVINO_INFO, key])
    folder.mkdir()
    is_half = metadata.precision == "float16"
    try:
        openvino.save_model(model, str(folder / f"{stem}.xml"), compress_to_fp16=is_half)
    except RuntimeError as error:  # it says no more than that
        raise OSError(
            f"{folder.name}: OpenVINO cannot write there ({error}); see whether the disk is full"
        ) from None
    facts = {"stride": metadata.stride, "names": dict(enumerate(metadata.names))}
    text = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)
    with name_in_errors(folder / f"{stem}.yaml"):
        (folder / f"{stem}.yaml").write_text(text, encoding="utf-8")


def write_engine(onnx_path: Path, metadata: ExportMetadata, path: Path) -> None:
    """Build a TensorRT engine (version 10 or later) for the GPU of this machine.

    Raises:
        ValueError: TensorRT is not installed, or cannot read or build the network.
    """
    tensorrt = import_runtime("tensorrt", path.name)
    logger = tensorrt.Logger(tensorrt.Logger.WARNING)
    builder = tensorrt.Builder(logger)
    # Strongly typed: the precision is that of the ONNX file.
    flag = 1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flag)
    parser = tensorrt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        reasons = "; ".join(str(parser.get_error(n)) for n in range(parser.num_errors))
        raise ValueError(f"{path.name}: TensorRT cannot read the network: {reasons}")
    engine = builder.build_serialized_network(network, builder.create_builder_config())
    if engine is None:
        raise ValueError(f"{path.name}: TensorRT could not build the engine; its log says why")
    header = metadata_to_json(metadata).encode("utf-8")
    with name_in_errors(path):
        path.write_bytes(ENGINE_LENGTH.pack(len(header)) + header + bytes(engine))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of exporters: sizes are meant to become constants where they do."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# --------------------------------------------------------------------------------------------- int8
class _Calibration:
    """Images one after the other, as ONNX Runtime asks for them."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._all = batches
        self._batches = iter(batches)

    def get_next(self) -> dict[str, Any] | None:
        """The next input, None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}

    def __len__(self) -> int:
        return len(self._all)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Continue with these inputs: so that not the activations of all are kept at a time."""
        self._batches = iter(self._all[start_index:end_index])


def quantize(source: Path, target: Path, batches: Sequence[Tensor], for_openvino: bool) -> None:
    """Weights and activations of a float32 ONNX file to 8 bits (QDQ, weights per channel).

    What follows the last convolutions, decoding above all, stays float32, and so do these
    convolutions: one scale for coordinates and scores costs accuracy (BCCD, pruned YOLOv5n: 2.7
    points of mAP@.5:.95). Ranges leave out the outermost 0.01 % of the values.

    Args:
        source: ONNX, opset 13 or later.
        target: where to.
        batches: inputs [B, 3, H, W] to take the ranges of activations from.
        for_openvino: convolutions alone, which that runtime turns into more 8-bit work by itself;
            for ONNX Runtime all that it can compute with 8 bits. (One thread, pruned YOLOv5n at
            320 pixels: OpenVINO 4.6 instead of 5.3 ms, ONNX Runtime 5.7 instead of 6.5.)
    """
    onnx = import_runtime("onnx", target.name)
    quantization = import_runtime("onnxruntime.quantization", target.name)
    with _quiet():
        try:
            quantization.quantize_static(
                str(source),
                str(target),
                _Calibration(batches),
                quant_format=quantization.QuantFormat.QDQ,
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=quantization.CalibrationMethod.Percentile,
                op_types_to_quantize=["Conv"] if for_openvino else None,
                nodes_to_exclude=_from_last_convolutions(onnx.load(str(source)).graph),
                extra_options={"CalibPercentile": 99.99, "CalibStridedMinMax": 1},
            )
        except ValueError as error:
            raise ValueError(
                f"--int8: activations have no ranges that 8 bits could hold ({error}); a network "
                "that was never trained has none"
            ) from None


def _from_last_convolutions(graph: Any) -> list[str]:
    """Names of the nodes from which no path leads to a convolution, these last ones included."""
    leads_to_convolution: set[str] = set()  # names of tensors
    found = []
    for node in reversed(graph.node):  # sorted: what reads a tensor stands behind what makes it
        if leads_to_convolution.isdisjoint(node.output):
            found.append(node.name)
        if node.op_type == "Conv" or not leads_to_convolution.isdisjoint(node.output):
            leads_to_convolution.update(node.input)
    return found


# ------------------------------------------------------------------------------------ all together
@dataclass(frozen=True)
class Exporter:
    """Writes one network in any format, with the same settings and facts."""

    model: Model  # BN folded, float32
    metadata: ExportMetadata
    opset: int
    simplify: bool = False
    nms: NmsSettings | None = None
    calibration: Sequence[Tensor] = ()  # inputs [B, 3, H, W] on the CPU; for int8

    def write(self, export_format: str, folder: Path, stem: str) -> Path:
        """Write one format into a folder and return the path: `stem` with the suffix it has.

        Intermediate files are left in the folder.

        Raises:
            ValueError: a package is missing, or the format cannot hold the network.
        """
        path = folder / f"{stem}{SUFFIXES[export_format]}"
        if export_format == "torchscript":
            write_torchscript(*self._traceable(self.metadata.precision), self.metadata, path)
        elif export_format == "onnx":
            self._write_onnx(path, self.metadata.precision)
        elif export_format == "engine":
            source = folder / "for_engine.onnx"
            self._write_onnx(source, self.metadata.precision)
            write_engine(source, self.metadata, path)
        else:
            source = folder / "for_openvino.onnx"
            # OpenVINO itself rounds weights to float16, and casts back where it computes.
            precision = "float32" if self.metadata.precision == "float16" else None
            self._write_onnx(source, precision or self.metadata.precision, for_openvino=True)
            write_openvino(source, self.metadata, path, stem)
        return path

    def _traceable(self, precision: str) -> tuple[ExportGraph, Tensor]:
        """The graph and an input of the right size."""
        facts = self.metadata
        model = copy.deepcopy(self.model)
        if precision == "float16":
            # Decoding is in float32, and anchors are not exact in float16.
            head = model.head
            anchors, strides = head.anchors.clone(), head.strides.clone()
            model.half()
            head.anchors, head.strides = anchors, strides
        graph = ExportGraph(model, None if facts.dynamic else facts.imgsz_hw, self.nms).eval()
        device = self.model.head.strides.device
        return graph, torch.zeros(facts.batch_size, 3, *facts.imgsz_hw, device=device)

    def _write_onnx(self, path: Path, precision: str, for_openvino: bool = False) -> None:
        """An ONNX file in that precision."""
        is_int8 = precision == "int8"
        first = path.with_suffix(".float32.onnx") if is_int8 else path
        graph, images = self._traceable(precision)
        write_onnx(graph, images, self.metadata, first, opset=self.opset, simplify=self.simplify)
        if is_int8:
            quantize(first, path, self.calibration, for_openvino)
