"""Attention inside a sliding window, with sinks: the forward, and what it shares with the gradients.

A program holds a block of queries and goes through what they see: the sinks before their windows, the keys at the left
edge of the windows under a mask, those that all of them see, and those around the queries themselves under a mask
again. The softmax is taken on the way, so logits never reach the memory. Exponentials are powers of two.

There may be more keys than queries: the first F tokens then have keys alone. Tokens are numbered with them.
"""

# B batch, H query heads, G key/value heads, R query heads a key/value head, N tokens, M = N - F queries, D head dim,
# S sinks

# the arguments of a kernel get their types when it is launched
# mypy: allow-untyped-defs

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lighthouse.attention.kernels.launch import on_device_of
from lightning_lighthouse.attention.kernels.ops import empty_heads_inner
from lightning_lighthouse.attention.kernels.rows import locate, store_rows
from lightning_lighthouse.attention.kernels.window_tiles import Tile, tiles_for
from lightning_lighthouse.attention.pyramid import ceil_div

# Powers of two instead of e: what a GPU computes
LOG2_E = math.log2(math.e)
# Sinks at a time: the fewest that a matrix product takes
BLOCK_SINKS = 16
# Below every logit, and not minus infinity, whose difference with itself is no number
LOWEST = tl.constexpr(-1e30)


@triton.jit
def load_block(p_rows, i_row, stride_row, num_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows `[E, BLOCK_D]` in their own dtype; zeros for padded channels and, if MASKED, from `num_rows` on."""
    i_dim = tl.arange(0, BLOCK_D)
    p_block = p_rows + i_row.to(tl.int64)[:, None] * stride_row + i_dim[None, :]
    if D != BLOCK_D:
        m_dim = (i_dim < D)[None, :]
        if MASKED:
            return tl.load(p_block, mask=(i_row < num_rows)[:, None] & m_dim, other=0.0)
        return tl.load(p_block, mask=m_dim, other=0.0)
    if MASKED:
        return tl.load(p_block, mask=(i_row < num_rows)[:, None], other=0.0)
    return tl.load(p_block)


@triton.jit
def dot(b_left, b_right, UPCAST: tl.constexpr):
    """A product of matrices, summed in fp32."""
    if UPCAST:
        b_left, b_right = b_left.to(tl.float32), b_right.to(tl.float32)
    return tl.dot(b_left, b_right)


@triton.jit
def key_range(first, num_tokens, window, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where the keys of the queries from `first` on begin, are seen by all of them, no longer are, and end."""
    last = first + BLOCK_Q - 1
    begin = tl.maximum(first - window + 1, 0) // BLOCK_K * BLOCK_K
    end = tl.minimum(last + 1, num_tokens)
    full_begin = tl.minimum(tl.cdiv(tl.maximum(last - window + 1, 0), BLOCK_K) * BLOCK_K, end)
    full_end = tl.maximum((first + 1) // BLOCK_K * BLOCK_K, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
def _attend(
    b_q, b_out, b_top, b_sum, p_k, stride_kn, p_v, stride_vn, begin, end, i_query, scale, window, num_tokens,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Take the keys `begin` to `end` into the softmax. KIND: "full" for keys that all queries see, "edge", "sinks"."""
    for first in range(begin, end, BLOCK_K):
        i_key = first + tl.arange(0, BLOCK_K)
        b_k = load_block(p_k, i_key, stride_kn, num_tokens, D, BLOCK_D, KIND != "full")
        b_product = dot(b_q, tl.trans(b_k), UPCAST)
        if KIND == "edge":
            distance = i_query[:, None] - i_key[None, :]
            b_product = tl.where((distance >= 0) & (distance < window), b_product, float("-inf"))
        if KIND == "sinks":
            m_seen = (i_query[:, None] - i_key[None, :] >= window) & (i_key < end)[None, :]
            b_product = tl.where(m_seen, b_product, float("-inf"))
        b_new = tl.maximum(b_top, tl.max(b_product, 1) * scale)
        b_weight = tl.exp2(b_product * scale - b_new[:, None])
        b_kept = tl.exp2(b_top - b_new)
        b_v = load_block(p_v, i_key, stride_vn, num_tokens, D, BLOCK_D, KIND != "full")
        b_out = b_out * b_kept[:, None] + dot(b_weight.to(b_v.dtype), b_v, UPCAST)
        b_sum = b_sum * b_kept + tl.sum(b_weight, 1)
        b_top = b_new
    return b_out, b_top, b_sum


@triton.jit(do_not_specialize=["window", "num_sinks", "num_tokens", "num_front", "num_blocks"])
def _window_fwd_kernel(
    p_q, stride_qb, stride_qh, stride_qn, p_k, stride_kb, stride_kh, stride_kn, p_v, stride_vb, stride_vh, stride_vn,
    p_out, stride_ob, stride_oh, stride_on, p_lse,
    scale, window, num_sinks, num_tokens, num_front, num_blocks,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, SINKS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    i_batch, i_head, i_row = locate(num_blocks, H, BLOCK_Q)
    num_queries = num_tokens - num_front
    i_query = i_row + num_front
    first = tl.program_id(0) // H % num_blocks * BLOCK_Q + num_front
    p_k += i_batch * stride_kb + i_head // R * stride_kh
    p_v += i_batch * stride_vb + i_head // R * stride_vh
    p_q += i_batch * stride_qb + i_head * stride_qh
    b_q = load_block(p_q, i_row, stride_qn, num_queries, D, BLOCK_D, True)
    b_out = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    b_top = tl.full((BLOCK_Q,), LOWEST, tl.float32)
    b_sum = tl.zeros((BLOCK_Q,), tl.float32)
    if SINKS:
        num_seen = tl.minimum(num_sinks, tl.maximum(first + BLOCK_Q - window, 0))
        b_out, b_top, b_sum = _attend(
            b_q, b_out, b_top, b_sum, p_k, stride_kn, p_v, stride_vn, 0, num_seen, i_query, scale, window, num_tokens,
            D, BLOCK_S, BLOCK_D, "sinks", UPCAST,
        )  # fmt: skip
    begin, full_begin, full_end, end = key_range(first, num_tokens, window, BLOCK_Q, BLOCK_K)
    b_out, b_top, b_sum = _attend(
        b_q, b_out, b_top, b_sum, p_k, stride_kn, p_v, stride_vn, begin, full_begin, i_query, scale, window, num_tokens,
        D, BLOCK_K, BLOCK_D, "edge", UPCAST,
    )  # fmt: skip
    b_out, b_top, b_sum = _attend(
        b_q, b_out, b_top, b_sum, p_k, stride_kn, p_v, stride_vn, full_begin, full_end, i_query, scale, window,
        num_tokens, D, BLOCK_K, BLOCK_D, "full", UPCAST,
    )  # fmt: skip
    b_out, b_top, b_sum = _attend(
        b_q, b_out, b_top, b_sum, p_k, stride_kn, p_v, stride_vn, full_end, end, i_query, scale, window, num_tokens,
        D, BLOCK_K, BLOCK_D, "edge", UPCAST,
    )  # fmt: skip
    m_query = i_row < num_queries
    # rows behind the last token see nothing
    b_sum = tl.where(m_query, b_sum, 1.0)
    p_out += i_batch * stride_ob + i_head * stride_oh
    store_rows(p_out, b_out / b_sum[:, None], i_row, stride_on, m_query, D, BLOCK_D)
    tl.store(p_lse + (i_batch * H + i_head) * num_queries + i_row, b_top + tl.log2(b_sum), mask=m_query)


def window_fwd(
    q_BHMD: Tensor, k_BGND: Tensor, v_BGND: Tensor, window: int, num_sinks: int, scale: float,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output `[B, H, M, D]`, laid out as a model does, and log-sum-exp `[B, H, M]` to the base 2.

    Channels are contiguous in all tensors, and `scale` is positive. The queries are those of the last M tokens.
    """
    batch, heads, num_queries, dim = q_BHMD.shape
    num_tokens = k_BGND.shape[2]
    out_BHMD = empty_heads_inner(q_BHMD, num_queries)
    lse_BHM = q_BHMD.new_empty((batch, heads, num_queries), dtype=torch.float32)
    tile = tile or tiles_for(dim, window, q_BHMD.device).forward
    num_blocks = ceil_div(num_queries, tile.queries)
    with on_device_of(q_BHMD):
        _window_fwd_kernel[(batch * num_blocks * heads,)](
            *rows_of(q_BHMD, k_BGND, v_BGND, out_BHMD), lse_BHM,
            scale * LOG2_E, window, num_sinks, num_tokens, num_tokens - num_queries, num_blocks,
            heads, heads // k_BGND.shape[1], dim, num_sinks > 0, BLOCK_SINKS,
            tile.queries, tile.keys, block_dim(dim), upcasts(q_BHMD),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out_BHMD, lse_BHM


def rows_of(*tensors: Tensor) -> list[Any]:
    """Each tensor followed by its strides, but for that of the channels, as kernels take them."""
    return [argument for x in tensors for argument in (x, *x.stride()[:3])]


def block_dim(dim: int) -> int:
    """The head dim as a power of two that a matrix product takes."""
    return max(BLOCK_SINKS, triton.next_power_of_2(dim))


def upcasts(x: Tensor) -> bool:
    """Whether products take their operands in fp32: Triton's interpreter knows none in bf16."""
    return x.device.type == "cpu"
