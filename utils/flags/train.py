"""The flags of train.py: names, defaults, and what can be checked without a file or torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from utils.choices import (
    AMP_CHOICES,
    AUTO_BATCH,
    AUTO_SHARE,
    DEFAULT_COST_POWER,
    MODES,
    NOMINAL_BATCH,
    ON_NAN,
    OPTIMIZERS,
    SCHEDULES,
    SHORTCUT_RULES,
)
from utils.device_text import gpu_indices
from utils.flags.checks import (
    WORKERS_HELP,
    add_download_flag,
    add_run_dir_flags,
    check_device,
    check_imgsz,
    check_least,
    check_shares,
    is_device,
    new_parser,
    number_or_auto,
)

LEAST_VALUES = {
    **dict.fromkeys(("epochs", "nominal_batch"), 1),
    **dict.fromkeys(("workers", "patience", "sparsity_rate", "distill_gain"), 0),
    **dict.fromkeys(("seed", "freeze", "evolve"), 0),
}
# More than 10, the longest that a gradient can be, leaves nothing of it; numbers must stay finite.
MAX_SPARSITY_RATE = 100
MAX_SEED = 2**32 - 1 - 1024  # NumPy takes 32 bits, and each process adds its number
# A flag that does nothing without another.
ACTS_ONLY_WITH = {
    **dict.fromkeys(
        ("--sparsity_rate", "--sparsity_mode", "--sparsity_schedule", "--shortcut"), "--bn_sparsity"
    ),
    **dict.fromkeys(("--sparsity_cost", "--sparsity_share"), "--bn_sparsity"),
    "--distill-gain": "--teacher",
}
# What a resumed run may be told anew; everything else comes from its checkpoint.
RESUME_FLAGS = {"resume", "device", "workers", "on_nan", "batch_size", "allow_download_scripts"}
RESUME_FLAGS |= {"data", "teacher"}  # they may have moved


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    """All flags with their defaults."""
    parser = new_parser(description)
    group = parser.add_argument_group("network and data")
    group.add_argument(
        "--weights",
        default="yolov5s.pt",
        help="checkpoint to start from: ours, a public YOLOv5 .pt, a known name, or '' for none",
    )
    group.add_argument("--cfg", default="", help="model yaml; default: the network of --weights")
    group.add_argument("--data", default="data/coco128.yaml", help="data set yaml")
    group.add_argument("--hyp", default="hyp.scratch-low.yaml", help="hyperparameter yaml")
    group.add_argument("--single-cls", action="store_true", help="treat all classes as one")
    add_download_flag(group)
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=int, default=300)
    group.add_argument(
        "--batch-size",
        type=int,
        default=16,
        help="images, over all GPUs; -1: up to --nominal-batch, what fits into the memory of one "
        "GPU, and 16 on a CPU",
    )
    group.add_argument(
        "--nominal-batch",
        type=int,
        default=NOMINAL_BATCH,
        help="images an optimizer step sums up; smaller batches accumulate gradients",
    )
    group.add_argument("--imgsz", "--img", "--img-size", type=int, default=640, help="pixels")
    group.add_argument("--optimizer", choices=OPTIMIZERS, default="SGD")
    group.add_argument("--cos-lr", action="store_true", help="cosine instead of linear schedule")
    group.add_argument("--label-smoothing", type=float, help="0 to 1; default: of the hyp file")
    group.add_argument("--patience", type=int, default=100, help="epochs without gain; 0: never")
    group.add_argument(
        "--freeze", type=int, nargs="+", default=[0], help="first N rows, or row numbers"
    )
    group.add_argument("--multi-scale", action="store_true", help="vary the size by +- 50 %%")
    group.add_argument("--rect", action="store_true", help="rectangular batches, no mosaic")
    group.add_argument("--image-weights", action="store_true", help="draw hard classes more often")
    group.add_argument("--noautoanchor", action="store_true", help="keep the anchors as they are")
    group.add_argument(
        "--on-nan",
        choices=ON_NAN,
        default="stop",
        help="when a loss runs away or is not finite: stop, or recover, which goes back to the "
        "last checkpoint and on with half the learning rate; default: %(default)s",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of all that is drawn by chance; on a CPU the same seed gives the same weights",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="on a GPU too the same seed shall give the same weights: slower; a CPU needs no flag",
    )
    group.add_argument(
        "--evolve",
        type=int,
        default=0,
        metavar="N",
        help="search better hyperparameters than --hyp in N trainings, one after the other; with "
        "--name and --exist-ok of an earlier search it goes on",
    )
    add_slimming_flags(parser)
    add_run_flags(parser)
    return parser


def add_slimming_flags(parser: argparse.ArgumentParser) -> None:
    """Penalty and teacher."""
    group = parser.add_argument_group("slimming")
    group.add_argument(
        "--bn_sparsity", "--bn-sparsity", action="store_true", help="L1 penalty on BN gammas"
    )
    group.add_argument(
        "--sparsity_rate",
        "--sparsity-rate",
        type=number_or_auto,
        default=1e-4,
        help="its factor, or auto: what fits the gradients and the length of the run",
    )
    group.add_argument(
        "--sparsity_mode",
        "--sparsity-mode",
        choices=MODES,
        default="subgradient",
        help="subgradient: joins the gradients (classic); proximal: after the step, exact zeros",
    )
    group.add_argument(
        "--sparsity_schedule",
        "--sparsity-schedule",
        choices=SCHEDULES,
        default="linear",
        help="linear: the rate decays to a tenth (classic); hold: full for half of the run, then "
        "to 0; default: %(default)s",
    )
    group.add_argument(
        "--sparsity_cost",
        "--sparsity-cost",
        type=float,
        metavar="POWER",
        default=DEFAULT_COST_POWER,
        help="the rate of a channel grows with this power of the operations that its removal "
        "saves; 0: the same for all (classic); default: %(default)s",
    )
    group.add_argument(
        "--sparsity_share",
        "--sparsity-share",
        type=float,
        metavar="SHARE",
        help="once this share of the gammas is below 0.01 the others are let go and recover; 1: "
        f"never (classic); default: {AUTO_SHARE:g} with --sparsity_rate auto, else 1",
    )
    group.add_argument(
        "--shortcut",
        choices=SHORTCUT_RULES,
        default="group",
        help="what is penalised, and can be pruned: keep leaves out what touches a shortcut, "
        "group takes everything",
    )
    group.add_argument(
        "--ft_pruned_model",
        "--ft-pruned-model",
        action="store_true",
        help="fine-tune the slim network in --weights; --cfg is not used",
    )
    group = parser.add_argument_group("distillation")
    group.add_argument(
        "--teacher",
        default="",
        help="checkpoint to learn from beside the labels, as the dense parent of a slim network",
    )
    group.add_argument(
        "--distill-gain",
        type=float,
        default=1.0,
        help="weight of the teacher; at 1 it counts about as much as the labels",
    )


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Where it runs, and where its results go."""
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="", help="'' (best), cpu, mps, 0 or 0,1")
    group.add_argument(
        "--sync-bn", action="store_true", help="batch norm over the images of all GPUs together"
    )
    group.add_argument("--amp", choices=AMP_CHOICES, default="auto", help="precision")
    group.add_argument("--workers", type=int, help=WORKERS_HELP)
    group.add_argument(
        "--cache",
        nargs="?",
        const="ram",
        default="auto",
        choices=("auto", "ram", "disk", "off"),
        help="decoded images; auto: in memory, where they are few (up to 256 MiB)",
    )
    group = parser.add_argument_group("results")
    add_run_dir_flags(group, "train")
    group.add_argument("--tensorboard", action="store_true", help="event files beside the others")
    group.add_argument("--save-period", type=int, default=-1, help="keep every Nth epoch")
    group.add_argument("--nosave", action="store_true", help="write only the last checkpoint")
    group.add_argument("--noval", action="store_true", help="validate only the last epoch")
    group.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        help="run folder or its last.pt; default: the newest unfinished run",
    )


def parse_args(
    argv: Sequence[str] | None = None, description: str | None = None
) -> tuple[argparse.Namespace, set[str]]:
    """Options, and the names of those that were typed; checks what needs no files.

    Args:
        argv: the command line; None takes that of the program.
        description: what `--help` says above the flags.
    """
    parser = build_parser(description)
    options = parser.parse_args(argv)
    given = _given_flags(argv)
    if options.resume and options.evolve:
        parser.error("--evolve starts trainings, --resume goes on with one; give one of them")
    if not options.resume:  # whose options are those of the run
        check_conflicts(parser, options, given)
    check_values(parser, options)
    if options.sparsity_share is None:
        options.sparsity_share = AUTO_SHARE if options.sparsity_rate == "auto" else 1.0
    return options, given


def parse_saved(saved: Mapping[str, Any]) -> argparse.Namespace:
    """The options of a saved run, with the default for what is missing, checked as if typed.

    Raises:
        ValueError: one is not what the command line would take.
    """
    parser = build_parser()
    parser.error = _raise_value_error  # type: ignore[method-assign, assignment]
    words: list[str] = []
    for action in parser._actions:
        value = saved.get(action.dest)
        if value is None or action.dest in ("help", "resume"):
            continue
        flag = action.option_strings[0]
        if action.nargs == 0 and not isinstance(value, bool):
            parser.error(f"{flag} is {value!r}, expected true or false")
        elif action.nargs == "+":
            words += [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
        elif action.nargs != 0:
            words.append(f"{flag}={value}")
        elif value:
            words.append(flag)
    options = parser.parse_args(words)
    check_values(parser, options)
    return argparse.Namespace(**{**saved, **vars(options)})


def _raise_value_error(message: str) -> NoReturn:
    raise ValueError(message)


def check_values(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Refuse numbers out of range, and devices that mean nothing or cannot do what is asked."""
    check_device(parser, options)
    if options.amp == "fp16" and is_device(options, "cpu", "mps"):
        parser.error(f"--amp fp16 needs a CUDA GPU, not {options.device}; try --amp bf16")
    check_imgsz(parser, options)
    check_least(parser, options, LEAST_VALUES)
    if options.sparsity_rate != "auto" and options.sparsity_rate > MAX_SPARSITY_RATE:
        parser.error(
            f"--sparsity_rate is {options.sparsity_rate:g}, expected at most {MAX_SPARSITY_RATE}; "
            "1e-4 to 1e-2 are usual, auto chooses"
        )
    check_batch_size(parser, options)
    check_shares(parser, options, ("sparsity_cost", "sparsity_share"))
    if options.sparsity_share == 0:
        parser.error("--sparsity_share is 0, expected more, to 1")
    if options.label_smoothing is not None and not 0 <= options.label_smoothing < 1:
        parser.error(f"--label-smoothing is {options.label_smoothing}, expected 0 to below 1")
    if options.seed > MAX_SEED:
        parser.error(f"--seed is {options.seed}, expected at most {MAX_SEED}")


def check_conflicts(
    parser: argparse.ArgumentParser, options: argparse.Namespace, given: set[str]
) -> None:
    """Refuse flags that contradict each other, or need what others leave out."""
    if options.bn_sparsity and options.ft_pruned_model:
        parser.error("--bn_sparsity and --ft_pruned_model are different stages; give one of them")
    for flag, needed in ACTS_ONLY_WITH.items():
        if _option_name(flag) in given and not getattr(options, _option_name(needed)):
            parser.error(f"{flag} acts only with {needed}")
    if not options.weights and not options.cfg:
        parser.error("--weights '' needs a network: give --cfg, for example --cfg yolov5n.yaml")
    if options.ft_pruned_model and not options.weights:
        parser.error("--ft_pruned_model needs the pruned checkpoint: give --weights")
    if options.noval and options.image_weights:
        parser.error("--image-weights needs the validation that --noval leaves out")
    if options.noval and "patience" in given and options.patience:
        parser.error("--patience needs the validation that --noval leaves out")
    if options.on_nan == "recover" and options.nosave:
        parser.error("--on-nan recover needs the checkpoints that --nosave leaves out")
    if options.image_weights and options.rect:
        parser.error("--image-weights draws images at random, --rect sorts them; give one of them")


def check_batch_size(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """A number of images, or what stands for as many as fit."""
    if options.batch_size != AUTO_BATCH:
        check_least(parser, options, {"batch_size": 1})
    elif len(gpu_indices(options.device)) > 1:
        parser.error("--batch-size -1 finds what fits on one GPU; give a number for several")


def _option_name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _given_flags(argv: Sequence[str] | None) -> set[str]:
    """Names of the options that were typed."""
    parser = build_parser()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    return set(vars(parser.parse_args(argv)))
