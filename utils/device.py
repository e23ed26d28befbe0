"""Devices, precision, seeds and the few facts about distributed runs."""

from __future__ import annotations

import gc
import logging
import os
import platform
import random
import subprocess
import sys
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import conv2d

from utils.device_text import gpu_indices

LOGGER = logging.getLogger(__name__)

CPUINFO = Path("/proc/cpuinfo")


def select_device(text: str) -> torch.device:
    """The device that `--device` names; of several GPUs the one of this process.

    Args:
        text: `''` (best available), `cpu`, `mps`, `0`, `cuda:1` or `0,1`.

    Raises:
        ValueError: the text is not one of these, or there is no such device here.
    """
    name = text.strip().lower()
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ValueError("--device mps: no Apple GPU here; try --device cpu")
        return torch.device("mps")
    if name == "":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    indices = gpu_indices(name)
    if not torch.cuda.is_available():
        raise ValueError(f"--device {text}: no CUDA GPU is available here; try --device cpu")
    missing = [index for index in indices if index >= torch.cuda.device_count()]
    if missing:
        raise ValueError(
            f"--device {text}: there is no GPU {missing[0]}, "
            f"this machine has {torch.cuda.device_count()} (numbered from 0)"
        )
    return torch.device("cuda", indices[local_rank() % len(indices)])


def describe_device(device: torch.device) -> str:
    """One phrase for the log: what it is and how much memory it has."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()})"
    return str(device)


def select_precision(amp: str, device: torch.device) -> torch.dtype:
    """Number format of forward and backward passes; float32 means no mixed precision.

    `auto` takes bfloat16 where the device computes it natively, float16 on older NVIDIA GPUs,
    and float32 elsewhere, where half precision would be emulated and slow; who asks for bfloat16
    there is told so.

    Raises:
        ValueError: float16 training on a device that cannot scale losses.
    """
    if amp == "off":
        return torch.float32
    if amp == "bf16":
        if device.type in ("cpu", "cuda") and not computes_bfloat16(device):
            LOGGER.warning(
                "warning: --amp bf16: this %s has no instructions for bfloat16 and emulates it, "
                "which is slow; --amp auto takes what is fast here",
                device.type,
            )
        return torch.bfloat16
    if amp == "fp16":
        if device.type != "cuda":
            raise ValueError(f"--amp fp16 needs a CUDA GPU, not {device.type}; try --amp bf16")
        return torch.float16
    if computes_bfloat16(device) and (device.type == "cuda" or not _is_arm() or _gains_on_arm()):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def computes_bfloat16(device: torch.device) -> bool:
    """Whether a GPU or CPU has instructions for it."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    if _is_arm():
        return _arm_has_bfloat16()
    # No public function tells; without this one, float32 is always right.
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def _is_arm() -> bool:
    return platform.machine().lower() in ("aarch64", "arm64")


def _arm_has_bfloat16() -> bool:
    """What the system says: Linux in a file, macOS by a command."""
    command = ["sysctl", "-n", "hw.optional.arm.FEAT_BF16"]
    try:
        if sys.platform == "darwin":
            return subprocess.run(command, capture_output=True, text=True).stdout.strip() == "1"
        rows = [line.partition(":") for line in CPUINFO.read_text("utf-8").splitlines()]
    except OSError:
        return False
    return any(key.strip() == "Features" and "bf16" in value.split() for key, _, value in rows)


def _gains_on_arm() -> bool:
    """Whether a small convolution and its way back are not slower in bfloat16.

    The instructions alone do not tell: torch may have no kernels for them, above all for the way
    back, and what stands in for these is many times slower.
    """
    return _convolution_seconds(torch.bfloat16) < 1.5 * _convolution_seconds(torch.float32)


def _convolution_seconds(precision: torch.dtype) -> float:
    """The best of five, after a first one."""
    x = torch.ones(1, 32, 20, 20, dtype=precision).to(memory_format=torch.channels_last)
    weight = torch.ones(32, 32, 3, 3, dtype=precision, requires_grad=True)
    x.requires_grad_()

    def there_and_back() -> None:
        conv2d(x, weight, padding=1).sum().backward()

    there_and_back()
    return min(timeit.repeat(there_and_back, number=1, repeat=5))


def select_validation_precision(training: torch.dtype, device: torch.device) -> torch.dtype:
    """Number format in which a network is validated while it is trained in this one.

    On a CUDA GPU float16 if the training is mixed: also where that computes in bfloat16, whose 8
    bits can cost a point of mAP; the 11 of float16 do not (YOLOv5n on COCO128). Else float32, which
    a CPU computes faster than float16.
    """
    is_half = device.type == "cuda" and training != torch.float32
    return torch.float16 if is_half else torch.float32


def count_loader_processes(requested: int | None, device: torch.device) -> int:
    """How many processes load images where `--workers` says nothing.

    Beside a GPU 8, or as many as there are cores for each GPU. None on a CPU: there they would take
    from the network the cores that they need, and loading with all cores between two steps is
    faster (two cores, YOLOv5n, 320 px: an epoch of BCCD takes 4.2 s, with two processes 4.6 s).
    """
    if requested is not None:
        return requested
    return 0 if device.type == "cpu" else min(num_own_cores(), 8)


def num_usable_cores() -> int:
    """CPU cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def num_own_cores() -> int:
    """Of these the share of this process, where several of a training are on this machine."""
    return max(num_usable_cores() // local_world_size(), 1)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; the data pipeline has its own generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (third-party code may use the global generator)
    torch.manual_seed(seed)


def forbid_chance(device: torch.device, on_gpu: bool) -> None:
    """Let torch add up in the same order in every run: always on a CPU, on a GPU if wanted.

    A CPU loses nothing by it: the gradient of the predictions that the loss picks out, which its
    threads else add up as they come, even takes half the time. A GPU is slower, and torch warns of
    what has no fixed order there. To be called before anything is computed on it.
    """
    if on_gpu:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks for
    # Does what torch.use_deterministic_algorithms does, which takes seconds to import a compiler.
    torch.set_deterministic_debug_mode("warn" if on_gpu or device.type == "cpu" else "default")
    # With it torch writes into all new memory, for programs that read what nobody wrote. That takes
    # 3 to 6 % of a step of YOLOv5n.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def memory_text(device: torch.device) -> str:
    """Memory in use by tensors on the GPU, or by this process on the CPU, as `1.23G`."""
    if device.type == "cuda":
        used = torch.cuda.memory_reserved(device)
    elif device.type == "mps":
        used = torch.mps.driver_allocated_memory()
    else:
        used = _resident_bytes()
    return f"{used / 1e9:.2f}G"


def free_memory(device: torch.device) -> None:
    """Give back what no tensor holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def limit_memory(device: torch.device, share: float) -> Iterator[None]:
    """Within the block only this share of the memory of a GPU can be used."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_per_process_memory_fraction(share, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def _resident_bytes() -> int:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0  # not Linux: the figure is a convenience


def rank() -> int:
    """Number of this process among all, 0 when alone."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """Number of this process on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """Number of processes that train together, 1 when alone."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of processes of this training on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def distributed_backend() -> str:
    """What connects processes: for what lies on GPUs, and for the rest."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
