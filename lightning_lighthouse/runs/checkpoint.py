"""The checkpoints that a training leaves, and the one that it continues from."""

from __future__ import annotations

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_lighthouse.runs.metric_name import metric_name
from lightning_lighthouse.runs.saving import WholeCheckpointIO, check_writable, is_remote


class Checkpoint(ModelCheckpoint):
    """ModelCheckpoint whose `last.ckpt` is always the last, and always that of a completed optimizer step.

    It is written at each validation, at the end, on SIGTERM, and every `every_n_train_steps` or `train_time_interval`;
    Lightning 2.6 writes it only where the monitored loss has improved. On SIGTERM the step is finished first. After an
    exception nothing is written: a step is incomplete then, and a run resumed from it would skip a batch. `best.ckpt`
    is that of the best validation.
    """

    _received_sigterm = False
    # a last.ckpt that waits for the end of a step
    _is_pending = False
    # step and time of the last.ckpt written last
    _kept_step = 0
    _kept_time = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write files that appear whole or not at all, unless the Trainer has a CheckpointIO of its own.

        Raises:
            SavingError: No file can be written to the folder of the checkpoints.
        """
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and self.dirpath is not None and not is_remote(self.dirpath):
            check_writable(Path(self.dirpath))
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first hook after Lightning has set its handler."""
        self._handle_sigterm()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on only note a SIGTERM when it comes."""
        super().on_train_start(trainer, pl_module)
        self._handle_sigterm()
        self._kept_step, self._kept_time = trainer.global_step, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Behind the last batch of a step: save where it is time, and stop where a rank received SIGTERM."""
        if trainer.fit_loop._should_accumulate():
            return
        if self.monitor is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif self._is_pending or self._is_due(trainer):
            self._keep_last(trainer)
        self._agree_on_sigterm(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation, unless the best is saved later, at the epoch's end."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        # with every_n_train_steps Lightning would look for the best at those steps only, where no loss is new
        self._defer_save_until_validation |= self.monitor is not None and self._every_n_epochs < 1
        super().on_validation_end(trainer, pl_module)
        if not self._should_save_on_train_epoch_end(trainer):
            self._keep_last(trainer)
        if not trainer.fit_loop._should_accumulate():
            self._agree_on_sigterm(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        self._keep_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end."""
        if self._kept_step != trainer.global_step:
            self._keep_last(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save on SIGTERM, between two steps."""
        if isinstance(exception, SIGTERMException) and self._kept_step != trainer.global_step:
            self._keep_last(trainer)

    # Lightning's handler calls a collective wherever the signal strikes, and stops between the batches of a step
    def _handle_sigterm(self) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note_sigterm)

    def _note_sigterm(self, signum: int, frame: FrameType | None) -> None:
        self._received_sigterm = True

    def _agree_on_sigterm(self, trainer: Trainer) -> None:
        received = self._received_sigterm
        if trainer.world_size > 1:
            received = trainer.strategy.reduce_boolean_decision(received, all=False)
        if received:
            # the loop looks at it once this batch is counted as done
            trainer._signal_connector.received_sigterm = True

    def _is_due(self, trainer: Trainer) -> bool:
        if self._every_n_train_steps and trainer.global_step % self._every_n_train_steps == 0:
            return self._kept_step != trainer.global_step
        if self._train_time_interval is None:
            return False
        is_time = time.monotonic() - self._kept_time >= self._train_time_interval.total_seconds()
        return bool(trainer.strategy.broadcast(is_time))

    # the setting stays as it is, for it is part of the key under which the state of this callback is found again
    def _monitor_candidates(self, trainer: Trainer) -> dict[str, Tensor]:
        candidates = super()._monitor_candidates(trainer)
        name = metric_name(self.monitor, candidates) if self.monitor is not None else None
        if self.monitor is not None and name in candidates:
            candidates[self.monitor] = candidates[name]
        return candidates

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Tensor]) -> None:
        if trainer.fit_loop._should_accumulate():
            self._is_pending = True
        else:
            super()._save_last_checkpoint(trainer, monitor_candidates)
            self._note_kept(trainer)

    def _keep_last(self, trainer: Trainer) -> None:
        # skipped where nothing is to be saved at all, or this step was saved together with the best
        if not self.save_last or self.dirpath is None or self._should_skip_saving_checkpoint(trainer):
            return
        if trainer.fit_loop._should_accumulate():
            # a validation between the batches of a step
            self._is_pending = True
        else:
            last = Path(self.dirpath) / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            # before saving: it is part of the state
            self.last_model_path = str(last)
            trainer.save_checkpoint(last, self.save_weights_only)
            self._note_kept(trainer)

    def _note_kept(self, trainer: Trainer) -> None:
        self._is_pending = False
        self._kept_step, self._kept_time = trainer.global_step, time.monotonic()
