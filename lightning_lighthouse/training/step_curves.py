"""The curves of the optimizer steps: what is read of a step, and when, without a wait between two points."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_lighthouse.phases.ledger import PhaseTotals
from lightning_lighthouse.runs.layout import (
    DATA_WAIT,
    GRAD_NORM,
    LEARNING_RATE,
    LOSS,
    MEMORY,
    MFU,
    MFU_DENSE_EQUIVALENT,
    STEP_SECONDS,
    TFLOPS,
    TOKENS_PER_SECOND,
)
from lightning_lighthouse.training.attention_curves import AttentionCurves
from lightning_lighthouse.training.gradient_norm import gradient_norm

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_lighthouse.runs.curves import PhaseCurves

# what goes on over a switch without a jump of its own
JOINED = (LOSS, GRAD_NORM, LEARNING_RATE)


@dataclass
class Window:
    """The timed batches since the last point: all but the first of a phase, which compiles.

    Args:
        steps: Optimizer steps.
        tokens: Of all ranks.
        seconds: Of training time. The point before it ended with a wait for the device, as does the one that reads it.
        waiting: What of that went by before the loader handed a batch out.
        flops: Of all ranks.
        dense_flops: What they would be if every layer were dense.
    """

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    waiting: float = 0.0
    flops: float = 0.0
    dense_flops: float = 0.0


class StepCurves:
    """Every `log_every_n_steps`, and around each switch, a point on every curve.

    A step is told in the order of the methods: `begin`, `before_step`, `add_loss`, `read`, `add_time`, `write`. Every
    rank does the same.

    Args:
        trainer: Its setting, its ranks and its device.
        curves: Where the points go.
        attention: What the layers do.
        peak: FLOP/s of a device at most; None where it is not known.
    """

    def __init__(
        self, trainer: Trainer, curves: PhaseCurves, attention: AttentionCurves, peak: float | None = None
    ) -> None:
        self._trainer, self._curves, self._attention, self._peak = trainer, curves, attention, peak
        # the newest value of each curve, for whoever shows how far the run is
        self.newest: dict[str, float] = {}
        self._step, self._phase = 0, ""
        self._is_due = False
        # the phase whose curves get a point beside the next one
        self._meets = ""
        self._losses: list[Tensor] = []
        # of each optimizer
        self._norms: dict[int, Tensor] = {}
        self._rates: dict[int, float] = {}
        self._values: dict[str, float] = {}
        self._window = Window()
        # of the phase's totals, what is in a window, this one or one before
        self._counted = (0, 0.0, 0.0)

    def meet(self, phase: str) -> None:
        """Give the curves of `phase` a point at the next step too, so that they meet the next ones at the switch."""
        self._meets = phase

    def begin(self, batch: Any, step: int, phase: str, next_phase: str, totals: PhaseTotals) -> None:
        """A batch begins; the model attends as in its phase.

        Args:
            batch: With token ids.
            step: Optimizer steps done.
            phase: The phase it runs in.
            next_phase: That of the step behind it, as far as it is known.
            totals: Those of `phase`.
        """
        every = self._trainer.log_every_n_steps  # type: ignore[attr-defined]
        self._is_due = (every > 0 and step % every == 0) or phase != next_phase or bool(self._meets)
        if phase != self._phase:
            self._window, self._counted = Window(), _times(totals)
            self._attention.start_phase(totals)
            self.newest.pop(TOKENS_PER_SECOND, None)
        self._step, self._phase = step, phase
        self._attention.begin(batch, self._is_due)

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer is about to take its step, with its gradients and the rate that it will use."""
        if not self._is_due:
            return
        norm = gradient_norm(optimizer, self._trainer)
        if norm is not None:
            self._norms[id(optimizer)] = norm
        self._rates[id(optimizer)] = float(optimizer.param_groups[0]["lr"])

    def add_loss(self, loss: Tensor) -> None:
        """A batch is done, with a loss, a scalar on its device; a step shows the mean of its batches."""
        self._losses.append(loss.detach())

    def read(self, next_phase: str, totals: PhaseTotals) -> None:
        """An optimizer step is done: where a point is due, wait for the device, and read what it computed.

        Args:
            next_phase: That of the step to come; a switch that was not foreseen makes a point due.
            totals: Those of this phase.
        """
        losses, self._losses = self._losses, []
        norms, self._norms = list(self._norms.values()), {}
        rates, self._rates = list(self._rates.values()), {}
        self._is_due |= self._phase != next_phase
        self._values = {}
        if not self._is_due:
            return
        if losses:
            # every rank logs the same steps, so all of them are here
            mean = self._trainer.strategy.reduce(torch.stack(losses).mean(), reduce_op="mean")
            self._values[LOSS] = float(mean)
        if norms:
            self._values[GRAD_NORM] = float(torch.linalg.vector_norm(torch.stack(norms)))
        if rates:
            self._values[LEARNING_RATE] = rates[0]
        self._values |= self._attention.values(totals)

    def add_time(self, totals: PhaseTotals, steps: int) -> None:
        """The time of a batch was taken.

        Args:
            totals: Of its phase.
            steps: Optimizer steps that it finished.
        """
        now = _times(totals)
        tokens, seconds, waiting = (new - old for new, old in zip(now, self._counted, strict=True))
        self._counted = now
        if tokens or seconds:
            window = self._window
            window.steps += steps
            window.tokens += int(tokens)
            window.seconds += seconds
            window.waiting += waiting
            flops, dense_flops = self._attention.flops(int(tokens))
            window.flops += flops
            window.dense_flops += dense_flops

    def write(self) -> None:
        """Write the point of a step, where one is due."""
        meets, self._meets = self._meets, ""
        if not self._is_due:
            return
        values = self._values | self._speed()
        self.newest |= values
        self._window = Window()
        self._curves.scalars(self._phase, self._step, values)
        if meets and self._step > 0:
            joined = {tag: value for tag, value in values.items() if tag in JOINED}
            self._curves.join(meets, self._step, joined)

    def _speed(self) -> dict[str, float]:
        values = {}
        window = self._window
        if window.seconds > 0 and window.steps:
            if window.tokens:
                values[TOKENS_PER_SECOND] = window.tokens / window.seconds
            values[STEP_SECONDS] = window.seconds / window.steps
            values[DATA_WAIT] = window.waiting / window.seconds
            speed = 1 / (window.seconds * self._trainer.world_size)
            if window.flops:
                values[TFLOPS] = window.flops * speed / 1e12
            if window.flops and self._peak is not None:
                values[MFU] = window.flops * speed / self._peak
                values[MFU_DENSE_EQUIVALENT] = window.dense_flops * speed / self._peak
        memory = peak_memory(self._trainer.strategy.root_device)
        if memory is not None:
            values[MEMORY] = memory / 2**30
        return values


def _times(totals: PhaseTotals) -> tuple[int, float, float]:
    return totals.paced_tokens, totals.paced_seconds, totals.paced_waiting


def peak_memory(device: torch.device) -> int | None:
    """Most bytes allocated on a GPU so far; elsewhere the largest resident size of this process, if it is known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(ImportError):
        # not on Windows
        import resource

        size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Linux counts in KiB
        return size if sys.platform == "darwin" else size * 1024
    return None
