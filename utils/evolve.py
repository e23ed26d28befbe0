"""Hyperparameter search by evolution: mutate what did best, train, keep score in a csv file.

A plain evolution strategy: a parent is drawn among the best few, by how much better than the worst
of them it is; most of its values are multiplied by log-normal noise and kept within bounds that
make sense. Each generation draws from its own stream, so a search that was interrupted goes on as
it would have gone.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.config import Hyperparameters, load_yaml
from utils.run_dir import save_options, write_text_atomic

LOGGER = logging.getLogger(__name__)

# Between which values each hyperparameter is searched; the others stay.
SEARCH_BOUNDS = {
    "lr0": (1e-5, 0.1),
    "lrf": (0.01, 1.0),
    "momentum": (0.6, 0.98),
    "weight_decay": (0.0, 0.001),
    "warmup_epochs": (0.0, 5.0),
    "warmup_momentum": (0.0, 0.95),
    "warmup_bias_lr": (0.0, 0.2),
    "box": (0.02, 0.2),
    "cls": (0.1, 4.0),
    "cls_pw": (0.5, 2.0),
    "obj": (0.2, 4.0),
    "obj_pw": (0.5, 2.0),
    "anchor_t": (2.0, 8.0),
    "hsv_h": (0.0, 0.1),
    "hsv_s": (0.0, 0.9),
    "hsv_v": (0.0, 0.9),
    "degrees": (0.0, 45.0),
    "translate": (0.0, 0.9),
    "scale": (0.0, 0.9),
    "shear": (0.0, 10.0),
    "perspective": (0.0, 0.001),
    "flipud": (0.0, 1.0),
    "fliplr": (0.0, 1.0),
    "mosaic": (0.0, 1.0),
    "mixup": (0.0, 1.0),
    "copy_paste": (0.0, 1.0),
}
NUM_PARENTS = 5
MUTATED_SHARE = 0.8  # of the values
NOISE = 0.2  # standard deviation of the logarithm
# A value of 0 cannot be multiplied away from it: this share of them gets a small start.
AWAKENED_SHARE, AWAKENED_TO = 0.1, 0.05  # the latter as a share of the upper bound

# What may change while a search goes on: all else changes what a fitness means.
FREE_OPTIONS = frozenset(
    {"evolve", "project", "name", "exist_ok", "device", "workers", "cache", "tensorboard"}
)

FIGURES = ("generation", "fitness", "mAP_0.5", "mAP_0.5:0.95")


class Score(NamedTuple):
    """What a training with some hyperparameters came to."""

    fitness: float
    map50: float
    map50_95: float


class Generation(NamedTuple):
    """One row of `evolve.csv`."""

    number: int
    score: Score
    hyp: Hyperparameters


def keep_options(folder: Path, options: Mapping[str, Any]) -> None:
    """Save the options of a new search; see that one that goes on has those that it began with.

    Raises:
        ValueError: it has others, so that its generations could not be compared.
    """
    path = folder / "opt.yaml"
    if (folder / "evolve.csv").exists() and path.exists():
        began = load_yaml(path)
        for name, value in options.items():
            if name not in FREE_OPTIONS and began.get(name, value) != value:
                raise ValueError(
                    f"{folder}: this search began with {name} {began[name]}, not {value}; go on "
                    "with the same options, or start another with another --name"
                )
    save_options(path, options)


def evolve(
    folder: Path,
    seed_hyp: Hyperparameters,
    num_generations: int,
    train: Callable[[Hyperparameters, int], Score],
    seed: int = 0,
) -> Generation:
    """Search until there are so many generations in all; the first one is `seed_hyp` itself.

    Args:
        folder: of `evolve.csv`, which is continued, and `hyp_evolved.yaml`, the best so far.
        seed_hyp: where a new search starts.
        num_generations: trainings, those of an earlier part of the search included.
        train: trains with hyperparameters in the generation of that number.
        seed: of the mutations.

    Returns:
        The best generation.

    Raises:
        ValueError: `evolve.csv` is damaged.
    """
    path = folder / "evolve.csv"
    history = read_history(path) if path.exists() else []
    if history:
        LOGGER.info("%s: goes on after %d generations", path, len(history))
    if len(history) >= num_generations:
        LOGGER.warning("warning: %d in all are asked for: nothing is left to do", num_generations)
    for number in range(len(history), num_generations):
        rng = np.random.default_rng((seed, number))
        hyp = mutate(history, rng) if history else seed_hyp
        history.append(Generation(number, train(hyp, number), hyp))
        write_text_atomic(path, _as_csv(history))
        best = best_of(history)
        save_options(folder / "hyp_evolved.yaml", best.hyp.to_dict())
        LOGGER.info(
            "generation %d of %d: fitness %.4f (mAP@.5 %.4f, mAP@.5:.95 %.4f); best %.4f, of %d",
            number + 1, num_generations, *history[-1].score, best.score.fitness, best.number + 1,
        )  # fmt: skip
    return best_of(history)


def best_of(history: Sequence[Generation]) -> Generation:
    """The generation with the highest fitness, the earliest of equal ones."""
    return max(history, key=lambda generation: generation.score.fitness)


def mutate(history: Sequence[Generation], rng: np.random.Generator) -> Hyperparameters:
    """A child of one of the best."""
    ranked = sorted(history, key=lambda generation: -generation.score.fitness)[:NUM_PARENTS]
    fitness = np.array([generation.score.fitness for generation in ranked])
    weights = fitness - fitness.min() + 1e-3
    parent = ranked[rng.choice(len(ranked), p=weights / weights.sum())].hyp
    changes: dict[str, Any] = {}
    for name, (low, high) in SEARCH_BOUNDS.items():
        value = getattr(parent, name)
        is_chosen, factor, is_woken = rng.random(), rng.normal(0, NOISE), rng.random()
        if value == 0 and is_woken < AWAKENED_SHARE:
            value = AWAKENED_TO * high
        elif is_chosen < MUTATED_SHARE:
            value *= math.exp(factor)
        else:
            continue  # as it is, even if it was given outside of the bounds
        changes[name] = float(f"{min(max(value, low), high):.5g}")
    return dataclasses.replace(parent, **changes)


def read_history(path: Path) -> list[Generation]:
    """The rows of an `evolve.csv`.

    Raises:
        ValueError: names file, line and what is wrong.
    """
    history: list[Generation] = []
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                history.append(_parse(row, len(history)))
        except (KeyError, TypeError, ValueError, OverflowError, csv.Error) as error:
            raise ValueError(
                f"{path}:{reader.line_num}: not a row of a search ({error}); move the file "
                "away to start anew"
            ) from None
    return history


def _parse(row: dict[str, str], number: int) -> Generation:
    if int(row["generation"]) != number:
        raise ValueError(f"generation {row['generation']!r}, expected {number}")
    score = Score(*(float(row[name]) for name in FIGURES[1:]))
    if not all(map(math.isfinite, score)):
        raise ValueError(f"fitness and mAP of {score} cannot be compared")
    names = [entry.name for entry in dataclasses.fields(Hyperparameters)]
    values = {name: float(row[name]) for name in names if row.get(name)}
    anchors = values.pop("anchors", None)
    hyp = Hyperparameters(**values, anchors=None if anchors is None else int(anchors))
    return Generation(number, score, hyp)


def _as_csv(history: Sequence[Generation]) -> str:
    names = [entry.name for entry in dataclasses.fields(Hyperparameters)]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, [*FIGURES, *names], restval="", lineterminator="\n")
    writer.writeheader()
    for number, score, hyp in history:
        figures = dict(zip(FIGURES, (number, *score), strict=True))
        writer.writerow(figures | hyp.to_dict())
    return buffer.getvalue()
