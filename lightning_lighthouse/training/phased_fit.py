"""One fit in phases: the patched model, the clock, the curves, and who else listens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_lighthouse.attention.sdpa import sdpa_priority
from lightning_lighthouse.checks import LighthouseWarning
from lightning_lighthouse.model.peaks import peak_flops
from lightning_lighthouse.notices import held_notices, say, shown_notices
from lightning_lighthouse.phases.events import BatchEnd, BatchStart, FitEnd, FitStart, Switch, phase_events
from lightning_lighthouse.phases.ledger import PhaseTotals
from lightning_lighthouse.phases.phase import Phase
from lightning_lighthouse.phases.plan import PhasePlan, describe_switch, phases_begun
from lightning_lighthouse.phases.run_state import RunState
from lightning_lighthouse.phases.schedule import DENSE, LIGHTHOUSE
from lightning_lighthouse.routing.call_counts import CallCounts
from lightning_lighthouse.routing.patch import Patch
from lightning_lighthouse.runs.curves import PhaseCurves
from lightning_lighthouse.runs.record import describe_spike, shown_settings, tell_summary
from lightning_lighthouse.runs.resume import mend_resume
from lightning_lighthouse.training.attention_curves import AttentionCurves
from lightning_lighthouse.training.batch_documents import watched_batches
from lightning_lighthouse.training.last_validation import LastValidation
from lightning_lighthouse.training.left_files import LeftFiles
from lightning_lighthouse.training.nonfinite import FiniteGuard, restart_spike_detection
from lightning_lighthouse.training.parallel import check_tensor_parallel, free_gradients, tokens_of_ranks
from lightning_lighthouse.training.patched_model import attend, patched_model
from lightning_lighthouse.training.progress import Progress, shown_progress
from lightning_lighthouse.training.rank_watch import watched_ranks
from lightning_lighthouse.training.rewarm import Rewarm
from lightning_lighthouse.training.settings import Settings
from lightning_lighthouse.training.step_curves import StepCurves
from lightning_lighthouse.training.stopwatch import Stopwatch, timed_fetches
from lightning_lighthouse.training.switching import apply_rule, describe_start, resolve_plan


class PhasedFit:
    """Patches the model of a fit, off, and leads it through its phases.

    Args:
        settings: Of the callback.
        trainer: At fit start: after wrapping and sharding, and before anything is traced.
        module: In training.

    Raises:
        SettingError: The settings do not fit the model, the device or the strategy.
        ValueError: No attention to route, or the model is patched already.
    """

    def __init__(self, settings: Settings, trainer: Trainer, module: LightningModule) -> None:
        self._settings, self._trainer, self._module = settings, trainer, module
        self._events = phase_events(trainer)
        self._run = RunState()
        self._patch: Patch | None = None
        # those before the dense one; none in a dense baseline
        self._phases: Sequence[Phase] = ()
        self._curves: PhaseCurves | None = None
        self._steps: StepCurves | None = None
        self._progress: Progress | None = None
        self._stopwatch = Stopwatch()
        self._rewarm: Rewarm | None = None
        self._guard = FiniteGuard(settings.stop_on_nonfinite)
        self._step = 0
        # of the batch before
        self._step_before = 0
        # the phase whose attention the patch has
        self._attending = 0
        # whether the last batch left an optimizer step unfinished
        self._mid_step = False
        self._phase = DENSE
        self._counts = CallCounts()
        self._validation = LastValidation(trainer, module)
        self._has_begun = self._has_ended = False
        self._contexts = ExitStack()
        try:
            self._patch_model()
        except BaseException:
            self.close()
            raise

    def _patch_model(self) -> None:
        settings, trainer, module = self._settings, self._trainer, self._module
        check_tensor_parallel(trainer, module)
        assert isinstance(settings, Callback)
        self._left = LeftFiles(settings, trainer, module)
        self._contexts.callback(self._guard.clear)
        self._contexts.enter_context(shown_notices())
        self._details = self._contexts.enter_context(held_notices())
        for context in (
            watched_ranks(trainer.strategy.launcher),
            sdpa_priority(settings.attention.sdpa),
            timed_fetches(trainer.profiler, lambda seconds: self._stopwatch.fetched(seconds)),  # type: ignore[attr-defined]
        ):
            self._contexts.enter_context(context)
        items = lambda: {} if self._progress is None else self._progress.items()  # noqa: E731
        self._logs_lines = self._contexts.enter_context(shown_progress(trainer, items))
        if settings.enabled:
            self._patch, self._phases = patched_model(settings, module, self._contexts)
        self._contexts.enter_context(watched_batches(trainer, module, settings, self._patch))

    @property
    def _plan(self) -> PhasePlan | None:
        """What this run follows; None for a dense baseline, also one that goes on from another run."""
        return self._run.plan if self._settings.enabled else None

    def phase_at(self, step: int) -> str:
        """The name of the phase in which the batch trains that begins after `step` optimizer steps."""
        return DENSE if self._patch is None or self._plan is None else self._plan.name(step)

    @contextmanager
    def lend_patch(self) -> Iterator[Patch]:
        """Hand out the patch, off, to set the phase by hand outside of training batches; the time is not training's.

        Raises:
            RuntimeError: There is none, in a dense baseline.
        """
        patch = self._patch
        if patch is None:
            raise RuntimeError("a dense baseline, enabled=False, has no patch to lend")
        self._drain()
        patch.hand_back(())
        with patch.unaudited(), self._stopwatch.stopped(), patch.paused():
            yield patch

    @contextmanager
    def trial(self, is_dense: bool) -> Iterator[None]:
        """Attend as in the first phase inside, or as in the dense one, for training steps that are none of the run."""
        if self._patch is None or is_dense:
            yield
            return
        self._patch.set_step(0)
        self._patch.on()
        try:
            yield
            if self._patch.has_run:
                self._finish_audit(self._patch)
        finally:
            self.leave_phase()

    def start(self, run: RunState) -> None:
        """Resolve the switch step, against that of `run` when resumed; open the curves.

        To be called in the first hook at which the step and the callback's state are right under every strategy.
        """
        settings, trainer = self._settings, self._trainer
        mend_resume(trainer)
        self._run = run
        if self._patch is not None:
            self._go_on_as_begun(run.plan)
            run.plan = resolve_plan(
                trainer,
                self._module,
                run.plan,
                phases=self._phases,
                plateau=settings.plateau,
                return_steps=settings.return_steps,
                rewarm_steps=settings.rewarm_steps,
                allow_return=settings.allow_return,
            )
            if settings.rewarm_steps:
                self._rewarm = Rewarm(trainer.optimizers)
                self._contexts.callback(self._rewarm.remove)
        names = self._plan.names if self._plan is not None else [LIGHTHOUSE, DENSE]
        for name in names:
            # in the order of the run
            run.ledger.totals(name)
        device = trainer.strategy.root_device
        peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
        metric, step = settings.validation_metric, trainer.global_step
        self._curves = curves = PhaseCurves(trainer, step, metric, names, knows_peak=peak is not None)
        self._contexts.callback(curves.close)
        attention = AttentionCurves(
            trainer, self._module, self._patch, settings.select, keeps_documents=settings.documents is True
        )
        self._steps = steps = StepCurves(trainer, curves, attention, peak)
        costs = partial(attention.costs, names, self._phases, settings.attention)
        self._progress = Progress(trainer, run, lambda: self._plan, lambda: steps.newest, costs)
        if self._logs_lines:
            self._contexts.callback(self._events.subscribe(BatchEnd, self._progress.tell))
        if self._patch is not None and self._plan is not None:
            layers = [name or type(self._module).__name__ for name in self._patch.targets]
            line = describe_start(trainer, self._plan, settings.plateau, layers, self._details())
            curves.text(trainer.global_step, line)
        for detail in self._details():
            # of a dense baseline
            say(detail)
        self._step_before = trainer.global_step - 1
        assert isinstance(settings, Callback)
        run.shown = curves.hyperparameters(shown_settings(settings, self._plan), run.shown)
        self._events.publish(FitStart(trainer.global_step, self.phase_at(trainer.global_step)))

    def _go_on_as_begun(self, saved: PhasePlan | None) -> None:
        """Keep to the layers that a resumed run began with, where its settings say nothing of them."""
        if saved is None or not self._phases or not self._settings.has_default_layers:
            return
        self._phases, line = phases_begun(self._phases, saved)
        if self._patch is not None:
            attend(self._patch, self._phases[0], self._settings)
        if line:
            rank_zero_warn(f"Lighthouse: {line}", category=LighthouseWarning)

    def begin_batch(self, batch: Any, batch_idx: int) -> None:
        """Set the phase by the optimizer step; switch when its time has come."""
        self._has_begun = True
        self._stopwatch.start()
        self._guard.start_batch(self._module, batch, batch_idx)
        self._step = self._trainer.global_step
        self._phase = self.phase_at(self._step)
        if self._patch is not None and self._plan is not None:
            self._set_phase(self._patch, self._plan)
        self._step_before = self._step
        assert self._steps is not None
        self._steps.begin(batch, self._step, self._phase, self.phase_at(self._step + 1), self._totals)
        self._events.publish(BatchStart(self._step, self._phase))

    def _set_phase(self, patch: Patch, plan: PhasePlan) -> None:
        switch, number = plan.switch, plan.number(self._step)
        if self._rewarm is not None:
            self._rewarm.start_batch(switch.rate_factor(self._step))
        is_dense = number == len(plan.phases)
        if not switch.switched if is_dense else number != plan.number(max(0, self._step_before)):
            self._begin_phase(plan, number)
        if is_dense:
            patch.dense()
            return
        if number != self._attending:
            attend(patch, self._phases[number], self._settings)
            self._attending = number
        patch.set_step(self._step)
        patch.on()
        names = patch.routed
        num_returned = switch.layers_returned(self._step, len(names))
        patch.hand_back(names[len(names) - num_returned :])
        # once a step, also where it accumulates batches
        if num_returned > switch.layers_returned(self._step - 1, len(names)) and not self._mid_step:
            self._restart_spike_detection()

    def _begin_phase(self, plan: PhasePlan, number: int) -> None:
        """Mark the switch to a phase; the one to dense is final."""
        plan.switch.switched = number == len(plan.phases)
        before = plan.names[number - 1]
        if self._step > 0:
            self._events.publish(Switch(self._step, self._phase, before))
        assert self._curves is not None
        assert self._steps is not None
        self._steps.meet(before)
        free_gradients(self._trainer)
        if self._step > 0:
            self._curves.mark_switch(plan.names[number], self._step)
            self._say(describe_switch(plan, number))
            self._restart_spike_detection()

    def note_loss(self, loss: Tensor) -> None:
        """A loss is about to be propagated back."""
        self._guard.note_loss(loss)

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Stop if the losses or the gradients of this step are not finite."""
        self._guard.check(self._trainer, self._module, optimizer, self._phase)
        if self._rewarm is not None:
            self._rewarm.on_closure_end(optimizer)
        if self._steps is not None:
            self._steps.before_step(optimizer)

    def end_batch(self, batch: Any, outputs: Any) -> None:
        """Leave the phase until the next batch; audit what is routed for the first time; write the curves."""
        if not self._has_begun:
            # Lightning ends a batch that is None, and has not begun it
            return
        self._has_begun = False
        self.leave_phase()
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        # a batch that training_step passes over has routed nothing
        assert self._steps is not None
        trainer, totals = self._trainer, self._totals
        # where it passes over all batches before the switch, there is nothing to judge by
        if self._patch is not None and self._phase != DENSE and (self._patch.has_run or loss is not None):
            for line in self._counts.add(self._patch, self._step):
                rank_zero_warn(line, category=LighthouseWarning)
            totals.routed_calls += self._counts.num_routed
            totals.dense_calls += self._counts.num_dense
            if self._patch.is_audited:
                self._finish_audit(self._patch)
        if isinstance(loss, Tensor):
            # Lightning hands out the part of the loss that this batch adds to an accumulated step
            scale = trainer.accumulate_grad_batches if self._module.automatic_optimization else 1
            self._steps.add_loss(loss * scale)
        steps_done = trainer.global_step - self._step
        self._mid_step = steps_done == 0
        next_phase = self._plan.name(trainer.global_step) if self._plan else DENSE
        if steps_done:
            self._steps.read(next_phase, totals)
        totals.steps += steps_done
        self._stopwatch.stop(totals, self._phase, tokens_of_ranks(trainer, batch))
        self._steps.add_time(totals, steps_done)
        if steps_done:
            self._steps.write()
        self._events.publish(BatchEnd(trainer.global_step, self._phase, next_phase))

    def begin_validation(self) -> None:
        """Validation is dense, and its time is not training time."""
        self.leave_phase()
        self._drain()
        self._stopwatch.pause()

    def end_validation(self) -> None:
        """Note the dense validation loss, and ask the plateau rule."""
        trainer, ledger = self._trainer, self._run.ledger
        assert self._curves is not None
        self._validation.note()
        loss = self._curves.validation_loss(trainer)
        if loss is not None:
            ledger.add_validation(trainer.global_step, self._phase, loss)
            if line := describe_spike(trainer, ledger):
                self._say(line, trainer.global_step)
        if self._settings.plateau is not None and self._plan is not None and not self._has_ended:
            apply_rule(trainer, self._settings.plateau, self._plan, ledger, mid_step=self._mid_step)

    def pause(self) -> None:
        """Something else than training begins."""
        self._stopwatch.pause()

    def leave_phase(self) -> None:
        """Leave every call to dense attention until the next batch."""
        if self._patch is not None:
            self._patch.off()
            self._patch.hand_back(())

    def end(self) -> None:
        """Validate what the training ends with, and sum up; sharded weights are gathered while the ranks still work."""
        self.leave_phase()
        self._drain()
        trainer, run = self._trainer, self._run
        self._has_ended = True
        self._validation.renew()
        tell_summary(trainer, self._plan, run.ledger)
        self._events.publish(FitEnd(trainer.global_step, self._phase))
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._left.report(self._plan, self._phases, run.ledger)

    def end_untrained(self, run: RunState) -> None:
        """Report a run that went on from its last step, with nothing left to train."""
        self._run = run
        self._go_on_as_begun(run.plan)
        self._left.report_untrained(self._plan, self._phases, run.ledger)

    def write_final_weights(self) -> None:
        """Write the final weights, where they are not sharded."""
        self._left.write_weights(self._validation)

    def close(self) -> None:
        """Restore the model, and whatever else this fit changed. Harmless at any time."""
        self._patch = self._curves = self._steps = self._progress = self._rewarm = None
        # the last entered goes first, and each goes, also if another fails, as a writer does on a full disk
        self._contexts.close()

    @property
    def _totals(self) -> PhaseTotals:
        return self._run.ledger.totals(self._phase)

    def _drain(self) -> None:
        self._stopwatch.drain(self._totals, self._phase, self._trainer.strategy.root_device)

    def _say(self, line: str, step: int | None = None) -> None:
        rank_zero_info(f"Lighthouse: {line}")
        assert self._curves is not None
        self._curves.text(self._step if step is None else step, line)

    def _restart_spike_detection(self) -> None:
        assert self._curves is not None
        if restart_spike_detection(self._trainer.callbacks):  # type: ignore[attr-defined]
            self._curves.text(self._step, "the window of SpikeDetection starts anew")

    def _finish_audit(self, patch: Patch) -> None:
        try:
            patch.check()
        except RuntimeError as error:
            if self._settings.on_unroutable == "raise":
                raise
            rank_zero_warn(f"Lighthouse: {error}", category=LighthouseWarning)
