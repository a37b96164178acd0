"""Lighthouse Attention over shared sequences: the ranks exchange the S gathered entries, and not the N tokens.

A rank scores and pools its own tokens. All ranks are told the scores, and choose alike; where tiles end with the ranks,
a run of S / W entries in the gathered sequence is a rank's own. Heads are exchanged for those alone. The outputs return
to the rank's tokens with the last entries of the rank before, which reach over the edge.
"""

# B batch, H query heads, G key/value heads, D head dim, L levels, W ranks, r rank, n tokens of a rank, S entries of all
# ranks, s = S / W of a rank, E entries of the levels above the tokens on one rank

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_lighthouse.attention import reference
from lightning_lighthouse.attention.backends import choose_stages
from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.inputs import plain
from lightning_lighthouse.attention.pyramid import PyramidShape, ceil_div
from lightning_lighthouse.attention.rotation import Rotation, check_rotation
from lightning_lighthouse.attention.sdpa import causal_sdpa
from lightning_lighthouse.context.collectives import all_gather
from lightning_lighthouse.context.exchange import heads_to_shares, num_neighbours, tokens_to_heads
from lightning_lighthouse.context.fronts import append_front
from lightning_lighthouse.context.group import Context
from lightning_lighthouse.context.queries import exchange_queries
from lightning_lighthouse.notices import log_once


def can_exchange_entries(config: LighthouseConfig, num_tokens: int, context: Context) -> bool:
    """Whether tiles end with ranks, for `num_tokens` of each, and the scorer needs no more than a rank's own tokens."""
    shape = config.pyramid(*plain(num_tokens * context.size))
    if not shape.compresses:
        return False
    is_even = shape.padded_tokens == shape.num_tokens and shape.num_tiles % context.size == 0
    if is_even and (config.scorer == "norm" or not config.reads_scores):
        return True
    obstacle = "the scorer reads all tokens" if is_even else f"its {shape.num_tiles} tiles do not end with the ranks"
    log_once(
        "shared entries",
        f"{context.size} ranks exchange all {shape.num_tokens:,} tokens around Lighthouse Attention, not its "
        f"{shape.num_gathered:,} entries alone: {obstacle}",
    )
    return False


def exchange_entries(
    q_BHnD: Tensor,
    k_BGnD: Tensor,
    v_BGnD: Tensor,
    config: LighthouseConfig,
    context: Context,
    *,
    scale: float | None = None,
    step: Tensor | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """`lighthouse_attention` over a shared sequence, for this rank's tokens: `[B, H, n, D]`.

    Args:
        q_BHnD: Of this rank's tokens, as the others.
        k_BGnD: Of the same.
        v_BGnD: Of the same.
        config: Settings for which `can_exchange_entries`.
        context: The ranks that share the sequence.
        scale: As there.
        step: As there.
        rotation: As there.
    """
    # windows lie within a rank, so that offsets inside them are the same on all
    rotation = check_rotation(rotation, config, q_BHnD.shape[3])
    shape = config.pyramid(*plain(q_BHnD.shape[2] * context.size))
    part = replace(shape, num_tokens=shape.num_tokens // context.size, num_tiles=shape.num_tiles // context.size)
    stages = choose_stages(config, q_BHnD.device, q_BHnD.dtype)
    with torch.no_grad():
        scores = stages.score(q_BHnD, k_BGnD, v_BGnD, part, config)
        whole = stages.select(_of_all_ranks(stages, scores, part, context), shape, config, step)
        own = _own(stages, whole, shape, part, context)
    qs, ks, vs = stages.gather(q_BHnD, k_BGnD, v_BGnD, own, part, rotation)
    if num_neighbours(ks.shape[1], context) < context.size:
        o_BHsD = exchange_queries(qs, ks, vs, context, scale=scale, sdpa=config.sdpa)
        shares = o_BHsD.permute(2, 0, 1, 3).unsqueeze(0)
    else:
        q, k, v = tokens_to_heads(qs, ks, vs, context)
        shares = heads_to_shares(causal_sdpa(q, k, v, scale=scale, backend=config.sdpa), context)
    return _scatter(stages, shares, own, _reaching(stages, whole.slots, shape, part, context), part, config, context)


def _of_all_ranks(stages: ModuleType, scores: Any, part: PyramidShape, context: Context) -> Any:
    """The scores of the whole sequence, in the form of the backend, from those of each rank."""
    is_listed = stages is reference
    # [2, B, G, E], level by level; those of the tokens are never compared
    levels = torch.cat([torch.stack(level) for level in scores[1:]], -1) if is_listed and scores[1:] else scores
    if isinstance(levels, list) or not levels.numel():
        # a selection that compares none
        return scores
    sizes = [part.entries(level) for level in range(1, part.num_levels)]
    gathered = all_gather(levels, context.size, context.group).split(sizes, -1)
    joined = [level.movedim(0, -2).flatten(-2) for level in gathered]
    if not is_listed:
        return torch.cat(joined, -1)
    return [scores[0], *((s_q, s_k) for s_q, s_k in joined)]


def _rows(stages: ModuleType, shape: PyramidShape, level: int) -> tuple[int, int]:
    """Where a level begins in the slot map of a backend, and how many numbers it has there."""
    if stages is reference:
        return shape.start(level), shape.entries(level)
    # one number for the tokens of each window of level 1
    start = 0 if level == 0 else shape.entries(1) + shape.start(level) - shape.start(1)
    return start, shape.entries(max(level, 1))


def _own(stages: ModuleType, whole: Any, shape: PyramidShape, part: PyramidShape, context: Context) -> Any:
    """The selection of this rank's tokens, numbered as in a sequence of their own."""
    rank, first_slot = context.rank, context.rank * part.num_gathered
    levels = []
    for level in range(part.num_levels):
        start, count = _rows(stages, shape, level)[0], _rows(stages, part, level)[1]
        levels.append(whole.slots[..., start + rank * count : start + (rank + 1) * count])
    slots = torch.cat(levels, -1)
    slots = torch.where(slots >= 0, slots - first_slot, slots)
    index = whole.index[..., first_slot : first_slot + part.num_gathered]
    if stages is reference:
        # the kernels gather by slots alone
        moved = torch.zeros_like(index)
        for level in range(part.num_levels):
            start, count = shape.start(level), part.entries(level)
            is_here = (index >= start) & (index < start + shape.entries(level))
            moved = torch.where(is_here, index - start - rank * count + part.start(level), moved)
        index = moved
    return type(whole)(index, slots)


def _reaching(stages: ModuleType, slots: Tensor, shape: PyramidShape, part: PyramidShape, context: Context) -> Tensor:
    """`[B, G, L - 1]` bool: whether the last entry of each level of the rank before is gathered; none for the first."""
    if context.rank == 0:
        return slots.new_zeros((*slots.shape[:2], part.num_levels - 1), dtype=torch.bool)
    last = [
        _rows(stages, shape, level)[0] + context.rank * part.entries(level) - 1 for level in range(1, part.num_levels)
    ]
    return _at(slots, last) >= 0


def _at(x: Tensor, places: list[int]) -> Tensor:
    """`x[..., places]`: torch would copy such a list to the device, and wait for all that the device has to do."""
    return torch.stack([x[..., place] for place in places], -1)


def _scatter(
    stages: ModuleType,
    shares_usBHD: Tensor,
    own: Any,
    reaching_BGL: Tensor,
    part: PyramidShape,
    config: LighthouseConfig,
    context: Context,
) -> Tensor:
    """Return outputs to this rank's tokens, those of the rank before that reach over the edge among them.

    They lie in one coarsest window that is put in front of the rank's tokens, so that the stage itself does the rest.
    """
    levels = part.num_levels
    heads = shares_usBHD.shape[0] * shares_usBHD.shape[3] // reaching_BGL.shape[1]
    last = [_rows(stages, part, level)[0] + part.entries(level) - 1 for level in range(1, levels)]
    rows_BHL = _at(own.slots, last).repeat_interleave(heads, 1).clamp(min=0).long()
    extended, room = _with_front(part)
    o_BHsD = append_front(shares_usBHD, rows_BHL, reaching_BGL.repeat_interleave(heads, 1), room, context)

    pieces = []
    for level in range(levels):
        start, count = _rows(stages, part, level)
        front = own.slots.new_full((*own.slots.shape[:2], _rows(stages, extended, level)[1] - count), -1)
        if level:
            slot = part.num_gathered + level - 1
            front[..., -1] = torch.where(reaching_BGL[..., level - 1], slot, -1)
        pieces += [front, own.slots[..., start : start + count]]
    selection = type(own)(own.index, torch.cat(pieces, -1))
    return stages.scatter(o_BHsD, selection, extended, config, front=1)


def _with_front(part: PyramidShape) -> tuple[PyramidShape, int]:
    """The sizes with one coarsest window more, as one tile, and how many rows that has beside the gathered ones.

    A shape gathers a multiple of the pooling factor beside its coarsest entries: some of those rows stay empty.
    """
    levels, factor = part.num_levels, part.pooling_factor
    more = ceil_div(levels - 2, factor) if levels > 2 else 0
    winners = [0] * levels
    winners[1] = part.num_tiles * sum(part.winners) + more
    window = part.window(levels - 1)
    coarsest = part.num_tokens // window + 1
    extended = PyramidShape(part.num_tokens + window, levels, factor, 1, coarsest, tuple(winners))
    return extended, 1 + factor * more
