"""Scatter: each token sums the outputs of the entries that write to it, one a level; its gradient collects them."""

# The legend is that of kernels/rows.py

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.kernels.ops import Operator, empty_heads_inner, pack, unpack
from lightning_lighthouse.attention.kernels.rows import collect, num_coarsest, spread
from lightning_lighthouse.attention.kernels.tiles import Selection
from lightning_lighthouse.attention.operators import remembered
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


def _scatter_behind(o: Tensor, slots: Tensor, sizes: list[int], mean: bool, front: int) -> Tensor:
    out = _empty_behind(o, slots, sizes, mean, front)
    spread(o, out, slots, unpack(sizes), shift=1, mean=mean, windows=_windows_behind(sizes, front, o.device))
    return out


def _windows_behind(sizes: list[int], front: int, device: torch.device) -> Tensor:
    """`[2, N / window]` int32: where the coarsest windows lie, and how many rows they have; those in front none."""
    # what is made while a CUDA graph is captured belongs to the graph
    is_lasting = device.type != "cuda" or not torch.cuda.is_current_stream_capturing()
    return (_kept_windows if is_lasting else _make_windows)(front, device, *sizes)


def _make_windows(front: int, device: torch.device, *sizes: int) -> Tensor:
    shape = unpack([*sizes])
    window = shape.window(shape.num_levels - 1)
    starts = torch.arange(-front, num_coarsest(shape) - front, device=device) * window
    rows = (shape.num_tokens - front * window - starts).clamp(0, window) * (starts >= 0)
    return torch.stack((starts, rows)).int()


# of a few launches each time, where the kernels of a rank's share are short
_kept_windows = remembered(_make_windows)


def _empty_behind(o: Tensor, slots: Tensor, sizes: list[int], mean: bool, front: int) -> Tensor:
    shape = unpack(sizes)
    return empty_heads_inner(o, shape.num_tokens - front * shape.window(shape.num_levels - 1))


def _scatter_behind_backward(dout: Tensor, slots: Tensor, sizes: list[int], mean: bool, front: int) -> Tensor:
    do = _empty_do(dout, slots, sizes, mean, front)
    windows = _windows_behind(sizes, front, dout.device)
    collect(dout, do, slots, unpack(sizes), shift=1, mean=mean, windows=windows)
    return do


def _empty_do(dout: Tensor, slots: Tensor, sizes: list[int], mean: bool, front: int) -> Tensor:
    return _empty_gathered(dout, slots, sizes, mean)


def _setup_behind(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, slots, *ctx.how = inputs
    ctx.save_for_backward(slots)


def _backward_behind(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return scatter_behind_bwd(dout, *ctx.saved_tensors, *ctx.how), None, None, None, None


scatter_behind_bwd = Operator(_scatter_behind_backward, _empty_do)
scatter_behind_fwd = Operator(_scatter_behind, _empty_behind, _setup_behind, _backward_behind)


def scatter(
    o_BHSD: Tensor, selection: Selection, shape: PyramidShape, config: LighthouseConfig, front: int = 0
) -> Tensor:
    """Return the outputs to the tokens: `[B, H, S, D] -> [B, H, N - F, D]`.

    Entry (l, i) adds to tokens `[i p^l + p^l - 1, i p^l + 2 p^l - 2]`, cut at N - 1. The F tokens of the first `front`
    coarsest windows are left out.
    """
    is_mean = config.combine == "mean"
    if front:
        out: Tensor = scatter_behind_fwd(o_BHSD, selection.slots, pack(shape), is_mean, front)
        return out
    return scatter_fwd(o_BHSD, selection.slots, pack(shape), is_mean)
