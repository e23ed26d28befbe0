"""The search goes uphill, stays in bounds, and goes on where it stopped."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from utils.config import load_hyperparameters
from utils.evolve import (
    SEARCH_BOUNDS,
    Generation,
    Score,
    evolve,
    keep_options,
    mutate,
    read_history,
)

ROOT = Path(__file__).resolve().parents[1]
LOW = load_hyperparameters(ROOT / "data/hyps/hyp.scratch-low.yaml")


def hill(hyp, _number):
    """Best at lr0 0.002 and box 0.1."""
    distance = math.log(hyp.lr0 / 0.002) ** 2 + math.log(hyp.box / 0.1) ** 2
    fitness = math.exp(-distance)
    return Score(fitness, fitness, fitness)


def test_search_climbs(tmp_path):
    best = evolve(tmp_path, LOW, 120, hill)
    assert hill(LOW, 0).fitness < 0.1
    assert best.score.fitness > 0.8
    history = read_history(tmp_path / "evolve.csv")
    assert [generation.number for generation in history] == list(range(120))
    assert history[0].hyp == LOW
    assert max(history, key=lambda g: g.score.fitness) == best
    assert load_hyperparameters(tmp_path / "hyp_evolved.yaml") == best.hyp


def test_interrupted_search_goes_on_as_it_would_have(tmp_path, caplog):
    whole, part = tmp_path / "whole", tmp_path / "part"
    for folder in (whole, part):
        folder.mkdir()
    evolve(whole, LOW, 12, hill, seed=3)

    def stops(hyp, number):
        if number == 5:
            raise KeyboardInterrupt
        return hill(hyp, number)

    with pytest.raises(KeyboardInterrupt):
        evolve(part, LOW, 12, stops, seed=3)
    assert len(read_history(part / "evolve.csv")) == 5
    evolve(part, dataclasses.replace(LOW, lr0=9.0), 12, hill, seed=3)  # a seed acts at the start
    assert (part / "evolve.csv").read_text() == (whole / "evolve.csv").read_text()
    assert "nothing is left" not in caplog.text
    evolve(part, LOW, 3, hill)
    assert "3 in all are asked for: nothing is left to do" in caplog.text
    assert (part / "evolve.csv").read_text() == (whole / "evolve.csv").read_text()


def test_a_search_goes_on_with_the_options_it_began_with(tmp_path):
    options = {"data": "a.yaml", "epochs": 3, "freeze": [0], "evolve": 2, "device": ""}
    keep_options(tmp_path, options)
    keep_options(tmp_path, options | {"epochs": 5})  # nothing was trained yet
    evolve(tmp_path, LOW, 1, hill)
    keep_options(tmp_path, options | {"epochs": 5, "evolve": 9, "device": "0", "new": 1})
    with pytest.raises(ValueError, match="began with epochs 5, not 3; go on with the same"):
        keep_options(tmp_path, options)
    with pytest.raises(ValueError, match=r"began with data a\.yaml, not b\.yaml"):
        keep_options(tmp_path, options | {"epochs": 5, "data": "b.yaml"})


def test_children_stay_in_bounds_and_zeros_can_wake():
    hyp, woken = LOW, set()
    for number in range(300):
        child = mutate([Generation(0, Score(0.5, 0.5, 0.5), hyp)], np.random.default_rng(number))
        for name, (low, high) in SEARCH_BOUNDS.items():
            assert low <= getattr(child, name) <= high
        woken |= {n for n in SEARCH_BOUNDS if getattr(hyp, n) == 0 < getattr(child, n)}
        assert child.iou_t == LOW.iou_t
        hyp = child
    assert {"degrees", "mixup", "copy_paste"} <= woken


def test_the_better_parent_has_more_children():
    good = Generation(1, Score(0.9, 0, 0), dataclasses.replace(LOW, fl_gamma=1.0))
    bad = Generation(0, Score(0.1, 0, 0), LOW)
    children = [mutate([bad, good], np.random.default_rng(n)).fl_gamma for n in range(100)]
    assert sum(children) > 90


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("generation,fitness\n0,0.5\n", "evolve.csv:2: not a row of a search"),
        ("a,b\n1,2\n", "evolve.csv:2"),
        ("generation,fitness,mAP_0.5,mAP_0.5:0.95,lr0\n0,x,0.1,0.1,0.01\n", "could not convert"),
    ],
)
def test_damaged_history_is_named(tmp_path, text, what):
    (tmp_path / "evolve.csv").write_text(text)
    with pytest.raises(ValueError, match=what):
        evolve(tmp_path, LOW, 2, hill)
