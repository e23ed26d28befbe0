from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import harness
from benchmarks.peak import own_times
from utils.config import load_dataset_spec
from utils.dataset import scan_split

CPU = torch.device("cpu")
TIMES = {"plain": np.array([2.0, 4.0, 12.0]), "ours": np.array([1.0, 4.0, 3.0])}


def test_median_and_quartiles():
    assert harness.spread(np.array([5.0, 1, 4, 2, 3])) == (3, 2, 4)
    assert harness.spread(np.array([7.0])) == (7, 7, 7)
    assert f"{harness.spread(np.array([5.0, 1, 4, 2, 3])):.1f}" == "3.0 (2.0 to 4.0)"


def test_the_ratio_is_that_of_each_round():
    ratios = harness.speed_ups(TIMES)  # of the rounds 2, 1, 4; of the medians it would be 4 / 3
    assert ratios == {"plain": (1, 1, 1), "ours": (2, 1.5, 3)}


def test_growth_is_time_per_work_against_the_first_row():
    times = {"1x": np.array([1.0, 2.0]), "4x": np.array([8.0, 8.0])}
    assert harness.growth(times, {"1x": 10, "4x": 40})["4x"] == (1.5, 1.25, 1.75)


def test_timing_table():
    assert harness.timing_table(TIMES, 12, "images").splitlines() == [
        "| variant | seconds | images/s | times as fast |",
        "|---|---|---|---|",
        "| plain | 4.000 (3.000 to 8.000) | 3.0 | 1.00 (1.00 to 1.00) |",
        "| ours | 3.000 (2.000 to 3.500) | 4.0 | 2.00 (1.50 to 3.00) |",
    ]


def test_ratio_of_one_variant_to_the_others():
    assert harness.ratio_table(TIMES | {"other": TIMES["plain"] / 2}, "ours").splitlines() == [
        "| ours against | times as fast |",
        "|---|---|",
        "| plain | 2.00 (1.50 to 3.00) |",
        "| other | 1.00 (0.75 to 1.50) |",
    ]


def test_memory_is_given_with_its_spread():
    plain, ours = [[harness.Peak(mebi, 9, 0) for mebi in run] for run in ((100, 200), (50, 200))]
    assert harness.memory_table({"plain": plain, "ours": ours}).splitlines()[2:] == [
        "| plain | 150 (125 to 175) | 1.00 (1.00 to 1.00) | 9 (9 to 9) | 0 (0 to 0) |",
        "| ours | 125 (88 to 162) | 0.75 (0.62 to 0.88) | 9 (9 to 9) | 0 (0 to 0) |",
    ]


@pytest.mark.slow
def test_a_remote_is_called_again_and_again():
    with harness.Remote(Mock, name="what can be called") as remote:
        assert [0 < remote() < 1 for _ in range(2)] == [True, True]
    assert remote.process.returncode == 0


def test_variants_take_turns_in_alternating_order():
    calls = []
    variants = {name: lambda name=name: calls.append(name) for name in "abc"}
    times = harness.take_turns(variants, 3, CPU)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
    assert all((seconds > 0).all() and len(seconds) == 3 for seconds in times.values())


def test_a_variant_may_time_itself():
    assert harness.take_turns({"a": lambda: 42.0}, 2, CPU)["a"].tolist() == [42, 42]


def test_copies_are_distinct_files_with_their_labels(tiny_dataset, tmp_path):
    spec = load_dataset_spec(tiny_dataset.yaml, tmp_path)
    yaml = harness.copy_dataset(spec, tmp_path / "copies", 9)
    copied = load_dataset_spec(yaml, tmp_path)
    split = scan_split(copied.train, copied.names, cache=False)
    original = scan_split(spec.train, spec.names, cache=False)
    assert len(set(split.paths)) == 9
    for index in range(9):
        assert np.array_equal(split.labels[index], original.labels[index % 4])


@pytest.mark.slow
def test_peak_memory_is_that_of_the_function_alone():
    ballast = np.ones(2**26)  # 512 MiB here must not count there
    peaks = [harness.measure_peak(np.ones, shape=[mebi * 2**17]) for mebi in (1, 257)]
    own = harness.run_alone("numpy:ones", '{"shape": 1}').process
    assert len(ballast)
    assert peaks[1].process - peaks[0].process == pytest.approx(256, abs=40)
    assert peaks[1].process < own - 100
    assert peaks[0].worker == 0


def event(name, parent=None, number=-1, microseconds=1.0):
    return SimpleNamespace(
        name=name, cpu_parent=parent, sequence_nr=number, self_cpu_time_total=microseconds,
        device_type=DeviceType.CPU,
    )  # fmt: skip


def test_operators_are_sorted_by_what_they_are_part_of():
    loss, conv = event("loss"), event("aten::conv2d", number=1)
    cast = event("aten::to", conv)
    back = event("autograd::engine::evaluate_function: MulBackward0", number=7)
    conv_back = event("autograd::engine::evaluate_function: ConvolutionBackward0", number=1)
    events = [
        (loss, "loss"),
        (event("aten::mul", loss, 7), "loss"),
        (event("aten::mul", back), "loss"),  # the way back of the one before
        (conv, "convolution forward"),
        (event("aten::_to_copy", cast), "casts and copies"),
        (event("aten::convolution_backward", conv_back), "convolution backward"),
        (event("aten::mul", event("Optimizer.step#SGD.step")), "optimizer"),
        (event("aten::native_batch_norm"), "batch norm"),
        (event("aten::silu_"), "activation"),
        (event("aten::max_pool2d"), "other"),
    ]
    kinds = own_times([operator for operator, _ in events], CPU)
    assert [kind for kind, _, _ in kinds] == [kind for _, kind in events]
