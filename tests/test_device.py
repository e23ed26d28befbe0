"""Devices by name, and the messages about those that are not there."""

from types import SimpleNamespace

import pytest
import torch

from utils import device as devices
from utils.device import count_loader_processes, memory_text, select_device, select_precision

no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.mark.parametrize("text", ["gpu", "0,", "0,0", "-1", "1.5", "cuda:x"])
def test_wrong_names(text):
    with pytest.raises(ValueError, match="expected cpu, mps, a GPU number"):
        select_device(text)


def test_cpu():
    assert select_device("cpu") == torch.device("cpu")
    assert select_device(" CPU ") == torch.device("cpu")
    assert memory_text(torch.device("cpu")).endswith("G")


@no_cuda
@pytest.mark.parametrize("text", ["0", "cuda", "0,1"])
def test_no_gpu_is_one_clear_message(text):
    with pytest.raises(ValueError, match="no CUDA GPU is available") as caught:
        select_device(text)
    assert "--device cpu" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_precision():
    cpu = torch.device("cpu")
    assert select_precision("off", cpu) == torch.float32
    assert select_precision("bf16", cpu) == torch.bfloat16
    assert select_precision("auto", cpu) in (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="needs a CUDA GPU"):
        select_precision("fp16", cpu)


@pytest.mark.parametrize(
    ("training", "device", "expected"),
    [
        (torch.bfloat16, "cuda:1", torch.float16),
        (torch.float16, "cuda", torch.float16),
        (torch.float32, "cuda", torch.float32),
        (torch.bfloat16, "cpu", torch.float32),
        (torch.bfloat16, "mps", torch.float32),
    ],
)
def test_precision_of_validations(training, device, expected):
    assert devices.select_validation_precision(training, torch.device(device)) == expected


@pytest.fixture
def arm(monkeypatch, tmp_path):
    """Pretend to be an Arm CPU with these features, and these seconds of a convolution."""

    def pretend(features, bf16_seconds=1.0, system="linux"):
        told = SimpleNamespace(stdout=f"{int('bf16' in features)}\n")
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nFeatures\t: {features}\n")
        monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
        monkeypatch.setattr(devices.platform, "machine", lambda: "aarch64")
        monkeypatch.setattr(devices.sys, "platform", system)
        monkeypatch.setattr(devices.subprocess, "run", lambda *_, **__: told)
        seconds = {torch.float32: 1.0, torch.bfloat16: bf16_seconds}
        monkeypatch.setattr(devices, "_convolution_seconds", seconds.__getitem__)

    return pretend


@pytest.mark.parametrize("system", ["linux", "darwin"])
@pytest.mark.parametrize(
    ("features", "bf16_seconds", "expected"),
    [
        ("fp asimd i8mm bf16", 0.6, torch.bfloat16),
        ("fp asimd i8mm bf16", 20.0, torch.float32),  # there are no kernels for it
        ("fp asimd", 0.6, torch.float32),
    ],
)
def test_auto_on_arm(arm, features, bf16_seconds, expected, system):
    arm(features, bf16_seconds, system)
    assert select_precision("auto", torch.device("cpu")) == expected


def test_arm_that_says_nothing(arm, tmp_path):
    arm("bf16")
    (tmp_path / "cpuinfo").unlink()
    assert not devices.computes_bfloat16(torch.device("cpu"))


def test_seconds_of_a_convolution():
    assert 0 < devices._convolution_seconds(torch.float32) < 10


@pytest.mark.parametrize(
    ("device", "is_native"), [("cpu", True), ("cpu", False), ("cuda", True), ("cuda", False)]
)
def test_emulated_bfloat16_is_never_chosen_and_told(monkeypatch, caplog, device, is_native):
    monkeypatch.setattr(devices.platform, "machine", lambda: "x86_64")
    supported = "_is_avx512_bf16_supported"
    monkeypatch.setattr(torch.cpu, supported, lambda: is_native, raising=False)
    version = (8, 0) if is_native else (7, 5)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: version)
    slow = {"cpu": torch.float32, "cuda": torch.float16}[device]
    target = torch.device(device)
    assert select_precision("auto", target) == (torch.bfloat16 if is_native else slow)
    assert caplog.text == ""
    assert select_precision("bf16", target) == torch.bfloat16
    assert (f"this {device} has no instructions for bfloat16" in caplog.text) != is_native
    assert len(caplog.messages) == (not is_native)


@pytest.mark.parametrize(
    ("requested", "device", "cores", "ranks", "expected"),
    [
        (None, "cpu", 64, 1, 0),
        (None, "cuda:0", 64, 1, 8),
        (None, "cuda:0", 64, 8, 8),
        (None, "cuda:0", 16, 4, 4),
        (None, "cuda:0", 4, 1, 4),
        (None, "cuda:0", 2, 8, 1),
        (3, "cpu", 64, 1, 3),
        (0, "cuda:0", 64, 1, 0),
        (12, "cuda:0", 16, 4, 12),
    ],
)
def test_processes_load_images_where_the_cpu_has_nothing_else_to_do(
    requested, device, cores, ranks, expected, monkeypatch
):
    """All that train together on a machine load with its cores, not each of them."""
    monkeypatch.setattr(devices, "num_usable_cores", lambda: cores)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert count_loader_processes(requested, torch.device(device)) == expected
