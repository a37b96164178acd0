"""Trainings that share a GPU take turns: one trains or evaluates while the others start and compile."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_lighthouse.phases.events import BatchStart, phase_events


def turn_flags(runs: Path, gpu: str | None, is_alone: bool = False) -> list[str]:
    """What gives `lighthouse fit` a `Turns`; this folder has to be in its `PYTHONPATH`.

    Args:
        runs: Folder of the trainings that share GPUs; the lock of each GPU is in it.
        gpu: Where it trains.
        is_alone: As `Turns` has it.
    """
    settings = {"lock": runs.absolute() / f"gpu-{gpu or 0}.lock", "is_alone": str(is_alone).lower()}
    flags = ["--trainer.callbacks+=turns.Turns"]
    return [*flags, *(f"--trainer.callbacks.init_args.{key}={value}" for key, value in settings.items())]


def turn_environment(gpu: str | None) -> dict[str, str]:
    """The environment of a training on one GPU that is given `turn_flags`."""
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": paths} | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})


class Lock:
    """A lock on a file, which the kernel frees where the process dies.

    Args:
        path: Of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: Any = None

    def take(self, kind: int = fcntl.LOCK_EX) -> None:
        """Wait for it; nothing happens where it is held."""
        if self._file is None:
            file = self.path.open("a")
            fcntl.flock(file, kind)
            self._file = file

    def free(self) -> None:
        """Nothing happens where it is not held."""
        if self._file is not None:
            # closing is not enough: processes that read data, forked meanwhile, have the file open too
            fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()
            self._file = None


class Turns(L.Callback):
    """Holds a lock while the GPU is needed and times are taken.

    The first step of each phase compiles, mostly on the CPU, and is not timed: it runs without the lock, and the wait
    for the lock falls into its time. So a step of another training may fall into those that are timed, which matters
    where these are few. This belongs before the `LighthouseCallback`, where the command line puts it.

    Args:
        lock: Path of a file that the trainings of one GPU share.
        is_alone: Let no other training begin or switch while steps are timed.
    """

    def __init__(self, lock: str, is_alone: bool = False) -> None:
        self.is_alone = is_alone
        self._turn, self._starts = Lock(Path(lock)), Lock(Path(f"{lock}.starts"))
        self._phase: str | None = None
        self._is_first = False

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Hear of the phases; an evaluation at a switch is over when its batch begins."""
        phase_events(trainer).subscribe(BatchStart, self._begin)

    def _begin(self, event: BatchStart) -> None:
        self._is_first = event.phase != self._phase
        self._phase = event.phase
        if self._is_first:
            # another one may train while this one compiles
            self._turn.free()
            self._starts.free()
            self._starts.take(fcntl.LOCK_SH)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Wait for the turn after what compiled has run."""
        if not self._is_first:
            return
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        self._starts.free()
        # in this order, or two would wait for each other
        if self.is_alone:
            self._starts.take()
        self._turn.take()

    def teardown(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """What is written at the end needs no GPU."""
        self._turn.free()
        self._starts.free()
