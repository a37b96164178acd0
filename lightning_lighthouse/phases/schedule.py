"""When a run switches from Lighthouse to dense attention: a step, resolved once from a step or a fraction.

Pure Python. The phase is a function of the optimizer step alone, so all ranks agree without talking.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from lightning_lighthouse.attention.layer_types import DENSE, LIGHTHOUSE
from lightning_lighthouse.checks import ResumeError, SettingError, quoted

# Each group is one recompile of a compiled model
RETURN_GROUPS = 4


def check_switch_at(switch_at: int | float, name: str = "switch_at") -> int | float:
    """Return `switch_at` if it is a step (an int >= 0) or a fraction (a float in (0, 1]); `name` is for the error.

    Raises:
        TypeError: Neither an int nor a float.
        ValueError: Out of range.
    """
    allowed = "a step (an int >= 0) or a fraction of the steps (a float above 0, at most 1.0)"
    if type(switch_at) not in (int, float):
        raise TypeError(f"{name} must be {allowed}, got {quoted(switch_at)}")
    in_range = switch_at >= 0 if isinstance(switch_at, int) else 0 < switch_at <= 1
    if not in_range:
        raise ValueError(f"{name} must be {allowed}, got {quoted(switch_at)}")
    return switch_at


def resolve_switch_step(switch_at: int | float, total_steps: int | float, name: str = "switch_at") -> int:
    """The first optimizer step that trains dense.

    Args:
        switch_at: A step, or a fraction of `total_steps`, rounded up to a whole step.
        total_steps: Optimizer steps of the whole training; inf or -1 where the Trainer cannot know them.
        name: Of the setting, for the error.

    Raises:
        SettingError: A fraction of an unknown number of steps.
    """
    if isinstance(switch_at, int):
        return switch_at
    if not math.isfinite(total_steps) or total_steps < 0:
        raise SettingError(
            f"{name}={switch_at} is a fraction, but the number of steps is unknown: "
            f"set trainer.max_steps, or give {name} as a step (an int)"
        )
    # 0.55 * 100 is 55.00000000000001 in floating point, and step 55 is meant
    return math.ceil(round(switch_at * total_steps, 6))


def check_return(return_steps: int, switch_step: int, phase_step: int = 0) -> None:
    """Refuse a gradual return that would begin before its phase, which begins at `phase_step`. Raises SettingError."""
    if return_steps > switch_step - phase_step:
        begins = f"; its phase begins at step {phase_step}" if phase_step else ""
        raise SettingError(
            f"return_steps={return_steps} must end at the switch, which is at step {switch_step}{begins}"
        )


@dataclass
class SwitchState:
    """What a checkpoint keeps of the switch.

    Args:
        switch_at: The setting it was resolved from.
        switch_step: The first optimizer step that trains dense.
        switched: Whether that step was reached.
        return_steps: Steps before `switch_step` over which layers are handed back; 0 for all of them at the switch.
        rewarm_steps: Steps from `switch_step` on with a lower learning rate.
        by_plateau: Whether a plateau rule moved `switch_step` ahead.
    """

    switch_at: int | float
    switch_step: int
    switched: bool = False
    return_steps: int = 0
    rewarm_steps: int = 0
    by_plateau: bool = False

    def phase(self, step: int) -> str:
        """LIGHTHOUSE or DENSE for the optimizer step about to run; dense for good once switched."""
        return DENSE if self.switched or step >= self.switch_step else LIGHTHOUSE

    @property
    def return_step(self) -> int:
        """The first optimizer step with layers handed back."""
        return self.switch_step - self.return_steps

    def layers_returned(self, step: int, num_layers: int) -> int:
        """How many of the routed layers train dense at optimizer step `step`.

        The layers form up to RETURN_GROUPS groups of about equal size. All but one are handed back one after the other
        over `return_steps`, the first group at once; the last group follows at the switch.
        """
        if self.phase(step) == DENSE:
            return num_layers
        if step < self.return_step:
            return 0
        groups = min(RETURN_GROUPS, num_layers, self.return_steps + 1)
        stage = (step - self.return_step) * (groups - 1) // self.return_steps
        return num_layers * (stage + 1) // groups if groups > 1 else 0

    def rate_factor(self, step: int) -> float:
        """The share of the scheduled learning rate that optimizer step `step` gets.

        With n = `rewarm_steps` the steps from the switch on get 1/(n + 1), 2/(n + 1), .., n/(n + 1), and 1 after them.
        A run that is dense from step 0 on has no switch, and no re-warm.
        """
        done = step - self.switch_step
        rewarms = self.switch_step > 0 and 0 <= done < self.rewarm_steps
        return (done + 1) / (self.rewarm_steps + 1) if rewarms else 1.0

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)


def resume_switch(
    saved: SwitchState, asked: SwitchState, step: int, allow_return: bool, has_rule: bool = False
) -> tuple[SwitchState, str]:
    """Decide between the switch in a checkpoint and the one that the settings ask for now.

    Args:
        saved: From the checkpoint.
        asked: From the settings of this run.
        step: Optimizer steps done.
        allow_return: Let a run that has switched, or has begun to hand layers back, go back to Lighthouse if the new
            settings say so.
        has_rule: Whether the settings have a plateau rule.

    Returns:
        The switch to follow, and a line for the user, empty if nothing changed.

    Raises:
        ResumeError: The settings were changed, following them means going back to Lighthouse, and that is not allowed.
    """
    changes = _changes(saved, asked, has_rule)
    kept = replace(saved, rewarm_steps=asked.rewarm_steps)
    if saved.by_plateau and not changes:
        return kept, _moved(saved, kept)
    # a share of 1.0 names no dense step: the end of such a training is not the begin of a dense phase
    last = step - 1 if isinstance(saved.switch_at, float) and saved.switch_at == 1.0 else step
    # what a rule decided holds from then on, also where its step is still one ahead
    returned = saved.layers_returned(last, RETURN_GROUPS) or saved.by_plateau
    if asked.layers_returned(step, RETURN_GROUPS) >= returned:
        # a switch that is asked for too late comes now: its step is the first dense one, and re-warming begins there
        followed = kept if saved.switched else replace(asked, switch_step=max(asked.switch_step, step))
        return followed, _moved(saved, followed)
    done = f"switched to dense attention at step {saved.switch_step}"
    if not saved.switched and saved.return_steps:
        done = f"hands its layers back from step {saved.return_step} on, all of them by step {saved.switch_step},"
    elif not saved.switched:
        done = f"is to switch to dense attention at step {saved.switch_step}"
    if not changes:
        longer = (
            f"the training got longer: switch_at={asked.switch_at} now means step {asked.switch_step}, but this run "
            f"{done} and stays {'dense' if saved.switched else 'with that'}"
        )
        return kept, longer
    if not allow_return:
        raise ResumeError(
            f"{changes} (step {asked.switch_step}), but this run {done} and is at step {step}: undo the change, or "
            "set allow_return to true to train with Lighthouse again"
        )
    return asked, f"returning to Lighthouse attention until step {asked.switch_step}, as allow_return asks"


def _moved(saved: SwitchState, asked: SwitchState) -> str:
    lines = []
    if asked.switch_step != saved.switch_step:
        lines.append(f"the switch to dense attention moves from step {saved.switch_step} to step {asked.switch_step}")
    for name in ("return_steps", "rewarm_steps"):
        before, now = getattr(saved, name), getattr(asked, name)
        if now != before:
            lines.append(f"{name} changes from {before} to {now}")
    return ", ".join(lines)


def _changes(saved: SwitchState, asked: SwitchState, has_rule: bool) -> str:
    """The settings that differ, in words."""
    changes = []
    if asked.switch_at != saved.switch_at:
        changes.append(f"switch_at was changed from {saved.switch_at} to {asked.switch_at}")
    if asked.return_steps != saved.return_steps:
        changes.append(f"return_steps was changed from {saved.return_steps} to {asked.return_steps}")
    if saved.by_plateau and not has_rule:
        changes.append("the plateau rule was taken away")
    return ", ".join(changes)
