"""Trainings as one of several processes: what their steps are, and what happens if one fails.

    python -m tests.steps_of_ranks compare jobs.json folder
    python -m tests.steps_of_ranks MISHAP FLAGS OF train.py

jobs.json holds command lines of train.py by name, mishaps are below. Batch norms keep their
statistics, as those of a batch are the one thing that differs between processes, except with
`--sync-bn`: its batch norms, which torch has for GPUs alone, compute here on CPUs. The job STOPPED
is told to stop after its first step. tests/test_ranks.py compares what `folder/rank*.pt` hold.
"""

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

import train
from utils import ranks
from utils.claim import release
from utils.command import run_command
from utils.device import rank, world_size
from utils.training import report
from utils.training.run import Run

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
STOPPED = "stopped"


def main() -> None:
    """One or the other, see above."""
    torch.set_num_threads(1)
    keep_statistics()
    synchronise_on_cpu()
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
        steps = {name: steps_of(argv, name == STOPPED) for name, argv in jobs.items()}
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


# What happens in the second of four batches of the second epoch, and in which processes.
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
            len(seen) != 6
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

    Unless they are synchronised. And leave out pictures, and all but a few verdicts.
    """
    freeze_rows = train.freeze_rows

    def freeze(model: nn.Module, options: argparse.Namespace) -> list[nn.Module]:
        if options.sync_bn:
            return freeze_rows(model, options)
        return [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]

    train.freeze_rows = freeze
    for name in ("plot_results", "plot_labels", "plot_batch", "plot_gamma_history"):
        setattr(report, name, lambda *_: None)
    is_due = train.is_verdict_due
    train.is_verdict_due = lambda options, *when: (  # it takes as long as the training
        options.sparsity_mode == "proximal" and options.name != STOPPED and is_due(options, *when)
    )


class Sum(torch.autograd.Function):
    """Over all processes; so is its gradient."""

    @staticmethod
    def forward(_, tensor: Tensor) -> Tensor:
        return ranks.add_up(tensor)

    @staticmethod
    def backward(_, gradient: Tensor) -> Tensor:
        return ranks.add_up(gradient)


def synchronise_on_cpu() -> None:
    """Let `--sync-bn` pass, and its batch norms compute what the definition says, in float64."""
    check = train.check_processes
    train.check_processes = lambda options, device: check(
        argparse.Namespace(**(vars(options) | {"sync_bn": False})), device
    )

    def forward(bn: nn.SyncBatchNorm, x: Tensor) -> Tensor:
        mean, variance = bn.running_mean, bn.running_var
        if bn.training:
            values = x.double().transpose(0, 1).flatten(1)  # [C, B * H * W]
            count = values.new_tensor([values.shape[1]])
            total = Sum.apply(torch.cat((values.sum(1), values.square().sum(1), count)))
            sums, squares = (total[:-1] / total[-1]).chunk(2)
            mean, variance = sums.float(), (squares - sums.square()).float()
            unbiased = variance * (total[-1] / (total[-1] - 1)).float()
            with torch.no_grad():
                bn.num_batches_tracked += 1
                bn.running_mean.lerp_(mean, bn.momentum)
                bn.running_var.lerp_(unbiased, bn.momentum)
        scale = bn.weight * (variance + bn.eps).rsqrt()
        return x * scale[:, None, None] + (bn.bias - mean * scale)[:, None, None]

    nn.SyncBatchNorm.forward = forward
    nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda *_: None


def steps_of(argv: list[str], is_stopped: bool) -> list[dict]:
    """Of every optimizer step the gradients of the loss, the learning rate and the new weights."""
    steps: list[dict] = []
    optimizer_step = train.optimizer_step

    def step(run: Run, epoch: int, norm: torch.Tensor) -> None:
        gradients = flat(p.grad for p in run.model.parameters() if p.grad is not None)
        optimizer_step(run, epoch, norm)
        gammas = {} if run.penalty is None else run.penalty.batchnorms
        steps.append(
            {
                "gradients": gradients,
                "lr": torch.tensor([group["lr"] for group in run.optimizer.param_groups]),
                "batches": torch.tensor([run.batches]),
                "weights": flat(run.model.parameters()),
                "gammas": flat(bn.weight for bn in gammas.values()),
                "statistics": flat(
                    b for name, b in run.model.named_buffers() if ".running_" in name
                ),
                "average": floats(run.ema.model),
            }
        )
        if is_stopped and len(steps) == 1 and rank() == world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    train.optimizer_step = step
    try:
        train.main(argv)
    except SystemExit:
        assert is_stopped
        release(Path(argv[argv.index("--project") + 1], argv[argv.index("--name") + 1]))
    finally:
        train.optimizer_step = optimizer_step
    return steps


def floats(model: nn.Module) -> Tensor:
    """All parameters, and all statistics."""
    return flat(tensor for tensor in model.state_dict().values() if tensor.is_floating_point())


def flat(tensors: Iterable[Tensor]) -> Tensor:
    """All values in a row, copied."""
    return torch.cat([torch.zeros(0), *(tensor.detach().flatten() for tensor in tensors)])


if __name__ == "__main__":
    main()
