"""LighthouseCallback: Lightning's hooks, each calling the patch, the schedule, the curves or the ledger."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal
from weakref import ReferenceType, ref

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_lighthouse.attention import check_backend
from lightning_lighthouse.audit import Audit, explain
from lightning_lighthouse.config import LighthouseConfig, check_type
from lightning_lighthouse.curves import LOSS, RATE, PhaseCurves
from lightning_lighthouse.export import is_sharded, write_final
from lightning_lighthouse.ledger import Ledger, Stopwatch, count_tokens
from lightning_lighthouse.patch import Patch, patch_attention
from lightning_lighthouse.schedule import (
    DENSE,
    LIGHTHOUSE,
    SettingError,
    SwitchState,
    check_switch_at,
    resolve_switch_step,
    resume_switch,
)
from lightning_lighthouse.sdpa import sdpa_priority
from lightning_lighthouse.targets import check_layers

STATE_VERSION = 1


class LighthouseCallback(Callback):
    """Train with Lighthouse Attention, then switch to dense attention for good (arXiv 2605.06554, section 4).

        Trainer(callbacks=[LighthouseCallback(switch_at=0.9)])

    The model is patched when a fit starts and restored when it ends, however it ends. Lighthouse Attention runs inside
    training batches only: validation is dense in both phases, and its loss is the one to watch, because the training
    loss of the Lighthouse phase is not that of a language model (docs/design.md). At the end the weights are written
    to `final.pt` in the log folder, and a summary is printed.

    Args:
        switch_at: When to switch: an int is an optimizer step, a float above 0 and up to 1.0 a fraction of the
            training's steps, rounded up.
        attention: Settings of Lighthouse Attention.
        dense_layers: Attention layers that stay dense; negative numbers count from the end, [] for none. None: the
            first and last two of 16 or more, else the first and last.
        select: Glob over module names that chooses the attention layers, for example "*.attn". None finds them.
        enabled: False trains the dense baseline: nothing is patched, and the curves go to the run `dense`.
        on_unroutable: What happens when a layer that should be routed stayed dense in the first routed batch.
        allow_return: Let a resumed run that has switched go back to Lighthouse where a later switch_at says so.
        validation_metric: Name under which the model logs its validation loss, for the summary.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range. At fit start: no attention to route, or the model is patched already.
        SettingError: At train start: the switch step cannot be derived, or a resumed run would return unasked.
        RuntimeError: After the first routed batch: a layer stayed dense, with the reason.
    """

    def __init__(
        self,
        switch_at: int | float = 0.9,
        attention: LighthouseConfig = LighthouseConfig(),  # noqa: B008, immutable
        dense_layers: list[int] | None = None,
        select: str | None = None,
        enabled: bool = True,
        on_unroutable: Literal["raise", "warn"] = "raise",
        allow_return: bool = False,
        validation_metric: str = "val/loss",
    ) -> None:
        check_type("attention", attention, LighthouseConfig)
        check_type("select", select, str | None)
        check_type("enabled", enabled, bool)
        check_type("on_unroutable", on_unroutable, Literal["raise", "warn"])
        check_type("allow_return", allow_return, bool)
        check_type("validation_metric", validation_metric, str)
        check_layers(dense_layers)
        self.switch_at = check_switch_at(switch_at)
        self.attention = attention
        self.dense_layers = dense_layers
        self.select = select
        self.enabled = enabled
        self.on_unroutable = on_unroutable
        self.allow_return = allow_return
        self.validation_metric = validation_metric

        self._switch: SwitchState | None = None
        self._ledger = Ledger()
        # the checkpoint's, until the Trainer knows its step
        self._loaded: tuple[SwitchState | None, Ledger] | None = None
        self._is_fitting = True
        self._trainer: ReferenceType[Trainer] | None = None
        self._patch: Patch | None = None
        self._curves: PhaseCurves | None = None
        self._stopwatch = Stopwatch()
        self._sdpa = ExitStack()
        self._audited = False
        self._step = 0
        self._phase = DENSE
        self._losses: list[Tensor] = []
        self._meets_at_switch = False
        self._told_of_metric = False
        # where the final weights go, once the training has ended
        self._folder: Path | None = None

    # Constant, so that a changed setting still finds the state of the run.
    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint."""
        return "LighthouseCallback"

    def state_dict(self) -> dict[str, Any]:
        """The switch, None for a dense baseline, and the ledger."""
        switch = self._switch.state_dict() if self._switch else None
        return {"version": STATE_VERSION, "switch": switch, "ledger": self._ledger.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the checkpoint's state for a fit; a validation or test with a checkpoint leaves the run's own alone."""
        if not self._is_fitting:
            return
        version = state_dict.get("version")
        if version != STATE_VERSION:
            raise ValueError(
                f"the checkpoint's LighthouseCallback state must have version {STATE_VERSION}, got {version}"
            )
        switch = state_dict["switch"]
        self._loaded = SwitchState(**switch) if switch else None, Ledger.from_state_dict(state_dict["ledger"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Know what a checkpoint is loaded for."""
        self._is_fitting = stage == "fit"
        self._loaded = None

    # Fit start comes after wrapping and sharding, and before anything is traced.
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Patch the model, off, and prefer the configured SDPA backend in every phase."""
        self._restore()
        self._sdpa.enter_context(sdpa_priority(self.attention.sdpa))
        self._audited = False
        self._folder = None
        if self.enabled:
            try:
                check_backend(self.attention, pl_module.device)
            except ValueError as error:
                raise SettingError(str(error)) from None
            self._patch = patch_attention(pl_module, self.attention, dense_layers=self.dense_layers, select=self.select)

    # The first hook at which the step and the callback's state are right under every strategy.
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve the switch step, against that of the checkpoint when resumed; open the curves."""
        self._stopwatch = Stopwatch()
        self._losses = []
        continues = self._trainer is not None and self._trainer() is trainer and trainer.global_step > 0
        if self._loaded is not None:
            self._switch, self._ledger = self._loaded
        elif not continues:
            self._switch, self._ledger = None, Ledger()
        self._loaded, self._trainer = None, ref(trainer)
        self._curves = PhaseCurves(trainer, trainer.global_step, self.validation_metric)
        if self.enabled:
            self._switch = self._resolve_switch(trainer, pl_module)
            self._announce(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the phase by the optimizer step; switch when its time has come."""
        self._stopwatch.start()
        self._step = trainer.global_step
        if self._patch is None or self._switch is None:
            return
        self._phase = self._switch.phase(self._step)
        if self._phase == DENSE:
            if not self._switch.switched:
                self._switch_to_dense(trainer)
            return
        if not self._audited:
            self._patch.audit = Audit(self._patch.targets)
        self._patch.on()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave the phase until the next batch; audit the first routed one; write the curves."""
        self._leave_phase()
        if self._patch is not None and self._patch.audit is not None:
            self._finish_audit(self._patch)
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            # Lightning hands out the part of the loss that this batch adds to an accumulated step
            scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._losses.append(loss.detach() * scale)
        steps_done = trainer.global_step - self._step
        if steps_done:
            self._log_step(trainer)
        totals = self._ledger.totals(self._phase)
        totals.steps += steps_done
        self._stopwatch.stop(totals, self._phase, count_tokens(batch) * trainer.world_size)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is dense, and its time is not training time."""
        self._leave_phase()
        self._stopwatch.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the dense validation loss."""
        if trainer.sanity_checking or not self._is_fitting:
            return
        loss = trainer.callback_metrics.get(self.validation_metric)
        if loss is None:
            if self._ledger.last_validation is None and not self._told_of_metric:
                self._told_of_metric = True
                logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
                rank_zero_warn(
                    f"Lighthouse: validation_metric={self.validation_metric!r} was not logged, the summary will lack "
                    f"it; logged: {logged}"
                )
            return
        switch_step = self._switch.switch_step if self._switch else None
        self._ledger.add_validation(trainer.global_step, float(loss), switch_step)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """The time of a checkpoint is not training time."""
        self._stopwatch.pause()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the phase also where an epoch was cut short."""
        self._leave_phase()
        self._stopwatch.pause()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sum up; sharded weights are gathered here, while the ranks still work together."""
        self._leave_phase()
        rank_zero_info("\n".join(f"Lighthouse: {line}" for line in self._ledger.summary()))
        if self._switch is not None and not self._switch.switched:
            rank_zero_warn(
                f"Lighthouse: the training ended at step {trainer.global_step}, before the switch to dense attention "
                f"at step {self._switch.switch_step}: the model has not recovered from Lighthouse"
            )
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # log_dir is broadcast: every rank asks
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        wrapped = trainer.strategy.model
        if wrapped is not None and is_sharded(wrapped):
            rank_zero_info(f"Lighthouse: final weights: {write_final(trainer, wrapped, folder)}")
        else:
            self._folder = folder

    # After the hooks that may change the weights last: averages of weights, the module's own on_train_end.
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the model; write the final weights."""
        self._restore()
        if self._folder is not None:
            rank_zero_info(f"Lighthouse: final weights: {write_final(trainer, pl_module, self._folder)}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the model."""
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the model."""
        self._restore()

    def _resolve_switch(self, trainer: Trainer, pl_module: LightningModule) -> SwitchState:
        is_fraction = isinstance(self.switch_at, float)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        schedulers = [c for c in callbacks if isinstance(c, GradientAccumulationScheduler)]
        if is_fraction and any(scheduler.going_to_accumulate_grad_batches() for scheduler in schedulers):
            raise SettingError(
                f"switch_at={self.switch_at} is a fraction, but Lightning's count of steps ignores the "
                "GradientAccumulationScheduler: give switch_at as a step (an int)"
            )
        if is_fraction and not pl_module.automatic_optimization:
            rank_zero_warn(
                f"Lighthouse: under manual optimization Lightning's count of steps may be wrong, and switch_at="
                f"{self.switch_at} with it: better give switch_at as a step (an int)"
            )
        total = trainer.estimated_stepping_batches
        asked = SwitchState(self.switch_at, resolve_switch_step(self.switch_at, total))
        step = trainer.global_step
        if self._switch is not None:
            switch, line = resume_switch(self._switch, asked, step, self.allow_return)
            if line:
                rank_zero_warn(f"Lighthouse: {line}")
            return switch
        if step > 0:
            rank_zero_warn(
                f"Lighthouse: resumed at step {step} from a checkpoint without Lighthouse state; the phase follows "
                f"from the step: {asked.phase(step)} (switch at step {asked.switch_step})"
            )
        # already past: the run starts dense, and no switch happens in it
        return SwitchState(asked.switch_at, asked.switch_step, switched=step > 0 and step >= asked.switch_step)

    def _announce(self, trainer: Trainer) -> None:
        assert self._switch is not None
        assert self._patch is not None
        assert self._curves is not None
        names = [name or type(trainer.lightning_module).__name__ for name in self._patch.targets]
        total = trainer.estimated_stepping_batches
        phase = self._switch.phase(trainer.global_step)
        line = f"{phase} phase from step {trainer.global_step}; switch to dense at step {self._switch.switch_step}"
        rank_zero_info(
            f"Lighthouse: {line} of {total}; {len(names)} attention layers routed, {names[0]} .. {names[-1]}"
        )
        if not self._switch.switched and self._switch.switch_step >= total:
            rank_zero_warn(f"Lighthouse: {total} steps end before the switch at step {self._switch.switch_step}")
        self._curves.text(trainer.global_step, line)
        settings = {"switch_at": self.switch_at, "switch_step": self._switch.switch_step, **asdict(self.attention)}
        named = {f"lighthouse/{name}": value for name, value in settings.items()}
        self._curves.hyperparameters(named)

    def _switch_to_dense(self, trainer: Trainer) -> None:
        assert self._switch is not None
        self._switch.switched = self._meets_at_switch = True
        if isinstance(trainer.strategy, FSDPStrategy):
            # FSDP1 cannot recompile while gradients are kept; the step before has used them
            for optimizer in trainer.optimizers:
                optimizer.zero_grad(set_to_none=True)
        if self._step > 0:
            line = f"switched from Lighthouse to dense attention at step {self._step}"
            rank_zero_info(f"Lighthouse: {line}")
            if self._curves is not None:
                self._curves.text(self._step, line)

    def _leave_phase(self) -> None:
        if self._patch is not None:
            self._patch.off()

    def _finish_audit(self, patch: Patch) -> None:
        assert patch.audit is not None
        missing = patch.audit.unrouted()
        patch.audit = None
        self._audited = True
        if not missing:
            return
        if self.on_unroutable == "raise":
            raise RuntimeError(explain(missing, len(patch.targets)))
        rank_zero_warn(f"Lighthouse: {explain(missing, len(patch.targets))}")

    def _log_step(self, trainer: Trainer) -> None:
        """Write the curves of the optimizer step just done: every `log_every_n_steps`, and around the switch."""
        losses, self._losses = self._losses, []
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_due = every > 0 and self._step % every == 0
        is_last = (
            self._phase == LIGHTHOUSE and self._switch is not None and self._switch.phase(trainer.global_step) == DENSE
        )
        meets, self._meets_at_switch = self._meets_at_switch, False
        if self._curves is None or not (is_due or is_last or meets):
            return
        values = {}
        if losses:
            # every rank logs the same steps, so all of them are here
            values[LOSS] = float(trainer.strategy.reduce(torch.stack(losses).mean(), reduce_op="mean"))
        rate = self._ledger.totals(self._phase).window_rate()
        if rate is not None:
            values[RATE] = rate
        self._curves.scalars(self._phase, self._step, values)
        if meets and self._step > 0 and LOSS in values:
            # both curves have a point at the switch, so that they meet
            self._curves.scalars(LIGHTHOUSE, self._step, {LOSS: values[LOSS]})

    def _restore(self) -> None:
        if self._patch is not None:
            self._patch.restore()
            self._patch = None
        if self._curves is not None:
            self._curves.close()
            self._curves = None
        self._sdpa.close()
