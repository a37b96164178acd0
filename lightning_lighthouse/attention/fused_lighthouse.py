"""Lighthouse Attention by the Triton kernels and one kernel of attention, as one operator with an explicit backward.

The same kernels in the same order as stage by stage. But on the CPU an autograd function and torch's SDPA take longer
than many of the kernels they lead to, and there is one of them here in place of six.
"""

# B batch, H query heads, G key/value heads, N tokens, S gathered entries, D head dim

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.kernels.gather import empty_tokens, gather_bwd, gather_fwd
from lightning_lighthouse.attention.kernels.ops import Operator, empty_heads_inner, pack, unpack
from lightning_lighthouse.attention.kernels.rows import num_slots
from lightning_lighthouse.attention.kernels.scatter import scatter_bwd, scatter_fwd
from lightning_lighthouse.attention.kernels.score import score_fwd
from lightning_lighthouse.attention.kernels.select import select_fwd
from lightning_lighthouse.attention.kernels.select_causal import select_causal_fwd
from lightning_lighthouse.attention.pyramid import PyramidShape
from lightning_lighthouse.attention.rotation import Rotation
from lightning_lighthouse.attention.sdpa import in_memory_order
from lightning_lighthouse.attention.sdpa_kernels import KERNELS


def _lighthouse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor | None,
    step: Tensor | None,
    turns: Tensor | None,
    sizes: list[int],
    rule: str,
    cover_prefix: bool,
    seed: int,
    first_head: int,
    distance: int,
    mean: bool,
    scale: float | None,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    if scores is None:
        scores = score_fwd.forward(q, k, sizes, rule == "causal")
    if rule == "causal":
        _, slots = select_causal_fwd.forward(scores, sizes)
    else:
        _, slots = select_fwd.forward(scores, sizes, rule, cover_prefix, seed, step, first_head)
    qs, ks = (gather_fwd.forward(x, slots, sizes, turns, distance) for x in (q, k))
    vs = gather_fwd.forward(v, slots, sizes, None, 0)
    o, lse = KERNELS[kernel].forward(qs, ks, vs, scale)
    return scatter_fwd.forward(o, slots, sizes, mean), qs, ks, vs, o, lse, slots


def _empty(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scores: Tensor | None,
    step: Tensor | None,
    turns: Tensor | None,
    sizes: list[int],
    rule: str,
    cover_prefix: bool,
    seed: int,
    first_head: int,
    distance: int,
    mean: bool,
    scale: float | None,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape = unpack(sizes)
    qs, ks, vs = (empty_heads_inner(x, shape.num_gathered) for x in (q, k, v))
    o, lse = KERNELS[kernel].forward(qs, ks, vs, scale)
    slots = torch.empty(*k.shape[:2], num_slots(shape), dtype=torch.int32, device=k.device)
    return empty_heads_inner(q, shape.num_tokens), qs, ks, vs, o, lse, slots


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, _, _, turns, ctx.sizes, *_, ctx.distance, ctx.mean, ctx.scale, ctx.kernel = inputs
    _, *kept = output
    # the short sequence, neither q, k and v nor the output
    ctx.save_for_backward(*kept, turns)
    ctx.heads_inner = [x.stride(1) < x.stride(2) for x in (q, k, v)]
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)


def _gradients(
    dout: Tensor, kept: list[Tensor], turns: Tensor | None, sizes: list[int], heads_inner: list[bool],
    wanted: list[bool], distance: int, mean: bool, scale: float | None, kernel: str,
) -> list[Tensor | None]:  # fmt: skip
    """Of q, k and v where they are wanted; what was kept is taken out of its list.

    What nobody else holds is free before the long gradients are made.
    """
    slots = kept.pop()
    do = in_memory_order(scatter_bwd(dout, slots, sizes, mean), kept[3].stride())
    short = list(KERNELS[kernel].backward(do, *kept, scale))
    del do
    kept.clear()
    # values are not rotated
    rotations = (turns, distance), (turns, distance), (None, 0)
    gradients: list[Tensor | None] = []
    for is_wanted, is_inner, rotation in zip(wanted, heads_inner, rotations, strict=True):
        # each short gradient is free before the next long one is made
        dxs = short.pop(0)
        gradients.append(gather_bwd(dxs, slots, sizes, is_inner, *rotation) if is_wanted else None)
        del dxs
    return gradients


def _lighthouse_backward(
    dout: Tensor,
    qs: Tensor,
    ks: Tensor,
    vs: Tensor,
    o: Tensor,
    lse: Tensor,
    slots: Tensor,
    turns: Tensor | None,
    sizes: list[int],
    heads_inner: list[bool],
    wanted: list[bool],
    distance: int,
    mean: bool,
    scale: float | None,
    kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:
    kept = [qs, ks, vs, o, lse, slots]
    dq, dk, dv = (
        dout.new_empty(0) if dx is None else dx
        for dx in _gradients(dout, kept, turns, sizes, heads_inner, wanted, distance, mean, scale, kernel)
    )
    return dq, dk, dv


def _empty_gradients(dout: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    qs, ks, vs, _, _, _, _, sizes, heads_inner, wanted, *_ = inputs
    dq, dk, dv = (
        empty_tokens(xs, sizes, is_inner) if is_wanted else dout.new_empty(0)
        for xs, is_inner, is_wanted in zip((qs, ks, vs), heads_inner, wanted, strict=True)
    )
    return dq, dk, dv


def _backward(ctx: Any, dout: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 15
    *kept, turns = ctx.saved_tensors
    # unless the graph is kept
    ctx.maybe_clear_saved_tensors()
    wanted = list(ctx.needs_input_grad[:3])
    how = (turns, ctx.sizes, ctx.heads_inner, wanted, ctx.distance, ctx.mean, ctx.scale, ctx.kernel)
    if Operator.is_watched(dout):
        short = lighthouse_bwd.op(dout, *kept, *how)
        gradients = [dx if is_wanted else None for dx, is_wanted in zip(short, wanted, strict=True)]
    else:
        gradients = _gradients(dout, kept, *how)
    return *gradients, *(None,) * 12


lighthouse_bwd = Operator(_lighthouse_backward, _empty_gradients)
lighthouse_fwd = Operator(_lighthouse, _empty, _setup_context, _backward, keeps=True)


def fused_lighthouse(
    q_BHND: Tensor,
    k_BGND: Tensor,
    v_BGND: Tensor,
    scores: Tensor | None,
    shape: PyramidShape,
    config: LighthouseConfig,
    kernel: str,
    *,
    scale: float | None,
    step: Tensor | None,
    first_head: int,
    rotation: Rotation | None,
) -> Tensor:
    """`lighthouse_attention` where its attention is `kernel` of `sdpa_kernels`, and gradients are wanted.

    Args:
        q_BHND: `[B, H, N, D]`.
        k_BGND: `[B, G, N, D]`.
        v_BGND: `[B, G, N, D]`.
        scores: As `select` of the kernels takes them; None: by the norms of q and k.
        shape: Of N tokens.
        config: Settings.
        kernel: A name in `sdpa_kernels.KERNELS`.
        scale: As in `lighthouse_attention`, and so the others.
        step: As there.
        first_head: As there.
        rotation: As there.

    Returns:
        `[B, H, N, D]`.
    """
    turns = None if rotation is None else rotation.steps(shape.pooling_factor, shape.num_levels - 1, q_BHND)
    return lighthouse_fwd(
        q_BHND, k_BGND, v_BGND, scores, step, turns, pack(shape), config.selection, config.cover_prefix, config.seed,
        first_head, 0 if rotation is None else rotation.distance, config.combine == "mean", scale, kernel,
    )  # fmt: skip
