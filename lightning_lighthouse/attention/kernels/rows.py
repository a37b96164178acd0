"""What the kernels of gather and scatter share: rows into windows, windows into rows, and the slot map between them.

`collect` sums the rows of every window and stores the windows that are gathered; `spread` returns to every row what
the windows above it hold. Each is the other's gradient. Gather pools with `collect` and its backward spreads; scatter
spreads and its backward collects. They differ twice: gather divides by the window, and scatter shifts, for entry i of
a level with windows of w tokens writes to tokens `(i + 1) w - 1 .. (i + 2) w - 2`, which is window i + 1 where token j
counts as j + 1. Nothing here needs an atomic, and every sum has one order.

Gather may rotate the tokens of a window on to its last one (attention/rotation.py). Sums are then built up from the
first child to the last, as Horner does a polynomial: before each child the sum so far is rotated on by one child, which
takes one angle a level. To rotate, every channel needs its partner; so each sum is carried twice, the second time with
the partners in the places of the channels, and no channel crosses threads.

The slot map of the kernels holds the levels above the tokens entry by entry. The tokens of one window are gathered
together or not at all, next to each other, so level 0 needs one number a window: the slot of its first token.
"""

# B batch, H query heads, G key/value heads, R query heads a key/value head, N tokens, D head dim, L levels, W pooling
# factor, S gathered entries, E coarsest windows of a program, P slots: a window of level 1, then entries of 1, 2, ...

# the arguments of a kernel get their types when it is launched
# mypy: allow-untyped-defs

from __future__ import annotations

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lightning_lighthouse.attention.kernels.launch import MOST_KEPT, Launch
from lightning_lighthouse.attention.kernels.ops import within_reach
from lightning_lighthouse.attention.pyramid import PyramidShape, ceil_div, power_of_two

# Values of one block: 16 bytes of bf16 for each thread of a warp, so that one load is one instruction
WARP_VALUES = 256
NUM_WARPS = 4
# Rows of a window whose loads are in flight together
UNROLL = tl.constexpr(4)


@triton.jit
def level_entries(num_coarsest, LEVEL: tl.constexpr, L: tl.constexpr, W: tl.constexpr):
    """Entries of LEVEL in a pyramid of `num_coarsest` coarsest entries."""
    return num_coarsest * W ** (L - 1 - LEVEL)


@triton.jit
def level_start(num_coarsest, LEVEL: tl.constexpr, L: tl.constexpr, W: tl.constexpr):
    """Position of entry (LEVEL, 0) among the levels above the tokens, finest first."""
    o_level = num_coarsest * 0
    for finer in tl.static_range(1, LEVEL):
        o_level += level_entries(num_coarsest, finer, L, W)
    return o_level


@triton.jit
def load_slots(p_slots, i_entry, num_coarsest, LEVEL: tl.constexpr, L: tl.constexpr, W: tl.constexpr):
    """Slots of the entries `i_entry` of LEVEL, -1 where not gathered or outside the level.

    For LEVEL 0 the entries are windows of level 1, and their slots those of their first tokens.
    """
    m_entry = (i_entry >= 0) & (i_entry < level_entries(num_coarsest, max(LEVEL, 1), L, W))
    o_level = 0 if LEVEL == 0 else level_entries(num_coarsest, 1, L, W) + level_start(num_coarsest, LEVEL, L, W)
    return tl.load(p_slots + o_level + i_entry, mask=m_entry, other=-1)


@triton.jit
def token_slots(b_before, b_first, i_child, W: tl.constexpr, SHIFT: tl.constexpr):
    """Slots of the tokens `i_child` of windows, given those of the first tokens of the windows before and of these."""
    if SHIFT:
        b_first = tl.where(i_child == 0, b_before, b_first)
        i_child = (i_child + W - 1) % W
    return tl.where(b_first >= 0, b_first + i_child, -1)


@triton.jit
def rows_of(p_windows, i_token, num_tokens, num_coarsest, w: tl.constexpr, TABLE: tl.constexpr):
    """Rows of the tokens `i_token` of windows that lie one behind the other, and which of them exist.

    TABLE: `p_windows` holds the first row of each of `num_coarsest` windows of w tokens, then how many it has, maybe 0.
    """
    if TABLE:
        i_coarsest = i_token // w
        mask = (i_token >= 0) & (i_coarsest < num_coarsest)
        i_child = i_token - i_coarsest * w
        i_row = i_child + tl.load(p_windows + i_coarsest, mask=mask, other=0)
        mask = mask & (i_child < tl.load(p_windows + num_coarsest + i_coarsest, mask=mask, other=0))
    else:
        i_row = i_token
        mask = (i_token >= 0) & (i_token < num_tokens)
    return i_row, mask


@triton.jit
def load_rows(
    p_rows, i_row, stride_row, stride_dim, m_row, D: tl.constexpr, BLOCK_D: tl.constexpr, PAIR: tl.constexpr = 0
):
    """Rows `[E, BLOCK_D]` in fp32, zeros where masked; with PAIR the partner of each channel, PAIR channels away."""
    i_dim = tl.arange(0, BLOCK_D)
    if PAIR > 1:
        RUN: tl.constexpr = min(PAIR & -PAIR, 16)
        i_dim = tl.where(i_dim // PAIR % 2 == 0, i_dim + PAIR, i_dim - PAIR)
        # the compiler does not see that they run on, and would load them one by one
        i_dim = tl.max_contiguous(tl.multiple_of(i_dim, RUN), RUN)
    mask = m_row[:, None]
    # channels that are not rotated have no partner
    if D != BLOCK_D or (PAIR and D % (2 * PAIR) != 0):
        mask = mask & (i_dim < D)[None, :]
    o_row = i_row.to(tl.int64)[:, None] * stride_row + i_dim[None, :] * stride_dim
    b_rows = tl.load(p_rows + o_row, mask=mask, other=0.0).to(tl.float32)
    # neighbours are in one thread already
    if PAIR == 1:
        b_first, b_second = tl.split(tl.reshape(b_rows, (i_row.shape[0], BLOCK_D // 2, 2)))
        b_rows = tl.reshape(tl.join(b_second, b_first), (i_row.shape[0], BLOCK_D))
    return b_rows


@triton.jit
def store_rows(p_rows, b_rows, i_row, stride_row, m_row, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows `[E, BLOCK_D]`, rounded to the dtype they are stored in."""
    i_dim = tl.arange(0, BLOCK_D)
    mask = m_row[:, None]
    if D != BLOCK_D:
        mask = mask & (i_dim < D)[None, :]
    o_row = i_row.to(tl.int64)[:, None] * stride_row + i_dim[None, :]
    tl.store(p_rows + o_row, b_rows.to(p_rows.dtype.element_ty), mask=mask)


@triton.jit
def load_turn(p_turns, i_window, LEVEL: tl.constexpr, L: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Cosines and signed sines that rotate on by one child of windows of LEVEL, `[E, BLOCK_D]`: for each the same."""
    # rows as those they are for, so that threads hold the same channels of both
    m_row = i_window >= 0
    b_cos = load_rows(p_turns + (LEVEL - 1) * D, i_window * 0, 0, 1, m_row, D, BLOCK_D)
    b_sin = load_rows(p_turns + (LEVEL + L - 2) * D, i_window * 0, 0, 1, m_row, D, BLOCK_D)
    return b_cos, b_sin


@triton.jit
def turned(b_rows, b_partners, b_cos, b_sin):
    """Rows, rotated, and their partners."""
    return b_rows * b_cos + b_partners * b_sin, b_partners * b_cos - b_rows * b_sin


@triton.jit
def _collect(
    p_tokens, stride_token, stride_dim, p_gathered, stride_slot, p_slots, p_windows, p_turns, i_window, b_levels,
    num_tokens, num_coarsest,
    LEVEL: tl.constexpr, L: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SHIFT: tl.constexpr, MEAN: tl.constexpr, TABLE: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """Sums `[E, BLOCK_D]` of the windows `i_window` of LEVEL; what they and the windows in them gather is stored.

    With the sums come those of the partners, zeros where nothing is rotated, PAIR 0.

    SHIFT is 0 in gather, which stores means; it is 1 in scatter, which stores sums, where token j counts as j + 1 and
    window i as entry i - 1. MEAN: divide each row by the number of levels that write to its token; `b_levels` of them
    are above LEVEL.
    """
    b_slot = load_slots(p_slots, i_window - SHIFT, num_coarsest, LEVEL, L, W)
    b_levels += (b_slot >= 0).to(tl.int32)
    b_sum = tl.zeros((i_window.shape[0], BLOCK_D), tl.float32)
    b_partners = b_sum
    if PAIR:
        b_cos, b_sin = load_turn(p_turns, i_window, LEVEL, L, D, BLOCK_D)
    if LEVEL == 1:
        b_first = load_slots(p_slots, i_window, num_coarsest, 0, L, W)
        b_before = load_slots(p_slots, i_window - 1, num_coarsest, 0, L, W) if SHIFT else b_first
        # all loads before the first store, which the compiler may not move them across
        for i_child in tl.range(W, loop_unroll_factor=UNROLL):
            i_token = i_window * W + (i_child - SHIFT)
            i_row, m_token = rows_of(p_windows, i_token, num_tokens, num_coarsest, W ** (L - 1), TABLE)
            b_rows = load_rows(p_tokens, i_row, stride_token, stride_dim, m_token, D, BLOCK_D)
            if MEAN:
                m_slot = token_slots(b_before, b_first, i_child, W, SHIFT) >= 0
                b_rows = b_rows / tl.maximum(b_levels + m_slot.to(tl.int32), 1).to(tl.float32)[:, None]
            if PAIR:
                b_sum, b_partners = turned(b_sum, b_partners, b_cos, b_sin)
                b_partners += load_rows(p_tokens, i_row, stride_token, stride_dim, m_token, D, BLOCK_D, PAIR)
            b_sum += b_rows
        # few tokens are gathered themselves; their rows come from the cache
        for i_child in tl.range(W, loop_unroll_factor=UNROLL):
            i_token = i_window * W + (i_child - SHIFT)
            b_token_slot = token_slots(b_before, b_first, i_child, W, SHIFT)
            m_slot = b_token_slot >= 0
            i_row, m_token = rows_of(p_windows, i_token, num_tokens, num_coarsest, W ** (L - 1), TABLE)
            b_rows = load_rows(p_tokens, i_row, stride_token, stride_dim, m_slot & m_token, D, BLOCK_D)
            if MEAN:
                b_rows = b_rows / (b_levels + 1).to(tl.float32)[:, None]
            store_rows(p_gathered, b_rows, b_token_slot, stride_slot, m_slot, D, BLOCK_D)
    else:
        for i_child in range(W):
            b_child, b_child_partners = _collect(
                p_tokens, stride_token, stride_dim, p_gathered, stride_slot, p_slots, p_windows, p_turns,
                i_window * W + i_child, b_levels,
                num_tokens, num_coarsest, LEVEL - 1, L, W, D, BLOCK_D, SHIFT, MEAN, TABLE, PAIR,
            )  # fmt: skip
            if PAIR:
                b_sum, b_partners = turned(b_sum, b_partners, b_cos, b_sin)
                b_partners += b_child_partners
            b_sum += b_child
    b_entry = b_sum if SHIFT else b_sum * (1.0 / W**LEVEL)
    store_rows(p_gathered, b_entry, b_slot, stride_slot, b_slot >= 0, D, BLOCK_D)
    return b_sum, b_partners


@triton.jit
def _spread(
    p_gathered, stride_slot, stride_dim, p_tokens, stride_token, p_slots, p_windows, p_turns, i_window,
    b_above, b_above_partners, b_levels, num_tokens, num_coarsest,
    LEVEL: tl.constexpr, L: tl.constexpr, W: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SHIFT: tl.constexpr, MEAN: tl.constexpr, TABLE: tl.constexpr, PAIR: tl.constexpr,
):  # fmt: skip
    """Store into every token of the windows `i_window` of LEVEL the sum of the gathered entries above it.

    `b_above` is the sum over the coarser levels. The other arguments are those of `_collect`, its transpose: what that
    rotates on from child to child this rotates back, from the last child to the first.
    """
    b_slot = load_slots(p_slots, i_window - SHIFT, num_coarsest, LEVEL, L, W)
    b_rows = load_rows(p_gathered, b_slot, stride_slot, stride_dim, b_slot >= 0, D, BLOCK_D)
    b_sum = b_above + (b_rows if SHIFT else b_rows * (1.0 / W**LEVEL))
    b_partners = b_above_partners
    if PAIR:
        b_rows = load_rows(p_gathered, b_slot, stride_slot, stride_dim, b_slot >= 0, D, BLOCK_D, PAIR)
        b_partners = b_above_partners + b_rows * (1.0 / W**LEVEL)
        b_cos, b_sin = load_turn(p_turns, i_window, LEVEL, L, D, BLOCK_D)
    b_levels += (b_slot >= 0).to(tl.int32)
    if LEVEL == 1:
        b_first = load_slots(p_slots, i_window, num_coarsest, 0, L, W)
        b_before = load_slots(p_slots, i_window - 1, num_coarsest, 0, L, W) if SHIFT else b_first
        for i_turn in tl.range(W, loop_unroll_factor=UNROLL):
            i_child = W - 1 - i_turn if PAIR else i_turn
            i_token = i_window * W + (i_child - SHIFT)
            b_token_slot = token_slots(b_before, b_first, i_child, W, SHIFT)
            m_slot = b_token_slot >= 0
            b_token = b_sum + load_rows(p_gathered, b_token_slot, stride_slot, stride_dim, m_slot, D, BLOCK_D)
            if MEAN:
                b_token = b_token / tl.maximum(b_levels + m_slot.to(tl.int32), 1).to(tl.float32)[:, None]
            i_row, m_token = rows_of(p_windows, i_token, num_tokens, num_coarsest, W ** (L - 1), TABLE)
            store_rows(p_tokens, b_token, i_row, stride_token, m_token, D, BLOCK_D)
            if PAIR:
                b_sum, b_partners = turned(b_sum, b_partners, b_cos, -b_sin)
    else:
        for i_turn in range(W):
            i_child = W - 1 - i_turn if PAIR else i_turn
            _spread(
                p_gathered, stride_slot, stride_dim, p_tokens, stride_token, p_slots, p_windows, p_turns,
                i_window * W + i_child, b_sum, b_partners, b_levels,
                num_tokens, num_coarsest, LEVEL - 1, L, W, D, BLOCK_D, SHIFT, MEAN, TABLE, PAIR,
            )  # fmt: skip
            if PAIR:
                b_sum, b_partners = turned(b_sum, b_partners, b_cos, -b_sin)


@triton.jit
def locate(num_blocks, G: tl.constexpr, BLOCK_E: tl.constexpr):
    """Batch, kv head and coarsest windows of a program."""
    # heads first: those of a token are neighbours in memory
    i_program = tl.program_id(0)
    i_head = (i_program % G).to(tl.int64)
    i_window = i_program // G % num_blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    i_batch = (i_program // G // num_blocks).to(tl.int64)
    return i_batch, i_head, i_window


@triton.jit(do_not_specialize=["num_tokens", "num_coarsest", "num_slots", "num_blocks"])
def _collect_kernel(
    p_x, p_y, p_slots, p_windows, p_turns,
    stride_xb, stride_xh, stride_xn, stride_xd, stride_yb, stride_yh, stride_ys,
    num_tokens, num_coarsest, num_slots, num_blocks,
    G: tl.constexpr, R: tl.constexpr, L: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
    SHIFT: tl.constexpr, MEAN: tl.constexpr, TABLE: tl.constexpr, PAIR: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_batch, i_head, i_window = locate(num_blocks, G, BLOCK_E)
    p_slots += (i_batch * G + i_head) * num_slots
    p_x += i_batch * stride_xb + i_head * R * stride_xh
    p_y += i_batch * stride_yb + i_head * R * stride_yh
    b_levels = tl.zeros((BLOCK_E,), tl.int32)
    for _ in range(R):
        _collect(
            p_x, stride_xn, stride_xd, p_y, stride_ys, p_slots, p_windows, p_turns, i_window, b_levels,
            num_tokens, num_coarsest, L - 1, L, W, D, BLOCK_D, SHIFT, MEAN, TABLE, PAIR,
        )  # fmt: skip
        p_x += stride_xh
        p_y += stride_yh


@triton.jit(do_not_specialize=["num_tokens", "num_coarsest", "num_slots", "num_blocks"])
def _spread_kernel(
    p_y, p_x, p_slots, p_windows, p_turns,
    stride_yb, stride_yh, stride_ys, stride_yd, stride_xb, stride_xh, stride_xn,
    num_tokens, num_coarsest, num_slots, num_blocks,
    G: tl.constexpr, R: tl.constexpr, L: tl.constexpr, W: tl.constexpr, D: tl.constexpr,
    SHIFT: tl.constexpr, MEAN: tl.constexpr, TABLE: tl.constexpr, PAIR: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_batch, i_head, i_window = locate(num_blocks, G, BLOCK_E)
    p_slots += (i_batch * G + i_head) * num_slots
    p_y += i_batch * stride_yb + i_head * R * stride_yh
    p_x += i_batch * stride_xb + i_head * R * stride_xh
    b_levels = tl.zeros((BLOCK_E,), tl.int32)
    b_above = tl.zeros((BLOCK_E, BLOCK_D), tl.float32)
    for _ in range(R):
        _spread(
            p_y, stride_ys, stride_yd, p_x, stride_xn, p_slots, p_windows, p_turns, i_window,
            b_above, b_above, b_levels, num_tokens, num_coarsest, L - 1, L, W, D, BLOCK_D, SHIFT, MEAN, TABLE, PAIR,
        )  # fmt: skip
        p_y += stride_yh
        p_x += stride_xh


def collect(
    x_BHND: Tensor,
    y_BHSD: Tensor,
    slots_BGP: Tensor,
    shape: PyramidShape,
    shift: int,
    mean: bool,
    windows: Tensor | None = None,
    turns: Tensor | None = None,
    distance: int = 0,
) -> None:
    """Write into y what its entries gather from the rows of x. The last dimension of y is contiguous.

    `windows` `[2, U]` int32 says where the coarsest windows lie: their first rows, and how many they have.
    `turns` `[2, L - 1, D]`, by `Rotation.steps`, rotates the tokens of windows on to the last one; the two channels of
    a pair are `distance` apart.
    """
    x_BHND = within_reach(x_BHND)
    plan = _plan("collect", *_sizes(x_BHND, y_BHSD, slots_BGP), shape, shift, mean, windows is not None, distance)
    plan(x_BHND, y_BHSD, slots_BGP, windows, turns)


def spread(
    y_BHSD: Tensor,
    x_BHND: Tensor,
    slots_BGP: Tensor,
    shape: PyramidShape,
    shift: int,
    mean: bool,
    windows: Tensor | None = None,
    turns: Tensor | None = None,
    distance: int = 0,
) -> None:
    """Write into the rows of x what the entries y above them hold. The last dimension of x is contiguous."""
    y_BHSD = within_reach(y_BHSD)
    plan = _plan("spread", *_sizes(y_BHSD, x_BHND, slots_BGP), shape, shift, mean, windows is not None, distance)
    plan(y_BHSD, x_BHND, slots_BGP, windows, turns)


def _sizes(source: Tensor, target: Tensor, slots_BGP: Tensor) -> tuple[Any, ...]:
    return source.shape, source.stride(), target.stride(), slots_BGP.shape


@lru_cache(maxsize=MOST_KEPT)
def _plan(
    name: str,
    source_shape: tuple[int, ...],
    source_strides: tuple[int, ...],
    target_strides: tuple[int, ...],
    slots_shape: tuple[int, ...],
    shape: PyramidShape,
    shift: int,
    mean: bool,
    has_table: bool,
    distance: int,
) -> Launch:
    batch, heads, _, dim = source_shape
    groups, num_slots = slots_shape[1:]
    block_rows, block_dim = block_of(dim, NUM_WARPS)
    # the last token counts as one more in scatter, and may open one more window
    num_blocks = ceil_div(num_coarsest(shape) + shift, block_rows)
    return Launch(
        _collect_kernel if name == "collect" else _spread_kernel,
        batch * num_blocks * groups,
        (*source_strides, *target_strides[:3], shape.num_tokens, num_coarsest(shape), num_slots, num_blocks),
        (groups, heads // groups, shape.num_levels, shape.pooling_factor, dim, shift, mean, has_table, distance,
         block_rows, block_dim),
        NUM_WARPS,
    )  # fmt: skip


def num_coarsest(shape: PyramidShape) -> int:
    """Entries of the coarsest level."""
    return shape.num_tiles * shape.tile_entries


def num_slots(shape: PyramidShape) -> int:
    """P, the length of the kernels' slot map."""
    return shape.entries(1) + shape.num_entries - shape.entries(0)


def block_of(head_dim: int, num_warps: int) -> tuple[int, int]:
    """Rows of one block, and the head dim as a power of two."""
    block_dim = power_of_two(head_dim)
    return max(1, num_warps * WARP_VALUES // block_dim), block_dim
