"""A validation of the weights that a training ends with, where the last of its own is of others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.trainer import call
from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from torch import nn

# by their bytes
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# of a tensor at a time: sums are made of a copy in int64
PIECE = 1 << 24


class LastValidation:
    """The newest validation of a fit, and whether its weights are still there. Every rank calls every method.

    Args:
        trainer: Of the fit.
        module: In training.
    """

    def __init__(self, trainer: Trainer, module: nn.Module) -> None:
        self._trainer, self._module = trainer, module
        self._step = -1
        self._sums: dict[str, list[Tensor]] | None = None

    def note(self) -> None:
        """It has ended."""
        self._step, self._sums = self._trainer.global_step, _checksums(self._module)

    def renew(self) -> None:
        """In `on_train_end`: validate again, where steps, or hooks behind the last step, have changed the weights."""
        if self._step != self._trainer.global_step or self.is_outdated():
            validate_now(self._trainer)

    def is_outdated(self) -> bool:
        """Whether the weights have changed since, on any rank; False where there was none."""
        # it validates the averages that it puts in their place at the end
        if self._sums is None or any(isinstance(each, WeightAveraging) for each in self._trainer.callbacks):  # type: ignore[attr-defined]
            return False
        # Lightning moves the weights to the CPU before it ends a fit, and a hook may have merged some into others
        now, then = (
            {name: [int(piece) for piece in pieces] for name, pieces in sums.items()}
            for sums in (_checksums(self._module), self._sums)
        )
        return bool(self._trainer.strategy.reduce_boolean_decision(now != then, all=False))


@torch.no_grad()
def _checksums(module: nn.Module) -> dict[str, list[Tensor]]:
    """The sum of the bits of each tensor of floats in `final.pt`, of this rank's part, in pieces, as int64 scalars.

    They stay where the weights lie, so that nothing waits for a GPU. Sums of integers are the same on every device and
    in every order, which those of floats are not. A tensor whose bits cannot be seen, such as one that is quantized, is
    left out. Under FSDP, which would gather all weights, nothing is looked at.
    """
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(child, FullyShardedDataParallel) for child in module.modules()):
        return {}
    # FSDP2 has weights whole after a forward, and in parts again behind this call
    weights = module.state_dict().items()
    parts = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in weights}
    return {
        name: [
            piece.sum(dtype=torch.int64) for piece in part.view(INTEGERS[part.element_size()]).reshape(-1).split(PIECE)
        ]
        for name, part in parts.items()
        if type(part) is Tensor and part.is_floating_point() and part.layout is torch.strided
    }


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
