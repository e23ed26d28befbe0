"""From pictures to detections: placing on the input, network, NMS, and back to the picture.

Pictures are placed as `val.py` places them, so that its mAP is that of what is seen here; one box
has one class, its best, where mAP counts every class of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from utils.augment import letterbox, resize_long_side
from utils.backends import Network
from utils.boxes import Letterbox, to_original
from utils.dataset import RECT_PAD, rect_shape_hw, round_imgsz
from utils.nms import non_max_suppression, split_detections
from utils.profile import Stopwatch

DEFAULT_IMGSZ = 640
DEFAULT_IOU_THRES = 0.45
MAX_BATCH = 16  # pictures that go through the network together

# Test-time augmentation: size of the picture on the input, and whether it is mirrored.
PLAIN_PASSES = ((1.0, False),)
AUGMENTED_PASSES = ((1.0, False), (0.83, True), (0.67, False))


@dataclass(frozen=True)
class DetectionSettings:
    """How to detect; None leaves a choice to the network."""

    imgsz: int | None = None  # long side of the input, pixels; None: 640 or the network's only one
    conf_thres: float = 0.25  # least confidence, 0-1
    iou_thres: float | None = None  # of NMS, 0-1; None: 0.45 or as exported
    max_det: int = 1000  # per picture
    classes: tuple[int, ...] | None = None  # to be kept; None: all
    agnostic: bool = False  # boxes suppress those of other classes too
    augment: bool = False  # several passes, see AUGMENTED_PASSES


class Pipeline:
    """Detects in pictures; `watch` and `num_images` tell how long that took.

    Args:
        network: in any format, on the device.
        device: where pictures go.
        settings: how to detect.

    Raises:
        ValueError: a setting is out of range, or the network cannot follow it.
    """

    def __init__(self, network: Network, device: torch.device, settings: DetectionSettings) -> None:
        _check(network, settings)
        self.network, self.device, self.settings = network, device, settings
        if network.imgsz_hw is None:
            self.imgsz = round_imgsz(settings.imgsz or DEFAULT_IMGSZ, network.stride)
        else:
            self.imgsz = max(network.imgsz_hw)
        self.passes = AUGMENTED_PASSES if settings.augment else PLAIN_PASSES
        self.watch = Stopwatch(device)
        self.num_images = 0
        self._warm_up()

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> list[Tensor]:
        """Detect.

        Args:
            images: uint8 BGR [H, W, 3], of any sizes.

        Returns:
            Per picture [M, 6] float32 on the CPU: xyxy in pixels of the picture, confidence, class;
            the most confident first.
        """
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            groups.setdefault(image.shape[:2], []).append(index)
        detections: dict[int, Tensor] = {}
        for members in groups.values():
            for start in range(0, len(members), MAX_BATCH):
                part = members[start : start + MAX_BATCH]
                found = self._detect([images[index] for index in part])
                detections |= zip(part, found, strict=True)
        self.num_images += len(images)
        return [detections[index] for index in range(len(images))]

    def ms_per_image(self) -> tuple[float, float, float]:
        """Pre-processing, network, NMS."""
        return self.watch.ms_per_image(self.num_images)

    @torch.no_grad()
    def _warm_up(self) -> None:
        """Load what NMS needs, and let an accelerator select its kernels, before the clock runs."""
        non_max_suppression(torch.ones(1, 1, 6))
        if self.device.type != "cpu":
            side = self.network.imgsz_hw or (self.imgsz, self.imgsz)
            zeros = torch.zeros(1, 3, *side, device=self.device, dtype=self.network.precision)
            self.network(zeros)

    def _detect(self, images: list[np.ndarray]) -> list[Tensor]:
        """Detections in pictures of one size."""
        settings = self.settings
        self.watch.start()
        inputs, letterboxes = zip(
            *(self._prepare(images, scale, mirrored) for scale, mirrored in self.passes),
            strict=True,
        )
        self.watch.lap(0)
        outputs = [self.network(x)[0] for x in inputs]
        self.watch.lap(1)
        if self.network.has_nms:
            found = split_detections(outputs[0], settings.conf_thres)
            detections = [_select(rows, settings) for rows in found]
        else:
            _check_num_classes(outputs[0].shape[2] - 5, self.network.names)
            detections = non_max_suppression(
                self._merge(outputs, inputs, letterboxes),
                settings.conf_thres,
                DEFAULT_IOU_THRES if settings.iou_thres is None else settings.iou_thres,
                max_det=settings.max_det,
                agnostic=settings.agnostic,
                classes=settings.classes,
            )
        detections = [rows.float().cpu() for rows in detections]
        placed = [
            torch.cat((to_original(d[:, :4], letterboxes[0]), d[:, 4:]), 1) for d in detections
        ]
        self.watch.lap(2)
        return placed

    def _prepare(
        self, images: list[np.ndarray], scale: float, mirrored: bool
    ) -> tuple[Tensor, Letterbox]:
        """Network input [B, 3, H, W] of pictures of one size, and how they lie on it."""
        height, width = images[0].shape[:2]
        stride, fixed_hw = self.network.stride, self.network.imgsz_hw
        if fixed_hw is None:
            side = max(round(self.imgsz * scale / stride), 1) * stride
            shape_hw = rect_shape_hw(np.array([[height, width]]), side, stride, RECT_PAD)
        else:
            # val.py scales the long side to that of the input first; for a smaller picture than
            # that, what counts is the size that it has there.
            fit = min(fixed_hw[0] / height, fixed_hw[1] / width) * max(height, width)
            side = max(fixed_hw) if scale == 1 else max(round(fit * scale), 1)
            shape_hw = fixed_hw
        placements = [place(image, side, shape_hw) for image in images]
        batch = np.stack([cv2.cvtColor(image, cv2.COLOR_BGR2RGB) for image, _ in placements])
        x = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2)
        x = x.to(self.network.precision).div_(255)
        return x.flip(3) if mirrored else x, placements[0][1]

    def _merge(
        self, outputs: list[Tensor], inputs: Sequence[Tensor], letterboxes: Sequence[Letterbox]
    ) -> Tensor:
        """Predictions [B, N, 5+K] of all passes, in pixels of the input of the first."""
        merged = outputs[:1]
        (ratio_w, ratio_h), (pad_w, pad_h) = letterboxes[0].ratio_wh, letterboxes[0].pad_wh
        for (_, mirrored), predictions, x, own in zip(
            self.passes[1:], outputs[1:], inputs[1:], letterboxes[1:], strict=True
        ):
            cx, cy, w, h, scores = predictions.split([1, 1, 1, 1, predictions.shape[2] - 4], 2)
            cx = x.shape[3] - cx if mirrored else cx
            grow_w, grow_h = ratio_w / own.ratio_wh[0], ratio_h / own.ratio_wh[1]
            cx = (cx - own.pad_wh[0]) * grow_w + pad_w
            cy = (cy - own.pad_wh[1]) * grow_h + pad_h
            merged.append(torch.cat((cx, cy, w * grow_w, h * grow_h, scores), 2))
        return torch.cat(merged, 1)


def check_half(half: bool, device: torch.device) -> None:
    """Refuse float16 where it is no gain.

    Raises:
        ValueError: the device is a CPU.
    """
    if half and device.type == "cpu":
        raise ValueError(
            "half needs a GPU: float16 on a CPU is emulated and many times slower than float32; "
            "leave it away or choose another device"
        )


def place(
    image: np.ndarray, long_side: int, shape_hw: tuple[int, int]
) -> tuple[np.ndarray, Letterbox]:
    """Scale a picture to a long side and pad it to a shape, as evaluation does.

    Args:
        image: uint8 [H, W, 3].
        long_side: of the picture on the input, pixels.
        shape_hw: of the input; what does not fit in is scaled down.
    """
    height, width = image.shape[:2]
    image = resize_long_side(image, long_side, smooth=True)
    scaled_h, scaled_w = image.shape[:2]
    image, ratio_wh, pad_wh = letterbox(image, shape_hw)
    ratio_wh = ratio_wh[0] * scaled_w / width, ratio_wh[1] * scaled_h / height
    return image, Letterbox((height, width), ratio_wh, (float(pad_wh[0]), float(pad_wh[1])))


def _check(network: Network, settings: DetectionSettings) -> None:
    """Refuse settings that are out of range or that this network cannot follow."""
    for name in ("conf_thres", "iou_thres"):
        value = getattr(settings, name)
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} {value} lies outside 0 to 1")
    for name, least in (("imgsz", 1), ("max_det", 1)):
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}")
    unknown = [cls for cls in settings.classes or () if not 0 <= cls < len(network.names)]
    if unknown:
        known = ", ".join(f"{cls} {name}" for cls, name in enumerate(network.names[:6]))
        more = ", ..." if len(network.names) > 6 else ""
        raise ValueError(f"there is no class {unknown[0]}; the network knows {known}{more}")
    fixed_hw = network.imgsz_hw
    if fixed_hw is not None and settings.imgsz not in (None, max(fixed_hw)):
        raise ValueError(
            f"imgsz {settings.imgsz} cannot act: this network was exported for inputs of "
            f"{fixed_hw[1]} x {fixed_hw[0]} pixels; leave it away, or export again"
        )
    if network.has_nms:
        given = {
            "iou_thres": settings.iou_thres is not None,
            "agnostic NMS": settings.agnostic,
            "augment": settings.augment,
        }
        for name in (name for name, is_given in given.items() if is_given):
            raise ValueError(
                f"{name} cannot act: this network was exported with NMS inside; leave it away, or "
                "export without"
            )


def _check_num_classes(num_classes: int, names: Sequence[str]) -> None:
    if num_classes != len(names):
        raise ValueError(f"the network detects {num_classes} classes, but {len(names)} have names")


def _select(rows: Tensor, settings: DetectionSettings) -> Tensor:
    """What is wanted of detections [M, 6] that NMS inside the network has left, best first."""
    if settings.classes is not None:
        classes = torch.as_tensor(settings.classes, device=rows.device, dtype=rows.dtype)
        rows = rows[torch.isin(rows[:, 5], classes)]
    return rows[: settings.max_det]
