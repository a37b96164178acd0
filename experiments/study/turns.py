"""Trainings that share a GPU take turns: one trains or evaluates while the others start and compile."""

from __future__ import annotations

import fcntl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch


class Turns(L.Callback):
    """Holds a lock while the GPU is needed and times are taken; the kernel frees it where the process dies.

    The first step of each phase compiles, mostly on the CPU, and is not timed: it runs without the lock, and the wait
    for the lock falls into its time. It belongs before the `LighthouseCallback`, where the command line puts it.

    Args:
        lock: Path of a file that the trainings of one GPU share.
        first_steps: Of each phase, counted from zero.
    """

    def __init__(self, lock: str, first_steps: Sequence[int]) -> None:
        self.path = Path(lock)
        self.first_steps = frozenset(first_steps)
        self._held: Any = None

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        """Let another one train while this one compiles."""
        if trainer.global_step in self.first_steps:
            self._release()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Wait for the turn after what compiled has run."""
        if self._held is None:
            if module.device.type == "cuda":
                torch.cuda.synchronize(module.device)
            held = self.path.open("a")
            fcntl.flock(held, fcntl.LOCK_EX)
            self._held = held

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """What is written at the end needs no GPU."""
        self._release()

    def _release(self) -> None:
        if self._held is not None:
            # closing is not enough: processes that read data, forked meanwhile, have the file open too
            fcntl.flock(self._held, fcntl.LOCK_UN)
            self._held.close()
            self._held = None
