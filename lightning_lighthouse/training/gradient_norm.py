"""The norm of all gradients of an optimizer, before they are clipped, whole or sharded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_lighthouse.checks import is_named

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


def gradient_norm(optimizer: torch.optim.Optimizer, trainer: Trainer) -> Tensor | None:
    """The Euclidean norm as a float32 scalar on the device; nothing waits for it. Every rank calls it.

    Args:
        optimizer: In `on_before_optimizer_step`: the gradients are unscaled, and reduced over the ranks.
        trainer: Its strategy.

    Returns:
        None where this rank cannot see it: under FSDPStrategy, whose parameters are flat pieces, DeepSpeed, whose
        gradients are its own, and without any gradient.
    """
    if is_named(trainer.strategy, "FSDPStrategy"):
        return None
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    gradients = [parameter.grad.detach() for parameter in parameters if parameter.grad is not None]
    # a sharded one with its peers, for its norm is a sum over ranks
    kinds: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        gradient = gradient.coalesce()._values() if gradient.is_sparse else gradient
        if gradient.numel():
            kinds.setdefault(getattr(gradient, "device_mesh", None), []).append(gradient)
    if not kinds:
        return None
    norms = []
    for alike in kinds.values():
        # the ranks talk to each other where they compute, also of gradients that lie elsewhere
        norm = torch.nn.utils.get_total_norm(alike).to(trainer.strategy.root_device, torch.float32)
        norms.append(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    return torch.linalg.vector_norm(torch.stack(norms))
