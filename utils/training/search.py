"""`--evolve`: a search for better hyperparameters, each judged by a training of its own."""

from __future__ import annotations

import argparse
import logging
import math
import os
import subprocess
from collections.abc import Sequence

from utils.command import NOT_FINITE
from utils.config import Hyperparameters, load_hyperparameters
from utils.downloads import PROJECT_ROOT
from utils.evolve import Score, evolve, keep_options
from utils.lookup import find_config
from utils.metrics import fitness
from utils.ranks import SEARCH
from utils.run_dir import new_run_dir, read_results, save_options
from utils.stopping import cause_of, describe_interruption

LOGGER = logging.getLogger(__name__)


def search_hyperparameters(
    options: argparse.Namespace, given: set[str], command: Sequence[str]
) -> None:
    """Many trainings, each a process of its own that runs this command with more flags."""
    seed_hyp = load_hyperparameters(find_config(options.hyp, ["data/hyps"], PROJECT_ROOT))
    folder = new_run_dir(options.project, options.name, options.exist_ok)
    keep_options(folder, vars(options))
    flags = ["--evolve", "0", "--project", str(folder), "--name", "generation", "--exist-ok"]
    # One validation at the end is enough, unless the training itself needs them.
    flags += ["--nosave"] if {"image_weights", "patience"} & given else ["--nosave", "--noval"]

    # By this they see that they are alone. Windows would never say so.
    searching = {SEARCH: str(os.getpid())} if os.name == "posix" else {}
    again = f"the same command with --name {folder.name} --exist-ok goes on"

    def train_once(hyp: Hyperparameters, number: int) -> Score:
        path = folder / "hyp.yaml"
        save_options(path, hyp.to_dict())
        status = subprocess.call([*command, *flags, "--hyp", str(path)], env=os.environ | searching)
        if status == NOT_FINITE and number > 0:
            LOGGER.warning("warning: generation %d failed and counts as fitness 0", number + 1)
            return Score(0.0, 0.0, 0.0)
        if status:  # a full disk or a lost drive says nothing about the hyperparameters
            if number == 0:
                raise SystemExit("the search has not begun: its first training failed, see above")
            raise SystemExit(f"generation {number + 1} failed, see above; {again}")
        results = read_results(folder / "generation/results.csv")
        pairs = zip(results["metrics/mAP_0.5"], results["metrics/mAP_0.5:0.95"], strict=True)
        return max(Score(fitness(*pair), *pair) for pair in pairs if not math.isnan(pair[0]))

    try:
        best = evolve(folder, seed_hyp, options.evolve, train_once, options.seed)
    except KeyboardInterrupt as error:  # it has ended the training of the moment too
        LOGGER.info("\n%s; %s", describe_interruption(error), again)
        raise SystemExit(128 + cause_of(error)) from None
    LOGGER.info(
        "the best generation is number %d, fitness %.4f: %s; %s, with more generations in all",
        best.number + 1, best.score.fitness, folder / "hyp_evolved.yaml", again,
    )  # fmt: skip
