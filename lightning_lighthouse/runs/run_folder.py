"""Where what belongs to one run goes: its report, its final weights, its settings, beside its checkpoints."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def run_folder(trainer: Trainer) -> str:
    """The folder, or its address. Every rank calls it; rank 0's answer is that of all.

    With a TensorBoardLogger or CSVLogger it is the logger's own; without a logger `default_root_dir`. Other loggers
    have one `log_dir` for all runs: there it is `save_dir/name/version`, in which Lightning makes `checkpoints`.
    """
    loggers = trainer.loggers
    if not loggers or isinstance(loggers[0], TensorBoardLogger | CSVLogger):
        return str(trainer.log_dir or trainer.default_root_dir)
    logger = loggers[0]
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    folder = os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)
    return str(trainer.strategy.broadcast(folder))
