"""How long a training waits for its data."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch.profilers import Profiler

# what Lightning's training loop calls it when it asks for a batch
FETCH = ".train_dataloader_next"


@contextmanager
def timed_fetches(profiler: Profiler, note: Callable[[float], None]) -> Iterator[None]:
    """Note the seconds of each training batch's fetch.

    Args:
        profiler: The Trainer's, whichever it is: Lightning tells it when a fetch begins and ends.
        note: Given the seconds of each.
    """
    start, stop = profiler.start, profiler.stop
    began = 0.0

    def timed_start(action_name: str) -> None:
        nonlocal began
        start(action_name)
        if action_name.endswith(FETCH):
            began = time.perf_counter()

    def timed_stop(action_name: str) -> None:
        if action_name.endswith(FETCH):
            note(time.perf_counter() - began)
        stop(action_name)

    own = {name: value for name, value in vars(profiler).items() if name in ("start", "stop")}
    vars(profiler).update(start=timed_start, stop=timed_stop)
    try:
        yield
    finally:
        for name in ("start", "stop"):
            del vars(profiler)[name]
        vars(profiler).update(own)
