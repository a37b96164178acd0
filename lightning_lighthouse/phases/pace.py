"""How long the rest of a run will take, each phase at its own speed. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from lightning_lighthouse.phases.ledger import PhaseTotals
from lightning_lighthouse.phases.plan import PhasePlan
from lightning_lighthouse.phases.schedule import DENSE


class Span(NamedTuple):
    """Steps of one phase that are still to come."""

    phase: str
    steps: int


class TimeLeft(NamedTuple):
    """What is left.

    Args:
        seconds: Of training; validation and checkpoints are left out.
        is_measured: Whether every phase to come has run; otherwise one of them is estimated.
    """

    seconds: float
    is_measured: bool

    def __str__(self) -> str:
        return ("" if self.is_measured else "~") + clock(self.seconds)


def spans_left(plan: PhasePlan | None, step: int, total: int) -> list[Span]:
    """The steps from `step` to `total` by phase, in their order; None is a dense baseline."""
    if plan is None:
        return [Span(DENSE, max(0, total - step))]
    starts = [plan.first_step(number) for number in range(len(plan.names))]
    ends = [*starts[1:], total]
    parts = zip(plan.names, starts, ends, strict=True)
    spans = [Span(name, min(end, total) - max(start, step)) for name, start, end in parts]
    return [span for span in spans if span.steps > 0]


def time_left(
    spans: Sequence[Span], phases: Mapping[str, PhaseTotals], costs: Mapping[str, float] | None = None
) -> TimeLeft | None:
    """The time of some steps.

    A phase that has not run yet is taken to do as much work a second as the one that ran last.

    Args:
        spans: From `spans_left`.
        phases: Their totals so far, in the order of the run.
        costs: Work of a step by phase, in any unit; None where it is not known, so that all steps are alike.

    Returns:
        None before any step was timed.
    """
    known = {name: pace for name, totals in phases.items() if (pace := totals.seconds_per_step) is not None}
    if not known:
        return None
    last = list(known)[-1]
    seconds = 0.0
    for name, steps in spans:
        ratio = costs[name] / costs[last] if costs and name in costs and costs.get(last) else 1.0
        seconds += steps * known.get(name, known[last] * ratio)
    return TimeLeft(seconds, all(name in known for name, _ in spans))


def clock(seconds: float) -> str:
    """As in 0:07, 12:30 and 1:02:30; days stay hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
