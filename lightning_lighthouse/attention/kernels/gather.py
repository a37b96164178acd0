"""Gather: pool the tokens over windows and store the entries that were selected, in one pass over the tokens."""

# The legend is that of kernels/rows.py

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_lighthouse.attention.kernels.ops import Operator, empty_heads_inner, pack, unpack
from lightning_lighthouse.attention.kernels.rows import collect, spread
from lightning_lighthouse.attention.kernels.tiles import Selection
from lightning_lighthouse.attention.pyramid import PyramidShape
from lightning_lighthouse.attention.rotation import Rotation


def _gather(x: Tensor, slots: Tensor, sizes: list[int], turns: Tensor | None, distance: int) -> Tensor:
    xs = _empty_gathered(x, slots, sizes, turns, distance)
    collect(x, xs, slots, unpack(sizes), shift=0, mean=False, turns=turns, distance=distance)
    return xs


def _empty_gathered(x: Tensor, slots: Tensor, sizes: list[int], turns: Tensor | None, distance: int) -> Tensor:
    return empty_heads_inner(x, unpack(sizes).num_gathered)


def _gather_backward(
    dxs: Tensor, slots: Tensor, sizes: list[int], heads_inner: bool, turns: Tensor | None, distance: int
) -> Tensor:
    dx = empty_tokens(dxs, sizes, heads_inner)
    spread(dxs, dx, slots, unpack(sizes), shift=0, mean=False, turns=turns, distance=distance)
    return dx


def _empty_tokens(
    dxs: Tensor, slots: Tensor, sizes: list[int], heads_inner: bool, turns: Tensor | None, distance: int
) -> Tensor:
    return empty_tokens(dxs, sizes, heads_inner)


def empty_tokens(xs_BHSD: Tensor, sizes: list[int], heads_inner: bool) -> Tensor:
    """Uninitialised `[B, H, N, D]` in the memory order of what was gathered from: heads inside of tokens or not."""
    num_tokens = unpack(sizes).num_tokens
    if heads_inner:
        return empty_heads_inner(xs_BHSD, num_tokens)
    return xs_BHSD.new_empty((*xs_BHSD.shape[:2], num_tokens, xs_BHSD.shape[3]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, slots, ctx.sizes, turns, ctx.distance = inputs
    # neither x nor what was gathered: integers, and a few angles
    ctx.save_for_backward(slots, turns)
    ctx.heads_inner = x.stride(1) < x.stride(2)


def _backward(ctx: Any, dxs: Tensor) -> tuple[Tensor | None, ...]:
    slots, turns = ctx.saved_tensors
    return gather_bwd(dxs, slots, ctx.sizes, ctx.heads_inner, turns, ctx.distance), None, None, None, None


gather_bwd = Operator(_gather_backward, _empty_tokens)
gather_fwd = Operator(_gather, _empty_gathered, _setup_context, _backward)


def gather(
    q_BHND: Tensor,
    k_BGND: Tensor,
    v_BGND: Tensor,
    selection: Selection,
    shape: PyramidShape,
    rotation: Rotation | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool q, k and v alike and take the selected entries: `[B, H, N, D] -> [B, H, S, D]`.

    An entry is the mean over its window. Padding counts as zeros and every entry is divided by its whole window. Under
    a rotation the tokens of q and k are first rotated on to the last one of the window.
    """
    sizes = pack(shape)
    turns = None if rotation is None else rotation.steps(shape.pooling_factor, shape.num_levels - 1, q_BHND)
    distance = 0 if rotation is None else rotation.distance
    # one operator each, so that the backward frees each short gradient before it makes the next long one
    qs_BHSD, ks_BGSD = (gather_fwd(x, selection.slots, sizes, turns, distance) for x in (q_BHND, k_BGND))
    return qs_BHSD, ks_BGSD, gather_fwd(v_BGND, selection.slots, sizes, None, 0)
