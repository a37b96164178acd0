"""Several phases: their names, their steps, and what a resumed run makes of changed ones."""

from __future__ import annotations

import math

import pytest

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.checks import ResumeError, SettingError
from lightning_lighthouse.phases.phase import Phase, check_phases, name_phases, phases_asked
from lightning_lighthouse.phases.plan import PhasePlan, PlannedPhase, resolve_phases, resume_phases
from lightning_lighthouse.phases.run_state import RunState
from lightning_lighthouse.phases.schedule import SwitchState

CHUNKS = Phase(0.2, ["chunk"], window=8)
MIXED = Phase(0.9, ["window", "lighthouse"], window=4)


def plan(*phases: Phase, total: int = 10) -> PhasePlan:
    planned = resolve_phases(phases, total)
    return PhasePlan(planned, SwitchState(phases[-1].until, planned[-1].end))


def test_each_step_belongs_to_one_phase():
    ours = plan(CHUNKS, MIXED)
    names = ["chunk 8"] * 2 + ["window 4 + lighthouse"] * 7 + ["dense"] * 2
    assert [ours.name(step) for step in range(11)] == names
    assert [ours.first_step(number) for number in range(3)] == [0, 2, 9]


def test_a_switch_that_a_rule_moved_ends_the_last_phase_alone():
    ours = plan(CHUNKS, MIXED)
    ours.switch.switch_step = 5
    assert [ours.number(step) for step in (1, 2, 4, 5, 9)] == [0, 1, 1, 2, 2]


def test_no_two_phases_have_one_name():
    wide, dense = Phase(0.3, attention=LighthouseConfig(top_k=8)), Phase(0.1, ["dense"])
    assert name_phases([dense, wide, Phase(0.9)]) == ["dense (phase 1)", "lighthouse (phase 2)", "lighthouse (phase 3)"]
    assert name_phases([CHUNKS, MIXED]) == ["chunk 8", "window 4 + lighthouse"]


@pytest.mark.parametrize(
    ("phases", "total", "line"),
    [
        (
            (Phase(0.5), Phase(4)),
            10,
            "phases[1].until=4 is step 4, and must come after the phase before it,",
        ),
        ((Phase(0.1), Phase(0.11)), 10, ""),
        ((Phase(3), Phase(0.5)), math.inf, "phases[1].until=0.5 is a fraction, but the number of steps is unknown"),
        ((Phase(0.5),), math.inf, "switch_at=0.5 is a fraction, but the number of steps is unknown"),
    ],
)
def test_ends_that_cannot_be_are_named(phases, total, line):
    if not line:
        assert [phase.end for phase in resolve_phases(phases, total)] == [1, 2]
        return
    with pytest.raises(SettingError) as error:
        resolve_phases(phases, total)
    assert str(error.value).startswith(line)


def test_what_is_no_list_of_rising_phases_is_refused():
    with pytest.raises(ValueError, match=r"rising order, got until 0.5, 4, 0.3"):
        check_phases([Phase(0.5), Phase(4), Phase(0.3)])
    with pytest.raises(ValueError, match="at least one phase"):
        check_phases([])
    with pytest.raises(TypeError, match="must be a list of Phase"):
        check_phases([0.5])


@pytest.mark.parametrize(
    "short", [{"switch_at": 0.9}, {"layer_types": ["window"], "window": 4}, {"window": 4}, {"sink_tokens": 1}]
)
def test_the_short_form_and_phases_exclude_each_other(short):
    asked = {"switch_at": None, "layer_types": None, "window": None, "sink_tokens": 0} | short
    with pytest.raises(ValueError, match=f"phases and {next(iter(short))} cannot both be given"):
        phases_asked(**asked, phases=[MIXED])


def test_the_state_of_a_checkpoint_comes_back():
    state = RunState(plan(CHUNKS, MIXED))
    assert RunState.from_state_dict(state.state_dict()) == state


def test_a_longer_training_keeps_the_ends_that_were_reached():
    saved, asked = (resolve_phases([CHUNKS, MIXED], total) for total in (10, 100))
    followed, line = resume_phases(saved, asked, 5, allow_return=False)
    assert [phase.end for phase in followed] == [2, 90]
    assert line == ""
    followed, line = resume_phases(saved, asked, 1, allow_return=False)
    assert [phase.end for phase in followed] == [20, 90]
    assert line == "'chunk 8' ends at step 20 instead of 2"


def test_an_end_that_a_shorter_training_puts_behind_the_run_comes_now():
    saved, asked = (resolve_phases([CHUNKS, MIXED], total) for total in (100, 20))
    followed, line = resume_phases(saved, asked, 10, allow_return=False)
    assert [phase.end for phase in followed] == [10, 18]
    assert line == "'chunk 8' ends at step 10 instead of 20"
    # as where a setting does
    asked = resolve_phases([Phase(3, ["chunk"], window=8), MIXED], 100)
    assert [phase.end for phase in resume_phases(saved, asked, 10, allow_return=False)[0]] == [10, 90]


def test_a_phase_that_was_left_is_not_returned_to_unasked():
    saved, asked = resolve_phases([CHUNKS, MIXED], 10), resolve_phases([Phase(0.6, ["chunk"], window=8), MIXED], 10)
    with pytest.raises(ResumeError, match=r"at step 4, in 'window 4 \+ lighthouse', and would go back to 'chunk 8'"):
        resume_phases(saved, asked, 4, allow_return=False)
    assert resume_phases(saved, asked, 4, allow_return=True)[0] == asked
    # ahead of the change nothing is returned to
    assert resume_phases(saved, asked, 1, allow_return=False)[0] == asked


def test_other_phases_ahead_are_followed_and_told():
    saved = [PlannedPhase("lighthouse", 0.9, 9)]
    asked = resolve_phases([Phase(0.5), Phase(0.8, ["window"], window=4)], 10)
    followed, line = resume_phases(saved, asked, 3, allow_return=False)
    assert followed == asked
    assert line == "the phases were changed, from step 3 on: 'lighthouse' until 0.5, 'window 4' until 0.8"
