"""What is said when a training has ended: six lines at most."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_lighthouse.checks import is_named
from lightning_lighthouse.runs.final_weights import FINAL
from lightning_lighthouse.runs.record import REPORT
from lightning_lighthouse.runs.saving import is_remote

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

RECIPE = "config.yaml"


def where_things_are(trainer: Trainer, folder: str) -> list[str]:
    """Where the run's files are, how its curves are looked at, and what to type next.

    Args:
        trainer: Its loggers.
        folder: Of the run, with `final.pt`.
    """
    found = [FINAL, REPORT, "checkpoints"]
    if not is_remote(folder):
        found = [name for name in found if os.path.exists(os.path.join(folder, name))]
    shown = _short(folder)
    lines = [f"files: {shown}: {', '.join(found)}"]
    if any(is_named(logger, "TensorBoardLogger") for logger in trainer.loggers):
        lines.append(f"curves: {_command('tensorboard')} --logdir {shown}, then http://localhost:6006/#custom_scalars")
    ours = _command("lighthouse")
    next_ones = [f"{ours} compare {shown} ANOTHER_RUN --plot curves.png"]
    if os.path.exists(os.path.join(folder, RECIPE)):
        next_ones = [f"{ours} evaluate {shown}", f"{ours} export {shown} MODEL_FOLDER", *next_ones]
    return [*lines, f"next: {' | '.join(next_ones)}"]


def _short(path: str) -> str:
    """A path as it is typed from the current folder, where it lies below it."""
    if is_remote(path) or not Path(path).absolute().is_relative_to(Path.cwd()):
        return path
    return os.path.relpath(path)


def _command(name: str) -> str:
    """A command as it is typed here: also from an environment that is not activated."""
    beside = Path(sys.executable).parent / name
    if shutil.which(name) is not None or not beside.is_file():
        return name
    return _short(str(beside))
