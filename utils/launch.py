"""Starting one process for each GPU of this machine, and ending them together."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

from torch.distributed import TCPStore

from utils.ranks import SEARCH, is_orphan
from utils.stopping import SIGNALS

GRACE = 20.0  # seconds to end for the others, once one has failed
GLANCE = 0.1  # seconds between two looks at them


def launch(command: Sequence[str], count: int) -> int:
    """Run the command `count` times, as processes of one training.

    Signals that would end this process are passed on, and the processes decide when they end. They
    are told so too when a search has gone that this process works for.

    Returns:
        The exit status of the first that failed; 0 if none did.

    Raises:
        OSError: one of them cannot be started; there is none then.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # all are clients of the store above
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
    }
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **shared}
    environment.pop(SEARCH, None)  # they are parts of this process, which is one of the search
    processes: list[subprocess.Popen[bytes]] = []
    asked: list[int] = []

    numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda n, _: asked.append(n)) for number in heard}
    try:
        for rank in map(str, range(count)):
            own = {"RANK": rank, "LOCAL_RANK": rank}
            processes.append(subprocess.Popen(command, env={**environment, **own}))
        return _wait(processes, asked)
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[subprocess.Popen[bytes]], asked: list[int]) -> int:
    """Until all have ended; those that are left when one has failed are ended.

    Signals that come to be in `asked` are passed on here alone, so that each process gets them
    once: a second Ctrl-C ends a training without saving it.
    """
    code, deadline, is_alone = 0, float("inf"), False
    while None in (codes := [process.poll() for process in processes]):
        if not is_alone and is_orphan():
            is_alone = True
            asked.append(signal.SIGTERM)
        while asked:
            number = asked.pop(0)
            for process in processes:
                process.send_signal(number)
        if any(codes) and not code:
            # Once more: what this one has lost may have ended since the look at it.
            code = _cause([process.poll() for process in processes])
            deadline = time.monotonic() + GRACE
            for process in processes:
                process.terminate()
        if time.monotonic() > deadline:
            for process in processes:
                process.kill()
        time.sleep(GLANCE)
    code = code or _cause(codes)
    if code < 0 and -code not in (signal.SIGTERM, signal.SIGINT):
        name = signal.Signals(-code).name
        print(f"error: one of the {len(processes)} processes was ended by {name}", file=sys.stderr)
    return code if code >= 0 else 128 - code


def _cause(codes: Sequence[int | None]) -> int:
    """The exit status that the others follow from; 0 if none has failed.

    One that was killed has ended before those that lost it, though all be found at one glance.
    """
    failed = [code for code in codes if code]
    return next((code for code in failed if code < 0), failed[0] if failed else 0)
