"""The phases of a run by optimizer step: those that the settings name, then dense to the end.

The last switch, to dense, is `SwitchState`: it may be moved by a rule, and is final. The switches before it are steps
that were resolved once. Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_lighthouse.attention.layer_types import DENSE, LIGHTHOUSE
from lightning_lighthouse.checks import ResumeError, SettingError, quoted
from lightning_lighthouse.phases.phase import Phase, name_phases
from lightning_lighthouse.phases.schedule import SwitchState, resolve_switch_step


@dataclass
class PlannedPhase:
    """One phase before the dense one.

    Args:
        name: No other phase of the run has it.
        until: The setting that its end was resolved from.
        end: The first optimizer step behind it; of the last phase where no rule moves the switch.
    """

    name: str
    until: int | float
    end: int


@dataclass
class PhasePlan:
    """What a run follows, and what its checkpoints keep of that.

    Args:
        phases: In their order; the last ends at the switch.
        switch: From the last of them to dense attention.
    """

    phases: list[PlannedPhase]
    switch: SwitchState

    def number(self, step: int) -> int:
        """Which phase the optimizer step about to run belongs to, from 0 on; `len(phases)` is the dense one."""
        if self.switch.phase(step) == DENSE:
            return len(self.phases)
        return sum(step >= phase.end for phase in self.phases[:-1])

    def name(self, step: int) -> str:
        """The name of that phase."""
        return self.names[self.number(step)]

    @property
    def names(self) -> list[str]:
        """Of all phases, the dense one included."""
        return [*(phase.name for phase in self.phases), DENSE]

    def first_step(self, number: int) -> int:
        """Where a phase begins."""
        ends = [*(phase.end for phase in self.phases[:-1]), self.switch.switch_step]
        return ends[number - 1] if number else 0

    def state_dict(self) -> list[dict[str, Any]]:
        """Plain values for a checkpoint; the switch has its own."""
        return [asdict(phase) for phase in self.phases]


def resolve_phases(phases: Sequence[Phase], total_steps: int | float) -> list[PlannedPhase]:
    """The phases with their ends as steps.

    Args:
        phases: The settings.
        total_steps: Optimizer steps of the whole training; inf or -1 where the Trainer cannot know them.

    Raises:
        SettingError: An end is a fraction of an unknown number of steps, or is not behind the one before it.
    """
    planned: list[PlannedPhase] = []
    for number, (phase, name) in enumerate(zip(phases, name_phases(phases), strict=True)):
        setting = "switch_at" if len(phases) == 1 else f"phases[{number}].until"
        end = resolve_switch_step(phase.until, total_steps, setting)
        if planned and end <= planned[-1].end:
            raise SettingError(
                f"{setting}={phase.until} is step {end}, and must come after the phase before it, which ends at step "
                f"{planned[-1].end}"
            )
        planned.append(PlannedPhase(name, phase.until, end))
    return planned


def phases_begun(asked: Sequence[Phase], saved: PhasePlan) -> tuple[list[Phase], str]:
    """What a resumed run goes on with whose settings say nothing of the layers: Lighthouse in all, if it began so.

    That was the default before the mixture, and is not to change in the middle of a run.

    Args:
        asked: The default phase.
        saved: From the checkpoint.

    Returns:
        The phases, and a line for the user, empty if they are those asked for, or all behind the run.
    """
    if saved.names != [LIGHTHOUSE, DENSE] or asked[0].words == LIGHTHOUSE:
        return list(asked), ""
    line = (
        f"this run began with Lighthouse in all layers, and goes on so instead of with {quoted(asked[0].words)}, the "
        "default now: say so with layer_types [lighthouse]"
    )
    return [Phase(asked[0].until)], "" if saved.switch.switched else line


def resume_phases(
    saved: Sequence[PlannedPhase], asked: Sequence[PlannedPhase], step: int, allow_return: bool
) -> tuple[list[PlannedPhase], str]:
    """Decide between the phases in a checkpoint and those that the settings ask for now.

    Where a phase of before has ended, it has: a training that got longer moves the ends ahead alone. The last end is
    the business of `resume_switch`.

    Args:
        saved: From the checkpoint.
        asked: From the settings of this run.
        step: Optimizer steps done.
        allow_return: Let a run go back to a phase that it has left.

    Returns:
        The phases to follow, and a line for the user, empty if nothing changed.

    Raises:
        ResumeError: The settings would lead the run back to a phase that it has left.
    """
    if [phase.name for phase in saved] == [phase.name for phase in asked]:
        # an end that is asked for too late comes now
        late = [old.end > step > new.end for old, new in zip(saved, asked, strict=True)]
        asked = [replace(new, end=step) if is_late else new for new, is_late in zip(asked, late, strict=True)]
    is_same = [(phase.name, phase.until) for phase in saved] == [(phase.name, phase.until) for phase in asked]
    if is_same:
        kept = [old if old.end <= step else new for old, new in zip(saved, asked, strict=True)]
        moved = [
            f"{quoted(old.name)} ends at step {new.end} instead of {old.end}"
            for old, new in list(zip(saved, kept, strict=True))[:-1]
            if old.end != new.end
        ]
        return [replace(phase) for phase in kept], ", ".join(moved)
    number, asked_number = (sum(step >= phase.end for phase in phases[:-1]) for phases in (saved, asked))
    before, now = saved[number].name, asked[asked_number].name
    if now in [phase.name for phase in saved[:number]] and not allow_return:
        raise ResumeError(
            f"phases were changed: this run is at step {step}, in {quoted(before)}, and would go back to "
            f"{quoted(now)}: undo the change, or set allow_return to true"
        )
    listed = ", ".join(f"{quoted(phase.name)} until {phase.until}" for phase in asked)
    return list(asked), f"the phases were changed, from step {step} on: {listed}"


def describe_switch(plan: PhasePlan, number: int) -> str:
    """The line that marks the begin of a phase in logs and curves."""
    if number < len(plan.phases):
        return f"switched from {plan.names[number - 1]} to {plan.names[number]} at step {plan.first_step(number)}"
    switch = plan.switch
    reason = " by the plateau rule" if switch.by_plateau else ""
    rewarm = f"; the learning rate is re-warmed over {switch.rewarm_steps} steps" if switch.rewarm_steps else ""
    before = "Lighthouse" if plan.names[number - 1] == LIGHTHOUSE else plan.names[number - 1]
    return f"switched from {before} to dense attention at step {switch.switch_step}{reason}{rewarm}"
