"""What each phase of a run cost and reached: steps, seconds, tokens, dense validation losses."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import Tensor

from lightning_lighthouse.schedule import DENSE, LIGHTHOUSE


@dataclass
class PhaseTotals:
    """Sums over one phase, all ranks.

    Args:
        steps: Optimizer steps.
        seconds: Training time, validation and checkpoints left out.
        paced_tokens: Tokens of the batches whose time counts for throughput: all but the first of a phase and of a
            run, which compile.
        paced_seconds: Time of those batches.
    """

    steps: int = 0
    seconds: float = 0.0
    paced_tokens: int = 0
    paced_seconds: float = 0.0
    _window_start: tuple[int, float] = (0, 0.0)

    @property
    def tokens_per_second(self) -> float | None:
        """None before a batch was timed."""
        return self.paced_tokens / self.paced_seconds if self.paced_seconds > 0 else None

    def window_rate(self) -> float | None:
        """Tokens per second since the last call; None if no batch was timed since."""
        tokens, seconds = self._window_start
        self._window_start = self.paced_tokens, self.paced_seconds
        if self.paced_seconds <= seconds:
            return None
        return (self.paced_tokens - tokens) / (self.paced_seconds - seconds)


@dataclass
class Ledger:
    """Totals of both phases, and the validations that frame the switch: `(step, loss)` each."""

    lighthouse: PhaseTotals = field(default_factory=PhaseTotals)
    dense: PhaseTotals = field(default_factory=PhaseTotals)
    before_switch: tuple[int, float] | None = None
    after_switch: tuple[int, float] | None = None
    last_validation: tuple[int, float] | None = None

    def totals(self, phase: str) -> PhaseTotals:
        """The totals of LIGHTHOUSE or DENSE."""
        return {LIGHTHOUSE: self.lighthouse, DENSE: self.dense}[phase]

    def add_validation(self, step: int, loss: float, switch_step: int | None) -> None:
        """Record a dense validation after `step` optimizer steps."""
        self.last_validation = (step, loss)
        if switch_step is None:
            return
        if step <= switch_step:
            self.before_switch = (step, loss)
        elif self.after_switch is None:
            self.after_switch = (step, loss)

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Ledger:
        """The ledger of a checkpoint."""
        values = {item.name: state[item.name] for item in fields(cls) if item.name in state}
        for phase in (LIGHTHOUSE, DENSE):
            values[phase] = PhaseTotals(**values[phase])
        return cls(**values)

    def summary(self) -> list[str]:
        """The run in a few lines."""
        lines = []
        for phase in (LIGHTHOUSE, DENSE):
            totals = self.totals(phase)
            if totals.steps:
                rate = totals.tokens_per_second
                pace = f", {rate:,.0f} tokens/s" if rate is not None else ""
                lines.append(f"{phase:<10} {totals.steps:>7} steps {totals.seconds:>9.1f} s{pace}")
        validations = {
            "last before the switch": self.before_switch,
            "first after the switch": self.after_switch,
            "final": self.last_validation,
        }
        for name, validation in validations.items():
            if validation is not None:
                lines.append(f"dense validation loss, {name}: {validation[1]:.4f} (step {validation[0]})")
        return lines


class Stopwatch:
    """Times batches into a ledger; stands still while the Trainer validates.

    A GPU works behind the clock, but the sums are right wherever the host waited for it, which it does at each logged
    step and at the switch.
    """

    def __init__(self) -> None:
        self._mark: float | None = None
        self._paced_phase: str | None = None

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
        if self._paced_phase == phase:
            totals.paced_seconds += seconds
            totals.paced_tokens += tokens
        self._paced_phase = phase

    def pause(self) -> None:
        """Something else than training begins."""
        self._mark = None


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
