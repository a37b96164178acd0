"""The log folder of a run that was refused: as if it had never been."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger


@contextmanager
def no_trace_of_a_refusal(trainer: Trainer) -> Iterator[None]:
    """Remove the log folder again if the run inside fails before there is anything in it but its empty event file.

    Lightning opens the loggers before the data is looked at. Only files of this process and folders that were not
    there before are removed.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    folders = [Path(logger.log_dir) for logger in loggers]
    made = [part for folder in folders for part in (folder, *folder.parents) if not part.exists()]
    try:
        yield
    except BaseException:
        for logger, folder in zip(loggers, folders, strict=True):
            # the resolved recipe is written when a training starts, checkpoints and phases later
            files = list(folder.iterdir()) if folder in made and folder.is_dir() else []
            if files and all(_is_own_event_file(file) for file in files):
                logger.experiment.close()
                for file in files:
                    file.unlink()
        for folder in made:
            # what is not empty stays
            with suppress(OSError):
                folder.rmdir()
        raise


def _is_own_event_file(file: Path) -> bool:
    return file.name.startswith("events.out.tfevents.") and f".{os.getpid()}." in file.name
