"""A validation of the weights that a training ends with, where the last of its own is of an earlier step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.trainer import call

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def validate_now(trainer: Trainer) -> None:
    """Run a fit's validation once more, by Lightning's own loop, with its hooks and logged as the others.

    Args:
        trainer: In `on_train_end`; every rank calls it. A fit without validation has none at its end either.
    """
    if not trainer.enable_validation:
        return
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    first_batch = connector._first_loop_iter
    trainer.validating = True
    # the loop has counted the step as done: others are logged before that
    loop._batches_that_stepped -= 1
    try:
        call._call_lightning_module_hook(trainer, "on_validation_model_zero_grad")
        loop.val_loop.run()
    finally:
        loop._batches_that_stepped += 1
        trainer.training = True
        connector._first_loop_iter = first_batch
