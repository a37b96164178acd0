"""When a run switches from Lighthouse to dense attention: a step, resolved once from a step or a fraction.

Pure Python. The phase is a function of the optimizer step alone, so all ranks agree without talking.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

LIGHTHOUSE = "lighthouse"
DENSE = "dense"


class SettingError(ValueError):
    """A setting that only the running Trainer can show to be wrong."""


def check_switch_at(switch_at: int | float) -> int | float:
    """Return `switch_at` if it is a step (an int >= 0) or a fraction (a float in (0, 1]).

    Raises:
        TypeError: Neither an int nor a float.
        ValueError: Out of range.
    """
    allowed = "a step (an int >= 0) or a fraction of the steps (a float above 0, at most 1.0)"
    if type(switch_at) not in (int, float):
        raise TypeError(f"switch_at must be {allowed}, got {switch_at!r}")
    in_range = switch_at >= 0 if isinstance(switch_at, int) else 0 < switch_at <= 1
    if not in_range:
        raise ValueError(f"switch_at must be {allowed}, got {switch_at!r}")
    return switch_at


def resolve_switch_step(switch_at: int | float, total_steps: int | float) -> int:
    """The first optimizer step that trains dense.

    Args:
        switch_at: A step, or a fraction of `total_steps`, rounded up to a whole step.
        total_steps: Optimizer steps of the whole training; inf or -1 where the Trainer cannot know them.

    Raises:
        SettingError: A fraction of an unknown number of steps.
    """
    if isinstance(switch_at, int):
        return switch_at
    if not math.isfinite(total_steps) or total_steps < 0:
        raise SettingError(
            f"switch_at={switch_at} is a fraction, but the number of steps is unknown: "
            "set trainer.max_steps, or give switch_at as a step (an int)"
        )
    # 0.55 * 100 is 55.00000000000001 in floating point, and step 55 is meant
    return math.ceil(round(switch_at * total_steps, 6))


class ResumeError(ValueError):
    """The settings contradict what the resumed run has done."""


@dataclass
class SwitchState:
    """What a checkpoint keeps of the switch.

    Args:
        switch_at: The setting it was resolved from.
        switch_step: The first optimizer step that trains dense.
        switched: Whether that step was reached.
    """

    switch_at: int | float
    switch_step: int
    switched: bool = False

    def phase(self, step: int) -> str:
        """LIGHTHOUSE or DENSE for the optimizer step about to run; dense for good once switched."""
        return DENSE if self.switched or step >= self.switch_step else LIGHTHOUSE

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)


def resume_switch(saved: SwitchState, asked: SwitchState, step: int, allow_return: bool) -> tuple[SwitchState, str]:
    """Decide between the switch in a checkpoint and the one that the settings ask for now.

    Args:
        saved: From the checkpoint.
        asked: From the settings of this run.
        step: Optimizer steps done.
        allow_return: Let a run that has switched go back to Lighthouse if the new settings say so.

    Returns:
        The switch to follow, and a line for the user, empty if nothing changed.

    Raises:
        ResumeError: The run has switched, `switch_at` was changed to a later step, and going back is not allowed.
    """
    if not saved.switched:
        moved = asked.switch_step != saved.switch_step
        line = f"the switch to dense attention moves from step {saved.switch_step} to step {asked.switch_step}"
        return asked, line if moved else ""
    if step >= asked.switch_step:
        return saved, ""
    if asked.switch_at == saved.switch_at:
        return saved, (
            f"the training got longer: switch_at={asked.switch_at} now means step {asked.switch_step}, but this run "
            f"switched to dense attention at step {saved.switch_step} and stays dense"
        )
    if not allow_return:
        raise ResumeError(
            f"switch_at was changed from {saved.switch_at} to {asked.switch_at} (step {asked.switch_step}), but this "
            f"run switched to dense attention at step {saved.switch_step} and is at step {step}: keep "
            f"switch_at={saved.switch_at}, or set allow_return to true to train with Lighthouse again"
        )
    return asked, f"returning to Lighthouse attention until step {asked.switch_step}, as allow_return asks"
