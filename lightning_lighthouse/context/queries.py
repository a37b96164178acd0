"""What ranks exchange where W does not divide the key/value heads, as with more ranks than those: heads x queries.

u neighbours share the heads out among them, and the W / u groups of neighbours share out the queries: a rank attends
from its part of the queries, of its share of the heads, to keys and values of the whole sequence. The queries are cut
into 2 W / u chunks, and group g takes chunk g with the g-th from the end, so that all have as much to do. One exchange
takes q, k and v there, and another one takes the output back.

A selection is made from scores of all tokens and all queries of a group of heads, as in one process: heads are never
split further, nor repeated.
"""

# B batch, H query heads, G key/value heads, D head dim; W ranks, u of them neighbours, g group of neighbours; T rows of
# all ranks, tokens or gathered entries, t = T / W of a rank; S gathered entries

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from lightning_lighthouse.attention.backends import choose_stages
from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.inputs import plain
from lightning_lighthouse.attention.lighthouse import lighthouse_attention, score_entries
from lightning_lighthouse.attention.lower_right import lower_right_sdpa
from lightning_lighthouse.attention.rotation import Rotation, check_rotation
from lightning_lighthouse.context.collectives import pass_both, pass_on
from lightning_lighthouse.context.exchange import exchange_tokens, first_kv_head, num_neighbours, to_all_groups
from lightning_lighthouse.context.group import Context

# of rows, the first one and the one behind the last
Rows = tuple[int, int]


def exchange_queries(
    q_BHtD: Tensor, k_BGtD: Tensor, v_BGtD: Tensor, context: Context, *, scale: float | None, sdpa: str
) -> Tensor:
    """Causal attention over the rows of all ranks, for this rank's: `[B, H, t, D]`.

    Args:
        q_BHtD: Of this rank's rows.
        k_BGtD: Of the same.
        v_BGtD: Of the same.
        context: The ranks.
        scale: Factor of the attention logits; None: `D ** -0.5`.
        sdpa: As `backend` in `lower_right_sdpa`.
    """
    neighbours, (count,) = num_neighbours(k_BGtD.shape[1], context), plain(q_BHtD.shape[2])
    chunks, group = chunks_of(count * context.size, context.size // neighbours), context.rank // neighbours
    # of this rank's rows, those of each group
    own = pieces_of(context.rank, count, chunks)
    sent = [num_rows(own[rank // neighbours]) for rank in range(context.size)]
    received = [num_rows(pieces_of(rank, count, chunks)[group]) for rank in range(context.size)]

    q_tBHD = q_BHtD.permute(2, 0, 1, 3)
    # to one group after the other, of which each rank gets its share of the heads
    parts = [torch.cat([q_tBHD[start:end] for start, end in pieces]) for pieces in own if pieces]
    q_rows = torch.cat([x.unflatten(2, (neighbours, -1)).permute(2, 0, 1, 3, 4).flatten(0, 1) for x in parts])
    kv = torch.cat([x.unflatten(1, (neighbours, -1)) for x in (k_BGtD, v_BGtD)], 2).permute(1, 3, 0, 2, 4)
    q_rows, kv = pass_both(q_rows, to_all_groups(kv, context), sent, received, context.group)
    k, v = kv.flatten(0, 1).permute(1, 2, 0, 3).chunk(2, 1)
    o = _attend(q_rows.permute(1, 2, 0, 3), k, v, _of_group(chunks, group), scale, sdpa)

    o_rows = pass_on(o.permute(2, 0, 1, 3), received, sent, context.group)
    parts = [
        x.unflatten(0, (neighbours, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)
        for x in o_rows.split([neighbours * num_rows(pieces) for pieces in own if pieces])
    ]
    return _in_order(parts, [pieces for pieces in own if pieces]).permute(1, 2, 0, 3)


def shared_lighthouse(
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
    """`lighthouse_attention` over a shared sequence whose tokens are exchanged: `[B, H, n, D]`.

    Every group of neighbours scores, selects and gathers for the whole sequence; they share out the attention between.

    Args:
        q_BHnD: Of this rank's tokens, as the others.
        k_BGnD: Of the same.
        v_BGnD: Of the same.
        config: Settings.
        context: The ranks that share the sequence.
        scale: As there.
        step: As there.
        rotation: As there.
    """
    first_head, neighbours = first_kv_head(k_BGnD.shape[1], context), num_neighbours(k_BGnD.shape[1], context)
    shape = config.pyramid(*plain(q_BHnD.shape[2] * context.size))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        stages = choose_stages(config, q.device, q.dtype)
        with torch.no_grad():
            scores = score_entries(stages, q, k, v, shape, config, scale=scale)
            selection = stages.select(scores, shape, config, step, first_head)
        qs, ks, vs = stages.gather(q, k, v, selection, shape, check_rotation(rotation, config, q.shape[3]))
        o_BHSD = _share_queries(qs, ks, vs, neighbours, context, scale, config.sdpa)
        return stages.scatter(o_BHSD, selection, shape, config)

    # sequences that are too short to gain are dense, and say so; of few rows some groups would get none
    if not shape.compresses or shape.num_gathered < 2 * (context.size // neighbours):
        attend = partial(
            lighthouse_attention, config=config, scale=scale, step=step, first_head=first_head, rotation=rotation
        )
    return exchange_tokens(attend, q_BHnD, k_BGnD, v_BGnD, context)


def _share_queries(
    qs: Tensor, ks: Tensor, vs: Tensor, neighbours: int, context: Context, scale: float | None, sdpa: str
) -> Tensor:
    """Causal attention over rows that every group has whole, each from its part of the queries: `[B, H / u, S, D]`."""
    size, group, (total,) = context.size, context.rank // neighbours, plain(qs.shape[2])
    chunks = chunks_of(total, size // neighbours)
    own = _of_group(chunks, group)
    o = _attend(torch.cat([qs[:, :, start:end] for start, end in own], 2), ks, vs, own, scale, sdpa)
    # ranks with the same heads
    are_alike = [rank % neighbours == context.rank % neighbours for rank in range(size)]
    sent = [num_rows(own) * is_alike for is_alike in are_alike]
    received = [num_rows(_of_group(chunks, rank // neighbours)) * are_alike[rank] for rank in range(size)]
    rows = o.permute(2, 0, 1, 3)
    arrived = pass_on(rows.repeat(size // neighbours, 1, 1, 1), sent, received, context.group)
    pieces = [_of_group(chunks, other) for other in range(size // neighbours)]
    return _in_order(arrived.split([num_rows(each) for each in pieces]), pieces).permute(1, 2, 0, 3)


def _attend(q: Tensor, k: Tensor, v: Tensor, own: list[Rows], scale: float | None, sdpa: str) -> Tensor:
    """Causal attention from chunks of the queries, which lie one behind the other, to all keys before their ends."""
    queries = q.split([end - start for start, end in own], 2)
    return torch.cat(
        [
            lower_right_sdpa(part, k[:, :, :end], v[:, :, :end], scale=scale, backend=sdpa)
            for part, (_, end) in zip(queries, own, strict=True)
        ],
        2,
    )


def chunks_of(total: int, groups: int) -> list[Rows]:
    """Two chunks of the rows for each group, as even as can be."""
    edges = [number * total // (2 * groups) for number in range(2 * groups + 1)]
    return list(pairwise(edges))


def _of_group(chunks: list[Rows], group: int) -> list[Rows]:
    """The chunks that a group attends for: causal attention of both is as much work in each of them."""
    return [(start, end) for start, end in (chunks[group], chunks[-1 - group]) if start < end]


def pieces_of(rank: int, count: int, chunks: list[Rows]) -> list[list[Rows]]:
    """What of the `count` rows of a rank each group attends for, counted from the rank's first one."""
    first = rank * count
    found = []
    for group in range(len(chunks) // 2):
        cut = [(max(start - first, 0), min(end - first, count)) for start, end in _of_group(chunks, group)]
        found.append([(start, end) for start, end in cut if start < end])
    return found


def num_rows(pieces: list[Rows]) -> int:
    return sum(end - start for start, end in pieces)


def _in_order(parts: list[Tensor] | tuple[Tensor, ...], pieces: list[list[Rows]]) -> Tensor:
    """The rows of all parts by their places, of which each part has several pieces."""
    found = []
    for part, places in zip(parts, pieces, strict=True):
        split = part.split([end - start for start, end in places])
        found += [(start, rows) for (start, _), rows in zip(places, split, strict=True)]
    return torch.cat([rows for _, rows in sorted(found, key=lambda one: one[0])])
