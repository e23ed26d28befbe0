"""Targets as they are typed."""

import pytest

from utils.pruning.targets import TARGET_UNITS, parse_target


@pytest.mark.parametrize(
    ("text", "quantity", "number", "is_share"),
    [
        ("50%", "gflops", 0.5, True),
        (" 12.5 % ", "params", 0.125, True),
        ("3", "gflops", 3, False),
        ("0.5G", "gflops", 0.5, False),
        ("800M", "gflops", 0.8, False),
        ("800k", "params", 800_000, False),
        ("1.2M", "params", 1_200_000, False),
        ("1e6", "params", 1_000_000, False),
        ("7 ms", "latency", 7, False),
    ],
)
def test_targets_are_numbers_with_units_or_shares(text, quantity, number, is_share):
    target = parse_target(text, TARGET_UNITS[quantity])
    assert target.text == text.strip()
    assert target.is_share is is_share
    assert target.number == pytest.approx(number)
    assert target.of(200) == pytest.approx(number * (200 if is_share else 1))


@pytest.mark.parametrize("text", ["", "half", "%", "nan", "inf", "1.2.3", "5M%", "3x", "800k", "-"])
def test_what_is_no_target(text):
    with pytest.raises(ValueError, match=r"is no number and no share such as 50%|is not above 0"):
        parse_target(text, TARGET_UNITS["gflops"])


@pytest.mark.parametrize(
    ("text", "said"),
    [("0", "above 0"), ("-2", "above 0"), ("0%", "between 0%"), ("100%", "between"), ("120%", "b")],
)
def test_targets_that_mean_nothing(text, said):
    with pytest.raises(ValueError, match=said):
        parse_target(text, TARGET_UNITS["params"])
