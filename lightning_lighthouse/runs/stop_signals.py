"""SIGTERM and Ctrl-C as wishes to stop, noted when they come and granted between two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

# `timeout` and some shells send a signal to a process and then to its group: both are one wish.
SECONDS_OF_ONE_WISH = 0.1
HINT = b"Lighthouse: stopping after this step; Ctrl-C again stops at once\n"


class StopSignals:
    """The signals that one process of a run has received.

    Lightning's own handler calls a collective wherever the signal strikes, and stops between the batches of a step.
    This one only notes it; a second SIGINT goes to the handler of before, which raises KeyboardInterrupt.
    """

    def __init__(self) -> None:
        # 0 for none; of two the higher number
        self.received = 0
        self._interrupted_at = 0.0
        self._before: Any = None
        self._says_so = False

    def replace_lightnings(self, trainer: Trainer) -> None:
        """Before Lightning sets its handler of SIGTERM: let it set this one, and undo it at the end of the fit."""
        self.received = 0
        trainer._signal_connector._sigterm_notifier_fn = self.note  # type: ignore

    def listen_to_interrupts(self, trainer: Trainer) -> None:
        """From now on note SIGINT too: there is something to lose. Before that it stops the run at once."""
        self._says_so = trainer.is_global_zero
        before = signal.getsignal(signal.SIGINT)
        # nohup and & have it ignored; a second fit finds our own
        if threading.current_thread() is threading.main_thread() and callable(before) and before != self.note:
            self._before = before
            signal.signal(signal.SIGINT, self.note)

    def close(self, trainer: Trainer) -> None:
        """Give SIGINT back, and Lightning its handler."""
        vars(trainer._signal_connector).pop("_sigterm_notifier_fn", None)
        if self._before is not None and signal.getsignal(signal.SIGINT) == self.note:
            signal.signal(signal.SIGINT, self._before)
        self._before = None

    def note(self, signum: int, frame: FrameType | None) -> None:
        """The handler."""
        if signum == signal.SIGINT:
            now = time.monotonic()
            if self._interrupted_at and now - self._interrupted_at > SECONDS_OF_ONE_WISH and self._before is not None:
                signal.signal(signal.SIGINT, self._before)
                self._before(signum, frame)
                return
            if not self._interrupted_at and self._says_so:
                # a logger may be in the middle of a line
                os.write(2, HINT)
            self._interrupted_at = now
        self.received = max(self.received, signum)

    def agree(self, trainer: Trainer) -> int:
        """The signal that any rank has received, 0 for none. Every rank calls it."""
        return int(highest(trainer, self.received))


def highest(trainer: Trainer, value: float) -> float:
    """The highest of the ranks' values. Every rank calls it."""
    if trainer.world_size == 1:
        return value
    # float64 has none on some devices, and float32 holds every number of batches that ends
    number = torch.tensor(float(value), device=trainer.strategy.root_device)
    return float(trainer.strategy.reduce(number, reduce_op="max"))
