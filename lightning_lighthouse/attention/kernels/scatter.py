"""Scatter: each token sums the outputs of the entries that write to it, one a level; its gradient collects them."""

# The legend is that of kernels/rows.py

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.kernels.ops import Operator, empty_heads_inner, pack, unpack
from lightning_lighthouse.attention.kernels.rows import collect, spread
from lightning_lighthouse.attention.kernels.tiles import Selection
from lightning_lighthouse.attention.pyramid import PyramidShape


def _scatter(o: Tensor, slots: Tensor, sizes: list[int], mean: bool) -> Tensor:
    out = _empty_tokens(o, slots, sizes, mean)
    spread(o, out, slots, unpack(sizes), shift=1, mean=mean)
    return out


def _empty_tokens(o: Tensor, slots: Tensor, sizes: list[int], mean: bool) -> Tensor:
    return empty_heads_inner(o, unpack(sizes).num_tokens)


def _scatter_backward(dout: Tensor, slots: Tensor, sizes: list[int], mean: bool) -> Tensor:
    do = _empty_gathered(dout, slots, sizes, mean)
    collect(dout, do, slots, unpack(sizes), shift=1, mean=mean)
    return do


def _empty_gathered(dout: Tensor, slots: Tensor, sizes: list[int], mean: bool) -> Tensor:
    return empty_heads_inner(dout, unpack(sizes).num_gathered)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, slots, sizes, mean = inputs
    ctx.save_for_backward(slots)
    ctx.sizes, ctx.mean = sizes, mean


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    (slots,) = ctx.saved_tensors
    return scatter_bwd(dout, slots, ctx.sizes, ctx.mean), None, None, None


scatter_bwd = Operator(_scatter_backward, _empty_gathered)
scatter_fwd = Operator(_scatter, _empty_tokens, _setup_context, _backward)


def scatter(o_BHSD: Tensor, selection: Selection, shape: PyramidShape, config: LighthouseConfig) -> Tensor:
    """Return the outputs to the tokens: `[B, H, S, D] -> [B, H, N, D]`.

    Entry (l, i) adds to tokens `[i p^l + p^l - 1, i p^l + 2 p^l - 2]`, cut at N - 1.
    """
    return scatter_fwd(o_BHSD, selection.slots, pack(shape), config.combine == "mean")
