"""What the kernels of selection share: the candidates of a tile, their ranks, and the places of what is gathered.

One program per tile and kv head walks down the levels. It keeps three rows of scratch a level, at LEVEL - 1: winners up
to and with each candidate; each winner's candidate; each winner's entry. These give every gathered entry its place in
the post-order of the gathered sequence, without a sort.
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

from lightning_lighthouse.attention.kernels.rows import level_entries, level_start, num_slots
from lightning_lighthouse.attention.pyramid import PyramidShape, power_of_two

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
def to_keys(b_score):
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
def threshold(p_keys, count, num_candidates, CHUNK: tl.constexpr):
    """A number that `count` keys reach, or more where keys are equal to it; and how many of those equal to it win."""
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
def tile_of(p_tiles, i_tile, num_tiles, tile_entries, tile_gathered, TABLE: tl.constexpr):
    """The first window of a tile, how many windows it has, its rank in its document, and its first slot.

    TABLE: `p_tiles` holds these numbers of all tiles, one kind behind the other. Candidates from beyond the windows
    that a tile has are padding, though they may be of another document: their scores are 0 and they get no slot.
    """
    if TABLE:
        first = tl.load(p_tiles + i_tile)
        real = tl.load(p_tiles + num_tiles + i_tile)
        rank = tl.load(p_tiles + 2 * num_tiles + i_tile)
        base = tl.load(p_tiles + 3 * num_tiles + i_tile)
    else:
        first = i_tile * tile_entries
        real = tile_entries
        rank = i_tile
        base = i_tile * tile_gathered
    return first, real, rank, base


@triton.jit
def is_real(b_entry, first, real, LEVEL: tl.constexpr, L: tl.constexpr, W: tl.constexpr, mask, TABLE: tl.constexpr):
    """Which entries of LEVEL are no padding."""
    if TABLE:
        mask = mask & (b_entry < (first + real) * W ** (L - 1 - LEVEL))
    return mask


@triton.jit
def winners_of(winners, num_candidates, whole_candidates, real, tile_entries, IN_PART: tl.constexpr):
    """How many of the candidates of a tile win. IN_PART: as a whole tile has winners, in proportion to its windows."""
    if IN_PART:
        count = tl.cdiv(real * tl.minimum(winners, whole_candidates), tile_entries)
    else:
        count = tl.minimum(winners, num_candidates)
    return count


@triton.jit
def entry_of(p_entries, i_candidate, mask, first, LEVEL: tl.constexpr, L: tl.constexpr, W: tl.constexpr, C):
    """Entries of the candidates of LEVEL: all of the tile at the coarsest, the children of winners below."""
    if LEVEL == L - 1:
        b_entry = first + i_candidate
    else:
        b_parent = tl.load(p_entries + LEVEL * C + i_candidate // W, mask=mask, other=0)
        b_entry = b_parent * W + i_candidate % W
    return b_entry


@triton.jit
def clear_slots(p_slots, i_tile, num_tiles, tile_entries, L: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr):
    """The tile's part of the slot map, nothing gathered so far."""
    o_level = 0
    for row in tl.static_range(L):
        num_entries = tile_entries * W ** (L - 1 - max(row, 1))
        for i_chunk in range(0, num_entries, CHUNK):
            i_entry = i_chunk + tl.arange(0, CHUNK)
            tl.store(p_slots + o_level + i_tile * num_entries + i_entry, -1, mask=i_entry < num_entries)
        o_level += num_entries * num_tiles


@triton.jit
def store_winners(p_upto, p_parents, p_entries, i_candidate, b_entry, b_won, b_upto, mask, LEVEL: tl.constexpr, C):
    """Keep the winners of a chunk; `b_upto` of the tile's are among the candidates up to and with each."""
    tl.store(p_upto + (LEVEL - 1) * C + i_candidate, b_upto, mask=mask)
    tl.store(p_parents + (LEVEL - 1) * C + b_upto - 1, i_candidate, mask=b_won)
    tl.store(p_entries + (LEVEL - 1) * C + b_upto - 1, b_entry, mask=b_won)


@triton.jit
def evenly(rank, count, num_candidates):
    """How many of `count` evenly spaced candidates are among the first `rank`: those of ranks floor(m n / count)."""
    return ((rank.to(tl.int64) * count + (num_candidates - 1)) // num_candidates).to(tl.int32)


@triton.jit
def place(
    p_index, p_slots, p_upto, p_parents, p_entries, first, real, base, num_coarsest, tile_entries, winners, C,
    L: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr, IN_PART: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """Write the index of the tile and its slots: what stands before a candidate on its own level, above and below.

    TABLE: the slots alone; padding stands behind all that is real, and moves nothing.
    """
    num_candidates = real if IN_PART else tile_entries
    whole_candidates = tile_entries
    for LEVEL in tl.static_range(L - 1, -1, -1):
        o_level = 0 if LEVEL == 0 else level_entries(num_coarsest, 0, L, W) + level_start(num_coarsest, LEVEL, L, W)
        o_slots = 0 if LEVEL == 0 else level_entries(num_coarsest, 1, L, W) + level_start(num_coarsest, LEVEL, L, W)
        for i_chunk in range(0, num_candidates, CHUNK):
            i_candidate = i_chunk + tl.arange(0, CHUNK)
            mask = i_candidate < num_candidates
            b_entry = entry_of(p_entries, i_candidate, mask, first, LEVEL, L, W, C)
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
            if not TABLE:
                tl.store(p_index + b_position, o_level + b_entry, mask=mask)
            mask = is_real(b_entry, first, real, LEVEL, L, W, mask, TABLE)
            b_slot = base + b_position
            if LEVEL == 0:
                tl.store(p_slots + b_entry // W, b_slot, mask=mask & (i_candidate % W == 0))
            else:
                tl.store(p_slots + o_slots + b_entry, b_slot, mask=mask)
        num_candidates = winners_of(winners, num_candidates, whole_candidates, real, tile_entries, IN_PART) * W
        whole_candidates = tl.minimum(winners, whole_candidates) * W


def empty_selection(scores: Tensor, shape: PyramidShape) -> tuple[Tensor, Tensor]:
    """Uninitialised memory of a `Selection`, for scores `[2, B, G, .]`."""
    batch, groups = scores.shape[1:3]
    index = torch.empty(batch, groups, shape.num_gathered, dtype=torch.int32, device=scores.device)
    slots = torch.empty(batch, groups, num_slots(shape), dtype=torch.int32, device=scores.device)
    return index, slots


def most_candidates(shape: PyramidShape) -> int:
    """C, the most candidates of a level in a tile."""
    return max(shape.candidates(level) for level in range(1, shape.num_levels))


def chunk_of(candidates: int) -> tuple[int, int]:
    """Candidates of one chunk, and the warps that work on it."""
    chunk = min(MAX_CHUNK, max(32, power_of_two(candidates)))
    return chunk, max(1, min(8, chunk // 128))
