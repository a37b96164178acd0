"""The curves of a run: one TensorBoard run a phase, so that each has its own colour on one chart."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_warn

from lightning_lighthouse.checks import LighthouseWarning, is_named, quoted
from lightning_lighthouse.notices import log_once, say
from lightning_lighthouse.phases.schedule import DENSE
from lightning_lighthouse.runs.board import watched_board
from lightning_lighthouse.runs.layout import layout
from lightning_lighthouse.runs.metric_name import metric_name
from lightning_lighthouse.runs.settings_row import SettingsRow
from lightning_lighthouse.runs.switch_marks import SwitchMarks

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.loggers import TensorBoardLogger
    from torch.utils.tensorboard import SummaryWriter


class PhaseCurves:
    """Writes the scalars of all phases; on rank 0 only.

    With a TensorBoardLogger they go to a run for each phase inside its folder, by its name, under the same tags, and
    each switch is a vertical line in a run of its own; with other loggers to those, beside a scalar `phase` that counts
    down: 0 is dense. What the module logs under one of our names is its own there.

    Args:
        trainer: Its loggers decide where the curves go.
        first_step: Points at or after this step, left by a run that died, are replaced.
        validation_metric: Name of the validation loss, for the layout.
        phases: Names of all phases in their order; the last is the dense one.
        knows_peak: Whether there will be an MFU.
    """

    def __init__(
        self,
        trainer: Trainer,
        first_step: int,
        validation_metric: str,
        phases: Sequence[str],
        *,
        knows_peak: bool = False,
    ) -> None:
        self._writers: dict[str, SummaryWriter] = {}
        self._trainer = trainer
        self._first_step = first_step
        self._validation_metric = validation_metric
        self._levels = {name: float(level) for level, name in enumerate(reversed(phases))}
        self._told_of_metric = False
        # names that the module logs, from the first point on
        self._logged: frozenset[str] | None = None
        boards: list[Any] = [logger for logger in trainer.loggers if is_named(logger, "TensorBoardLogger")]
        self._others = [logger for logger in trainer.loggers if logger not in boards]
        self._board: TensorBoardLogger | None = boards[0] if boards else None
        self._active = trainer.is_global_zero
        self._row = SettingsRow(self._writer, validation_metric)
        self._marks = SwitchMarks(self._writer)
        self._contexts = ExitStack()
        if self._active and self._board is not None:
            if first_step > 0:
                self._purge_validation(self._board)
            self._contexts.enter_context(watched_board(self._board, self._marks.note))
            charts: Any = layout(trainer, validation_metric, knows_peak=knows_peak)
            self._board.experiment.add_custom_scalars(charts)
        if self._board is None and self._others:
            names = ", ".join(type(logger).__name__ for logger in self._others)
            say(f"no TensorBoardLogger, the phases' scalars go to {names}")

    def scalars(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Write `values` by tag at an optimizer step."""
        if not self._active:
            return
        self.join(phase, step, values)
        if self._others:
            shown = {name: value for name, value in values.items() if not self._is_taken(name)}
            for logger in self._others:
                logger.log_metrics({**shown, "phase": self._levels[phase]}, step)

    def join(self, phase: str, step: int, values: Mapping[str, float]) -> None:
        """Write points of the next phase to the TensorBoard curves of this one, so that they meet."""
        if not self._active or self._board is None:
            return
        for tag, value in values.items():
            self._writer(phase).add_scalar(tag, value, step)
            self._marks.note(tag, value)

    def _is_taken(self, name: str) -> bool:
        """Whether the module logs this name as well, from the first step on: in one logger two curves would be one."""
        if self._logged is None:
            self._logged = frozenset(self._trainer.logged_metrics)
        if name in self._logged:
            log_once(
                f"{name} is the module's", f"the module logs {name} itself: outside of TensorBoard ours is left out"
            )
        return name in self._logged

    def mark_switch(self, phase: str, step: int) -> None:
        """The phase of that name begins: a line on every chart."""
        if self._active and self._board is not None:
            self._marks.mark(phase, step)

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
            self._row.add_loss(float(loss), trainer.global_step)
        return None if loss is None else float(loss)

    def text(self, step: int, text: str) -> None:
        """Write a line on the phases to the dense run, which every run has."""
        if self._active and self._board is not None:
            self._writer(DENSE).add_text("phase", text, step)

    def hyperparameters(self, values: dict[str, Any], told: dict[str, Any] | None) -> dict[str, Any]:
        """Add settings to every logger's hyperparameters; in TensorBoard with the validation loss as their metric.

        Args:
            values: By name.
            told: What this method returned to the part of the run before; None at its start.

        Returns:
            What a checkpoint should keep.
        """
        for logger in self._others if self._active else []:
            logger.log_hyperparams(values)
        shown = self._row.choose(values, told, self._first_step)
        if self._active and self._board is not None:
            self._row.write({**self._board.hparams, **values})
        return shown

    def close(self) -> None:
        """Write out what is buffered."""
        self._contexts.close()
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
            folder = os.path.join(self._board.log_dir, run)
            self._writers[run] = SummaryWriter(folder, purge_step=self._first_step or None)
        return self._writers[run]
