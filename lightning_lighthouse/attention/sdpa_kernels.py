"""Causal attention by one kernel of torch, and its backward, for operators that run below autograd.

Each is called as torch's own `scaled_dot_product_attention` and its backward call it, and returns the same bits.
"""

# B batch, H query heads, G key/value heads, S rows, D head dim

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Functions of torch are called in half the time of its operators, and backwards are none
aten = torch.ops.aten
cudnn_backward = aten._scaled_dot_product_cudnn_attention_backward.default
flash_backward = aten._scaled_dot_product_flash_attention_backward.default
efficient_backward = aten._scaled_dot_product_efficient_attention_backward.default
cpu_backward = aten._scaled_dot_product_flash_attention_for_cpu_backward.default


class Kernel(NamedTuple):
    """Attention of q `[B, H, S, D]`, k and v `[B, G, S, D]`; "efficient" wants as many heads of k and v as of q.

    Args:
        forward: Of q, k, v and the scale: o and the logsumexp. A scale of None is `D ** -0.5`.
        backward: Of the gradient in the memory order of o, q, k, v, o, the logsumexp and the scale: dq, dk and dv.
    """

    forward: Callable[[Tensor, Tensor, Tensor, float | None], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    o, lse, *_ = torch._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, True, False, scale=scale)
    return o, lse


def _cudnn_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    # the state of a generator; without dropout nobody reads it
    state = q.new_empty((), dtype=torch.int64)
    rows = q.shape[2]
    dq, dk, dv = cudnn_backward(
        do, q, k, v, o, lse, state, state, None, None, None, rows, rows, 0.0, True, scale=scale
    )  # fmt: skip
    return dq, dk, dv


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    o, lse, *_ = torch._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)
    return o, lse


def _flash_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    state, unused = q.new_empty((2,), dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)
    rows = q.shape[2]
    dq, dk, dv = flash_backward(do, q, k, v, o, lse, None, None, rows, rows, 0.0, True, state, unused, scale=scale)
    return dq, dk, dv


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    o, lse, *_ = torch._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, True, scale=scale)
    return o, lse


def _efficient_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    state = q.new_empty((), dtype=torch.int64)
    dq, dk, dv, _ = efficient_backward(
        do, q, k, v, None, o, lse, state, state, 0.0, [True, True, True, False], True, scale=scale
    )
    return dq, dk, dv


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    o, lse = torch._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=scale)
    return o, lse


def _cpu_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = cpu_backward(do, q, k, v, o, lse, 0.0, True, scale=scale)
    return dq, dk, dv


KERNELS = {
    "cudnn": Kernel(_cudnn_forward, _cudnn_backward),
    "flash": Kernel(_flash_forward, _flash_backward),
    "efficient": Kernel(_efficient_forward, _efficient_backward),
    "cpu": Kernel(_cpu_forward, _cpu_backward),
}
