"""What Lightning 2.6 gets wrong when it resumes, mended before the first batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def mend_resume(trainer: Trainer) -> None:
    """Make a resumed run go on with the batch, and the count of it, that an unbroken run would have next.

    Args:
        trainer: In `on_train_start`, when its state is loaded.
    """
    if trainer.fit_loop.is_resuming:
        _load_position(trainer)
        _count_batches(trainer)
        _begin_epoch(trainer)


def _load_position(trainer: Trainer) -> None:
    """Load the data's position where Lightning did not.

    It makes the loaders early, and then forgets their state, where the model asks for `estimated_stepping_batches` in
    `configure_optimizers`, as many schedules do. It also keeps it from them behind the end of an epoch, where
    LighthouseRecipe needs it to know which epoch comes next; other loaders may take it for a position.
    """
    loop = trainer.fit_loop
    states = loop._combined_loader_states_to_load
    if not states or loop._combined_loader is None or loop._data_fetcher is None:
        return
    if loop.restarting or all("epoch_is_over" in state for state in states):
        loop._combined_loader._load_state_dicts(states)
        # the iterator of before has fetched from the beginning
        iter(loop._data_fetcher)
    loop._combined_loader_states_to_load = []


def _count_batches(trainer: Trainer) -> None:
    """Count the batches of a resumed epoch as they are now, where the global batch is another than before.

    Lightning goes on from its old count, and so ends an epoch before its data or never sees its last batch; resumed
    behind the end of an epoch, it takes the next one for the rest of the ended one.
    """
    loop = trainer.fit_loop
    loaders = loop._combined_loader.flattened if loop._combined_loader is not None else []
    counts: Any = {getattr(loader, "batches_before", None) for loader in loaders}
    if len(counts) != 1 or None in counts:
        return
    (count,) = counts
    # Any: Lightning declares their counts too narrowly
    epochs: Any = loop.epoch_progress
    inner: Any = loop.epoch_loop
    batches: Any = inner.batch_progress
    unfinished = batches.current.processed - batches.current.completed
    batches.current.ready = batches.current.started = batches.current.processed = count
    batches.current.completed = count - unfinished
    if count >= trainer.num_training_batches and not batches.is_last_batch:
        batches.is_last_batch = True
        # as Lightning itself does for a last batch
        if inner.restarted_on_train_batch_end and loop.restarted_mid_epoch:
            epochs.increment_processed()
            epochs.increment_completed()


def _begin_epoch(trainer: Trainer) -> None:
    """Begin the next epoch where the checkpoint was written behind the last batch of one.

    With `max_steps` Lightning goes on counting the batches of the ended epoch, so that steps of accumulated gradients
    hold other batches than in an unbroken run; and it does not count the new epoch as begun, so that a second resume
    begins it again.
    """
    loop = trainer.fit_loop
    inner = loop.epoch_loop
    # Any: Lightning declares their counts too narrowly
    epochs: Any = loop.epoch_progress
    batches: Any = inner.batch_progress
    if not 0 < epochs.current.ready == epochs.current.processed:
        return
    for count in (epochs.total, epochs.current):
        if not batches.is_last_batch:
            # it ended at max_steps, and is now to be continued
            count.ready, count.started, count.processed = count.ready - 1, count.started - 1, count.processed - 1
        count.completed = count.processed
    if batches.is_last_batch and batches.current.completed == batches.current.processed:
        for progress in (batches, inner.scheduler_progress, inner.automatic_optimization.optim_progress):
            progress.reset_on_run()
        inner.val_loop.batch_progress.total.reset()
    # the next epoch counts as begun
    loop.reset_restart_stage()
