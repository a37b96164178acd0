"""Training time and the tokens trained in it: batches timed into a ledger, fetches of data within them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.profilers import Profiler
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_lighthouse.phases.ledger import PhaseTotals
from lightning_lighthouse.runs.stand_in import StandIn


class Stopwatch:
    """Times batches into a ledger; stands still while the Trainer validates.

    A GPU works behind the clock, but the sums are right wherever the host waited for it, which it does at each logged
    step, at the switch, and before each validation.
    """

    def __init__(self) -> None:
        self._mark: float | None = None
        self._paced_phase: str | None = None
        self._waited = 0.0

    def fetched(self, seconds: float) -> None:
        """A batch was handed out after `seconds`; they count where the time between two batches does."""
        if self._mark is not None:
            self._waited += seconds

    def start(self) -> None:
        """A batch begins; waiting for its data counts if the batch before it was timed too."""
        if self._mark is None:
            self._mark = time.perf_counter()

    def stop(self, totals: PhaseTotals, phase: str, tokens: int) -> None:
        """A batch of `tokens` tokens, over all ranks, ended."""
        now = time.perf_counter()
        if self._mark is None:
            # a checkpoint was written inside the batch: what of it was training is not known
            self._mark, self._paced_phase = now, None
        seconds = now - self._mark
        self._mark = now
        totals.seconds += seconds
        totals.tokens += tokens
        if self._paced_phase == phase:
            totals.paced_seconds += seconds
            totals.paced_tokens += tokens
            totals.paced_waiting += self._waited
        self._waited = 0.0
        self._paced_phase = phase

    def drain(self, totals: PhaseTotals, phase: str, device: torch.device) -> None:
        """Wait for the batches that the device still works on; the wait is training time."""
        if device.type != "cuda":
            return
        start = time.perf_counter()
        torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
        totals.seconds += seconds
        if self._paced_phase == phase:
            totals.paced_seconds += seconds
        if self._mark is not None:
            self._mark += seconds

    def pause(self) -> None:
        """Something else than training begins."""
        self._mark = None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """The time inside does not count."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._mark is not None:
                self._mark += time.perf_counter() - start


# what batches call their token ids
TOKEN_NAMES = ("tokens", "input_ids")


def count_tokens(batch: Any) -> int:
    """Tokens of a batch: the elements of its token ids, 0 if it has none."""
    ids = token_ids(batch)
    return 0 if ids is None else ids.numel()


def token_ids(batch: Any) -> Tensor | None:
    """The token ids of a batch, None if it has none.

    They go by name, as keys or attributes; without such a name they are the largest integer tensor of at most two
    dimensions, beside which masks, positions for each axis and images stand; or of any, if there is no such tensor.
    """
    for name in TOKEN_NAMES:
        named = batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)
        if isinstance(named, Tensor):
            return named
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
            found.append(tensor)
        return tensor

    apply_to_collection(batch, Tensor, note, allow_frozen=True)
    flat = [tensor for tensor in found if tensor.ndim <= 2]
    return max(flat or found, key=lambda tensor: tensor.numel(), default=None)


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
    vars(profiler).update(start=StandIn(start, timed_start), stop=StandIn(stop, timed_stop))
    try:
        yield
    finally:
        for name in ("start", "stop"):
            del vars(profiler)[name]
        vars(profiler).update(own)
