"""The curves of a run: one TensorBoard run a phase, so that each has its own colour on one chart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from lightning_lighthouse.schedule import DENSE, LIGHTHOUSE

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch.utils.tensorboard import SummaryWriter

LOSS = "train/loss"
RATE = "train/tokens_per_second"


class PhaseCurves:
    """Writes the scalars of both phases; on rank 0 only.

    With a TensorBoardLogger they go to the runs `lighthouse` and `dense` inside its folder, under the same tags; with
    other loggers to those, beside a scalar `phase` (1 in the Lighthouse phase, 0 in the dense one).

    Args:
        trainer: Its loggers decide where the curves go.
        first_step: Points at or after this step, left by a run that died, are replaced.
        validation_metric: Name of the validation loss, for the layout.
    """

    def __init__(self, trainer: Trainer, first_step: int, validation_metric: str) -> None:
        self._writers: dict[str, SummaryWriter] = {}
        self._first_step = first_step
        self._validation_metric = validation_metric
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        self._others = [logger for logger in trainer.loggers if not isinstance(logger, TensorBoardLogger)]
        self._board = boards[0] if boards else None
        self._active = trainer.is_global_zero
        if self._active and self._board is not None and first_step > 0:
            self._purge_validation(self._board)
        if self._board is None and self._others:
            names = ", ".join(type(logger).__name__ for logger in self._others)
            rank_zero_info(f"Lighthouse: no TensorBoardLogger; the phases' scalars go to {names}")

    def scalars(self, phase: str, step: int, values: dict[str, float]) -> None:
        """Write `values` by tag at an optimizer step."""
        if not self._active:
            return
        if self._board is not None:
            writer = self._writer(phase)
            for tag, value in values.items():
                writer.add_scalar(tag, value, step)
        for logger in self._others:
            logger.log_metrics({**values, "phase": float(phase == LIGHTHOUSE)}, step)

    def text(self, step: int, text: str) -> None:
        """Write a line on the phases to the dense run, which every run has."""
        if self._active and self._board is not None:
            self._writer(DENSE).add_text("phase", text, step)

    def hyperparameters(self, values: dict[str, Any]) -> None:
        """Add settings to every logger's hyperparameters.

        In TensorBoard they stand beside the dense run: the logger's own, written before, would hide them, and would
        add a point to the validation curve.
        """
        if not self._active:
            return
        for logger in self._others:
            logger.log_hyperparams(values)
        if self._board is not None:
            # not its api module, which wants TensorFlow
            from tensorboard.plugins.hparams import summary_v2 as hparams

            shown = {name: _shown(value) for name, value in {**self._board.hparams, **values}.items()}
            file_writer: Any = self._writer(DENSE).file_writer
            file_writer.add_summary(hparams.hparams_config_pb([hparams.HParam(name) for name in shown], metrics=[]))
            file_writer.add_summary(hparams.hparams_pb(shown))

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

    def _writer(self, phase: str) -> SummaryWriter:
        if phase not in self._writers:
            # tensorboard is slow to import, and not every run has it
            from torch.utils.tensorboard import SummaryWriter

            assert self._board is not None
            purge_step = self._first_step or None
            writer = SummaryWriter(str(Path(self._board.log_dir) / phase), purge_step=purge_step)
            charts = {
                "loss": ["Multiline", [LOSS, self._validation_metric]],
                "tokens per second": ["Multiline", [RATE]],
            }
            writer.add_custom_scalars({"Lighthouse": charts})
            self._writers[phase] = writer
        return self._writers[phase]


def _shown(value: Any) -> bool | int | float | str:
    """A setting as the HPARAMS tab can hold it."""
    return value if isinstance(value, bool | int | float | str) else str(value)
