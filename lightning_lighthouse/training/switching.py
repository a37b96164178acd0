"""The switch in a running Trainer: its step, resolved from the Trainer's count of steps, and what is said about it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.phases.ledger import Ledger
from lightning_lighthouse.phases.plateau import PlateauRule
from lightning_lighthouse.phases.schedule import SwitchState, check_return, resolve_switch_step, resume_switch

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def resolve_switch(
    trainer: Trainer,
    module: LightningModule,
    saved: SwitchState | None,
    *,
    switch_at: int | float,
    plateau: PlateauRule | None,
    return_steps: int,
    rewarm_steps: int,
    allow_return: bool,
) -> SwitchState:
    """The switch that this run follows.

    Args:
        trainer: At train start, when its step is right.
        module: Says how it optimizes.
        saved: From the checkpoint, or from an earlier fit of the same Trainer.
        switch_at: A step, or a fraction of the Trainer's steps, as the other settings of `LighthouseCallback`.
        plateau: The rule, which decides later; checked here against the Trainer.
        return_steps: Steps before the switch.
        rewarm_steps: Steps after it.
        allow_return: See `resume_switch`.

    Raises:
        SettingError: A fraction of a number of steps that Lightning does not know, or counts wrongly; no validation
            for the rule; no room for `return_steps`.
        ResumeError: See `resume_switch`.
    """
    _check_count(trainer, module, switch_at)
    asked = SwitchState(
        switch_at,
        resolve_switch_step(switch_at, trainer.estimated_stepping_batches),
        return_steps=return_steps,
        rewarm_steps=rewarm_steps,
    )
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        check_return(return_steps, asked.switch_step)
    if plateau is not None:
        _check_rule(trainer, plateau)
    step = trainer.global_step
    if saved is not None:
        switch, line = resume_switch(saved, asked, step, allow_return, has_rule=plateau is not None)
        if line:
            rank_zero_warn(f"Lighthouse: {line}")
        return switch
    if step > 0:
        rank_zero_warn(
            f"Lighthouse: resumed at step {step} from a checkpoint without Lighthouse state; the phase follows "
            f"from the step: {asked.phase(step)} (switch at step {asked.switch_step})"
        )
    # already past: the run starts dense, and no switch happens in it
    asked.switched = step > 0 and step >= asked.switch_step
    return asked


def apply_rule(trainer: Trainer, rule: PlateauRule, switch: SwitchState, ledger: Ledger, *, mid_step: bool) -> None:
    """After a validation: move the switch ahead to the next optimizer step if the rule says so. Every rank calls it.

    Rank 0 decides, for its losses and its clock may differ from those of the others.

    Args:
        trainer: Its step and its ranks.
        rule: The rule.
        switch: Changed in place, unless its own step, or the return before it, comes first.
        ledger: The validations.
        mid_step: The next batch belongs to an optimizer step that has begun; the switch never splits one.
    """
    step = trainer.global_step + mid_step
    earliest = resolve_switch_step(rule.earliest, trainer.estimated_stepping_batches, "plateau.earliest")
    if switch.switched or switch.by_plateau or not earliest <= step < switch.return_step:
        return
    if not trainer.strategy.broadcast(rule.is_reached(ledger.lighthouse_validations)):
        return
    switch.switch_step = step + switch.return_steps
    switch.by_plateau = True
    if switch.return_steps:
        rank_zero_info(
            f"Lighthouse: plateau at step {step}: layers return to dense attention until step {switch.switch_step}"
        )


def describe_start(trainer: Trainer, switch: SwitchState, rule: PlateauRule | None, names: list[str]) -> str:
    """Say in which phase the run starts, and when it switches; return that line.

    Args:
        trainer: At train start.
        switch: What was resolved.
        rule: May switch earlier.
        names: The routed layers.
    """
    total = trainer.estimated_stepping_batches
    phase = switch.phase(trainer.global_step)
    line = f"{phase} phase from step {trainer.global_step}; switch to dense at step {switch.switch_step}"
    line += " at the latest" if rule is not None and not (switch.switched or switch.by_plateau) else ""
    rank_zero_info(f"Lighthouse: {line} of {total}; {len(names)} attention layers routed, {names[0]} .. {names[-1]}")
    if not switch.switched and switch.switch_step >= total:
        rank_zero_warn(f"Lighthouse: {total} steps end before the switch at step {switch.switch_step}")
    return line


def describe_switch(switch: SwitchState) -> str:
    """The line that marks the switch in logs and curves."""
    reason = " by the plateau rule" if switch.by_plateau else ""
    rewarm = f"; the learning rate is re-warmed over {switch.rewarm_steps} steps" if switch.rewarm_steps else ""
    return f"switched from Lighthouse to dense attention at step {switch.switch_step}{reason}{rewarm}"


def _check_count(trainer: Trainer, module: LightningModule, switch_at: int | float) -> None:
    """Refuse, or warn of, what Lightning's count of steps does not mean."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    schedulers = [c for c in callbacks if isinstance(c, GradientAccumulationScheduler)]
    is_fraction = isinstance(switch_at, float)
    if is_fraction and any(scheduler.going_to_accumulate_grad_batches() for scheduler in schedulers):
        raise SettingError(
            f"switch_at={switch_at} is a fraction, but Lightning's count of steps ignores the "
            "GradientAccumulationScheduler: give switch_at as a step (an int)"
        )
    if is_fraction and not module.automatic_optimization:
        rank_zero_warn(
            f"Lighthouse: under manual optimization Lightning's count of steps may be wrong, and switch_at="
            f"{switch_at} with it: better give switch_at as a step (an int)"
        )
    count = len(trainer.optimizers)
    if count > 1 and not is_fraction:
        rank_zero_warn(
            f"Lighthouse: Lightning's global_step adds up the steps of all {count} optimizers, for max_steps too: if "
            f"each steps once a batch, switch_at={switch_at} comes after {-(-switch_at // count)} batches"
        )


def _check_rule(trainer: Trainer, rule: PlateauRule) -> None:
    if not trainer.enable_validation:
        raise SettingError("the plateau rule needs a validation in the fit: a val dataloader and a validation_step")
    resolve_switch_step(rule.earliest, trainer.estimated_stepping_batches, "plateau.earliest")
