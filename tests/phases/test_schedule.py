"""The switch step: resolved once, rounded as people count, and never undone unasked."""

from __future__ import annotations

import math

import pytest

from lightning_lighthouse.checks import ResumeError, SettingError
from lightning_lighthouse.phases.schedule import (
    DENSE,
    LIGHTHOUSE,
    SwitchState,
    check_switch_at,
    resolve_switch_step,
    resume_switch,
)


@pytest.mark.parametrize("value", [0, 1, 500, 0.1, 1.0])
def test_steps_and_fractions_are_accepted(value):
    assert check_switch_at(value) is value


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (-1, ValueError),
        (0.0, ValueError),
        (1.9, ValueError),
        (math.nan, ValueError),
        ("x", TypeError),
        (True, TypeError),
    ],
)
def test_other_values_are_quoted(value, error):
    with pytest.raises(error, match=r"switch_at must be a step .* or a fraction") as caught:
        check_switch_at(value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(
    ("switch_at", "total", "step"),
    # 0.55 * 100 is 55.00000000000001
    [(0.9, 100, 90), (0.55, 100, 55), (0.5, 5, 3), (1.0, 7, 7), (0.9, 1, 1), (12, math.inf, 12), (1, 100, 1)],
)
def test_the_switch_step(switch_at, total, step):
    assert resolve_switch_step(switch_at, total) == step


@pytest.mark.parametrize("total", [math.inf, -1])
def test_a_fraction_of_unknown_length_is_refused(total):
    with pytest.raises(SettingError, match="max_steps"):
        resolve_switch_step(0.9, total)


def test_the_phase_is_dense_from_the_switch_step_on():
    switch = SwitchState(0.9, 9)
    assert [switch.phase(step) for step in (0, 8, 9, 10)] == [LIGHTHOUSE, LIGHTHOUSE, DENSE, DENSE]
    switch.switched = True
    assert switch.phase(0) == DENSE


def test_a_switch_still_ahead_may_move_and_says_so():
    switch, line = resume_switch(SwitchState(0.5, 50), SwitchState(0.8, 80), 20, False)
    assert switch.switch_step == 80
    assert "from step 50 to step 80" in line


@pytest.mark.parametrize("step", [50, 51, 60])
def test_a_switch_that_is_asked_for_too_late_comes_now_and_only_once(step):
    asked = SwitchState(30, 30, return_steps=4, rewarm_steps=4)
    switch, line = resume_switch(SwitchState(0.9, 90), asked, step, False)
    assert (switch.switch_step, switch.phase(step)) == (step, DENSE)
    assert [switch.rate_factor(step + n) for n in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert line.startswith(f"the switch to dense attention moves from step 90 to step {step}")
    switch.switched = True
    # a resume with the same settings keeps it
    again, line = resume_switch(switch, asked, step + 2, False)
    assert (again, line) == (switch, "")


def test_an_unchanged_switch_says_nothing():
    assert resume_switch(SwitchState(0.5, 50), SwitchState(0.5, 50), 20, False)[1] == ""
    assert resume_switch(SwitchState(0.5, 50, True), SwitchState(0.5, 50), 60, False)[1] == ""


def test_a_longer_training_stays_dense_once_switched():
    switch, line = resume_switch(SwitchState(0.5, 50, True), SwitchState(0.5, 100), 60, False)
    assert switch.phase(60) == DENSE
    assert "stays dense" in line


def test_a_training_without_a_dense_step_has_none_either_where_it_gets_longer():
    switch, line = resume_switch(SwitchState(1.0, 50), SwitchState(1.0, 100), 50, False)
    assert switch == SwitchState(1.0, 100)
    assert line == "the switch to dense attention moves from step 50 to step 100"
    # a step, and a return that has begun, are what they were
    for saved, asked in (
        (SwitchState(50, 50), SwitchState(50, 50)),
        (SwitchState(1.0, 50, return_steps=8), SwitchState(1.0, 100, return_steps=8)),
        (SwitchState(1.0, 50, switched=True), SwitchState(1.0, 100)),
    ):
        assert resume_switch(saved, asked, 50, False)[0].phase(50) == DENSE


def test_going_back_needs_to_be_asked_for():
    saved, asked = SwitchState(0.5, 50, True), SwitchState(0.95, 95)
    with pytest.raises(ResumeError, match=r"0\.5 to 0\.95 .* allow_return to true"):
        resume_switch(saved, asked, 70, False)
    switch, line = resume_switch(saved, asked, 70, True)
    assert switch.phase(70) == LIGHTHOUSE
    assert "returning" in line
