"""Several processes that train together: how they meet, share what one has found, and end."""

from __future__ import annotations

import datetime
import logging
import os
import platform
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from utils import device as devices
from utils.command import NOT_FINITE
from utils.stopping import cause_of

LOGGER = logging.getLogger(__name__)

T = TypeVar("T")

# While the first process scans millions of files, judges or draws, the others wait.
PATIENCE = datetime.timedelta(days=1)
PARENT = os.getppid()
SEARCH = "YOLOV5_SLIM_SEARCH"  # in the environment of its trainings: the process that searches
PRECISIONS = (torch.float32, torch.float16, torch.bfloat16)  # who chose one can use those before
LOST = "another process of this training has ended"


class _Group:
    """How this process is connected."""

    patient: Any = None  # a process group; None: not at all
    store: Any = None  # what all can read and write


def is_connected() -> bool:
    """Whether there are others to talk to."""
    return _Group.patient is not None


@contextmanager
def connected() -> Iterator[None]:
    """Within the block the processes can talk to each other, if there are several.

    An error is told by the first process that meets it; the others end without a word. That one
    has lost another is said by the first of all. All end with the same exit status, as any of them
    may be the first to have ended.
    """
    if devices.world_size() == 1:
        yield
        return
    try:
        _Group.store = _meet(next(distributed.rendezvous("env://"))[0])
        distributed.init_process_group(
            devices.distributed_backend(),
            store=_Group.store,
            rank=devices.rank(),
            world_size=devices.world_size(),
        )
        _Group.patient = distributed.new_group(backend="gloo", timeout=PATIENCE)
        yield
        _leave()
    except SystemExit:
        _leave()
        raise
    except KeyboardInterrupt as error:
        if devices.rank() == 0:
            raise
        raise SystemExit(128 + cause_of(error)) from None
    except (OSError, ValueError, FloatingPointError, MemoryError, RuntimeError) as error:
        if is_lost_connection(error):
            status = _told_status()
            if devices.rank() == 0:
                kind = FloatingPointError if status == NOT_FINITE else ConnectionError
                raise kind(describe_lost_connection(error)) from None
        else:
            status = NOT_FINITE if isinstance(error, FloatingPointError) else 1
            if _is_first_to_tell(status):
                raise
            status = _told_status()
        raise SystemExit(status) from None


def _meet(store: distributed.Store) -> distributed.Store:
    """A part of the store that is new to all processes that are there now.

    torchrun starts a training anew with the same store, in which the processes of the time before
    have left their addresses. So the first invents a name, each other gives one of its own under
    it, and goes on once the first has seen it there.
    """
    own, others = uuid.uuid4().hex, range(1, devices.world_size())
    if devices.rank() == 0:
        store.set("meeting", own)
        store.wait([f"{own}/{rank}" for rank in others], PATIENCE)
        names = [store.get(f"{own}/{rank}").decode() for rank in others]
        store.set(f"{own}/all", " ".join(names))
        return distributed.PrefixStore(own, store)
    while True:
        name = store.get("meeting").decode()
        store.set(f"{name}/{devices.rank()}", own)
        while store.get("meeting").decode() == name:
            if store.check([f"{name}/all"]) and own in store.get(f"{name}/all").decode().split():
                return distributed.PrefixStore(name, store)
            time.sleep(0.05)


def _leave() -> None:
    if is_connected():
        distributed.destroy_process_group()
    go_alone()


def go_alone() -> None:
    """From here on nothing is shared: others may wait elsewhere, until this process has ended."""
    _Group.patient = None


def is_lost_connection(error: BaseException) -> bool:
    """Whether another process has ended, or cannot be reached."""
    return (
        isinstance(error, distributed.DistError)
        or (isinstance(error, RuntimeError) and "gloo" in str(error))
        or str(error).startswith(LOST)
    )


def describe_lost_connection(error: BaseException) -> str:
    """One line, with the first sentence of the error."""
    text = str(error) or type(error).__name__
    return text if text.startswith(LOST) else f"{LOST} ({text.splitlines()[0].split('. ')[0]})"


def _is_first_to_tell(status: int) -> bool:
    """Whether no other process has asked; it will end with this status, and they with it."""
    own = f"{status} {devices.rank()}"
    try:
        return _Group.store is None or _Group.store.compare_set("told", "", own) == own.encode()
    except RuntimeError:  # it has gone with the first process
        return True


def _told_status() -> int:
    """The exit status of the process that told its error; 1 if none did."""
    try:
        if _Group.store is not None and _Group.store.check(["told"]):
            return int(_Group.store.get("told").split()[0])
    except RuntimeError:  # it has gone
        pass
    return 1


def is_orphan() -> bool:
    """Whether what started this process for its own work has gone, and could not end it."""
    if SEARCH in os.environ:
        return os.getppid() != int(os.environ[SEARCH])
    return (is_connected() or "TORCHELASTIC_RUN_ID" in os.environ) and os.getppid() != PARENT


def job() -> str:
    """What names this training for as long as torchrun starts it anew; empty without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    name = os.environ["TORCHELASTIC_RUN_ID"]
    return name if name != "none" else f"{platform.node()}-{PARENT}-{_start_of(PARENT)}"


def _start_of(process: int) -> str:
    """When it began, in what units the system has; numbers of processes come again."""
    try:
        return Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2].split()[19]
    except OSError:  # not Linux
        return ""


# ----------------------------------------------------------------------------------------- sharing
def from_first(make: Callable[[], T]) -> T:
    """What the function gives in the first process; the others do not call it."""
    if not is_connected():
        return make()
    values: list[Any] = [make() if devices.rank() == 0 else None]
    distributed.broadcast_object_list(values, group=_Group.patient, device=torch.device("cpu"))
    return values[0]


def gather(value: T) -> list[T]:
    """In the first process the values of all, in others their own."""
    if not is_connected():
        return [value]
    values: list[Any] = [None] * devices.world_size()
    is_first = devices.rank() == 0
    distributed.gather_object(value, values if is_first else None, group=_Group.patient)
    return values if is_first else [value]


def share(value: T) -> list[T]:
    """The values of all processes, in all of them."""
    if not is_connected():
        return [value]
    values: list[Any] = [None] * devices.world_size()
    distributed.all_gather_object(values, value, group=_Group.patient)
    return values


def common_precision(own: torch.dtype) -> torch.dtype:
    """What all processes can compute in, of what each has chosen for its hardware."""
    chosen = share(own)
    common = min(chosen, key=PRECISIONS.index)
    if common != own:
        names = [str(precision).removeprefix("torch.") for precision in (common, own)]
        LOGGER.info("training in %s, not in %s, which another process is not made for", *names)
    return common


def add_up(tensor: Tensor) -> Tensor:
    """The sum over all processes; nothing waits for the device."""
    if is_connected():
        tensor = tensor.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(tensor)
    return tensor


def is_true_anywhere(flag: bool, device: torch.device) -> bool:
    """Whether it is true in any process; waits for all of them."""
    return flag if not is_connected() else bool(add_up(torch.tensor(float(flag), device=device)))


def take_from_first(tensors: list[Tensor]) -> None:
    """Overwrite tensors with those of the first process."""
    for tensor in tensors if is_connected() else []:
        distributed.broadcast(tensor, 0)


@contextmanager
def in_turn() -> Iterator[None]:
    """The block runs in the first process, then in one of each other machine, then in the rest.

    For what is written to disks: what the first has written the others find, if they can see it.
    """
    turn = 0 if devices.rank() == 0 else 1 if devices.local_rank() == 0 else 2
    for _ in range(turn):
        wait_for_all()
    yield
    for _ in range(turn, 2):
        wait_for_all()


def wait_for_all() -> None:
    """Meet the other processes, however long they take."""
    if is_connected():
        distributed.barrier(group=_Group.patient)
