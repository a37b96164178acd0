"""Select causally: candidates win that reach the thresholds of the tile before.

One launch a level, because a tile needs what the level above left to the tile before. At each level a candidate wins by
its s_q, or else by its s_k. The threshold of s_q is that of the tile before; the threshold of s_k is that of what the
tile before left over, for which its own pass over s_q is repeated here. The last launch places what is gathered.
"""

# The legend is that of kernels/rows.py; C most candidates of a level in a tile

# the arguments of a kernel get their types when it is launched
# mypy: allow-untyped-defs

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lighthouse.attention.kernels.launch import MOST_KEPT, Launch
from lightning_lighthouse.attention.kernels.ops import Operator, unpack
from lightning_lighthouse.attention.kernels.rows import level_start, num_coarsest
from lightning_lighthouse.attention.kernels.tiles import (
    ABOVE_ALL,
    WON,
    chunk_of,
    clear_slots,
    empty_selection,
    entry_of,
    evenly,
    is_real,
    most_candidates,
    place,
    store_winners,
    threshold,
    tile_of,
    to_keys,
)
from lightning_lighthouse.attention.pyramid import PyramidShape


@triton.jit
def _highest(p_keys, count, num_candidates, CHUNK: tl.constexpr):
    """The count-th highest key; above all where none is wanted."""
    pivot, _ = threshold(p_keys, count, num_candidates, CHUNK)
    b_lowest = tl.full((CHUNK,), ABOVE_ALL, tl.int32)
    for i_chunk in range(0, num_candidates, CHUNK):
        i_candidate = i_chunk + tl.arange(0, CHUNK)
        b_key = tl.load(p_keys + i_candidate, mask=i_candidate < num_candidates, other=WON)
        b_lowest = tl.minimum(b_lowest, tl.where(b_key >= pivot, b_key, ABOVE_ALL))
    return tl.min(b_lowest)


@triton.jit
def _reach(b_key, b_rest, pivot, count, b_left, seen):
    """Which of the rest win: the first `count` that reach the threshold, and the last ones if too few do.

    `b_left` candidates of the rest stand here and behind; `seen` reached the threshold in the chunks before.
    """
    b_hit = b_rest & (b_key >= pivot)
    b_one = b_hit.to(tl.int32)
    b_before = tl.minimum(seen + tl.cumsum(b_one, 0) - b_one, count)
    b_won = b_rest & ((b_hit & (b_before < count)) | (b_left <= count - b_before))
    return b_won, seen + tl.sum(b_one)


@triton.jit
def _reach_q(b_key, i_candidate, mask, pivot, count, num_candidates, rank, seen):
    """Which candidates of a chunk win by their s_q; in the first tile every second of those that are evenly spaced."""
    b_won, seen = _reach(b_key, mask, pivot, (count + 1) // 2, num_candidates - i_candidate, seen)
    b_place = evenly(i_candidate, count, num_candidates)
    b_even = mask & (evenly(i_candidate + 1, count, num_candidates) > b_place)
    return tl.where(rank > 0, b_won, b_even & (b_place % 2 == 0)), seen


@triton.jit(do_not_specialize=["num_coarsest", "num_slots", "num_scores", "stride_scores", "tile_entries", "winners",
                               "num_candidates", "num_tiles", "tile_gathered", "C"])  # fmt: skip
def _causal_kernel(
    p_scores, p_index, p_slots, p_scratch, p_tiles,
    num_coarsest, num_slots, num_scores, stride_scores, num_tiles, tile_entries, winners, num_candidates,
    tile_gathered, C, LEVEL: tl.constexpr, L: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr,
    TABLE: tl.constexpr,
):  # fmt: skip
    """The winners of LEVEL among its `num_candidates`, and the keys of their children. LEVEL L: the keys alone."""
    i_program = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(0) % num_tiles
    i_head = i_program // num_tiles
    p_sq = p_scores + i_head * num_scores
    p_sk = p_sq + stride_scores
    p_slots += i_head * num_slots
    p_index += i_program * tile_gathered
    # each level has three rows for the winners and two for the keys; then the keys that the tile before left over, and
    # the thresholds of the levels
    stride_tile = (5 * (L - 1) + 1) * C + L - 1
    p_upto = p_scratch + i_program * stride_tile
    p_parents = p_upto + C * (L - 1)
    p_entries = p_parents + C * (L - 1)
    p_qkeys = p_entries + C * (L - 1)
    p_kkeys = p_qkeys + C * (L - 1)
    p_rest = p_kkeys + C * (L - 1)
    p_pivots = p_rest + C

    first, real, rank, base = tile_of(p_tiles, i_tile, num_tiles, tile_entries, tile_gathered, TABLE)
    if LEVEL == L:
        if not TABLE:
            clear_slots(p_slots, i_tile, num_tiles, tile_entries, L, W, CHUNK)
        num_children = tile_entries
    else:
        count = tl.minimum(winners, num_candidates)
        p_qkeys += C * (LEVEL - 1)
        p_kkeys += C * (LEVEL - 1)
        p_pivot = p_pivots + (LEVEL - 1)
        # the first tiles read their own numbers, and use none of them
        before = tl.minimum(rank, 1).to(tl.int64)
        pivot_before = tl.load(p_pivot - tl.minimum(rank, 2).to(tl.int64) * stride_tile)
        pivot_q = tl.load(p_pivot - before * stride_tile)

        seen = 0
        for i_chunk in range(0, num_candidates, CHUNK):
            i_candidate = i_chunk + tl.arange(0, CHUNK)
            mask = i_candidate < num_candidates
            b_qkey = tl.load(p_qkeys - before * stride_tile + i_candidate, mask=mask, other=WON)
            b_kkey = tl.load(p_kkeys - before * stride_tile + i_candidate, mask=mask, other=WON)
            b_by_q, seen = _reach_q(b_qkey, i_candidate, mask, pivot_before, count, num_candidates, rank - 1, seen)
            tl.store(p_rest + i_candidate, tl.where(b_by_q, WON, b_kkey), mask=mask)
        tl.debug_barrier()
        pivot_k = _highest(p_rest, count // 2, num_candidates, CHUNK)

        seen_q = 0
        seen_k = 0
        won_by_q = 0
        won_before = 0
        for i_chunk in range(0, num_candidates, CHUNK):
            i_candidate = i_chunk + tl.arange(0, CHUNK)
            mask = i_candidate < num_candidates
            b_qkey = tl.load(p_qkeys + i_candidate, mask=mask, other=WON)
            b_kkey = tl.load(p_kkeys + i_candidate, mask=mask, other=WON)
            b_by_q, seen_q = _reach_q(b_qkey, i_candidate, mask, pivot_q, count, num_candidates, rank, seen_q)
            b_rest = mask & (b_by_q == 0)
            b_by_q_upto = won_by_q + tl.cumsum(b_by_q.to(tl.int32), 0)
            won_by_q = tl.max(b_by_q_upto)
            # (count + 1) // 2 of the tile win by s_q
            b_left = num_candidates - (count + 1) // 2 - (i_candidate - b_by_q_upto)
            b_by_k, seen_k = _reach(b_kkey, b_rest, pivot_k, count // 2, b_left, seen_k)
            b_place = evenly(i_candidate + 1, count, num_candidates)
            b_even = mask & (b_place > evenly(i_candidate, count, num_candidates))
            b_won = tl.where(rank > 0, b_by_q | b_by_k, b_even)
            b_upto = won_before + tl.cumsum(b_won.to(tl.int32), 0)
            won_before = tl.max(b_upto)
            b_entry = entry_of(p_entries, i_candidate, mask, first, LEVEL, L, W, C)
            store_winners(p_upto, p_parents, p_entries, i_candidate, b_entry, b_won, b_upto, mask, LEVEL, C)
        tl.debug_barrier()
        p_qkeys -= C * (LEVEL - 1)
        p_kkeys -= C * (LEVEL - 1)
        num_children = count * W

    if LEVEL == 1:
        place(
            p_index, p_slots, p_upto, p_parents, p_entries, first, real, base, num_coarsest, tile_entries, winners,
            C, L, W, CHUNK, False, TABLE,
        )  # fmt: skip
    else:
        p_qkeys += C * (LEVEL - 2)
        p_kkeys += C * (LEVEL - 2)
        o_level = level_start(num_coarsest, LEVEL - 1, L, W)
        for i_chunk in range(0, num_children, CHUNK):
            i_candidate = i_chunk + tl.arange(0, CHUNK)
            mask = i_candidate < num_children
            b_entry = entry_of(p_entries, i_candidate, mask, first, LEVEL - 1, L, W, C)
            m_real = is_real(b_entry, first, real, LEVEL - 1, L, W, mask, TABLE)
            b_sq = tl.load(p_sq + o_level + b_entry, mask=m_real, other=0.0)
            b_sk = tl.load(p_sk + o_level + b_entry, mask=m_real, other=0.0)
            tl.store(p_qkeys + i_candidate, to_keys(b_sq), mask=mask)
            tl.store(p_kkeys + i_candidate, to_keys(b_sk), mask=mask)
        tl.debug_barrier()
        pivot = _highest(p_qkeys, (tl.minimum(winners, num_children) + 1) // 2, num_children, CHUNK)
        tl.store(p_pivots + (LEVEL - 2), pivot)


def _select_causal(scores: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    shape = unpack(sizes)
    index, slots = empty_selection(scores, shape)
    launch_select_causal(scores, index, slots, shape, num_coarsest(shape), shape.num_tiles)
    return index, slots


def launch_select_causal(
    scores: Tensor,
    index: Tensor,
    slots: Tensor,
    shape: PyramidShape,
    num_windows: int,
    num_tiles: int,
    tiles: Tensor | None = None,
) -> None:
    """Write index and slots of `num_tiles` tiles over `num_windows` windows.

    `tiles` `[4, num_tiles]` int32 says where they lie: `tile_of`. With it there is no index, and slots are -1 before.
    """
    levels = shape.num_levels
    candidates = most_candidates(shape)
    programs = scores.shape[1] * scores.shape[2] * num_tiles
    numbers = (5 * (levels - 1) + 1) * candidates + levels - 1
    scratch = torch.empty(programs, numbers, dtype=torch.int32, device=scores.device)
    plans = _plans(
        scores.shape, scores.stride(0), slots.shape[-1], shape, num_windows, num_tiles, chunk_of(candidates),
        tiles is not None,
    )  # fmt: skip
    for plan in plans:
        plan(scores, index, slots, scratch, tiles)


@lru_cache(maxsize=MOST_KEPT)
def _plans(
    scores_shape: tuple[int, ...],
    stride_scores: int,
    num_slots: int,
    shape: PyramidShape,
    num_windows: int,
    num_tiles: int,
    chunk_and_warps: tuple[int, int],
    has_table: bool,
) -> list[Launch]:
    """One a level, the coarsest first."""
    _, batch, groups, num_scores = scores_shape
    chunk, num_warps = chunk_and_warps
    levels = shape.num_levels
    return [
        Launch(
            _causal_kernel,
            batch * groups * num_tiles,
            (num_windows, num_slots, num_scores, stride_scores, num_tiles, shape.tile_entries, shape.winners[1],
             shape.candidates(level) if level < levels else 0, shape.tile_gathered, most_candidates(shape)),
            (level, levels, shape.pooling_factor, chunk, has_table),
            num_warps,
        )
        for level in range(levels, 0, -1)
    ]  # fmt: skip


def _empty(scores: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    return empty_selection(scores, unpack(sizes))


select_causal_fwd = Operator(_select_causal, _empty)
