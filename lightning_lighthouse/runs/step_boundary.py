"""Checkpoints that are written inside a step, made to resume as one written behind the step before.

Inside a step the loader has handed out batches that no update has used, and Lightning 2.6 saves its position as it is:
a run resumed from there leaves them out. `OnExceptionCheckpoint`, `save_on_exception`, a validation between the batches
of one accumulated step and a training that ends there write such files, and Lightning where SLURM requeues a job.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import GradientAccumulationScheduler, OnExceptionCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lightning_lighthouse.runs.saving import SavingError

if TYPE_CHECKING:
    from lightning.pytorch import Callback, Trainer

REFUSAL = "a checkpoint inside an optimizer step resumes no run:"


class StepBoundary:
    """The counts, Lightning's and ours, and the loader's position behind the last whole optimizer step of a fit.

    To read them takes half a millisecond, so they are kept only where a callback may save inside a step.

    Args:
        trainer: At fit start.
        callback: Its state counts batches and validations, as the loops do.
    """

    def __init__(self, trainer: Trainer, callback: Callback) -> None:
        self._trainer, self._callback = trainer, callback
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        self._is_wanted = (
            trainer.accumulate_grad_batches > 1 or any(map(_leads_inside_steps, callbacks)) or _is_requeued(trainer)
        )
        # of the loops, and of the callback
        self._states: tuple[dict[str, Any], dict[str, Any]] | None = None
        # whether an optimizer may have changed the weights since
        self._is_updating = False
        self._is_broken = False

    def mark(self) -> None:
        """A step, a validation or an epoch has ended, or the training begins."""
        loop = self._trainer.fit_loop
        if loop._should_accumulate():
            return
        self._is_updating = False
        if self._is_wanted:
            self._states = copy.deepcopy((loop.state_dict(), self._callback.state_dict()))

    def update(self) -> None:
        """An optimizer is about to change the weights."""
        self._is_updating = True

    def break_off(self, exception: BaseException) -> None:
        """The fit ends here; also where a batch was fetched and is not counted yet. A signal ends it between steps."""
        self._is_broken = self._trainer.training and not isinstance(exception, SIGTERMException)

    def rewind(self, checkpoint: dict[str, Any]) -> None:
        """Let what is about to be saved go on behind the last whole step.

        Raises:
            SavingError: The weights are in the middle of an update, or it is not known where that step ended.
        """
        if self._trainer.state.fn != TrainerFn.FITTING or "loops" not in checkpoint:
            return
        loop = self._trainer.fit_loop
        # Any: Lightning declares its counts too narrowly
        batches: Any = loop.epoch_loop.batch_progress.current
        is_in_batch = batches.ready > batches.processed
        if not (is_in_batch or self._is_broken or loop._should_accumulate()):
            return
        if self._is_updating:
            if is_in_batch:
                raise SavingError(f"{REFUSAL} the weights are in the middle of an update")
            # the step is whole, and what came behind it is not
            return
        if self._states is None:
            raise SavingError(
                f"{REFUSAL} save in on_train_batch_end or later, or give save_checkpoint weights_only=True"
            )
        loops, counts = copy.deepcopy(self._states)
        checkpoint["loops"]["fit_loop"] = loops
        checkpoint["callbacks"][self._callback.state_key] = counts


def saves_on_exceptions(callback: Any) -> bool:
    """Whether a callback writes a checkpoint wherever an exception strikes."""
    return isinstance(callback, OnExceptionCheckpoint) or bool(getattr(callback, "save_on_exception", False))


def _is_requeued(trainer: Trainer) -> bool:
    """Whether a signal of SLURM's makes Lightning save wherever it strikes."""
    environment = trainer._accelerator_connector.cluster_environment
    return isinstance(environment, SLURMEnvironment) and environment.auto_requeue


def _leads_inside_steps(callback: Any) -> bool:
    return saves_on_exceptions(callback) or isinstance(callback, GradientAccumulationScheduler)
