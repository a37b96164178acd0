"""A layer that gives NaN or infinity on request, and a callback that asks for it: what tests of the guard inject."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, value):
        ctx.value = value
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.value, None


class FaultyLinear(nn.Linear):
    """A Linear whose result, or whose gradient, is spoilt while `fault` is set."""

    fault: tuple[str, float] | None = None

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        where, value = self.fault or ("", 0.0)
        if where == "forward":
            # one token: the rest stays finite
            return torch.where(torch.arange(out.shape[1], device=out.device)[:, None] == 5, value, out)
        return _Backward.apply(out, value) if where == "backward" else out


class Spoil(Callback):
    """Spoils the queries and keys of one layer in one batch, on one rank.

    Args:
        batch: Counted from 0 over the whole fit.
        where: "forward", "backward"; or "parameter", which spoils the gradient of the layer's weight alone.
        value: What comes instead.
        rank: Where.
    """

    layer = "model.blocks.2.attn.qkv"

    def __init__(self, batch: int, where: str, value: float = math.nan, rank: int = 0) -> None:
        self.batch, self.where, self.value, self.rank = batch, where, value, rank
        self.batches = 0

    def on_fit_start(self, trainer, pl_module):
        linear = pl_module.get_submodule(self.layer)
        # a sharded module has a class of its own already
        if type(linear) is nn.Linear:
            linear.__class__ = FaultyLinear
        if self.where == "parameter":
            linear.weight.register_hook(lambda gradient: gradient * self.value if self.is_armed else gradient)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.is_armed = self.batches == self.batch and trainer.global_rank == self.rank
        self.batches += 1
        if self.where != "parameter":
            pl_module.get_submodule(self.layer).fault = (self.where, self.value) if self.is_armed else None
