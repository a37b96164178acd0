"""Sinks: the first tokens of the sequence, merged into what the tokens of a window layer have seen without them.

A token attends to the sinks before its window. There are few, so one program holds a block of tokens and goes through
the sinks one by one: forward it merges them into the output by log-sum-exp, backward it adds their part of dq and
leaves sums over its block for their dk and dv. Nothing needs an atomic, and every sum has one order.
"""

# B batch, H query heads, G key/value heads, R query heads a key/value head, N tokens, D head dim, S sinks,
# P blocks of tokens

# the arguments of a kernel get their types when it is launched
# mypy: allow-untyped-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lighthouse.attention.kernels.rows import block_of, load_rows, locate, on_device_of, store_rows
from lightning_lighthouse.attention.pyramid import ceil_div

# With 32 values a thread of each of three tiles, nothing is spilled
NUM_WARPS = 8
ROWS_FACTOR = 4


@triton.jit
def _load_row(p_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    i_dim = tl.arange(0, BLOCK_D)
    return tl.load(p_row + i_dim, mask=i_dim < D, other=0.0).to(tl.float32)


@triton.jit
def _logits(b_q, b_k, scale, i_sink, i_token, window):
    """Logits `[BLOCK_N]` of one sink, minus infinity where it is in the window or behind it."""
    return tl.where(i_token - window >= i_sink, tl.sum(b_q * b_k[None, :], 1) * scale, float("-inf"))


@triton.jit(do_not_specialize=["window", "num_sinks", "num_tokens", "num_blocks"])
def _merge_sinks_kernel(
    p_q, stride_qb, stride_qh, stride_qn, p_k, stride_kb, stride_kh, stride_kn, p_v, stride_vb, stride_vh, stride_vn,
    p_out, stride_ob, stride_oh, stride_on, p_lse,
    scale, window, num_sinks, num_tokens, num_blocks,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_batch, i_head, i_row = locate(num_blocks, H, BLOCK_N)
    p_k += i_batch * stride_kb + i_head // R * stride_kh
    p_v += i_batch * stride_vb + i_head // R * stride_vh
    p_out += i_batch * stride_ob + i_head * stride_oh
    p_lse += (i_batch * H + i_head) * num_tokens
    # the tokens before have all sinks in their window
    i_token = window + i_row
    m_token = i_token < num_tokens
    b_q = load_rows(p_q + i_batch * stride_qb + i_head * stride_qh, i_token, stride_qn, 1, m_token, D, BLOCK_D)
    b_out = load_rows(p_out, i_token, stride_on, 1, m_token, D, BLOCK_D)
    b_top = tl.load(p_lse + i_token, mask=m_token, other=0.0)
    b_sum = tl.full((BLOCK_N,), 1.0, tl.float32)
    for i_sink in range(num_sinks):
        b_logit = _logits(b_q, _load_row(p_k, D, BLOCK_D), scale, i_sink, i_token, window)
        b_new = tl.maximum(b_top, b_logit)
        b_kept = tl.exp(b_top - b_new)
        b_weight = tl.exp(b_logit - b_new)
        b_out = b_out * b_kept[:, None] + b_weight[:, None] * _load_row(p_v, D, BLOCK_D)[None, :]
        b_sum = b_sum * b_kept + b_weight
        b_top = b_new
        p_k += stride_kn
        p_v += stride_vn
    store_rows(p_out, b_out / b_sum[:, None], i_token, stride_on, m_token, D, BLOCK_D)
    tl.store(p_lse + i_token, b_top + tl.log(b_sum), mask=m_token)


@triton.jit(do_not_specialize=["window", "num_sinks", "num_tokens", "num_blocks"])
def _sink_gradients_kernel(
    p_q, stride_qb, stride_qh, stride_qn, p_k, stride_kb, stride_kh, stride_kn, p_v, stride_vb, stride_vh, stride_vn,
    p_out, stride_ob, stride_oh, stride_on, p_dout, stride_gb, stride_gh, stride_gn,
    p_dq, stride_db, stride_dh, stride_dn, p_lse, p_dk, p_dv,
    scale, window, num_sinks, num_tokens, num_blocks,
    H: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_batch, i_head, i_row = locate(num_blocks, H, BLOCK_N)
    p_k += i_batch * stride_kb + i_head // R * stride_kh
    p_v += i_batch * stride_vb + i_head // R * stride_vh
    p_dq += i_batch * stride_db + i_head * stride_dh
    p_lse += (i_batch * H + i_head) * num_tokens
    o_block = ((i_batch * H + i_head) * num_blocks + tl.program_id(0) // H % num_blocks) * num_sinks * D
    i_token = window + i_row
    m_token = i_token < num_tokens
    b_q = load_rows(p_q + i_batch * stride_qb + i_head * stride_qh, i_token, stride_qn, 1, m_token, D, BLOCK_D)
    b_dout = load_rows(p_dout + i_batch * stride_gb + i_head * stride_gh, i_token, stride_gn, 1, m_token, D, BLOCK_D)
    b_out = load_rows(p_out + i_batch * stride_ob + i_head * stride_oh, i_token, stride_on, 1, m_token, D, BLOCK_D)
    b_delta = tl.sum(b_dout * b_out, 1)
    # rows behind the last token weigh nothing
    b_lse = tl.load(p_lse + i_token, mask=m_token, other=float("inf"))
    b_dq = load_rows(p_dq, i_token, stride_dn, 1, m_token, D, BLOCK_D)
    i_dim = tl.arange(0, BLOCK_D)
    for i_sink in range(num_sinks):
        b_k = _load_row(p_k, D, BLOCK_D)
        b_p = tl.exp(_logits(b_q, b_k, scale, i_sink, i_token, window) - b_lse)
        b_dp = tl.sum(b_dout * _load_row(p_v, D, BLOCK_D)[None, :], 1)
        b_ds = b_p * (b_dp - b_delta) * scale
        b_dq += b_ds[:, None] * b_k[None, :]
        tl.store(p_dk + o_block + i_dim, tl.sum(b_ds[:, None] * b_q, 0), mask=i_dim < D)
        tl.store(p_dv + o_block + i_dim, tl.sum(b_p[:, None] * b_dout, 0), mask=i_dim < D)
        p_k += stride_kn
        p_v += stride_vn
        o_block += D
    store_rows(p_dq, b_dq, i_token, stride_dn, m_token, D, BLOCK_D)


def merge_sinks(
    q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, out_BHND: Tensor, lse_BHN: Tensor,
    window: int, num_sinks: int, scale: float,
) -> None:  # fmt: skip
    """Add the sinks before the windows to the output and log-sum-exp of the windows, in place.

    Channels are contiguous in all tensors, and lse is contiguous.
    """
    heads, groups, dim = q_BHND.shape[1], k_BGND.shape[1], q_BHND.shape[3]
    num_blocks, block_rows, block_dim = _blocks(q_BHND, window)
    rows = [argument for x in (q_BHND, k_BGND, v_BGND, out_BHND) for argument in (x, *x.stride()[:3])]
    with on_device_of(q_BHND):
        _merge_sinks_kernel[(q_BHND.shape[0] * num_blocks * heads,)](
            *rows, lse_BHN, scale, window, num_sinks, q_BHND.shape[2], num_blocks,
            heads, heads // groups, dim, block_rows, block_dim, num_warps=NUM_WARPS,
        )  # fmt: skip


def add_sink_gradients(
    q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, out_BHND: Tensor, dout_BHND: Tensor, lse_BHN: Tensor,
    dq_BHND: Tensor, dk_BGND: Tensor, dv_BGND: Tensor, window: int, num_sinks: int, scale: float,
) -> None:  # fmt: skip
    """Add to the gradients of the windows what the sinks before them contribute, in place.

    out and lse are the merged ones. Channels are contiguous in all tensors, and lse is contiguous.
    """
    batch, heads, num_tokens, dim = q_BHND.shape
    groups = k_BGND.shape[1]
    num_blocks, block_rows, block_dim = _blocks(q_BHND, window)
    sums_2BHPSD = torch.empty(2, batch, heads, num_blocks, num_sinks, dim, dtype=torch.float32, device=q_BHND.device)
    tensors = (q_BHND, k_BGND, v_BGND, out_BHND, dout_BHND, dq_BHND)
    rows = [argument for x in tensors for argument in (x, *x.stride()[:3])]
    with on_device_of(q_BHND):
        _sink_gradients_kernel[(batch * num_blocks * heads,)](
            *rows, lse_BHN, *sums_2BHPSD, scale, window, num_sinks, num_tokens, num_blocks,
            heads, heads // groups, dim, block_rows, block_dim, num_warps=NUM_WARPS,
        )  # fmt: skip
    dk_BGSD, dv_BGSD = sums_2BHPSD.unflatten(2, (groups, heads // groups)).sum((3, 4))
    dk_BGND[:, :, :num_sinks] += dk_BGSD
    dv_BGND[:, :, :num_sinks] += dv_BGSD


def _blocks(q_BHND: Tensor, window: int) -> tuple[int, int, int]:
    """How many blocks the tokens behind the first window make, their rows, and the head dim as a power of two."""
    block_rows, block_dim = block_of(q_BHND.shape[3], NUM_WARPS * ROWS_FACTOR)
    return ceil_div(q_BHND.shape[2] - window, block_rows), block_rows, block_dim
