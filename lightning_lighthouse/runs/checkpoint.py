"""The checkpoints that a training leaves, and the one that it continues from."""

from __future__ import annotations

import math
import os
import signal
import time
from typing import Any

from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_lighthouse.runs.metric_name import metric_name
from lightning_lighthouse.runs.saving import WholeCheckpointIO, check_writable
from lightning_lighthouse.runs.stop_signals import StopSignals, highest


class Checkpoint(ModelCheckpoint):
    """ModelCheckpoint whose `last.ckpt` is always the last, and always that of a completed optimizer step.

    It is written at each validation, at the end, on SIGTERM and Ctrl-C, and every `every_n_train_steps` or
    `train_time_interval`; Lightning 2.6 writes it only where the monitored loss has improved. On a signal the step is
    finished first, or the validation left; `fit` then ends in a SystemExit with 128 + the signal's number, as a shell
    shows it. A second Ctrl-C stops at once. After an exception nothing is written: a step is incomplete then, and a run
    resumed from it would skip a batch. `best.ckpt` is that of the best validation.
    """

    # none before setup: the data may fail earlier
    _signals: StopSignals | None = None
    # what the ranks agreed to stop for
    _stopped_by = 0
    # whether all ranks validate as many batches, so that they can agree after each
    _validates_alike = False
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
        self._stopped_by = 0
        self._has_epoch_ended = False
        self._signals = signals = StopSignals()
        if stage == "fit":
            signals.replace_lightnings(trainer)
        if stage == "fit" and trainer.is_global_zero and self.dirpath is not None:
            check_writable(self.dirpath)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on a Ctrl-C is noted too when it comes."""
        super().on_train_start(trainer, pl_module)
        if self._signals is not None:
            self._signals.listen_to_interrupts(trainer)
        self._kept_step, self._kept_time = trainer.global_step, time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Behind the last batch of a step: save where it is time, and stop where a rank received a signal."""
        if trainer.fit_loop._should_accumulate():
            return
        if self.monitor is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif self._is_pending or self._is_due(trainer):
            self._keep_last(trainer)
        self._stop_if_asked(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask whether the ranks validate as many batches: where not, they would wait for each other in vain."""
        if self._is_in_fit(trainer):
            count = float(sum(trainer.fit_loop.epoch_loop.val_loop.max_batches))
            self._validates_alike = (
                trainer.world_size == 1 or -highest(trainer, -count) == highest(trainer, count) < math.inf
            )

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Leave the validation where a rank received a signal, unless it divides a step."""
        if self._is_in_fit(trainer) and self._validates_alike and not trainer.fit_loop._should_accumulate():
            self._stop_if_asked(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation, unless the best is saved later, at the epoch's end."""
        if not self._is_in_fit(trainer):
            return
        # with every_n_train_steps Lightning would look for the best at those steps only, where no loss is new
        self._defer_save_until_validation |= self.monitor is not None and self._every_n_epochs < 1
        super().on_validation_end(trainer, pl_module)
        # of averaged weights, which stand in the model at the end: a run goes on from its own
        is_average = self._has_epoch_ended and any(map(_averages_weights, trainer.callbacks))  # type: ignore[attr-defined]
        if not (self._should_save_on_train_epoch_end(trainer) or is_average):
            self._keep_last(trainer)
        if not trainer.fit_loop._should_accumulate():
            self._stop_if_asked(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The weights in the model are those in training."""
        super().on_train_epoch_start(trainer, pl_module)
        self._has_epoch_ended = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of an epoch."""
        super().on_train_epoch_end(trainer, pl_module)
        self._keep_last(trainer)
        self._has_epoch_ended = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end, which may come between the batches of a step: what is saved then goes on behind the last."""
        if self._is_pending or self._kept_step != trainer.global_step:
            self._keep_last(trainer, is_end=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save between two steps where a signal ends the run, and say how it goes on."""
        if isinstance(exception, SIGTERMException):
            if self._kept_step != trainer.global_step:
                self._keep_last(trainer)
            exception.code = self._exit_status(trainer)
            way = f"go on with --ckpt_path {self.last_model_path}" if self.last_model_path else "nothing was saved"
            rank_zero_info(f"Lighthouse: stopped at step {trainer.global_step}; {way}")
        self._close_signals(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the signals back."""
        self._close_signals(trainer)

    def _close_signals(self, trainer: Trainer) -> None:
        if self._signals is not None:
            self._signals.close(trainer)

    def _stop_if_asked(self, trainer: Trainer) -> None:
        assert self._signals is not None, "Lightning calls setup first"
        self._stopped_by = self._signals.agree(trainer)
        if self._stopped_by:
            # the loop looks at it once this batch is counted as done
            trainer._signal_connector.received_sigterm = True

    def _exit_status(self, trainer: Trainer) -> int:
        """What a shell shows for the signal; Lightning kills rank 0 where a rank that it launched ends with another."""
        environment = getattr(trainer.strategy, "cluster_environment", None)
        is_launched = isinstance(environment, LightningEnvironment) and trainer.strategy.launcher is None
        return 0 if is_launched and trainer.local_rank > 0 else 128 + (self._stopped_by or signal.SIGTERM)

    @staticmethod
    def _is_in_fit(trainer: Trainer) -> bool:
        return not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING

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

    def _keep_last(self, trainer: Trainer, is_end: bool = False) -> None:
        # skipped where nothing is to be saved at all, or this step was saved together with the best
        if not self.save_last or self.dirpath is None or self._should_skip_saving_checkpoint(trainer):
            return
        if trainer.fit_loop._should_accumulate() and not is_end:
            # a validation between the batches of a step
            self._is_pending = True
        else:
            # an address is no Path
            last = os.path.join(self.dirpath, f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}")
            # before saving: it is part of the state
            self.last_model_path = last
            trainer.save_checkpoint(last, self.save_weights_only)
            self._note_kept(trainer)

    def _note_kept(self, trainer: Trainer) -> None:
        self._is_pending = False
        self._kept_step, self._kept_time = trainer.global_step, time.monotonic()


def _averages_weights(callback: Any) -> bool:
    """Whether a callback puts an average of the weights into the model when the training ends."""
    return isinstance(callback, WeightAveraging | StochasticWeightAveraging)
