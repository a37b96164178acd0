"""Select: the winners of every level and tile, and where the gathered entries stand, without a sort.

One launch, a program per tile and kv head. At each level the threshold of the count-th largest key is found by
bisection over its bits, first for s_q, then for s_k among the rest; ties go to the lower entry by a prefix sum. Random
keys are a hash and have one threshold; evenly spaced winners need none. `selection="causal"` is in `kernels/causal.py`.
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

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.hashing import mix
from lightning_lighthouse.attention.kernels.launch import MOST_KEPT, Launch
from lightning_lighthouse.attention.kernels.ops import Operator, pack, unpack
from lightning_lighthouse.attention.kernels.rows import level_start, num_coarsest
from lightning_lighthouse.attention.kernels.select_causal import select_causal_fwd
from lightning_lighthouse.attention.kernels.tiles import (
    ABOVE_ALL,
    WON,
    Selection,
    chunk_of,
    clear_slots,
    empty_selection,
    entry_of,
    evenly,
    most_candidates,
    place,
    store_winners,
    threshold,
    tile_of,
    to_keys,
    winners_of,
)
from lightning_lighthouse.attention.pyramid import PyramidShape

# Random keys have 30 bits, and entry 0 the key above them
KEY_SHIFT = tl.constexpr(2)
COVERED = tl.constexpr(2**30)


@triton.jit
def _wins(b_key, pivot, ties, seen):
    """Which of a chunk's keys win, given how many keys equal to the threshold came before."""
    b_tie = (b_key == pivot).to(tl.int32)
    b_rank = seen + tl.cumsum(b_tie, 0) - b_tie
    return (b_key > pivot) | ((b_tie > 0) & (b_rank < ties)), seen + tl.sum(b_tie)


@triton.jit
def _mix(b_state, b_word):
    """The twin of `hashing.mix`, in 32 bits that wrap around."""
    b_state = (b_state ^ b_word) + 0x9E3779B9
    b_state = (b_state ^ (b_state >> 16)) * 0x85EBCA6B
    b_state = (b_state ^ (b_state >> 13)) * 0xC2B2AE35
    return b_state ^ (b_state >> 16)


@triton.jit
def _random_keys(state, i_head, b_entry, LEVEL: tl.constexpr):
    b_entry = b_entry.to(tl.uint32)
    b_state = tl.zeros(b_entry.shape, tl.uint32) + state.to(tl.uint32, bitcast=True)
    b_state = _mix(b_state, tl.full(b_entry.shape, LEVEL, tl.uint32))
    b_state = _mix(b_state, tl.zeros(b_entry.shape, tl.uint32) + i_head.to(tl.uint32))
    return (_mix(b_state, b_entry) >> KEY_SHIFT).to(tl.int32)


@triton.jit(do_not_specialize=["num_coarsest", "num_slots", "num_scores", "stride_scores", "tile_entries", "winners",
                               "num_tiles", "tile_gathered", "groups", "first_head", "state", "C"])  # fmt: skip
def _select_kernel(
    p_scores, p_index, p_slots, p_scratch, p_tiles, state,
    num_coarsest, num_slots, num_scores, stride_scores, num_tiles, tile_entries, winners, tile_gathered, groups,
    first_head, C, RULE: tl.constexpr, L: tl.constexpr, W: tl.constexpr, COVER: tl.constexpr,
    CHUNK: tl.constexpr, TABLE: tl.constexpr, IN_PART: tl.constexpr,
):  # fmt: skip
    i_tile = tl.program_id(0) % num_tiles
    i_head = (tl.program_id(0) // num_tiles).to(tl.int64)
    p_sq = p_scores + i_head * num_scores
    p_sk = p_sq + stride_scores
    p_slots += i_head * num_slots
    p_index += (i_head * num_tiles + i_tile) * tile_gathered
    p_qkeys = p_scratch + tl.program_id(0).to(tl.int64) * C * (2 + 3 * (L - 1))
    p_kkeys = p_qkeys + C
    p_upto = p_kkeys + C
    p_parents = p_upto + C * (L - 1)
    p_entries = p_parents + C * (L - 1)

    first, real, rank, base = tile_of(p_tiles, i_tile, num_tiles, tile_entries, tile_gathered, TABLE)
    if not TABLE:
        clear_slots(p_slots, i_tile, num_tiles, tile_entries, L, W, CHUNK)

    num_candidates = real if IN_PART else tile_entries
    whole_candidates = tile_entries
    for LEVEL in tl.static_range(L - 1, 0, -1):
        count = winners_of(winners, num_candidates, whole_candidates, real, tile_entries, IN_PART)
        # of the document
        first_entry = (first - rank * tile_entries) * W ** (L - 1 - LEVEL) if TABLE else 0
        if RULE == "strided":
            for i_chunk in range(0, num_candidates, CHUNK):
                i_candidate = i_chunk + tl.arange(0, CHUNK)
                mask = i_candidate < num_candidates
                b_upto = evenly(i_candidate + 1, count, num_candidates)
                b_won = mask & (b_upto > evenly(i_candidate, count, num_candidates))
                b_entry = entry_of(p_entries, i_candidate, mask, first, LEVEL, L, W, C)
                store_winners(p_upto, p_parents, p_entries, i_candidate, b_entry, b_won, b_upto, mask, LEVEL, C)
        else:
            o_level = level_start(num_coarsest, LEVEL, L, W)
            for i_chunk in range(0, num_candidates, CHUNK):
                i_candidate = i_chunk + tl.arange(0, CHUNK)
                mask = i_candidate < num_candidates
                b_entry = entry_of(p_entries, i_candidate, mask, first, LEVEL, L, W, C)
                if RULE == "random":
                    b_qkey = _random_keys(state, first_head + i_head % groups, b_entry - first_entry, LEVEL)
                    if COVER:
                        b_qkey = tl.where(b_entry == first_entry, COVERED, b_qkey)
                    b_kkey = b_qkey
                else:
                    b_sq = tl.load(p_sq + o_level + b_entry, mask=mask, other=0.0)
                    b_sk = tl.load(p_sk + o_level + b_entry, mask=mask, other=0.0)
                    if COVER:
                        b_sq = tl.where(b_entry == first_entry, float("inf"), b_sq)
                    b_qkey = to_keys(b_sq)
                    b_kkey = to_keys(b_sk)
                tl.store(p_qkeys + i_candidate, b_qkey, mask=mask)
                tl.store(p_kkeys + i_candidate, b_kkey, mask=mask)
            tl.debug_barrier()

            by_q = count if RULE == "random" else (count + 1) // 2
            pivot, ties = threshold(p_qkeys, by_q, num_candidates, CHUNK)
            seen = 0
            for i_chunk in range(0, num_candidates, CHUNK):
                i_candidate = i_chunk + tl.arange(0, CHUNK)
                mask = i_candidate < num_candidates
                b_key = tl.load(p_qkeys + i_candidate, mask=mask, other=WON)
                b_won, seen = _wins(b_key, pivot, ties, seen)
                tl.store(p_kkeys + i_candidate, WON, mask=mask & b_won)
            tl.debug_barrier()

            pivot, ties = threshold(p_kkeys, count - by_q, num_candidates, CHUNK)
            seen = 0
            won_before = 0
            for i_chunk in range(0, num_candidates, CHUNK):
                i_candidate = i_chunk + tl.arange(0, CHUNK)
                mask = i_candidate < num_candidates
                b_key = tl.load(p_kkeys + i_candidate, mask=mask, other=ABOVE_ALL)
                b_by_k, seen = _wins(b_key, pivot, ties, seen)
                b_won = mask & (b_by_k | (b_key == WON))
                b_upto = won_before + tl.cumsum(b_won.to(tl.int32), 0)
                won_before = tl.max(b_upto)
                b_entry = entry_of(p_entries, i_candidate, mask, first, LEVEL, L, W, C)
                store_winners(p_upto, p_parents, p_entries, i_candidate, b_entry, b_won, b_upto, mask, LEVEL, C)
        tl.debug_barrier()
        num_candidates = count * W
        whole_candidates = tl.minimum(winners, whole_candidates) * W

    place(
        p_index, p_slots, p_upto, p_parents, p_entries, first, real, base, num_coarsest, tile_entries, winners, C,
        L, W, CHUNK, IN_PART, TABLE,
    )  # fmt: skip


def _select(
    scores: Tensor, sizes: list[int], rule: str, cover_prefix: bool, seed: int, step: Tensor | None, first_head: int
) -> tuple[Tensor, Tensor]:
    shape = unpack(sizes)
    index, slots = empty_selection(scores, shape)
    launch_select(
        scores, index, slots, shape, num_coarsest(shape), shape.num_tiles, rule, cover_prefix, seed, step, first_head
    )
    return index, slots


def launch_select(
    scores: Tensor,
    index: Tensor,
    slots: Tensor,
    shape: PyramidShape,
    num_windows: int,
    num_tiles: int,
    rule: str,
    cover_prefix: bool,
    seed: int,
    step: Tensor | None,
    first_head: int,
    tiles: Tensor | None = None,
) -> None:
    """Write index and slots of `num_tiles` tiles over `num_windows` windows.

    `tiles` `[4, num_tiles]` int32 says where they lie: `tile_of`. With it there is no index, and slots are -1 before.
    """
    candidates = most_candidates(shape)
    programs = scores.shape[1] * scores.shape[2] * num_tiles
    # two rows of keys, and three rows a level with winners
    scratch = torch.empty(programs, 3 * shape.num_levels - 1, candidates, dtype=torch.int32, device=scores.device)
    state = mix(mix(0, seed), 0 if step is None else int(step))
    plan = _plan(
        scores.shape, scores.stride(0), slots.shape[-1], shape, num_windows, num_tiles, rule, cover_prefix, first_head,
        chunk_of(candidates), tiles is not None,
    )  # fmt: skip
    # the same bits with a sign, so that the type does not depend on the value
    plan(scores, index, slots, scratch, tiles, changing=(state - 2**32 if state >= 2**31 else state,))


@lru_cache(maxsize=MOST_KEPT)
def _plan(
    scores_shape: tuple[int, ...],
    stride_scores: int,
    num_slots: int,
    shape: PyramidShape,
    num_windows: int,
    num_tiles: int,
    rule: str,
    cover_prefix: bool,
    first_head: int,
    chunk_and_warps: tuple[int, int],
    has_table: bool,
) -> Launch:
    _, batch, groups, num_scores = scores_shape
    chunk, num_warps = chunk_and_warps
    return Launch(
        _select_kernel,
        batch * groups * num_tiles,
        (num_windows, num_slots, num_scores, stride_scores, num_tiles, shape.tile_entries, shape.winners[1],
         shape.tile_gathered, groups, first_head, most_candidates(shape)),
        (rule, shape.num_levels, shape.pooling_factor, cover_prefix, chunk, has_table, has_table and rule != "strided"),
        num_warps,
    )  # fmt: skip


def _empty(
    scores: Tensor, sizes: list[int], rule: str, cover_prefix: bool, seed: int, step: Tensor | None, first_head: int
) -> tuple[Tensor, Tensor]:
    return empty_selection(scores, unpack(sizes))


select_fwd = Operator(_select, _empty)


def select(
    scores: Tensor,
    shape: PyramidShape,
    config: LighthouseConfig,
    step: Tensor | None = None,
    first_head: int = 0,
) -> Selection:
    """Choose the gathered entries, coarse to fine, in contiguous tiles (`winners.py` has the rules).

    `step`, a 0-dim int64 tensor on the CPU, is what selection="random" draws for, None is step 0; `first_head` is the
    number that it gives to the first key/value head.
    """
    sizes = pack(shape)
    if config.selection == "causal":
        return Selection(*select_causal_fwd(scores, sizes))
    return Selection(*select_fwd(scores, sizes, config.selection, config.cover_prefix, config.seed, step, first_head))
