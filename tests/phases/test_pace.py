"""The time left: each phase at its own speed, and one that has not run at that of its work."""

from __future__ import annotations

import pytest

from lightning_lighthouse.phases.ledger import PhaseTotals
from lightning_lighthouse.phases.pace import Span, clock, spans_left, time_left
from lightning_lighthouse.phases.phase import Phase
from lightning_lighthouse.phases.plan import PhasePlan, resolve_phases
from lightning_lighthouse.phases.schedule import SwitchState


def plan():
    planned = resolve_phases([Phase(20, ["chunk"], window=8), Phase(90)], 100)
    return PhasePlan(planned, SwitchState(90, 90))


def timed(steps, seconds_a_step):
    tokens = 7 * steps
    # the first step compiles
    return PhaseTotals(steps, 100.0 + steps * seconds_a_step, tokens, tokens - 7, (steps - 1) * seconds_a_step)


def test_spans_are_what_is_still_to_come():
    assert spans_left(plan(), 0, 100) == [Span("chunk 8", 20), Span("lighthouse", 70), Span("dense", 10)]
    assert spans_left(plan(), 50, 100) == [Span("lighthouse", 40), Span("dense", 10)]
    assert spans_left(plan(), 95, 100) == [Span("dense", 5)]
    # a run that is cut short has no dense phase
    assert spans_left(plan(), 0, 60) == [Span("chunk 8", 20), Span("lighthouse", 40)]
    assert spans_left(None, 30, 100) == [Span("dense", 70)]


def test_each_phase_takes_its_own_time():
    phases = {"chunk 8": timed(20, 1.0), "lighthouse": timed(50, 2.0), "dense": PhaseTotals()}
    left = time_left(spans_left(plan(), 70, 100), phases, {"chunk 8": 1.0, "lighthouse": 3.0, "dense": 30.0})
    # ten times the work, so ten times the time
    assert left.seconds == pytest.approx(20 * 2.0 + 10 * 20.0)
    assert str(left) == "~4:00"
    phases["dense"] = timed(4, 15.0)
    left = time_left(spans_left(plan(), 94, 100), phases)
    assert left.seconds == pytest.approx(6 * 15.0)
    assert str(left) == "1:30"


def test_without_costs_all_steps_are_alike_and_without_time_nothing_is_known():
    phases = {"lighthouse": timed(50, 2.0), "dense": PhaseTotals()}
    assert time_left([Span("dense", 5)], phases).seconds == pytest.approx(10.0)
    assert time_left([Span("dense", 5)], {"dense": PhaseTotals()}) is None


@pytest.mark.parametrize(("seconds", "shown"), [(7, "0:07"), (750, "12:30"), (3750, "1:02:30"), (100_000, "27:46:40")])
def test_clock(seconds, shown):
    assert clock(seconds) == shown
