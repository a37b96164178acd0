"""Ranks of a run by fork: what was imported once is not imported again by each of them."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable


def run_ranks(work: Callable[[], None], ranks: int) -> None:
    """Run `work` in as many processes as ranks, as torchrun would set them up; one alone is no distributed run.

    Raises:
        RuntimeError: One of them failed, which has printed why.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    children = [_forked(work, rank, ranks, port) for rank in range(ranks)]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise RuntimeError(f"ranks ended with {statuses}")


def _forked(work: Callable[[], None], rank: int, ranks: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        if ranks > 1:
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE=str(ranks),
                LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
            )  # fmt: skip
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)
