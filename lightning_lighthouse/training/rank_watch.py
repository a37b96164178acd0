"""A process that ends a run on several ranks when one of them has died and rank 0 does not notice.

Lightning looks after the ranks that it started from a thread of rank 0, and that thread needs Python's global lock. The
main thread may keep it for ever: a compiled kernel's launch holds it while it waits for room in the GPU's queue, which
is full behind a collective that waits for the dead rank. A process of its own waits for nobody. This file is also its
program, and therefore imports nothing but the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Lightning looks every 5 s, and says more when it ends a run.
PATIENCE = 15.0
INTERVAL = 1.0


@contextmanager
def watched_ranks(launcher: Any) -> Iterator[None]:
    """Watch the ranks that Lightning has started from this process, where it has and the system has /proc.

    Args:
        launcher: The strategy's. Ranks of torchrun, SLURM and the like are watched by those.
    """
    ranks = [process.pid for process in getattr(launcher, "procs", [])]
    if not ranks or not Path("/proc/self/stat").exists():
        yield
        return
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), *map(str, ranks)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as watcher:
        try:
            yield
        finally:
            watcher.kill()


def read_state(process: int, parent: int) -> list[str]:
    """What /proc says of a child from its state on; [] once the parent knows of its end, and the number is free."""
    try:
        # the name, in parentheses, may hold anything
        _, _, state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")
    except OSError:
        return []
    fields = state.split()
    return fields if int(fields[1]) == parent else []


def exit_code(process: int, parent: int) -> int | None:
    """How a child ended; None while it runs, and once the parent knows."""
    fields = read_state(process, parent)
    return os.waitstatus_to_exitcode(int(fields[-1])) if fields and fields[0] == "Z" else None


def main(parent: int, ranks: list[int]) -> None:
    """Wait until `parent`, rank 0, is gone, or end it with the ranks if it leaves one that failed unnoticed."""
    # what is sent to all processes of a run is the parent's to handle
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    failed_since: dict[int, float] = {}
    while os.getppid() == parent:
        for rank in ranks:
            code = exit_code(rank, parent)
            if not code:
                failed_since.pop(rank, None)
            elif time.monotonic() - failed_since.setdefault(rank, time.monotonic()) > PATIENCE:
                print(
                    f"Lighthouse: the rank with process id {rank} ended with {code}, and rank 0 waits for it without "
                    "noticing: the run is stopped",
                    file=sys.stderr,
                    flush=True,
                )
                for process in [rank for rank in ranks if read_state(rank, parent)] + [parent]:
                    os.kill(process, signal.SIGKILL)
                return
        time.sleep(INTERVAL)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(argument) for argument in sys.argv[2:]])
