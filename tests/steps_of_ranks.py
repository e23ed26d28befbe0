"""Trainings as one of several processes: what their steps are, and what happens if one fails.

    python -m tests.steps_of_ranks compare jobs.json folder
    python -m tests.steps_of_ranks MISHAP FLAGS OF train.py

jobs.json holds command lines of train.py by name, mishaps are below. Batch norms keep their
statistics: those of a batch are the one thing that differs between processes without `--sync-bn`,
which needs GPUs. tests/test_ranks.py compares what `folder/rank*.pt` hold.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch import nn

import train
from utils import ranks
from utils.command import run_command
from utils.device import rank
from utils.training import report
from utils.training.run import Run

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def main() -> None:
    """One or the other, see above."""
    torch.set_num_threads(1)
    keep_statistics()
    first, *rest = sys.argv[1:]
    if first == "compare":
        compare(json.loads(Path(rest[0]).read_text()), Path(rest[1]))
    else:
        spoil(first)
        run_command(lambda: train.main(rest))


def become(argv: list[str], environment: dict[str, str], log: Path) -> None:
    """Let a fork of a process that has loaded torch go on as one that was started like this."""
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    sys.argv[1:] = argv
    ranks.PARENT = os.getppid()
    main()


def compare(jobs: dict[str, list[str]], folder: Path) -> None:
    """Train, and keep gradients, gammas and results of every step, and the files used."""
    written: list[str] = []
    read: list[str] = []
    sys.addaudithook(lambda event, args: note_use(event, args, written, read))
    with ranks.connected():
        train.ranks.connected = contextlib.nullcontext  # once is enough for all of them
        steps = {name: steps_of(argv) for name, argv in jobs.items()}
    written = [path for path in written if path.startswith(str(folder))]
    read = [path for path in read if path.startswith(str(folder.parent))]
    found = {"steps": steps, "written": written, "read": read}
    torch.save(found, folder / f"rank{rank()}.pt")


def note_use(event: str, args: tuple, written: list[str], read: list[str]) -> None:
    """Remember which files are opened, for writing or else, made or renamed."""
    if event == "open":
        is_written = isinstance(args[2], int) and args[2] & WRITING
        (written if is_written else read).append(str(args[0]))
    if event in ("os.mkdir", "os.rename", "os.remove"):
        written.append(str(args[0]))


# What happens in the second batch of the second epoch, and in which processes.
MISHAPS: dict[str, list[int]] = {
    "kill second": [1],
    "stop": [1],
    "fail": [1],
    "nan": [0, 1],
    "nan in second": [1],
}


def spoil(kind: str) -> None:
    """Let something happen to the training, unless it has been started anew after it."""
    compute_loss, seen = train.compute_loss, []

    def compute(run, images, targets, **rest):
        loss, parts = compute_loss(run, images, targets, **rest)
        seen.append(len(images))
        if (
            len(seen) != 5
            or rank() not in MISHAPS[kind]
            or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        ):
            return loss, parts
        (run.dir / "mishap").touch()
        if kind == "fail":
            raise FileNotFoundError("images: the drive has gone")
        if kind.startswith(("kill", "stop")):
            os.kill(os.getpid(), signal.SIGTERM if kind == "stop" else signal.SIGKILL)
        return loss * float("nan") if kind.startswith("nan") else loss, parts

    train.compute_loss = compute


def keep_statistics() -> None:
    """Let `train.py` treat all batch norms as those of frozen rows, but train their weights.

    And leave out pictures, and all but a few verdicts.
    """
    train.freeze_rows = lambda model, _: [
        m for m in model.modules() if isinstance(m, nn.BatchNorm2d)
    ]
    for name in ("plot_results", "plot_labels", "plot_batch", "plot_gamma_history"):
        setattr(report, name, lambda *_: None)
    is_due = train.is_verdict_due
    train.is_verdict_due = lambda options, *when: (  # it takes as long as the training
        options.sparsity_mode == "proximal" and is_due(options, *when)
    )


def steps_of(argv: list[str]) -> list[dict]:
    """Of every optimizer step the gradients of the loss, the learning rate and the new weights."""
    steps: list[dict] = []
    optimizer_step = train.optimizer_step

    def step(run: Run, epoch: int, norm: torch.Tensor) -> None:
        gradients = torch.cat([p.grad.flatten() for p in run.model.parameters()])
        optimizer_step(run, epoch, norm)
        gammas = {} if run.penalty is None else run.penalty.batchnorms
        steps.append(
            {
                "gradients": gradients.clone(),
                "lr": torch.tensor([group["lr"] for group in run.optimizer.param_groups]),
                "batches": torch.tensor([run.batches]),
                "weights": torch.cat([p.detach().flatten() for p in run.model.parameters()]),
                "gammas": torch.cat(
                    [torch.zeros(0), *(bn.weight.detach() for bn in gammas.values())]
                ),
            }
        )

    train.optimizer_step = step
    try:
        train.main(argv)
    finally:
        train.optimizer_step = optimizer_step
    return steps


if __name__ == "__main__":
    main()
