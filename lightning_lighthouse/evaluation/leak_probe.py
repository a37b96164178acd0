"""FutureLeakProbe: measures, while a run trains, how much the Lighthouse phase lets the model read of its future."""

from __future__ import annotations

import csv
import io
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.checks import LighthouseWarning, SettingError, check_type, is_named
from lightning_lighthouse.evaluation.leak import Sample, draw_positions, draw_trial, other_text
from lightning_lighthouse.evaluation.text import Text, read_text, token_losses
from lightning_lighthouse.evaluation.undisturbed import Ranks, undisturbed
from lightning_lighthouse.phases.events import BatchEnd, BatchStart, Switch, phase_events
from lightning_lighthouse.phases.schedule import DENSE, LIGHTHOUSE
from lightning_lighthouse.runs.run_folder import run_folder
from lightning_lighthouse.runs.saving import save_text

STATE_VERSION = 1
TABLE = "probe.csv"
CURVES = ("leak_nats", "leak_stderr", "lighthouse_loss", "dense_loss", "spike_nats")
# A standard error from fewer samples says little of itself
MIN_SAMPLES = 32


@dataclass(frozen=True)
class ProbeResult:
    """What one probe found; the losses are those of the same text with the same weights.

    Args:
        step: Optimizer steps done.
        leak_nats: Mean rise of the loss on the true next token when the text after it is replaced.
        leak_stderr: Standard error of that mean.
        num_positions: Positions tested.
        lighthouse_loss: Loss as the layers attend in the phase, in nats per token.
        dense_loss: Loss with dense attention.
        spike_nats: `dense_loss - lighthouse_loss`: what a switch at this step would cost.
        seconds: Time that the probe took, compilation included.
    """

    step: int
    leak_nats: float
    leak_stderr: float
    num_positions: int
    lighthouse_loss: float
    dense_loss: float
    spike_nats: float
    seconds: float


class PhasedCallback(Protocol):
    """What the probe needs of LighthouseCallback, which it finds in the Trainer by its key."""

    enabled: bool

    def lend_patch(self, trainer: Trainer) -> AbstractContextManager[Any]:
        """The patch, off, outside of training batches."""


class FutureLeakProbe(Callback):
    """Show what the selection leaks: the loss on a true token with and without the text that follows it.

        Trainer(callbacks=[LighthouseCallback(switch_at=0.9), FutureLeakProbe()])

    With the phase on for the probe alone, on validation text, positions inside windows of the coarsest level are
    drawn, and the text after them is replaced by that of another sequence. Attention is causal, so the loss on the
    true next token changes only as far as the selection has told the model about it: the leak, in nats. Beside it
    stand the losses of both phases on the same text, and the spike, the rise that a switch would bring now. Method and
    limits: docs/understand/design.md.

    A probe runs after validations of a phase with Lighthouse layers, or every so many steps, and right before the
    switch; after it there is nothing to measure. The other layers attend as in that phase. The scalars `probe/*` go to
    the Trainer's loggers, a line to the log, and all results to `probe.csv` in the log folder. Training and validation
    are left as they are, random numbers included. A compiled model compiles once more, for the phase without gradients.

    The module needs `token_losses(inputs, targets)`, all `[batch, tokens]`, or a `forward(inputs)` that returns logits
    or an object with `.logits`. Validation batches are token ids as `read_text` finds them.

    Args:
        every_n_steps: Optimizer steps from one probe to the next; 0: only the one right before the switch; None: a
            probe at each validation.
        max_stderr: A probe ends when the standard error of the leak is at most this many nats.
        max_seconds: A probe ends, precise or not, after this time; its first batch, which compiles, is not counted.
        max_total_seconds: No probe starts if it could exceed this time, for all probes of the run together, compilation
            left out, and with `max_seconds` kept for the one right before the switch. 36 s are 1% of an hour.
        num_batches: Validation batches, the first of each rank, whose text is used.
        many_positions: Test many positions of a sequence at a time, and replace a few windows after each. False: one
            position, and all text after it: slower by the number of positions, and exact for each of them.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range. During validation: the batches are padded.
        SettingError: At fit start: no LighthouseCallback, a module without losses of single tokens, or FSDP1.
    """

    def __init__(
        self,
        every_n_steps: int | None = None,
        max_stderr: float = 0.05,
        max_seconds: float = 4.0,
        max_total_seconds: float = 36.0,
        num_batches: int = 4,
        many_positions: bool = True,
    ) -> None:
        check_type("every_n_steps", every_n_steps, int | None)
        check_type("num_batches", num_batches, int)
        check_type("many_positions", many_positions, bool)
        for name, value, minimum in (("every_n_steps", every_n_steps, 0), ("num_batches", num_batches, 1)):
            if value is not None and value < minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        limits = {"max_stderr": max_stderr, "max_seconds": max_seconds, "max_total_seconds": max_total_seconds}
        for name, limit in limits.items():
            check_type(name, limit, int | float)
            if not limit > 0:
                raise ValueError(f"{name} must be greater than 0, got {limit}")
        if max_total_seconds < 2 * max_seconds:
            raise ValueError(
                f"max_total_seconds must be at least twice max_seconds={max_seconds}, got {max_total_seconds}"
            )
        self.every_n_steps = every_n_steps
        self.max_stderr = max_stderr
        self.max_seconds = max_seconds
        self.max_total_seconds = max_total_seconds
        self.num_batches = num_batches
        self.many_positions = many_positions

        self.results: list[ProbeResult] = []
        self._lighthouse: PhasedCallback | None = None
        self._texts: list[Text] = []
        # whether the last training batch was one of the Lighthouse phase, and the step before it
        self._was_routed = False
        self._step = 0
        self._subscriptions: list[Callable[[], None]] = []
        self._is_fitting = True
        self._told: set[str] = set()

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint."""
        return "FutureLeakProbe"

    def state_dict(self) -> dict[str, Any]:
        """The results so far."""
        return {"version": STATE_VERSION, "results": [asdict(result) for result in self.results]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the results of a resumed run."""
        if not self._is_fitting:
            return
        if state_dict.get("version") != STATE_VERSION:
            version = state_dict.get("version")
            raise ValueError(f"the checkpoint's FutureLeakProbe state must have version {STATE_VERSION}, got {version}")
        self.results = [ProbeResult(**result) for result in state_dict["results"]]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be measured."""
        self._is_fitting = stage == "fit"
        self._texts = []
        if not self._is_fitting:
            return
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        found = [callback for callback in callbacks if callback.state_key == "LighthouseCallback"]
        if not found:
            raise SettingError("FutureLeakProbe measures what LighthouseCallback does: add one to the Trainer")
        self._lighthouse = found[0]
        if not self._lighthouse.enabled:
            rank_zero_info("Lighthouse probe: nothing to measure with enabled=False")
            return
        if is_named(trainer.strategy, "FSDPStrategy"):
            raise SettingError("FutureLeakProbe cannot run under FSDPStrategy; use ModelParallelStrategy, or no probe")
        offers = callable(getattr(pl_module, "token_losses", None))
        if not offers and type(pl_module).forward is LightningModule.forward:
            raise SettingError(
                f"FutureLeakProbe needs the loss of each token: give {type(pl_module).__name__} a method "
                "token_losses(inputs, targets), all [batch, tokens], or a forward(inputs) that returns logits"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to the phases; forget what belongs to another run."""
        self._was_routed = False
        # a second fit of the same callback that starts anew
        self.results = [result for result in self.results if result.step <= trainer.global_step]
        if not self._is_active:
            return
        if not trainer.enable_validation:
            rank_zero_warn(
                "Lighthouse probe: without validation there is no text to measure on; nothing is measured",
                category=LighthouseWarning,
            )
        self._unsubscribe()
        events = phase_events(trainer)
        self._subscriptions = [
            events.subscribe(Switch, lambda event: self._before_switch(trainer, pl_module)),
            events.subscribe(BatchStart, self._note_phase),
            events.subscribe(BatchEnd, lambda event: self._after_batch(trainer, pl_module, event)),
        ]

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the text of the first batches."""
        is_wanted = self._is_active and (self._was_routed or trainer.sanity_checking)
        if not is_wanted or dataloader_idx > 0 or batch_idx >= self.num_batches:
            return
        if batch_idx == 0:
            self._texts = []
        keeps_documents = getattr(self._lighthouse, "documents", False) is True
        self._texts.append(read_text(batch, pl_module if keeps_documents else None))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Probe at each validation, unless `every_n_steps` says otherwise."""
        if self._was_routed and self.every_n_steps is None and not trainer.sanity_checking:
            self._probe(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let go of the text."""
        self._was_routed, self._texts = False, []

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Listen no more."""
        self._unsubscribe()

    def _unsubscribe(self) -> None:
        for unsubscribe in self._subscriptions:
            unsubscribe()
        self._subscriptions = []

    def _before_switch(self, trainer: Trainer, module: LightningModule) -> None:
        """Probe before the first dense batch, where only now it is known to be that."""
        if self._was_routed:
            self._probe(trainer, module, before_switch=True)

    def _note_phase(self, event: BatchStart) -> None:
        # the name of a phase has the types of its layers in it; without a Lighthouse layer nothing can leak
        self._step, self._was_routed = event.step, LIGHTHOUSE in event.phase
        if not self._was_routed:
            self._texts = []

    def _after_batch(self, trainer: Trainer, module: LightningModule, event: BatchEnd) -> None:
        """Probe every so many steps, and after the last step of the Lighthouse phase."""
        if not self._was_routed or event.step == self._step:
            return
        every = self.every_n_steps
        if event.next_phase == DENSE:
            self._probe(trainer, module, before_switch=True)
        # not the remainder: several optimizers count several steps at once
        elif every and event.step // every > self._step // every:
            self._probe(trainer, module)

    @property
    def _is_active(self) -> bool:
        return self._is_fitting and self._lighthouse is not None and self._lighthouse.enabled

    def _probe(self, trainer: Trainer, module: LightningModule, before_switch: bool = False) -> None:
        """Measure, unless this step was measured or the time is used up; log and write the result."""
        if self.results and self.results[-1].step == trainer.global_step:
            return
        if not trainer.strategy.reduce_boolean_decision(bool(self._texts)):
            self._tell_once("no validation text was seen before the first probe was due: it is left out")
            return
        spent = sum(result.seconds for result in self.results)
        if not before_switch and spent + 2 * self.max_seconds > self.max_total_seconds:
            self._tell_once(
                f"{spent:.1f} s of max_total_seconds={self.max_total_seconds} are used; the next probe is the one "
                "before the switch"
            )
            return
        result = self._measure(trainer, module)
        self.results.append(result)
        rank_zero_info(
            f"Lighthouse probe: step {result.step}: leak {result.leak_nats:.3f} +- {result.leak_stderr:.3f} nats "
            f"({result.num_positions} positions); loss {result.lighthouse_loss:.4f}, dense {result.dense_loss:.4f}, "
            f"spike {result.spike_nats:.3f}; {result.seconds:.1f} s"
        )
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        for logger in trainer.loggers:
            logger.log_metrics({f"probe/{name}": getattr(result, name) for name in CURVES}, result.step)
        path = os.path.join(run_folder(trainer), TABLE)
        if trainer.is_global_zero:
            save_text(_table(self.results), path)

    def _tell_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            rank_zero_warn(f"Lighthouse probe: {line}", category=LighthouseWarning)

    def _measure(self, trainer: Trainer, module: LightningModule) -> ProbeResult:
        assert self._lighthouse is not None
        start = time.perf_counter()
        with self._lighthouse.lend_patch(trainer) as patch, undisturbed(trainer, module):
            ranks = Ranks(trainer)
            num_batches = int(ranks.reduce([len(self._texts)], "min")[0])
            texts = self._texts[:num_batches]

            sums = [0.0, 0.0, 0.0]
            for index, text in enumerate(texts):
                if index and ranks.is_late(0.5 * self.max_seconds):
                    break
                patch.set_documents(text.documents)
                patch.on(inference=True)
                lighthouse = token_losses(module, text.inputs, text.targets)[:, : text.num_targets]
                patch.off()
                dense = token_losses(module, text.inputs, text.targets)[:, : text.num_targets]
                added = ranks.reduce([dense.numel(), lighthouse.sum().item(), dense.sum().item()])
                sums = [a + b for a, b in zip(sums, added, strict=True)]
                if not index:
                    ranks.start_clock()

            patch.on(inference=True)
            sample = Sample()
            # the same positions at each probe of a run: what changes is the model
            generator = torch.Generator().manual_seed(ranks.share)
            config: LighthouseConfig = patch.scope.settings.config
            window = config.pooling_factor ** (config.num_levels - 1)
            drawn = [draw_positions(text, window, generator, self.many_positions) for text in texts]
            num_rounds = int(ranks.reduce([min(len(positions) for positions, _ in drawn)], "min")[0])
            for trial_index in range(num_rounds * num_batches):
                if sample.count >= MIN_SAMPLES and sample.stderr <= self.max_stderr:
                    break
                if trial_index and ranks.is_late(self.max_seconds):
                    break
                rounds, index = divmod(trial_index, num_batches)
                text, (positions, part) = texts[index], drawn[index]
                patch.set_documents(text.documents)
                trial = draw_trial(text, other_text(texts, index, rounds), positions[rounds], part, generator)
                first, second = (token_losses(module, version, text.targets) for version in trial.versions)
                found = trial.differences(first, second).double()
                sample.add(*ranks.reduce([found.numel(), found.sum().item(), found.square().sum().item()]))

        num_tokens, lighthouse_sum, dense_sum = sums
        return ProbeResult(
            step=trainer.global_step,
            leak_nats=sample.mean,
            leak_stderr=sample.stderr,
            num_positions=sample.count,
            lighthouse_loss=lighthouse_sum / num_tokens,
            dense_loss=dense_sum / num_tokens,
            spike_nats=(dense_sum - lighthouse_sum) / num_tokens,
            seconds=trainer.strategy.broadcast(time.perf_counter() - start),
        )


def _table(results: list[ProbeResult]) -> str:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, [field.name for field in fields(ProbeResult)])
    table.writeheader()
    table.writerows(asdict(result) for result in results)
    return text.getvalue()
