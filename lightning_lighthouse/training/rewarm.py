"""The learning rate after the switch, scaled for the update alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_lighthouse.checks import SettingError


class Rewarm:
    """Scales the learning rate of every parameter group for the update alone.

    The rate is multiplied between the closure, which runs forward and backward, and the update, and put back right
    after it: neither a scheduler nor a checkpoint nor a module that sets the rate itself meets the scaled value.

    Args:
        optimizers: The Trainer's, without wrappers.

    Raises:
        SettingError: One is not a torch optimizer, and has no hooks around its step; or is a ZeroRedundancyOptimizer,
            which copies the rate to another optimizer before the closure runs.
    """

    def __init__(self, optimizers: Sequence[Any]) -> None:
        self.factor = 1.0
        self._stepping: set[Optimizer] = set()
        self._closed: set[Optimizer] = set()
        self._rates: dict[Optimizer, list[Any]] = {}
        self._handles: list[RemovableHandle] = []
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer) or _is_sharded(optimizer):
                raise SettingError(f"rewarm_steps needs optimizers of torch.optim, got {type(optimizer).__name__}")
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._on_step_start))
            self._handles.append(optimizer.register_step_post_hook(self._on_step_end))

    def on_closure_end(self, optimizer: Optimizer) -> None:
        """The gradients are ready. Lightning's `on_before_optimizer_step`."""
        self._closed.add(optimizer)
        self._scale(optimizer)

    def start_batch(self, factor: float) -> None:
        """Set the factor of the steps to come. A step that a loss scaler skipped is forgotten."""
        self.factor = factor
        self._stepping.clear()
        self._closed.clear()

    def remove(self) -> None:
        """Leave the optimizers as they were, also after an exception in the middle of a step."""
        for optimizer in list(self._rates):
            self._put_back(optimizer)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # A step calls the closure inside, or a loss scaler calls the step after the closure: the later one scales.
    def _on_step_start(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._stepping.add(optimizer)
        self._scale(optimizer)

    def _on_step_end(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._put_back(optimizer)
        self._stepping.discard(optimizer)
        self._closed.discard(optimizer)

    def _scale(self, optimizer: Optimizer) -> None:
        ready = optimizer in self._stepping and optimizer in self._closed
        if self.factor == 1.0 or not ready or optimizer in self._rates:
            return
        self._rates[optimizer] = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            # a new object, also where the rate is a tensor, which groups may share
            group["lr"] = group["lr"] * self.factor

    def _put_back(self, optimizer: Optimizer) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates.pop(optimizer, []), strict=False):
            group["lr"] = rate


def _is_sharded(optimizer: Optimizer) -> bool:
    """Whether another optimizer inside makes the update."""
    if not torch.distributed.is_available():
        return False
    # a second that one process need not wait
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return isinstance(optimizer, ZeroRedundancyOptimizer)
