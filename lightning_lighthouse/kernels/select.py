"""Select: the winners of every level and tile, and where the gathered entries stand, without a sort.

One program per tile and kv head walks down the levels. At each level the threshold of the count-th largest score is
found by bisection over the bits of the scores, first s_q, then s_k among the rest; ties go to the lower entry by a
prefix sum. The same prefix sums give the place of every entry in the post-order of the gathered sequence.
"""

# The legend is that of kernels/rows.py; C most candidates of a level in a tile

# the arguments of a kernel get their types when it is launched
# mypy: allow-untyped-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_lighthouse.config import LighthouseConfig, PyramidShape
from lightning_lighthouse.kernels.ops import Operator, pack, unpack
from lightning_lighthouse.kernels.rows import (
    level_entries,
    level_start,
    num_coarsest,
    num_slots,
    on_device_of,
)

# Candidates of a tile read at once. Larger tiles are read in chunks; smaller ones, the usual case, take one.
MAX_CHUNK = 2048

# Keys order like scores. No score has these two.
WON = tl.constexpr(-(2**31))
ABOVE_ALL = tl.constexpr(2**31 - 1)


class Selection(NamedTuple):
    """Which entries are gathered, and where they stand in the gathered sequence.

    Args:
        index: `[B, G, S]` int32, positions in the concatenation of all levels.
        slots: `[B, G, P]` int32, entry -> position in the gathered sequence, -1 where not gathered; level 0 as the
            position of the first token of each window of level 1 (kernels/rows.py).
    """

    # shadows a method of tuple that nobody needs here
    index: Tensor  # type: ignore[assignment]
    slots: Tensor


@triton.jit
def _to_keys(b_score):
    """Integers in the order of the scores. NaN is minus infinity."""
    b_score = tl.where(b_score == b_score, b_score, float("-inf"))
    b_bits = b_score.to(tl.int32, bitcast=True)
    return tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)


@triton.jit
def _count_from(p_keys, pivot, num_candidates, CHUNK: tl.constexpr):
    """How many keys are at least `pivot`."""
    b_count = tl.zeros((CHUNK,), tl.int32)
    for i_chunk in range(0, num_candidates, CHUNK):
        i_candidate = i_chunk + tl.arange(0, CHUNK)
        b_key = tl.load(p_keys + i_candidate, mask=i_candidate < num_candidates, other=WON)
        b_count += (b_key >= pivot).to(tl.int32)
    return tl.sum(b_count)


@triton.jit
def _threshold(p_keys, count, num_candidates, CHUNK: tl.constexpr):
    """The largest key that at least `count` keys reach, and how many of those equal to it win."""
    b_low = tl.full((CHUNK,), ABOVE_ALL, tl.int32)
    b_high = tl.full((CHUNK,), WON, tl.int32)
    for i_chunk in range(0, num_candidates, CHUNK):
        i_candidate = i_chunk + tl.arange(0, CHUNK)
        mask = i_candidate < num_candidates
        b_low = tl.minimum(b_low, tl.load(p_keys + i_candidate, mask=mask, other=ABOVE_ALL))
        b_high = tl.maximum(b_high, tl.load(p_keys + i_candidate, mask=mask, other=WON))
    low = tl.min(b_low)
    high = tl.max(b_high)
    while low < high:
        # the mean rounded up, without overflow
        middle = (low | high) - ((low ^ high) >> 1)
        reached = _count_from(p_keys, middle, num_candidates, CHUNK)
        low = tl.where(reached >= count, middle, low)
        high = tl.where(reached > count, high, tl.where(reached == count, middle, middle - 1))
    ties = count - _count_from(p_keys, low + 1, num_candidates, CHUNK)
    # nobody wins where none is wanted
    return tl.where(count > 0, low, ABOVE_ALL), tl.where(count > 0, ties, 0)


@triton.jit
def _wins(b_key, threshold, ties, seen):
    """Which of a chunk's keys win, given how many keys equal to the threshold came before."""
    b_tie = (b_key == threshold).to(tl.int32)
    b_rank = seen + tl.cumsum(b_tie, 0) - b_tie
    return (b_key > threshold) | ((b_tie > 0) & (b_rank < ties)), seen + tl.sum(b_tie)


@triton.jit
def _entry_of(p_entries, i_candidate, mask, i_tile, tile_entries, LEVEL: tl.constexpr, L: tl.constexpr,
              W: tl.constexpr, C):  # fmt: skip
    """Entries of the candidates of LEVEL: all of the tile at the coarsest, the children of winners below."""
    if LEVEL == L - 1:
        b_entry = i_tile * tile_entries + i_candidate
    else:
        b_parent = tl.load(p_entries + LEVEL * C + i_candidate // W, mask=mask, other=0)
        b_entry = b_parent * W + i_candidate % W
    return b_entry


@triton.jit(do_not_specialize=["num_coarsest", "num_slots", "num_scores", "stride_scores", "tile_entries", "winners",
                               "num_tiles", "tile_gathered", "C"])  # fmt: skip
def _select_kernel(
    p_scores, p_index, p_slots, p_scratch,
    num_coarsest, num_slots, num_scores, stride_scores, num_tiles, tile_entries, winners, tile_gathered, C,
    L: tl.constexpr, W: tl.constexpr, COVER: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    i_tile = tl.program_id(0) % num_tiles
    i_head = (tl.program_id(0) // num_tiles).to(tl.int64)
    p_sq = p_scores + i_head * num_scores
    p_sk = p_sq + stride_scores
    p_slots += i_head * num_slots
    p_index += (i_head * num_tiles + i_tile) * tile_gathered
    # per level, at row LEVEL - 1: winners up to and with each candidate; each winner's candidate; its entry
    p_qkeys = p_scratch + tl.program_id(0).to(tl.int64) * C * (2 + 3 * (L - 1))
    p_kkeys = p_qkeys + C
    p_upto = p_kkeys + C
    p_parents = p_upto + C * (L - 1)
    p_entries = p_parents + C * (L - 1)

    # the tile's part of the slot map, nothing gathered so far
    o_level = 0
    for row in tl.static_range(L):
        num_entries = tile_entries * W ** (L - 1 - max(row, 1))
        for i_chunk in range(0, num_entries, CHUNK):
            i_entry = i_chunk + tl.arange(0, CHUNK)
            tl.store(p_slots + o_level + i_tile * num_entries + i_entry, -1, mask=i_entry < num_entries)
        o_level += num_entries * num_tiles

    num_candidates = tile_entries
    for LEVEL in tl.static_range(L - 1, 0, -1):
        o_level = level_start(num_coarsest, LEVEL, L, W)
        for i_chunk in range(0, num_candidates, CHUNK):
            i_candidate = i_chunk + tl.arange(0, CHUNK)
            mask = i_candidate < num_candidates
            b_entry = _entry_of(p_entries, i_candidate, mask, i_tile, tile_entries, LEVEL, L, W, C)
            b_sq = tl.load(p_sq + o_level + b_entry, mask=mask, other=0.0)
            b_sk = tl.load(p_sk + o_level + b_entry, mask=mask, other=0.0)
            if COVER:
                b_sq = tl.where(b_entry == 0, float("inf"), b_sq)
            tl.store(p_qkeys + i_candidate, _to_keys(b_sq), mask=mask)
            tl.store(p_kkeys + i_candidate, _to_keys(b_sk), mask=mask)
        tl.debug_barrier()

        count = tl.minimum(winners, num_candidates)
        threshold, ties = _threshold(p_qkeys, (count + 1) // 2, num_candidates, CHUNK)
        seen = 0
        for i_chunk in range(0, num_candidates, CHUNK):
            i_candidate = i_chunk + tl.arange(0, CHUNK)
            mask = i_candidate < num_candidates
            b_key = tl.load(p_qkeys + i_candidate, mask=mask, other=WON)
            b_won, seen = _wins(b_key, threshold, ties, seen)
            tl.store(p_kkeys + i_candidate, WON, mask=mask & b_won)
        tl.debug_barrier()

        threshold, ties = _threshold(p_kkeys, count // 2, num_candidates, CHUNK)
        seen = 0
        won_before = 0
        for i_chunk in range(0, num_candidates, CHUNK):
            i_candidate = i_chunk + tl.arange(0, CHUNK)
            mask = i_candidate < num_candidates
            b_key = tl.load(p_kkeys + i_candidate, mask=mask, other=ABOVE_ALL)
            b_by_k, seen = _wins(b_key, threshold, ties, seen)
            b_won = mask & (b_by_k | (b_key == WON))
            b_upto = won_before + tl.cumsum(b_won.to(tl.int32), 0)
            won_before = tl.max(b_upto)
            b_entry = _entry_of(p_entries, i_candidate, mask, i_tile, tile_entries, LEVEL, L, W, C)
            tl.store(p_upto + (LEVEL - 1) * C + i_candidate, b_upto, mask=mask)
            tl.store(p_parents + (LEVEL - 1) * C + b_upto - 1, i_candidate, mask=b_won)
            tl.store(p_entries + (LEVEL - 1) * C + b_upto - 1, b_entry, mask=b_won)
        tl.debug_barrier()
        num_candidates = count * W

    # position in the post-order: what stands before a candidate on its own level, above it and below it
    num_candidates = tile_entries
    for LEVEL in tl.static_range(L - 1, -1, -1):
        o_level = 0 if LEVEL == 0 else level_entries(num_coarsest, 0, L, W) + level_start(num_coarsest, LEVEL, L, W)
        o_slots = 0 if LEVEL == 0 else level_entries(num_coarsest, 1, L, W) + level_start(num_coarsest, LEVEL, L, W)
        for i_chunk in range(0, num_candidates, CHUNK):
            i_candidate = i_chunk + tl.arange(0, CHUNK)
            mask = i_candidate < num_candidates
            b_entry = _entry_of(p_entries, i_candidate, mask, i_tile, tile_entries, LEVEL, L, W, C)
            b_position = i_candidate
            b_parent = i_candidate
            for above in tl.static_range(LEVEL, L - 1):
                b_parent = tl.load(p_parents + above * C + b_parent // W, mask=mask, other=0)
                b_position += b_parent
            b_upto = i_candidate + 1
            for below in tl.static_range(LEVEL):
                p_row = p_upto + (LEVEL - 1 - below) * C
                b_upto = W * tl.load(p_row + b_upto - 1, mask=mask & (b_upto > 0), other=0)
                b_position += b_upto
            tl.store(p_index + b_position, o_level + b_entry, mask=mask)
            b_slot = i_tile * tile_gathered + b_position
            if LEVEL == 0:
                tl.store(p_slots + b_entry // W, b_slot, mask=mask & (i_candidate % W == 0))
            else:
                tl.store(p_slots + o_slots + b_entry, b_slot, mask=mask)
        num_candidates = tl.minimum(winners, num_candidates) * W


def _select(scores: Tensor, sizes: list[int], cover_prefix: bool) -> tuple[Tensor, Tensor]:
    shape = unpack(sizes)
    index, slots = _empty_selection(scores, sizes, cover_prefix)
    candidates = max(shape.candidates(level) for level in range(1, shape.num_levels))
    programs = scores.shape[1] * scores.shape[2] * shape.num_tiles
    # two rows of keys, and three rows a level with winners
    scratch = torch.empty(programs, 3 * shape.num_levels - 1, candidates, dtype=torch.int32, device=scores.device)
    chunk = min(MAX_CHUNK, max(32, triton.next_power_of_2(candidates)))
    with on_device_of(scores):
        _select_kernel[(programs,)](
            scores, index, slots, scratch,
            num_coarsest(shape), num_slots(shape), scores.shape[-1], scores.stride(0),
            shape.num_tiles, shape.tile_entries, shape.winners[1], shape.tile_gathered, candidates,
            shape.num_levels, shape.pooling_factor, cover_prefix, chunk,
            num_warps=max(1, min(8, chunk // 128)),
        )  # fmt: skip
    return index, slots


def _empty_selection(scores: Tensor, sizes: list[int], cover_prefix: bool) -> tuple[Tensor, Tensor]:
    shape = unpack(sizes)
    batch, groups = scores.shape[1:3]
    index = torch.empty(batch, groups, shape.num_gathered, dtype=torch.int32, device=scores.device)
    slots = torch.empty(batch, groups, num_slots(shape), dtype=torch.int32, device=scores.device)
    return index, slots


select_fwd = Operator(_select, _empty_selection)


def select(scores: Tensor, shape: PyramidShape, config: LighthouseConfig) -> Selection:
    """Choose the gathered entries, coarse to fine, independently in each tile.

    Half of the winners (rounded up) have the highest s_q, the others the highest s_k of the rest. Ties go to the lower
    entry, NaN ranks below everything.
    """
    return Selection(*select_fwd(scores, pack(shape), config.cover_prefix))
