"""Score: the norms of the tokens, and their maxima at every level above, in one pass over q and k.

Under selection="causal" an entry has the score of its first token, and only one token in p is read.
"""

# The legend is that of kernels/rows.py

# the arguments of a kernel get their types when it is launched
# mypy: allow-untyped-defs

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.kernels.launch import MOST_KEPT, Launch
from lightning_lighthouse.attention.kernels.ops import Operator, pack, unpack, within_reach
from lightning_lighthouse.attention.kernels.rows import (
    UNROLL,
    block_of,
    level_entries,
    level_start,
    load_rows,
    locate,
    num_coarsest,
    rows_of,
)
from lightning_lighthouse.attention.pyramid import PyramidShape, ceil_div

# A warp alone sums its rows without waiting for others
NUM_WARPS = 1


@triton.jit
def _squares(
    p_rows, stride_head, stride_token, stride_dim, i_token, m_token,
    HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The largest squared norm of each token over HEADS heads; NaN if any is."""
    b_square = tl.zeros(i_token.shape, tl.float32)
    for _ in range(HEADS):
        b_rows = load_rows(p_rows, i_token, stride_token, stride_dim, m_token, D, BLOCK_D)
        b_square = tl.maximum(b_square, tl.sum(b_rows * b_rows, 1), propagate_nan=tl.PropagateNan.ALL)
        p_rows += stride_head
    return b_square


@triton.jit
def _score_windows(
    p_q, stride_qh, stride_qn, stride_qd, p_k, stride_kn, stride_kd, p_sq, p_sk, p_windows, i_window,
    num_tokens, num_coarsest,
    LEVEL: tl.constexpr, L: tl.constexpr, W: tl.constexpr, R: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TABLE: tl.constexpr,
):  # fmt: skip
    """Squared scores of the windows `i_window` of LEVEL; the scores of these and of the windows in them are stored."""
    if LEVEL == 0:
        i_token = i_window
        m_token = i_window < num_tokens
        if TABLE:
            i_token, m_token = rows_of(p_windows, i_token, num_tokens, num_coarsest, W ** (L - 1), TABLE)
        b_sq = _squares(p_q, stride_qh, stride_qn, stride_qd, i_token, m_token, R, D, BLOCK_D)
        b_sk = _squares(p_k, 0, stride_kn, stride_kd, i_token, m_token, 1, D, BLOCK_D)
    else:
        b_sq = tl.zeros(i_window.shape, tl.float32)
        b_sk = tl.zeros(i_window.shape, tl.float32)
        for i_child in tl.range(W, loop_unroll_factor=UNROLL if LEVEL == 1 else 1):
            b_child_sq, b_child_sk = _score_windows(
                p_q, stride_qh, stride_qn, stride_qd, p_k, stride_kn, stride_kd, p_sq, p_sk, p_windows,
                i_window * W + i_child, num_tokens, num_coarsest, LEVEL - 1, L, W, R, D, BLOCK_D, TABLE,
            )  # fmt: skip
            b_sq = tl.maximum(b_sq, b_child_sq, propagate_nan=tl.PropagateNan.ALL)
            b_sk = tl.maximum(b_sk, b_child_sk, propagate_nan=tl.PropagateNan.ALL)
        o_entry = level_start(num_coarsest, LEVEL, L, W) + i_window
        m_entry = i_window < level_entries(num_coarsest, LEVEL, L, W)
        # the root keeps the order, so that of a maximum is the maximum of the roots
        tl.store(p_sq + o_entry, tl.sqrt_rn(b_sq), mask=m_entry)
        tl.store(p_sk + o_entry, tl.sqrt_rn(b_sk), mask=m_entry)
    return b_sq, b_sk


@triton.jit(do_not_specialize=["num_tokens", "num_coarsest", "num_blocks", "num_scores", "stride_scores"])
def _score_kernel(
    p_q, p_k, p_scores, p_windows,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    num_tokens, num_coarsest, num_blocks, num_scores, stride_scores,
    G: tl.constexpr, R: tl.constexpr, L: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
    TABLE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_batch, i_head, i_window = locate(num_blocks, G, BLOCK_E)
    p_q += i_batch * stride_qb + i_head * R * stride_qh
    p_k += i_batch * stride_kb + i_head * stride_kh
    p_sq = p_scores + (i_batch * G + i_head) * num_scores
    p_sk = p_sq + stride_scores
    _score_windows(
        p_q, stride_qh, stride_qn, stride_qd, p_k, stride_kn, stride_kd, p_sq, p_sk, p_windows,
        i_window, num_tokens, num_coarsest, L - 1, L, W, R, D, BLOCK_D, TABLE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "num_coarsest", "num_blocks", "num_scores", "stride_scores"])
def _score_first_kernel(
    p_q, p_k, p_scores, p_windows,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    num_tokens, num_coarsest, num_blocks, num_scores, stride_scores,
    G: tl.constexpr, R: tl.constexpr, L: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
    TABLE: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores of the windows of level 1 by their first tokens; those of coarser ones are among them."""
    i_batch, i_head, i_window = locate(num_blocks, G, BLOCK_E)
    p_q += i_batch * stride_qb + i_head * R * stride_qh
    p_k += i_batch * stride_kb + i_head * stride_kh
    p_sq = p_scores + (i_batch * G + i_head) * num_scores
    p_sk = p_sq + stride_scores
    i_token = i_window * W
    m_token = i_token < num_tokens
    if TABLE:
        i_token, m_token = rows_of(p_windows, i_token, num_tokens, num_coarsest, W ** (L - 1), TABLE)
    b_sq = tl.sqrt_rn(_squares(p_q, stride_qh, stride_qn, stride_qd, i_token, m_token, R, D, BLOCK_D))
    b_sk = tl.sqrt_rn(_squares(p_k, 0, stride_kn, stride_kd, i_token, m_token, 1, D, BLOCK_D))
    for LEVEL in tl.static_range(1, L):
        o_entry = level_start(num_coarsest, LEVEL, L, W) + i_window // W ** (LEVEL - 1)
        m_entry = (i_window < level_entries(num_coarsest, 1, L, W)) & (i_window % W ** (LEVEL - 1) == 0)
        tl.store(p_sq + o_entry, b_sq, mask=m_entry)
        tl.store(p_sk + o_entry, b_sk, mask=m_entry)


def _score(q: Tensor, k: Tensor, sizes: list[int], first: bool) -> Tensor:
    scores = _empty_scores(q, k, sizes, first)
    launch_score(q, k, scores, unpack(sizes), first)
    return scores


def launch_score(
    q: Tensor, k: Tensor, scores: Tensor, shape: PyramidShape, first: bool, windows: Tensor | None = None
) -> None:
    """Write the scores `[2, B, G, .]`; `windows` as in `collect`."""
    q, k = within_reach(q), within_reach(k)
    plan = _plan(q.shape, q.stride(), k.shape[1], k.stride(), scores.shape[3], shape, first, windows is not None)
    plan(q, k, scores, windows)


@lru_cache(maxsize=MOST_KEPT)
def _plan(
    q_shape: tuple[int, ...],
    q_strides: tuple[int, ...],
    groups: int,
    k_strides: tuple[int, ...],
    num_scores: int,
    shape: PyramidShape,
    first: bool,
    has_table: bool,
) -> Launch:
    batch, heads, _, dim = q_shape
    block_rows, block_dim = block_of(dim, NUM_WARPS)
    num_blocks = ceil_div(shape.entries(1) if first else num_coarsest(shape), block_rows)
    return Launch(
        _score_first_kernel if first else _score_kernel,
        batch * num_blocks * groups,
        (*q_strides, *k_strides, shape.num_tokens, num_coarsest(shape), num_blocks, num_scores,
         batch * groups * num_scores),
        (groups, heads // groups, shape.num_levels, shape.pooling_factor, dim, has_table, block_rows, block_dim),
        NUM_WARPS,
    )  # fmt: skip


def _empty_scores(q: Tensor, k: Tensor, sizes: list[int], first: bool) -> Tensor:
    shape = unpack(sizes)
    num_scores = shape.num_entries - shape.entries(0)
    return torch.empty(2, *k.shape[:2], num_scores, dtype=torch.float32, device=k.device)


score_fwd = Operator(_score, _empty_scores)


def score(q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, shape: PyramidShape, config: LighthouseConfig) -> Tensor:
    """Scores `[2, B, G, .]` fp32, s_q and s_k, of the entries of levels 1, 2, ...: maxima of the tokens' norms.

    Under "causal" the norms of their first tokens. A selection that compares no scores gets `[2, B, G, 0]`.
    """
    if not config.reads_scores:
        return torch.empty(2, *k_BGND.shape[:2], 0, dtype=torch.float32, device=k_BGND.device)
    return score_fwd(q_BHND, k_BGND, pack(shape), config.selection == "causal")


def pool_scores(s_q_BGN: Tensor, s_k_BGN: Tensor, shape: PyramidShape, config: LighthouseConfig) -> Tensor:
    """Scores `[2, B, G, .]` fp32 of levels 1, 2, ... from those of the tokens: maxima; under "causal" the first's.

    Plain PyTorch, for scorers without a kernel. Padding scores 0.
    """
    scores = F.pad(torch.stack((s_q_BGN, s_k_BGN)).float(), (0, shape.padded_tokens - shape.num_tokens))
    levels = []
    for _ in range(1, shape.num_levels):
        windows = scores.unflatten(-1, (-1, shape.pooling_factor))
        scores = windows[..., 0] if config.selection == "causal" else windows.amax(-1)
        levels.append(scores)
    return torch.cat(levels, -1)
