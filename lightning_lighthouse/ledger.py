"""What each phase of a run cost and reached: steps, seconds, tokens, dense validation losses."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_lighthouse.schedule import DENSE, LIGHTHOUSE


@dataclass
class PhaseTotals:
    """Sums over one phase, all ranks.

    Args:
        steps: Optimizer steps.
        seconds: Training time, validation and checkpoints left out.
        tokens: Tokens of all batches.
        paced_tokens: Tokens of the batches whose time counts for throughput: all but the first of a phase and of a
            run, which compile.
        paced_seconds: Time of those batches.
        paced_waiting: What of that went by before the loader handed the batch out; on rank 0, the others' differs.
    """

    steps: int = 0
    seconds: float = 0.0
    tokens: int = 0
    paced_tokens: int = 0
    paced_seconds: float = 0.0
    paced_waiting: float = 0.0
    _window_start: tuple[int, float] = (0, 0.0)

    @property
    def tokens_per_second(self) -> float | None:
        """None before a batch was timed."""
        return self.paced_tokens / self.paced_seconds if self.paced_seconds > 0 else None

    @property
    def waiting_share(self) -> float | None:
        """Share of the timed batches' time that the process waited for data; None before a batch was timed.

        A GPU that still has work meanwhile loses less.
        """
        return self.paced_waiting / self.paced_seconds if self.paced_seconds > 0 else None

    def window_rate(self) -> float | None:
        """Tokens per second since the last call; None if no batch was timed since."""
        tokens, seconds = self._window_start
        self._window_start = self.paced_tokens, self.paced_seconds
        if self.paced_seconds <= seconds:
            return None
        return (self.paced_tokens - tokens) / (self.paced_seconds - seconds)


class Validation(NamedTuple):
    """One dense validation.

    Args:
        step: Optimizer steps done.
        seconds: Training time spent until then, both phases.
        phase: Phase of the last training batch.
        loss: Validation loss.
    """

    step: int
    seconds: float
    phase: str
    loss: float


@dataclass
class Ledger:
    """Totals of both phases, and every dense validation."""

    lighthouse: PhaseTotals = field(default_factory=PhaseTotals)
    dense: PhaseTotals = field(default_factory=PhaseTotals)
    validations: list[Validation] = field(default_factory=list)

    def totals(self, phase: str) -> PhaseTotals:
        """The totals of LIGHTHOUSE or DENSE."""
        return {LIGHTHOUSE: self.lighthouse, DENSE: self.dense}[phase]

    @property
    def seconds(self) -> float:
        """Training time of both phases."""
        return self.lighthouse.seconds + self.dense.seconds

    @property
    def lighthouse_validations(self) -> list[Validation]:
        """Those of the Lighthouse phase, since the last return to it."""
        dense = [index for index, validation in enumerate(self.validations) if validation.phase == DENSE]
        return self.validations[dense[-1] + 1 if dense else 0 :]

    @property
    def before_switch(self) -> Validation | None:
        """The last validation of the Lighthouse phase."""
        return next((v for v in reversed(self.validations) if v.phase == LIGHTHOUSE), None)

    @property
    def after_switch(self) -> Validation | None:
        """The first validation after that with dense training behind it; None for a dense baseline."""
        before = self.before_switch
        if before is None:
            return None
        return next((v for v in self.validations[self.validations.index(before) :] if v.phase == DENSE), None)

    @property
    def last_validation(self) -> Validation | None:
        """The newest."""
        return self.validations[-1] if self.validations else None

    def add_validation(self, step: int, phase: str, loss: float) -> None:
        """Record a dense validation after `step` optimizer steps, the last of them in `phase`."""
        self.validations.append(Validation(step, self.seconds, phase, loss))

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            LIGHTHOUSE: asdict(self.lighthouse),
            DENSE: asdict(self.dense),
            "validations": [tuple(validation) for validation in self.validations],
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Ledger:
        """The ledger of a checkpoint; one of an older version has no list of validations."""
        validations = [Validation(*values) for values in state.get("validations", [])]
        return cls(PhaseTotals(**state[LIGHTHOUSE]), PhaseTotals(**state[DENSE]), validations)

    def summary(self) -> list[str]:
        """The run in a few lines."""
        lines = []
        for phase in (LIGHTHOUSE, DENSE):
            totals = self.totals(phase)
            if totals.steps:
                rate, waiting = totals.tokens_per_second, totals.waiting_share
                pace = "" if rate is None else f", {rate:,.0f} tokens/s, {waiting:.1%} of the time waiting for data"
                lines.append(f"{phase:<10} {totals.steps:>7} steps {totals.seconds:>9.1f} s{pace}")
        validations = {
            "last before the switch": self.before_switch,
            "first after the switch": self.after_switch,
            "final": self.last_validation,
        }
        for name, validation in validations.items():
            if validation is not None:
                lines.append(f"dense validation loss, {name}: {validation.loss:.4f} (step {validation.step})")
        return lines


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
        assert self._mark is not None
        now = time.perf_counter()
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


def count_tokens(batch: Any) -> int:
    """Tokens of a batch: the elements of its largest integer tensor, 0 if it has none."""
    return max((tensor.numel() for tensor in _tensors(batch) if not tensor.is_floating_point()), default=0)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        for value in batch:
            yield from _tensors(value)
