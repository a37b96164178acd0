"""The log folder of a run that was refused: as if it had never been."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger


@contextmanager
def no_trace_of_a_refusal(trainer: Trainer) -> Iterator[None]:
    """Remove its log files again if the run inside fails before a training starts.

    Lightning opens the loggers before the data is looked at. Only what was not there before is removed: event files
    of this process, settings, and folders that are empty then.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    folders = [Path(logger.log_dir) for logger in loggers]
    made = [part for folder in folders for part in (folder, *folder.parents) if not part.exists()]
    before = {file for folder in folders for file in _written_by_loggers(folder)}
    # the Trainer's list is Lightning's to change
    callbacks: list[Any] = list(trainer.callbacks)  # type: ignore[attr-defined]
    try:
        yield
    except BaseException:
        has_started = any(getattr(callback, "has_started", False) for callback in callbacks)
        for logger, folder in zip(loggers, folders, strict=True):
            new = [] if has_started else _written_by_loggers(folder) - before
            if new:
                logger.experiment.close()
            for file in new:
                file.unlink()
        for folder in made:
            # what is not empty stays
            with suppress(OSError):
                folder.rmdir()
        raise


def _written_by_loggers(folder: Path) -> set[Path]:
    """The event files of this process, and the settings, which Lightning never writes over."""
    return {*folder.glob(f"events.out.tfevents.*.{os.getpid()}.*"), *folder.glob("hparams.yaml")}
