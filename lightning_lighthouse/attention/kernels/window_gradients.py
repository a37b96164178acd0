"""The gradients of attention inside a sliding window with sinks: a kernel for dq, one for dk and dv, one for sinks.

All take the probabilities from the log-sum-exp of the forward, so nothing but the output had to be kept. The kernel of
dq leaves `delta = dout . out` for the others. A sink is seen from everywhere: the third kernel sums its dk and dv over
parts of the queries that have it before their windows, and torch adds up the parts. Nothing needs an atomic, and every
sum has one order.
"""

# B batch, H query heads, G key/value heads, R query heads a key/value head, N tokens, M queries, those of the last
# tokens, D head dim, S sinks, P parts of the queries

# the arguments of a kernel get their types when it is launched
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lighthouse.attention.kernels.launch import on_device_of
from lightning_lighthouse.attention.kernels.ops import empty_heads_inner
from lightning_lighthouse.attention.kernels.rows import locate, store_rows
from lightning_lighthouse.attention.kernels.window import (
    BLOCK_SINKS,
    LOG2_E,
    block_dim,
    dot,
    key_range,
    load_block,
    rows_of,
    upcasts,
)
from lightning_lighthouse.attention.kernels.window_tiles import Tile, tiles_for
from lightning_lighthouse.attention.pyramid import ceil_div

# Queries of a part: enough programs for a GPU from 32,768 tokens on, and few sums to add up
PART = 1024


@triton.jit
def _seen(i_query, i_key, window, end, KIND: tl.constexpr):
    """Whether queries see keys; as sinks, those before `end` that are not in the window or behind it."""
    distance = i_query - i_key
    if KIND == "sinks":
        return (distance >= window) & (i_key < end)
    return (distance >= 0) & (distance < window)


@triton.jit
def _add_dq(
    b_dq, b_q, b_dout, b_lse, b_delta, p_k, stride_kn, p_v, stride_vn, begin, end, i_query, scale, window, num_tokens,
    D: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What the keys `begin` to `end` contribute to dq. KIND: "full" where all queries see all keys, "edge", "sinks"."""
    for first in range(begin, end, BLOCK_K):
        i_key = first + tl.arange(0, BLOCK_K)
        b_k = load_block(p_k, i_key, stride_kn, num_tokens, D, BLOCK_D, KIND != "full")
        b_v = load_block(p_v, i_key, stride_vn, num_tokens, D, BLOCK_D, KIND != "full")
        b_p = tl.exp2(dot(b_q, tl.trans(b_k), UPCAST) * scale - b_lse[:, None])
        if KIND != "full":
            b_p = tl.where(_seen(i_query[:, None], i_key[None, :], window, end, KIND), b_p, 0.0)
        b_ds = b_p * (dot(b_dout, tl.trans(b_v), UPCAST) - b_delta[:, None])
        b_dq += dot(b_ds.to(b_k.dtype), b_k, UPCAST)
    return b_dq


@triton.jit(do_not_specialize=["window", "num_sinks", "num_tokens", "num_front", "num_blocks"])
def _window_dq_kernel(
    p_q, stride_qb, stride_qh, stride_qn, p_k, stride_kb, stride_kh, stride_kn, p_v, stride_vb, stride_vh, stride_vn,
    p_out, stride_ob, stride_oh, stride_on, p_dout, stride_gb, stride_gh, stride_gn,
    p_dq, stride_db, stride_dh, stride_dn, p_lse, p_delta,
    scale, scale_log2, window, num_sinks, num_tokens, num_front, num_blocks,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, SINKS: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    i_batch, i_head, i_row = locate(num_blocks, H, BLOCK_Q)
    num_queries = num_tokens - num_front
    i_query = i_row + num_front
    first = tl.program_id(0) // H % num_blocks * BLOCK_Q + num_front
    m_query = i_row < num_queries
    p_q += i_batch * stride_qb + i_head * stride_qh
    p_k += i_batch * stride_kb + i_head // R * stride_kh
    p_v += i_batch * stride_vb + i_head // R * stride_vh
    p_dout += i_batch * stride_gb + i_head * stride_gh
    p_out += i_batch * stride_ob + i_head * stride_oh
    o_row = (i_batch * H + i_head) * num_queries + i_row
    b_q = load_block(p_q, i_row, stride_qn, num_queries, D, BLOCK_D, True)
    b_dout = load_block(p_dout, i_row, stride_gn, num_queries, D, BLOCK_D, True)
    b_out = load_block(p_out, i_row, stride_on, num_queries, D, BLOCK_D, True)
    b_delta = tl.sum(b_dout.to(tl.float32) * b_out.to(tl.float32), 1)
    tl.store(p_delta + o_row, b_delta, mask=m_query)
    # rows behind the last token weigh nothing
    b_lse = tl.load(p_lse + o_row, mask=m_query, other=float("inf"))
    b_dq = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    if SINKS:
        num_seen = tl.minimum(num_sinks, tl.maximum(first + BLOCK_Q - window, 0))
        b_dq = _add_dq(
            b_dq, b_q, b_dout, b_lse, b_delta, p_k, stride_kn, p_v, stride_vn, 0, num_seen, i_query, scale_log2,
            window, num_tokens, D, BLOCK_S, BLOCK_D, "sinks", UPCAST,
        )  # fmt: skip
    begin, full_begin, full_end, end = key_range(first, num_tokens, window, BLOCK_Q, BLOCK_K)
    b_dq = _add_dq(
        b_dq, b_q, b_dout, b_lse, b_delta, p_k, stride_kn, p_v, stride_vn, begin, full_begin, i_query, scale_log2,
        window, num_tokens, D, BLOCK_K, BLOCK_D, "edge", UPCAST,
    )  # fmt: skip
    b_dq = _add_dq(
        b_dq, b_q, b_dout, b_lse, b_delta, p_k, stride_kn, p_v, stride_vn, full_begin, full_end, i_query, scale_log2,
        window, num_tokens, D, BLOCK_K, BLOCK_D, "full", UPCAST,
    )  # fmt: skip
    b_dq = _add_dq(
        b_dq, b_q, b_dout, b_lse, b_delta, p_k, stride_kn, p_v, stride_vn, full_end, end, i_query, scale_log2,
        window, num_tokens, D, BLOCK_K, BLOCK_D, "edge", UPCAST,
    )  # fmt: skip
    p_dq += i_batch * stride_db + i_head * stride_dh
    store_rows(p_dq, b_dq * scale, i_row, stride_dn, m_query, D, BLOCK_D)


@triton.jit
def _add_dk_dv(
    b_dk, b_dv, b_k, b_v, p_q, stride_qn, p_dout, stride_gn, p_lse, p_delta, begin, end, i_key, scale, window,
    num_sinks,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr, KIND: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """What the queries `begin` to `end` contribute to dk and dv. KIND: as in `_add_dq`."""
    for first in range(begin, end, BLOCK_Q):
        i_query = first + tl.arange(0, BLOCK_Q)
        b_q = load_block(p_q, i_query, stride_qn, end, D, BLOCK_D, KIND != "full")
        b_dout = load_block(p_dout, i_query, stride_gn, end, D, BLOCK_D, KIND != "full")
        if KIND == "full":
            b_lse = tl.load(p_lse + i_query)
            b_delta = tl.load(p_delta + i_query)
        else:
            # rows behind the last one weigh nothing
            b_lse = tl.load(p_lse + i_query, mask=i_query < end, other=float("inf"))
            b_delta = tl.load(p_delta + i_query, mask=i_query < end, other=0.0)
        b_p = tl.exp2(dot(b_k, tl.trans(b_q), UPCAST) * scale - b_lse[None, :])
        if KIND != "full":
            b_p = tl.where(_seen(i_query[None, :], i_key[:, None], window, num_sinks, KIND), b_p, 0.0)
        b_dv += dot(b_p.to(b_dout.dtype), b_dout, UPCAST)
        b_ds = b_p * (dot(b_v, tl.trans(b_dout), UPCAST) - b_delta[None, :])
        b_dk += dot(b_ds.to(b_q.dtype), b_q, UPCAST)
    return b_dk, b_dv


@triton.jit
def rows_of_queries(
    p_q, stride_qb, stride_qh, stride_qn, p_dout, stride_gb, stride_gh, stride_gn, p_lse, p_delta, i_batch, i_head,
    num_tokens, num_front, G: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Pointers to what the queries of a key/value head have, that tokens are counted from."""
    o_front = num_front.to(tl.int64)
    p_q += i_batch * stride_qb + i_head * R * stride_qh - o_front * stride_qn
    p_dout += i_batch * stride_gb + i_head * R * stride_gh - o_front * stride_gn
    o_row = (i_batch * G + i_head) * R * (num_tokens - num_front) - o_front
    return p_q, p_dout, p_lse + o_row, p_delta + o_row


@triton.jit(do_not_specialize=["window", "num_tokens", "num_front", "num_blocks"])
def _window_dk_dv_kernel(
    p_q, stride_qb, stride_qh, stride_qn, p_k, stride_kb, stride_kh, stride_kn, p_v, stride_vb, stride_vh, stride_vn,
    p_dout, stride_gb, stride_gh, stride_gn, p_dk, stride_eb, stride_eh, stride_en, p_dv, stride_fb, stride_fh,
    stride_fn, p_lse, p_delta,
    scale, scale_log2, window, num_tokens, num_front, num_blocks,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    i_batch, i_head, i_key = locate(num_blocks, G, BLOCK_K)
    begin = tl.program_id(0) // G % num_blocks * BLOCK_K
    p_k += i_batch * stride_kb + i_head * stride_kh
    p_v += i_batch * stride_vb + i_head * stride_vh
    b_k = load_block(p_k, i_key, stride_kn, num_tokens, D, BLOCK_D, True)
    b_v = load_block(p_v, i_key, stride_vn, num_tokens, D, BLOCK_D, True)
    p_q, p_dout, p_lse, p_delta = rows_of_queries(
        p_q, stride_qb, stride_qh, stride_qn, p_dout, stride_gb, stride_gh, stride_gn, p_lse, p_delta, i_batch, i_head,
        num_tokens, num_front, G, R,
    )  # fmt: skip
    b_dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    b_dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    # the queries that see a key of this block; from full_begin to full_end each sees all of them
    end = tl.minimum(begin + BLOCK_K - 1 + window, num_tokens)
    first = tl.minimum(tl.maximum(begin, num_front), end)
    few = tl.cdiv(tl.maximum(begin + BLOCK_K - 1 - first, 0), BLOCK_Q) * BLOCK_Q
    full_begin = tl.minimum(first + few, end)
    full = tl.maximum(tl.minimum(begin + window, num_tokens) - full_begin, 0) // BLOCK_Q * BLOCK_Q
    full_end = full_begin + full
    for _ in range(R):
        b_dk, b_dv = _add_dk_dv(
            b_dk, b_dv, b_k, b_v, p_q, stride_qn, p_dout, stride_gn, p_lse, p_delta, first, full_begin, i_key,
            scale_log2, window, 0, D, BLOCK_Q, BLOCK_D, "edge", UPCAST,
        )  # fmt: skip
        b_dk, b_dv = _add_dk_dv(
            b_dk, b_dv, b_k, b_v, p_q, stride_qn, p_dout, stride_gn, p_lse, p_delta, full_begin, full_end, i_key,
            scale_log2, window, 0, D, BLOCK_Q, BLOCK_D, "full", UPCAST,
        )  # fmt: skip
        b_dk, b_dv = _add_dk_dv(
            b_dk, b_dv, b_k, b_v, p_q, stride_qn, p_dout, stride_gn, p_lse, p_delta, full_end, end, i_key,
            scale_log2, window, 0, D, BLOCK_Q, BLOCK_D, "edge", UPCAST,
        )  # fmt: skip
        p_q += stride_qh
        p_dout += stride_gh
        p_lse += num_tokens - num_front
        p_delta += num_tokens - num_front
    m_key = i_key < num_tokens
    p_dk += i_batch * stride_eb + i_head * stride_eh
    p_dv += i_batch * stride_fb + i_head * stride_fh
    store_rows(p_dk, b_dk * scale, i_key, stride_en, m_key, D, BLOCK_D)
    store_rows(p_dv, b_dv, i_key, stride_fn, m_key, D, BLOCK_D)


@triton.jit(do_not_specialize=["window", "num_sinks", "num_tokens", "num_front", "num_parts"])
def _sink_dk_dv_kernel(
    p_q, stride_qb, stride_qh, stride_qn, p_k, stride_kb, stride_kh, stride_kn, p_v, stride_vb, stride_vh, stride_vn,
    p_dout, stride_gb, stride_gh, stride_gn, p_dk, p_dv, p_lse, p_delta,
    scale, scale_log2, window, num_sinks, num_tokens, num_front, num_parts,
    G: tl.constexpr, R: tl.constexpr, D: tl.constexpr, PART: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    i_head = (tl.program_id(0) % G).to(tl.int64)
    i_part = tl.program_id(0) // G % num_parts
    i_batch = (tl.program_id(0) // G // num_parts).to(tl.int64)
    i_key = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    p_k += i_batch * stride_kb + i_head * stride_kh
    p_v += i_batch * stride_vb + i_head * stride_vh
    b_k = load_block(p_k, i_key, stride_kn, num_sinks, D, BLOCK_D, True)
    b_v = load_block(p_v, i_key, stride_vn, num_sinks, D, BLOCK_D, True)
    p_q, p_dout, p_lse, p_delta = rows_of_queries(
        p_q, stride_qb, stride_qh, stride_qn, p_dout, stride_gb, stride_gh, stride_gn, p_lse, p_delta, i_batch, i_head,
        num_tokens, num_front, G, R,
    )  # fmt: skip
    b_dk = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    b_dv = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
    # the tokens before have all sinks in their window
    begin = tl.maximum(window, num_front) + i_part * PART
    end = tl.minimum(begin + PART, num_tokens)
    for _ in range(R):
        b_dk, b_dv = _add_dk_dv(
            b_dk, b_dv, b_k, b_v, p_q, stride_qn, p_dout, stride_gn, p_lse, p_delta, begin, end, i_key,
            scale_log2, window, num_sinks, D, BLOCK_Q, BLOCK_D, "sinks", UPCAST,
        )  # fmt: skip
        p_q += stride_qh
        p_dout += stride_gh
        p_lse += num_tokens - num_front
        p_delta += num_tokens - num_front
    o_sum = ((i_batch * G + i_head) * num_parts + i_part) * num_sinks * D
    store_rows(p_dk + o_sum, b_dk * scale, i_key, D, i_key < num_sinks, D, BLOCK_D)
    store_rows(p_dv + o_sum, b_dv, i_key, D, i_key < num_sinks, D, BLOCK_D)


def window_bwd(
    dout_BHMD: Tensor, q_BHMD: Tensor, k_BGND: Tensor, v_BGND: Tensor, out_BHMD: Tensor, lse_BHM: Tensor,
    window: int, num_sinks: int, scale: float, dq_tile: Tile | None = None, dkdv_tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, laid out as a model does.

    Args:
        dout_BHMD: `[B, H, M, D]`.
        q_BHMD: `[B, H, M, D]`.
        k_BGND: `[B, G, N, D]`.
        v_BGND: `[B, G, N, D]`.
        out_BHMD: `[B, H, M, D]`, of `window_fwd`.
        lse_BHM: `[B, H, M]`, of `window_fwd`.
        window: As in `window_fwd`.
        num_sinks: As in `window_fwd`.
        scale: As in `window_fwd`.
    """
    batch, heads, num_queries, dim = q_BHMD.shape
    groups, num_tokens = k_BGND.shape[1:3]
    num_front = num_tokens - num_queries
    dq_BHMD, dk_BGND, dv_BGND = (empty_heads_inner(x, x.shape[2]) for x in (q_BHMD, k_BGND, v_BGND))
    delta_BHM = torch.empty_like(lse_BHM)
    tiles = tiles_for(dim, window, q_BHMD.device)
    dq_tile, dkdv_tile = dq_tile or tiles.dq, dkdv_tile or tiles.dkdv
    scales = (scale, scale * LOG2_E)
    sizes = (heads // groups, dim)
    blocks = (block_dim(dim), upcasts(q_BHMD))
    num_blocks = ceil_div(num_queries, dq_tile.queries)
    with on_device_of(q_BHMD):
        _window_dq_kernel[(batch * num_blocks * heads,)](
            *rows_of(q_BHMD, k_BGND, v_BGND, out_BHMD, dout_BHMD, dq_BHMD), lse_BHM, delta_BHM,
            *scales, window, num_sinks, num_tokens, num_front, num_blocks,
            heads, *sizes, num_sinks > 0, BLOCK_SINKS, dq_tile.queries, dq_tile.keys, *blocks,
            num_warps=dq_tile.num_warps, num_stages=dq_tile.num_stages,
        )  # fmt: skip
        num_blocks = ceil_div(num_tokens, dkdv_tile.keys)
        launch = {"num_warps": dkdv_tile.num_warps, "num_stages": dkdv_tile.num_stages}
        _window_dk_dv_kernel[(batch * num_blocks * groups,)](
            *rows_of(q_BHMD, k_BGND, v_BGND, dout_BHMD, dk_BGND, dv_BGND), lse_BHM, delta_BHM,
            *scales, window, num_tokens, num_front, num_blocks, groups, *sizes, dkdv_tile.queries, dkdv_tile.keys,
            *blocks, **launch,
        )  # fmt: skip
        # what all tokens have in their window is done
        num_parts = ceil_div(max(num_tokens - max(window, num_front), 0), PART)
        if num_sinks == 0 or num_parts == 0:
            return dq_BHMD, dk_BGND, dv_BGND
        sums_2BGPSD = q_BHMD.new_empty((2, batch, groups, num_parts, num_sinks, dim), dtype=torch.float32)
        _sink_dk_dv_kernel[(batch * num_parts * groups, ceil_div(num_sinks, dkdv_tile.keys))](
            *rows_of(q_BHMD, k_BGND, v_BGND, dout_BHMD), *sums_2BGPSD, lse_BHM, delta_BHM,
            *scales, window, num_sinks, num_tokens, num_front, num_parts,
            groups, *sizes, PART, dkdv_tile.queries, dkdv_tile.keys, *blocks, **launch,
        )  # fmt: skip
    sums_2BGSD = sums_2BGPSD.sum(3)
    dk_BGND[:, :, :num_sinks] += sums_2BGSD[0]
    dv_BGND[:, :, :num_sinks] += sums_2BGSD[1]
    return dq_BHMD, dk_BGND, dv_BGND
