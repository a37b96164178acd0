"""Which validation of a run this is: from the batches, so that a resumed run counts as an unbroken one does."""

from __future__ import annotations

import math

from lightning.pytorch import Trainer


def validation_number(trainer: Trainer, counted: int) -> int:
    """The number of the validation that runs, from 1 on.

    A checkpoint may be written before the validation of its step, which a resumed run does not make up for: what a
    callback has counted would be one too few.

    Args:
        trainer: In a validation of its fit.
        counted: What a callback has counted, for intervals of time, which no batch tells.
    """
    loop, interval = trainer.fit_loop.epoch_loop, getattr(trainer, "val_check_batch", None)
    if interval is None or getattr(trainer, "_val_check_time_interval", None) is not None:
        return counted
    every_n_epochs: int | None = trainer.check_val_every_n_epoch
    if every_n_epochs is None:
        return int((loop.total_batch_idx + 1) // interval)
    batches = trainer.num_training_batches
    per_epoch = 1 if math.isinf(interval) or math.isinf(batches) else max(1, int(batches // interval))
    within = 1 if math.isinf(interval) else int((loop.batch_idx + 1) // interval)
    return int(trainer.current_epoch // every_n_epochs * per_epoch + within)
