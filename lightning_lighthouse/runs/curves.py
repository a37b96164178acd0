"""The curves of a run: one TensorBoard run a phase, so that each has its own colour on one chart."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_lighthouse.checks import LighthouseWarning, is_named, quoted
from lightning_lighthouse.notices import say
from lightning_lighthouse.phases.ledger import PhaseTotals
from lightning_lighthouse.phases.schedule import DENSE
from lightning_lighthouse.runs.metric_name import metric_name, metric_names

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger
    from torch.utils.tensorboard import SummaryWriter

LOSS = "train/loss"
RATE = "train/tokens_per_second"


class PhaseCurves:
    """Writes the scalars of both phases; on rank 0 only.

    With a TensorBoardLogger they go to a run for each phase inside its folder, `lighthouse` and `dense` where there are
    no others, under the same tags; with other loggers to those, beside a scalar `phase` that counts down: 0 is dense.

    Args:
        trainer: Its loggers decide where the curves go.
        first_step: Points at or after this step, left by a run that died, are replaced.
        validation_metric: Name of the validation loss, for the layout.
        phases: Names of all phases in their order; the last is the dense one.
    """

    def __init__(self, trainer: Trainer, first_step: int, validation_metric: str, phases: Sequence[str]) -> None:
        self._writers: dict[str, SummaryWriter] = {}
        self._first_step = first_step
        self._validation_metric = validation_metric
        self._losses: list[Tensor] = []
        # the phase whose curve gets a point beside the next one
        self._meets = ""
        self._levels = {name: float(level) for level, name in enumerate(reversed(phases))}
        self._told_of_metric = False
        self._settings_run = DENSE
        boards: list[Any] = [logger for logger in trainer.loggers if is_named(logger, "TensorBoardLogger")]
        self._others = [logger for logger in trainer.loggers if logger not in boards]
        self._board: TensorBoardLogger | None = boards[0] if boards else None
        self._active = trainer.is_global_zero
        if self._active and self._board is not None and first_step > 0:
            self._purge_validation(self._board)
        if self._board is None and self._others:
            names = ", ".join(type(logger).__name__ for logger in self._others)
            say(f"no TensorBoardLogger, the phases' scalars go to {names}")

    def scalars(self, phase: str, step: int, values: dict[str, float]) -> None:
        """Write `values` by tag at an optimizer step."""
        if not self._active:
            return
        if self._board is not None:
            writer = self._writer(phase)
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)
        for logger in self._others:
            logger.log_metrics({**values, "phase": self._levels[phase]}, step)

    def add_loss(self, loss: Tensor) -> None:
        """Note the training loss of a batch, a scalar on its device; a step shows the mean of its batches."""
        self._losses.append(loss.detach())

    def meet(self, phase: str) -> None:
        """Give the curve of `phase` a point at the next step too, so that it meets the next one at the switch."""
        self._meets = phase

    def step_done(self, trainer: Trainer, step: int, phase: str, next_phase: str, totals: PhaseTotals) -> None:
        """Write the curves of a step: every `log_every_n_steps`, and around the switch. Every rank calls it.

        Args:
            trainer: Its setting and its ranks.
            step: Optimizer steps done before this one.
            phase: The phase it ran in.
            next_phase: That of the step to come.
            totals: Those of `phase`, for the throughput.
        """
        losses, self._losses = self._losses, []
        meets, self._meets = self._meets, ""
        every = trainer.log_every_n_steps  # type: ignore[attr-defined]
        is_due = every > 0 and step % every == 0
        is_last = phase != next_phase
        if not (is_due or is_last or meets):
            return
        values = {}
        if losses:
            # every rank logs the same steps, so all of them are here
            values[LOSS] = float(trainer.strategy.reduce(torch.stack(losses).mean(), reduce_op="mean"))
        rate = totals.window_rate()
        if rate is not None:
            values[RATE] = rate
        self.scalars(phase, step, values)
        if meets and step > 0 and LOSS in values:
            self.scalars(meets, step, {LOSS: values[LOSS]})

    def validation_loss(self, trainer: Trainer) -> float | None:
        """What the model logged in the validation that ends; None, with one warning, if it did not."""
        loss = trainer.callback_metrics.get(metric_name(self._validation_metric, trainer.callback_metrics))
        if loss is None and not self._told_of_metric:
            self._told_of_metric = True
            logged = ", ".join(sorted(trainer.callback_metrics)) or "nothing"
            rank_zero_warn(
                f"Lighthouse: validation_metric={quoted(self._validation_metric)} was not logged, the summary will "
                f"lack it; logged: {logged}",
                category=LighthouseWarning,
            )
        if loss is not None and self._active and self._board is not None:
            self._writer(self._settings_run).add_scalar(f"hparams/{self._validation_metric}", loss, trainer.global_step)
        return None if loss is None else float(loss)

    def text(self, step: int, text: str) -> None:
        """Write a line on the phases to the dense run, which every run has."""
        if self._active and self._board is not None:
            self._writer(DENSE).add_text("phase", text, step)

    def hyperparameters(self, values: dict[str, Any], told: dict[str, Any] | None) -> dict[str, Any]:
        """Add settings to every logger's hyperparameters; in TensorBoard with the validation loss as their metric.

        There they stand beside the dense run: the logger's own, written before, would hide them. TensorBoard shows the
        first settings that it finds in a run, and looks for metrics there and below. So a copy of the validation loss
        goes to the same run as `hparams/<its name>`, and settings that were changed before a resume get a run, and a
        row, of their own: `dense/from_step_<n>`.

        Args:
            values: By name.
            told: What this method returned to the part of the run before; None at its start.

        Returns:
            What a checkpoint should keep.
        """
        for logger in self._others if self._active else []:
            logger.log_hyperparams(values)
        shown = {name: _shown(value) for name, value in values.items()}
        self._settings_run = told["run"] if told else DENSE
        if told and told["values"] != shown:
            self._settings_run = f"{DENSE}/from_step_{self._first_step}"
        if self._active and self._board is not None:
            # not its api module, which wants TensorFlow
            from tensorboard.plugins.hparams import summary_v2 as hparams

            every = {name: _shown(value) for name, value in self._board.hparams.items()} | shown
            names = [hparams.HParam(name) for name in every]
            metric = hparams.Metric(f"hparams/{self._validation_metric}", display_name=self._validation_metric)
            file_writer: Any = self._writer(self._settings_run).file_writer
            file_writer.add_summary(hparams.hparams_config_pb(names, metrics=[metric]))
            file_writer.add_summary(hparams.hparams_pb(every))
        return {"run": self._settings_run, "values": shown}

    def close(self) -> None:
        """Write out what is buffered."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    def _purge_validation(self, board: TensorBoardLogger) -> None:
        """What `purge_step` does for a writer, for the one that Lightning made: the validation curve is in its run."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = Event(step=self._first_step, session_log=SessionLog(status=SessionLog.START))
        board.experiment.file_writer.event_writer.add_event(start)

    def _writer(self, run: str) -> SummaryWriter:
        if run not in self._writers:
            # tensorboard is slow to import, and not every run has it
            from torch.utils.tensorboard import SummaryWriter

            assert self._board is not None
            writer = SummaryWriter(os.path.join(self._board.log_dir, run), purge_step=self._first_step or None)
            charts = {
                "loss": ["Multiline", [LOSS, *metric_names(self._validation_metric)]],
                "tokens per second": ["Multiline", [RATE]],
            }
            writer.add_custom_scalars({"Lighthouse": charts})
            self._writers[run] = writer
        return self._writers[run]


def _shown(value: Any) -> bool | int | float | str:
    """A setting as the HPARAMS tab can hold it."""
    return value if isinstance(value, bool | int | float | str) else str(value)
