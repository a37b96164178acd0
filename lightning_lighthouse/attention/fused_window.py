"""Windows by the Triton kernels of this package, as one operator with an explicit backward."""

# B batch, H query heads, G key/value heads, N tokens, M queries, D head dim

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lighthouse.attention.kernels.ops import Operator, empty_heads_inner
from lightning_lighthouse.attention.kernels.window import window_fwd
from lightning_lighthouse.attention.kernels.window_gradients import window_bwd


def _attend_window(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (_channels_inner(x) for x in (q, k, v))
    return window_fwd(q, k, v, window, sinks, scale)


def _empty_output(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float) -> tuple[Tensor, Tensor]:
    return empty_heads_inner(q, q.shape[2]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _attend_window_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, out = (_channels_inner(x) for x in (dout, q, k, v, out))
    return window_bwd(dout, q, k, v, out, lse, window, sinks, scale)


def _empty_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (empty_heads_inner(x, x.shape[2]) for x in (q, k, v))
    return dq, dk, dv


def _channels_inner(x_BHND: Tensor) -> Tensor:
    """The tensor itself, or a copy with contiguous channels, as the kernels take them."""
    return x_BHND if x_BHND.stride(-1) == 1 else x_BHND.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.numbers = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 6
    return *attend_window_bwd(dout, *ctx.saved_tensors, *ctx.numbers), None, None, None


attend_window_bwd = Operator(_attend_window_backward, _empty_gradients)
attend_window_fwd = Operator(_attend_window, _empty_output, _setup_context, _backward)


def fused_window(
    q_BHMD: Tensor, k_BGND: Tensor, v_BGND: Tensor, window: int, *, sink_tokens: int, scale: float | None
) -> Tensor:
    """Each token sees itself, the `window - 1` tokens before it and the first `sink_tokens`.

    Grouped heads are not repeated. Forward and backward repeat bit for bit.

    Args:
        q_BHMD: `[B, H, M, D]`, of the last M tokens, D at most 256; on CUDA in 16 bits.
        k_BGND: `[B, G, N, D]`.
        v_BGND: `[B, G, N, D]`.
        window: Tokens, at least 1.
        sink_tokens: At least 0.
        scale: Factor of the attention logits; None: `D ** -0.5`.

    Returns:
        `[B, H, M, D]`.
    """
    scale = q_BHMD.shape[3] ** -0.5 if scale is None else scale
    if scale <= 0:
        # the kernels take maxima before they scale
        q_BHMD, scale = (-q_BHMD, -scale) if scale < 0 else (q_BHMD * 0, 1.0)
    return attend_window_fwd(q_BHMD, k_BGND, v_BGND, window, sink_tokens, scale)[0]
