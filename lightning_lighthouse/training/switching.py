"""The switch in a running Trainer: its step, resolved from the Trainer's count of steps, and what is said about it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lighthouse.checks import LighthouseWarning, SettingError, is_named
from lightning_lighthouse.phases.ledger import Ledger
from lightning_lighthouse.phases.phase import Phase
from lightning_lighthouse.phases.plan import PhasePlan, resolve_phases, resume_phases
from lightning_lighthouse.phases.plateau import PlateauRule
from lightning_lighthouse.phases.schedule import (
    SwitchState,
    check_return,
    resolve_switch_step,
    resume_switch,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def resolve_plan(
    trainer: Trainer,
    module: LightningModule,
    saved: PhasePlan | None,
    *,
    phases: Sequence[Phase],
    plateau: PlateauRule | None,
    return_steps: int,
    rewarm_steps: int,
    allow_return: bool,
) -> PhasePlan:
    """The phases that this run follows.

    Args:
        trainer: At train start, when its step is right.
        module: Says how it optimizes.
        saved: From the checkpoint, or from an earlier fit of the same Trainer.
        phases: Those before the dense one, as the other settings those of `LighthouseCallback`.
        plateau: The rule, which decides later; checked here against the Trainer.
        return_steps: Steps before the switch.
        rewarm_steps: Steps after it.
        allow_return: See `resume_switch`.

    Raises:
        SettingError: A fraction of a number of steps that Lightning does not know, or counts wrongly; no validation
            for the rule; no room for `return_steps`.
        ResumeError: See `resume_switch` and `resume_phases`.
    """
    for number, phase in enumerate(phases):
        _check_count(trainer, module, phase.until, "switch_at" if len(phases) == 1 else f"phases[{number}].until")
    planned = resolve_phases(phases, trainer.estimated_stepping_batches)
    asked = SwitchState(phases[-1].until, planned[-1].end, return_steps=return_steps, rewarm_steps=rewarm_steps)
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        begins = planned[-2].end if len(planned) > 1 else 0
        check_return(return_steps, asked.switch_step, begins)
    if plateau is not None:
        _check_rule(trainer, plateau)
    step = trainer.global_step
    if saved is not None:
        switch, line = resume_switch(saved.switch, asked, step, allow_return, has_rule=plateau is not None)
        followed, change = resume_phases(saved.phases, planned, step, allow_return)
        for words in filter(None, (line, change)):
            rank_zero_warn(f"Lighthouse: {words}", category=LighthouseWarning)
        return PhasePlan(followed, switch)
    plan = PhasePlan(planned, asked)
    if step > 0:
        rank_zero_warn(
            f"Lighthouse: resumed at step {step} from a checkpoint without Lighthouse state; the phase follows "
            f"from the step: {plan.name(step)} (switch at step {asked.switch_step})",
            category=LighthouseWarning,
        )
    # already past: the run starts dense, and no switch happens in it
    asked.switched = step > 0 and step >= asked.switch_step
    return plan


def apply_rule(trainer: Trainer, rule: PlateauRule, plan: PhasePlan, ledger: Ledger, *, mid_step: bool) -> None:
    """After a validation: move the switch ahead to the next optimizer step if the rule says so. Every rank calls it.

    Rank 0 decides, for its losses and its clock may differ from those of the others. Of several phases the last one
    is cut short, and no other.

    Args:
        trainer: Its step and its ranks.
        rule: The rule.
        plan: Its switch is changed in place, unless its own step, or the return before it, comes first.
        ledger: The validations.
        mid_step: The next batch belongs to an optimizer step that has begun; the switch never splits one.
    """
    switch = plan.switch
    step = trainer.global_step + mid_step
    if plan.number(step) != len(plan.phases) - 1:
        return
    earliest = resolve_switch_step(rule.earliest, trainer.estimated_stepping_batches, "plateau.earliest")
    if switch.switched or switch.by_plateau or not earliest <= step < switch.return_step:
        return
    if not trainer.strategy.broadcast(rule.is_reached(ledger.validations_of_this_phase)):
        return
    switch.switch_step = step + switch.return_steps
    switch.by_plateau = True
    if switch.return_steps:
        rank_zero_info(
            f"Lighthouse: plateau at step {step}: layers return to dense attention until step {switch.switch_step}"
        )


def describe_start(
    trainer: Trainer, plan: PhasePlan, rule: PlateauRule | None, names: list[str], details: list[str]
) -> str:
    """Say in which phase the run starts, and when it switches; return that line.

    Args:
        trainer: At train start.
        plan: What was resolved.
        rule: May switch earlier.
        names: The routed layers.
        details: Told in the same line.
    """
    total = trainer.estimated_stepping_batches
    switch, step = plan.switch, trainer.global_step
    line = f"{plan.name(step)} phase from step {step}; "
    later = range(plan.number(step) + 1, len(plan.phases))
    line += "".join(f"{plan.names[number]} from step {plan.first_step(number)}; " for number in later)
    line += f"switch to dense at step {switch.switch_step}"
    line += " at the latest" if rule is not None and not (switch.switched or switch.by_plateau) else ""
    layers = f"{len(names)} attention layers routed, {names[0]} .. {names[-1]}"
    rank_zero_info(f"Lighthouse: {'; '.join([f'{line} of {total}', layers, *details])}")
    if not switch.switched and switch.switch_step >= total:
        rank_zero_warn(
            f"Lighthouse: {total} steps end before the switch at step {switch.switch_step}", category=LighthouseWarning
        )
    return line


def _check_count(trainer: Trainer, module: LightningModule, switch_at: int | float, name: str) -> None:
    """Refuse, or warn of, what Lightning's count of steps does not mean."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    schedulers = [c for c in callbacks if is_named(c, "GradientAccumulationScheduler")]
    is_fraction = isinstance(switch_at, float)
    if is_fraction and any(scheduler.going_to_accumulate_grad_batches() for scheduler in schedulers):
        raise SettingError(
            f"{name}={switch_at} is a fraction, but Lightning's count of steps ignores the "
            f"GradientAccumulationScheduler: give {name} as a step (an int)"
        )
    if is_fraction and not module.automatic_optimization:
        rank_zero_warn(
            f"Lighthouse: under manual optimization Lightning's count of steps may be wrong, and {name}={switch_at} "
            f"with it: better give {name} as a step (an int)",
            category=LighthouseWarning,
        )
    count = len(trainer.optimizers)
    if count > 1 and not is_fraction:
        rank_zero_warn(
            f"Lighthouse: Lightning's global_step adds up the steps of all {count} optimizers, for max_steps too: if "
            f"each steps once a batch, {name}={switch_at} comes after {-(-switch_at // count)} batches",
            category=LighthouseWarning,
        )


def _check_rule(trainer: Trainer, rule: PlateauRule) -> None:
    if not trainer.enable_validation:
        raise SettingError("the plateau rule needs a validation in the fit: a val dataloader and a validation_step")
    resolve_switch_step(rule.earliest, trainer.estimated_stepping_batches, "plateau.earliest")
