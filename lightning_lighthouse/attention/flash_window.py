"""Windows by the flash kernel inside torch, as one operator with an explicit backward; sinks merged by log-sum-exp.

The sinks before a token's window are attended to by themselves (kernels/sinks.py) and merged with what the kernel
returns. The backward needs no other kernel: with the merged output and log-sum-exp the probabilities
`exp(logit - lse)` and the row sums `dout . out` are those of the whole, so torch's backward over the windows, and the
sinks by the same formula, add up to the exact gradients.
"""

# B batch, H query heads, G key/value heads, N tokens, D head dim

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lighthouse.attention.kernels.ops import Operator
from lightning_lighthouse.attention.kernels.sinks import add_sink_gradients, merge_sinks

# The kernel reads channels in pieces of 16 bytes.
PIECE_BYTES = 16
PIECE_CHANNELS = 8


def _attend_window(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float) -> tuple[Tensor, Tensor]:
    q, k, v = (_in_pieces(_tokens_first(x)) for x in (q, k, v))
    out, lse = flash_forward(q, k, v, window, scale)
    q, k, v, out = (x.transpose(1, 2) for x in (q, k, v, out))
    if sinks > 0:
        merge_sinks(q, k, v, out, lse, window, sinks, scale)
    return out, lse


def _empty_output(q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, scale: float) -> tuple[Tensor, Tensor]:
    # the kernel returns the memory order of q
    return torch.empty_like(_tokens_first(q)).transpose(1, 2), q.new_empty(q.shape[:3], dtype=torch.float32)


def _attend_window_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (_in_pieces(_tokens_first(x)) for x in (q, k, v))
    # torch would copy these two for itself
    dout, out = (x.transpose(1, 2).contiguous() for x in (dout, out))
    dq, dk, dv = flash_backward(dout, q, k, v, out, lse, window, scale)
    q, k, v, dout, out, dq, dk, dv = (x.transpose(1, 2) for x in (q, k, v, dout, out, dq, dk, dv))
    if sinks > 0:
        add_sink_gradients(q, k, v, out, dout, lse, dq, dk, dv, window, sinks, scale)
    return dq, dk, dv


def _empty_gradients(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int, sinks: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty_like(_tokens_first(x)).transpose(1, 2) for x in (q, k, v))
    return dq, dk, dv


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


def flash_window(
    q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, window: int, *, sink_tokens: int, scale: float | None
) -> Tensor:
    """Each token sees itself, the `window - 1` tokens before it and the first `sink_tokens`; 16 bits on CUDA.

    Grouped heads are not repeated, except that torch's backward expands dk and dv before it sums them. The backward
    repeats bit for bit where `torch.use_deterministic_algorithms(True)` asks for it.

    Args:
        q_BHND: `[B, H, N, D]`, D at most 256.
        k_BGND: `[B, G, N, D]`.
        v_BGND: `[B, G, N, D]`.
        window: Tokens, at least 1; with `sink_tokens` less than N.
        sink_tokens: At least 0.
        scale: Factor of the attention logits; None: `D ** -0.5`.

    Returns:
        `[B, H, N, D]`.
    """
    dim = q_BHND.shape[3]
    scale = dim**-0.5 if scale is None else scale
    pad = -dim % PIECE_CHANNELS
    if pad:
        # channels of zeros change no logit
        q_BHND, k_BGND, v_BGND = (torch.nn.functional.pad(x, (0, pad)) for x in (q_BHND, k_BGND, v_BGND))
    out_BHND, _ = attend_window_fwd(q_BHND, k_BGND, v_BGND, window, sink_tokens, scale)
    return out_BHND[..., :dim] if pad else out_BHND


def flash_forward(q_BNHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor, window: int, scale: float) -> tuple[Tensor, Tensor]:
    """Output `[B, N, H, D]` and log-sum-exp `[B, H, N]` of torch's flash kernel."""
    num_tokens = q_BNHD.shape[1]
    return torch.ops.aten._flash_attention_forward(
        q_BNHD, k_BNGD, v_BNGD, None, None, num_tokens, num_tokens, 0.0, False, False,
        scale=scale, window_size_left=window - 1, window_size_right=0,
    )[:2]  # fmt: skip


def flash_backward(
    dout_BNHD: Tensor, q_BNHD: Tensor, k_BNGD: Tensor, v_BNGD: Tensor, out_BNHD: Tensor, lse_BHN: Tensor,
    window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v by torch's flash kernel."""
    num_tokens = q_BNHD.shape[1]
    # read for dropout only
    state = lse_BHN.new_empty(0)
    return torch.ops.aten._flash_attention_backward(
        dout_BNHD, q_BNHD, k_BNGD, v_BNGD, out_BNHD, lse_BHN, None, None, num_tokens, num_tokens, 0.0, False,
        state, state, scale=scale, window_size_left=window - 1, window_size_right=0,
    )  # fmt: skip


def _tokens_first(x_BHND: Tensor) -> Tensor:
    """`[B, N, H, D]`, as the kernel takes it, with contiguous channels."""
    x_BNHD = x_BHND.transpose(1, 2)
    return x_BNHD if x_BNHD.stride(-1) == 1 else x_BNHD.contiguous()


def _in_pieces(x_BNHD: Tensor) -> Tensor:
    """The tensor itself, or a copy in the same order where rows do not begin at pieces, which the kernel reads."""
    starts = (x_BNHD.data_ptr(), *(stride * x_BNHD.element_size() for stride in x_BNHD.stride()[:3]))
    return x_BNHD if all(start % PIECE_BYTES == 0 for start in starts) else x_BNHD.clone()
