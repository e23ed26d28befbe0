import csv
import io
import math

import pytest

from utils.pruning.sweep import (
    SWEEP_TITLES,
    SweepRow,
    find_knee,
    format_sweep,
    sweep_cells,
    sweep_csv,
)


def _rows(scores, gflops=None) -> list[SweepRow]:
    """Percent 0, 0.1, 0.2 ... with these mAP@.5."""
    gflops = gflops or [10.0 - index for index in range(len(scores))]
    return [
        SweepRow(n / 10, n / 10, 1000 - n, cost, 5.0, 1.0 + n, score, score and score / 2)
        for n, (score, cost) in enumerate(zip(scores, gflops, strict=True))
    ]


@pytest.mark.parametrize(
    ("scores", "gflops", "knee"),
    [
        pytest.param([], None, None, id="no rows"),
        pytest.param([0.9], None, 0, id="the unpruned network alone"),
        pytest.param([None, None], None, None, id="no mAP"),
        pytest.param([math.nan, 0.5], None, None, id="NaN"),
        pytest.param([0.0, 0.0, 0.0], None, None, id="nothing to lose"),
        pytest.param([0.01, 0.0], None, None, id="less to lose than the drop"),
        pytest.param([0.9, 0.9, 0.895, 0.5], None, 2, id="before the cliff"),
        pytest.param([0.9, 0.9, 0.89], None, 2, id="a drop of exactly one point passes"),
        pytest.param([0.9, 0.8899], None, 0, id="each loses too much"),
        pytest.param([0.9, 0.9, 0.7, 0.9], None, 1, id="no lucky return"),
        pytest.param([0.9, 0.9, None, 0.9], None, 1, id="a gap is no pass"),
        pytest.param([0.9, 0.95, 0.93], None, 2, id="better than dense"),
        pytest.param([0.9, 0.9, 0.9], [3.0, 1.0, 2.0], 1, id="fewest GFLOPs, not highest percent"),
        pytest.param([0.9, 0.9, 0.9], [3.0, 1.0, 1.0], 2, id="equal GFLOPs: fewest parameters"),
    ],
)
def test_find_knee(scores, gflops, knee):
    rows = _rows(scores, gflops)
    assert find_knee(rows) == knee
    backwards = find_knee(rows[::-1])
    assert backwards == (None if knee is None else len(rows) - 1 - knee)


def test_the_allowed_drop_moves_the_knee():
    rows = _rows([0.9, 0.88, 0.7])
    assert [find_knee(rows, max_drop) for max_drop in (0, 0.02, 0.2)] == [0, 1, 2]


def test_the_table_lines_up_and_marks_the_knee():
    rows = _rows([0.9, 0.895, None], [8.0, 4.0, 2.0])
    title, *lines = format_sweep(rows, 1).split("\n")
    assert len(lines) == 3
    assert [("knee" in line) for line in lines] == [False, True, False]
    assert {len(line.removesuffix("  <- knee")) for line in lines} == {len(title)}
    cells = dict(zip(SWEEP_TITLES, sweep_cells(rows)[1], strict=True))
    assert cells == {
        "percent": "10.0%",
        "removed": "10.0%",
        "parameters": "999",
        "GFLOPs": "4.000",
        "saved": "50.0%",
        "latency, ms": "5.00",
        "speed-up": "2.00x",
        "mAP@.5": "0.8950",
        "mAP@.5:.95": "0.4475",
    }
    assert sweep_cells(rows)[2][-2:] == ("-", "-")


def test_empty_tables():
    assert format_sweep([], None).split()[0] == "percent"
    assert sweep_cells([]) == []
    assert sweep_csv([]).count("\n") == 1


def test_csv_keeps_every_digit():
    rows = [SweepRow(0.1 + 0.2, 1 / 3, 7, 1e-7 / 3, 2 / 3, 1.5, None, None)]
    (line,) = csv.DictReader(io.StringIO(sweep_csv(rows)))
    assert {name: float(cell) for name, cell in line.items() if cell} == {
        "percent": 0.1 + 0.2,
        "removed": 1 / 3,
        "parameters": 7,
        "gflops": 1e-7 / 3,
        "latency_ms": 2 / 3,
        "speed_up": 1.5,
    }
    assert line["map50"] == line["map50_95"] == ""
