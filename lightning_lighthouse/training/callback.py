"""LighthouseCallback: Lightning's hooks, each calling the patch, the schedule, the curves or the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal
from weakref import ReferenceType, ref

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_lighthouse.attention.backends import check_backend
from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.sdpa import sdpa_priority
from lightning_lighthouse.checks import SettingError, check_count, check_type
from lightning_lighthouse.notices import shown_notices
from lightning_lighthouse.phases.plateau import PlateauRule
from lightning_lighthouse.phases.run_state import RunState
from lightning_lighthouse.phases.schedule import DENSE, SwitchState, check_switch_at
from lightning_lighthouse.routing.patch import Patch, patch_attention, room_to_recompile
from lightning_lighthouse.routing.targets import DenseLayers, check_layers
from lightning_lighthouse.runs.curves import PhaseCurves
from lightning_lighthouse.runs.final_weights import is_sharded, write_final
from lightning_lighthouse.runs.record import describe_spike, shown_settings, tell_summary, write_report
from lightning_lighthouse.runs.resume import mend_resume
from lightning_lighthouse.training.nonfinite import FiniteGuard, restart_spike_detection
from lightning_lighthouse.training.parallel import check_tensor_parallel, free_gradients
from lightning_lighthouse.training.rank_watch import watched_ranks
from lightning_lighthouse.training.rewarm import Rewarm
from lightning_lighthouse.training.stopwatch import Stopwatch, count_tokens, timed_fetches
from lightning_lighthouse.training.switching import apply_rule, describe_start, describe_switch, resolve_switch


class LighthouseCallback(Callback):
    """Train with Lighthouse Attention, then switch to dense attention for good (arXiv 2605.06554, section 4).

        Trainer(callbacks=[LighthouseCallback(switch_at=0.9)])

    The model is patched when a fit starts and restored when it ends, however it ends. Lighthouse Attention runs inside
    training batches only: validation is dense in both phases, and its loss is the one to watch, because the training
    loss of the Lighthouse phase is not that of a language model (docs/understand/design.md). At the end the weights
    are written to `final.pt` in the log folder, beside `lighthouse.json` (docs/use/switch.md); a summary is printed.

    Args:
        switch_at: When to switch: an int is an optimizer step, a float above 0 and up to 1.0 a fraction of the
            training's steps, rounded up.
        attention: Settings of Lighthouse Attention.
        dense_layers: Attention layers that stay dense; negative numbers count from the end, None and [] for none.
            "published": the first and last two of 16 or more, else the first and last.
        select: Glob over module names that chooses the attention layers, for example "*.attn". None finds them.
        enabled: False trains the dense baseline: nothing is patched, and the curves go to the run `dense`.
        on_unroutable: What happens when a layer that should be routed stayed dense in the first routed batch.
        allow_return: Let a resumed run that has switched, or has begun to hand layers back, go back to Lighthouse
            where changed settings say so.
        validation_metric: Name under which the model logs its validation loss.
        plateau: Switch earlier where the dense validation loss stops gaining. None: at `switch_at`.
        return_steps: Hand the routed layers back to dense attention in up to 4 groups, the last layers first, over
            this many optimizer steps before the switch; 0: all of them at the switch.
        rewarm_steps: After the switch raise the learning rate linearly to what the schedule says, over this many
            optimizer steps; 0: none. Every optimizer's groups are scaled during their update alone.
        stop_on_nonfinite: Stop before an optimizer step whose loss or gradients are NaN or infinite on any rank, and
            name the layer (docs/use/reliability.md).
        hf_assume_causal: Your statement that no training batch of a transformers model has padding or packed
            documents, so that no mask is built (docs/use/models.md). A batch that has them is an error.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range. At fit start: no attention to route, or the model is patched already.
        SettingError: At train start: the switch step cannot be derived, or a resumed run would return unasked.
        RuntimeError: After the first routed batch: a layer stayed dense, with the reason.
        NonFiniteError: Before an optimizer step: a loss or a gradient is not finite; a RuntimeError.
    """

    def __init__(
        self,
        switch_at: int | float = 0.9,
        attention: LighthouseConfig = LighthouseConfig(),  # noqa: B008, immutable
        dense_layers: DenseLayers = None,
        select: str | None = None,
        enabled: bool = True,
        on_unroutable: Literal["raise", "warn"] = "raise",
        allow_return: bool = False,
        validation_metric: str = "val/loss",
        plateau: PlateauRule | None = None,
        return_steps: int = 0,
        rewarm_steps: int = 0,
        stop_on_nonfinite: bool = True,
        hf_assume_causal: bool = False,
    ) -> None:
        check_type("attention", attention, LighthouseConfig)
        check_type("select", select, str | None)
        check_type("enabled", enabled, bool)
        check_type("on_unroutable", on_unroutable, Literal["raise", "warn"])
        check_type("allow_return", allow_return, bool)
        check_type("validation_metric", validation_metric, str)
        check_type("plateau", plateau, PlateauRule | None)
        check_type("stop_on_nonfinite", stop_on_nonfinite, bool)
        check_type("hf_assume_causal", hf_assume_causal, bool)
        check_layers(dense_layers)
        self.switch_at = check_switch_at(switch_at)
        self.plateau = plateau
        self.return_steps = check_count("return_steps", return_steps)
        self.rewarm_steps = check_count("rewarm_steps", rewarm_steps)
        self.attention = attention
        self.dense_layers = dense_layers
        self.select = select
        self.enabled = enabled
        self.on_unroutable = on_unroutable
        self.allow_return = allow_return
        self.validation_metric = validation_metric
        self.stop_on_nonfinite = stop_on_nonfinite
        self.hf_assume_causal = hf_assume_causal

        self._run = RunState()
        # the checkpoint's, until the Trainer knows its step
        self._loaded: RunState | None = None
        self._is_fitting = True
        self._trainer: ReferenceType[Trainer] | None = None
        self._patch: Patch | None = None
        self._curves: PhaseCurves | None = None
        self._stopwatch = Stopwatch()
        self._rewarm: Rewarm | None = None
        self._guard = FiniteGuard(stop_on_nonfinite)
        self._contexts = ExitStack()
        self._step = 0
        # whether the last batch left an optimizer step unfinished
        self._mid_step = False
        self._phase = DENSE
        # where the final weights go, once the training has ended
        self._folder: Path | None = None

    # Constant, so that a changed setting still finds the state of the run.
    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint."""
        return "LighthouseCallback"

    def state_dict(self) -> dict[str, Any]:
        """The switch, None for a dense baseline, the ledger, and the settings shown."""
        return self._run.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the checkpoint's state for a fit; a validation or test with a checkpoint leaves the run's own alone."""
        if self._is_fitting:
            self._loaded = RunState.from_state_dict(state_dict)

    @property
    def _switch(self) -> SwitchState | None:
        """The switch that this run follows; none for a dense baseline, also one that goes on from another run."""
        return self._run.switch if self.enabled else None

    def phase_at(self, step: int) -> str:
        """LIGHTHOUSE or DENSE: how the batch trains that begins after `step` optimizer steps."""
        return DENSE if self._patch is None or self._switch is None else self._switch.phase(step)

    @contextmanager
    def lend_patch(self, trainer: Trainer) -> Iterator[Patch]:
        """Hand out the patch, off, to set the phase by hand outside of training batches; the time is not training's.

        Raises:
            RuntimeError: No model is patched: outside of a fit, or in a dense baseline.
        """
        patch = self._patch
        if patch is None:
            raise RuntimeError("there is a patch to lend only while a fit runs, and none with enabled=False")
        self._stopwatch.drain(self._run.ledger.totals(self._phase), self._phase, trainer.strategy.root_device)
        patch.hand_back(())
        # what is routed here says nothing of the training batch
        audit, patch.audit = patch.audit, None
        try:
            with self._stopwatch.stopped(), patch.paused():
                yield patch
        finally:
            patch.audit = audit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Know what a checkpoint is loaded for."""
        self._is_fitting = stage == "fit"
        self._loaded = None

    # Fit start comes after wrapping and sharding, and before anything is traced.
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Patch the model, off, and prefer the configured SDPA backend in every phase."""
        self._restore()
        check_tensor_parallel(trainer, pl_module)
        self._contexts.callback(self._guard.clear)
        for context in (
            shown_notices(),
            watched_ranks(trainer.strategy.launcher),
            sdpa_priority(self.attention.sdpa),
            timed_fetches(trainer.profiler, lambda seconds: self._stopwatch.fetched(seconds)),  # type: ignore[attr-defined]
        ):
            self._contexts.enter_context(context)
        if self.enabled and self.return_steps:
            self._contexts.enter_context(room_to_recompile())
        self._folder = None
        if self.enabled:
            try:
                check_backend(self.attention, pl_module.device)
            except ValueError as error:
                raise SettingError(str(error)) from None
            self._patch = patch_attention(
                pl_module,
                self.attention,
                dense_layers=self.dense_layers,
                select=self.select,
                hf_assume_causal=self.hf_assume_causal,
            )
            self._contexts.callback(self._patch.restore)

    # The first hook at which the step and the callback's state are right under every strategy.
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolve the switch step, against that of the checkpoint when resumed; open the curves."""
        mend_resume(trainer)
        self._stopwatch = Stopwatch()
        continues = self._trainer is not None and self._trainer() is trainer and trainer.global_step > 0
        if self._loaded is not None:
            self._run = self._loaded
        elif not continues:
            self._run = RunState()
        self._loaded, self._trainer = None, ref(trainer)
        self._curves = PhaseCurves(trainer, trainer.global_step, self.validation_metric)
        self._contexts.callback(self._curves.close)
        if self.enabled:
            assert self._patch is not None
            self._run.switch = resolve_switch(
                trainer,
                pl_module,
                self._run.switch,
                switch_at=self.switch_at,
                plateau=self.plateau,
                return_steps=self.return_steps,
                rewarm_steps=self.rewarm_steps,
                allow_return=self.allow_return,
            )
            if self.rewarm_steps:
                self._rewarm = Rewarm(trainer.optimizers)
                self._contexts.callback(self._rewarm.remove)
            names = [name or type(pl_module).__name__ for name in self._patch.targets]
            self._curves.text(trainer.global_step, describe_start(trainer, self._run.switch, self.plateau, names))
        values = shown_settings(self, self._switch)
        self._run.shown = self._curves.hyperparameters(values, self._run.shown)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set the phase by the optimizer step; switch when its time has come."""
        self._stopwatch.start()
        self._guard.start_batch(pl_module, batch, batch_idx)
        self._step = trainer.global_step
        if self._patch is None or self._switch is None:
            return
        self._phase = self._switch.phase(self._step)
        if self._rewarm is not None:
            self._rewarm.start_batch(self._switch.rate_factor(self._step))
        if self._phase == DENSE:
            if not self._switch.switched:
                self._switch_to_dense(trainer)
            self._patch.dense()
            return
        self._patch.set_step(self._step)
        self._patch.on()
        names = list(self._patch.targets)
        num_returned = self._switch.layers_returned(self._step, len(names))
        self._patch.hand_back(names[len(names) - num_returned :])
        returned_before = self._switch.layers_returned(self._step - 1, len(names))
        # once a step, also where it accumulates batches
        if num_returned > returned_before and not self._mid_step:
            self._restart_spike_detection(trainer)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the loss for the check."""
        self._guard.note_loss(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Stop if the losses or the gradients of this step are not finite."""
        self._guard.check(trainer, pl_module, optimizer, self._phase)
        if self._rewarm is not None:
            self._rewarm.on_closure_end(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Leave the phase until the next batch; audit the first routed one; write the curves."""
        self._leave_phase()
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        audit = self._patch.audit if self._patch is not None else None
        # a batch that training_step passes over has routed nothing
        if self._patch is not None and audit is not None and (audit.saw_a_layer or loss is not None):
            self._finish_audit(self._patch)
        assert self._curves is not None
        if isinstance(loss, Tensor):
            # Lightning hands out the part of the loss that this batch adds to an accumulated step
            scale = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._curves.add_loss(loss * scale)
        totals = self._run.ledger.totals(self._phase)
        steps_done = trainer.global_step - self._step
        self._mid_step = steps_done == 0
        if steps_done:
            next_phase = self._switch.phase(trainer.global_step) if self._switch else DENSE
            self._curves.step_done(trainer, self._step, self._phase, next_phase, totals)
        totals.steps += steps_done
        self._stopwatch.stop(totals, self._phase, count_tokens(batch) * trainer.world_size)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is dense, and its time is not training time."""
        self._leave_phase()
        self._stopwatch.drain(self._run.ledger.totals(self._phase), self._phase, trainer.strategy.root_device)
        self._stopwatch.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the dense validation loss."""
        if trainer.sanity_checking or not self._is_fitting:
            return
        assert self._curves is not None
        loss = self._curves.validation_loss(trainer)
        if loss is not None:
            self._run.ledger.add_validation(trainer.global_step, self._phase, loss)
            if line := describe_spike(trainer, self._run.ledger):
                rank_zero_info(f"Lighthouse: {line}")
                self._curves.text(trainer.global_step, line)
        if self.plateau is not None and self._switch is not None:
            apply_rule(trainer, self.plateau, self._switch, self._run.ledger, mid_step=self._mid_step)

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
        self._stopwatch.drain(self._run.ledger.totals(self._phase), self._phase, trainer.strategy.root_device)
        tell_summary(trainer, self._switch, self._run.ledger)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        # log_dir is broadcast: every rank asks
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        write_report(trainer, self, self._switch, self._run.ledger, folder)
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

    def _switch_to_dense(self, trainer: Trainer) -> None:
        assert self._switch is not None
        assert self._curves is not None
        self._switch.switched = True
        self._curves.meet()
        free_gradients(trainer)
        if self._step > 0:
            line = describe_switch(self._switch)
            rank_zero_info(f"Lighthouse: {line}")
            self._curves.text(self._step, line)
            self._restart_spike_detection(trainer)

    def _restart_spike_detection(self, trainer: Trainer) -> None:
        assert self._curves is not None
        if restart_spike_detection(trainer.callbacks):  # type: ignore[attr-defined]
            self._curves.text(self._step, "the window of SpikeDetection starts anew")

    def _leave_phase(self) -> None:
        if self._patch is not None:
            self._patch.off()
            self._patch.hand_back(())

    def _finish_audit(self, patch: Patch) -> None:
        try:
            patch.check()
        except RuntimeError as error:
            if self.on_unroutable == "raise":
                raise
            rank_zero_warn(f"Lighthouse: {error}")

    def _restore(self) -> None:
        self._patch = self._curves = self._rewarm = None
        # the last entered goes first, and each goes, also if another fails, as a writer does on a full disk
        self._contexts.close()
