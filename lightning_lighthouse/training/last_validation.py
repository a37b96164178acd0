"""A validation of the weights that a training ends with, where the last of its own is of others."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer import call
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import Tensor, nn


class LastValidation:
    """The newest validation of a fit, and whether its weights are still there. Every rank calls every method.

    Args:
        trainer: Of the fit.
        module: In training.
    """

    def __init__(self, trainer: Trainer, module: nn.Module) -> None:
        self._trainer, self._module = trainer, module
        self._step = -1
        self._norms: list[Tensor] | None = None

    def note(self) -> None:
        """It has ended."""
        self._step, self._norms = self._trainer.global_step, _norms(self._module)

    def renew(self) -> None:
        """In `on_train_end`: validate again, where steps, or hooks behind the last step, have changed the weights."""
        if self._step != self._trainer.global_step or self.is_outdated():
            validate_now(self._trainer)

    def is_outdated(self) -> bool:
        """Whether the weights have changed since, on any rank; False where there was none."""
        # it validates the averages that it puts in their place at the end
        if self._norms is None or any(isinstance(each, WeightAveraging) for each in self._trainer.callbacks):  # type: ignore[attr-defined]
            return False
        now = _norms(self._module)
        # a hook may have merged some into others
        has_changed = len(now) != len(self._norms) or not all(map(torch.equal, self._norms, now))
        return bool(self._trainer.strategy.reduce_boolean_decision(has_changed, all=False))


def _norms(module: nn.Module) -> list[Tensor]:
    """Of each parameter and buffer, where it lies, so that nothing waits for the GPU; of this rank's part."""
    tensors = (tensor.detach() for tensor in chain(module.parameters(), module.buffers()))
    parts = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors)
    # norms of fewer bits would hide small changes, and not all types have any
    wide = (part if part.dtype == torch.float64 else part.float() for part in parts if part.is_floating_point())
    return [torch.linalg.vector_norm(part) for part in wide]


def validate_now(trainer: Trainer) -> None:
    """Run a fit's validation once more, by Lightning's own loop, with its hooks and logged as the others.

    Args:
        trainer: In `on_train_end`; every rank calls it. A fit without validation has none at its end either.
    """
    if not trainer.enable_validation:
        return
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    first_batch = connector._first_loop_iter
    trainer.validating = True
    # the loop has counted the step as done: others are logged before that
    loop._batches_that_stepped -= 1
    try:
        call._call_lightning_module_hook(trainer, "on_validation_model_zero_grad")
        loop.val_loop.run()
    finally:
        loop._batches_that_stepped += 1
        trainer.training = True
        connector._first_loop_iter = first_batch
