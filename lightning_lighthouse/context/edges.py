"""Windows and chunks over shared sequences: what crosses the edges of the ranks is all that they exchange.

The first tokens of a rank see some of the rank before, and sinks of the first one. Those keys and values are put in
front of the rank's own, together with queries that nobody needs, and the ordinary attention runs on both. Where a
window reaches further than one rank, heads are exchanged for tokens instead.
"""

# B batch, H query heads, G key/value heads, D head dim; W ranks, r rank, n tokens of a rank, E tokens in front of them

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lightning_lighthouse.attention.windows import chunk_attention, window_attention
from lightning_lighthouse.context.collectives import pass_on
from lightning_lighthouse.context.exchange import Attend, exchange_tokens
from lightning_lighthouse.context.group import Context


def shared_window(
    q_BHnD: Tensor,
    k_BGnD: Tensor,
    v_BGnD: Tensor,
    context: Context,
    window: int,
    *,
    sink_tokens: int = 0,
    scale: float | None = None,
    sdpa: str = "auto",
) -> Tensor:
    """`window_attention` over a shared sequence, for this rank's tokens: `[B, H, n, D]`.

    Args:
        q_BHnD: Of this rank's tokens, as the others.
        k_BGnD: Of the same.
        v_BGnD: Of the same.
        context: The ranks that share the sequence.
        window: As there, in tokens of the whole sequence, as the others.
        sink_tokens: As there.
        scale: As there.
        sdpa: As there.
    """
    attend = partial(window_attention, window=window, sink_tokens=sink_tokens, scale=scale, sdpa=sdpa)
    count = q_BHnD.shape[2]
    # ranks differ here in sizes, and a compiler may leave out what is empty on one of them: the others would wait
    if torch.compiler.is_compiling() or max(window - 1, sink_tokens) > count:
        return exchange_tokens(attend, q_BHnD, k_BGnD, v_BGnD, context)
    starts = [rank * count for rank in range(context.size)]
    reach = [min(window - 1, start) for start in starts]
    # the sinks that the edge does not hold itself
    sinks = [min(sink_tokens, start - edge) for start, edge in zip(starts, reach, strict=True)]
    return _behind(_in_front(k_BGnD, v_BGnD, sinks, reach, context), attend, q_BHnD, k_BGnD, v_BGnD)


def shared_chunk(
    q_BHnD: Tensor,
    k_BGnD: Tensor,
    v_BGnD: Tensor,
    context: Context,
    window: int,
    *,
    scale: float | None = None,
    sdpa: str = "auto",
) -> Tensor:
    """`chunk_attention` over a shared sequence, for this rank's tokens; nothing is sent where chunks end with ranks.

    Args:
        q_BHnD: `[B, H, n, D]`, of this rank's tokens.
        k_BGnD: `[B, G, n, D]`.
        v_BGnD: Alike.
        context: The ranks that share the sequence.
        window: As there, in tokens of the whole sequence.
        scale: As there.
        sdpa: As there.
    """
    attend = partial(chunk_attention, window=window, scale=scale, sdpa=sdpa)
    # of the chunk that a rank's first token lies in
    reach = [rank * q_BHnD.shape[2] % window for rank in range(context.size)]
    if not any(reach):
        return attend(q_BHnD, k_BGnD, v_BGnD)
    if torch.compiler.is_compiling() or max(reach) > q_BHnD.shape[2]:
        return exchange_tokens(attend, q_BHnD, k_BGnD, v_BGnD, context)
    front_BGED = _in_front(k_BGnD, v_BGnD, [0] * context.size, reach, context)
    return _behind(front_BGED, attend, q_BHnD, k_BGnD, v_BGnD)


def _in_front(k_BGnD: Tensor, v_BGnD: Tensor, sinks: list[int], reach: list[int], context: Context) -> Tensor:
    """Keys and values, `[B, G, E, 2 D]`, that rank r puts in front of its own.

    In one exchange: ranks have graphs of their own, in which several might come in another order.

    Args:
        k_BGnD: Of this rank's tokens.
        v_BGnD: Of the same.
        sinks: So many of the sequence's first tokens for each rank, and then
        reach: so many of those right before it.
        context: The ranks.
    """
    rank, size, count = context.rank, context.size, k_BGnD.shape[2]
    kv_BGnD = torch.cat((k_BGnD, v_BGnD), 3)
    parts, sent, received = [kv_BGnD[:, :, :0]], [0] * size, [0] * size
    for other in range(size):
        if rank == 0:
            parts.append(kv_BGnD[:, :, : sinks[other]])
            sent[other] += sinks[other]
        if other == rank + 1:
            parts.append(kv_BGnD[:, :, count - reach[other] :])
            sent[other] += reach[other]
    received[0] += sinks[rank]
    if rank:
        received[rank - 1] += reach[rank]
    sent_EBGD = torch.cat(parts, 2).permute(2, 0, 1, 3)
    return pass_on(sent_EBGD, sent, received, context.group).permute(1, 2, 0, 3)


def _behind(front_BGED: Tensor, attend: Attend, q_BHnD: Tensor, k_BGnD: Tensor, v_BGnD: Tensor) -> Tensor:
    """Attend with keys and values in front of a rank's own; also without any, so that every rank has one graph.

    A rank whose backward pass had no part in an exchange would let the others wait for ever.
    """
    count = front_BGED.shape[2]
    k_front, v_front = front_BGED.chunk(2, 3)
    q_front = q_BHnD.new_zeros((*q_BHnD.shape[:2], count, q_BHnD.shape[3]))
    k, v = torch.cat((k_front, k_BGnD), 2), torch.cat((v_front, v_BGnD), 2)
    return attend(torch.cat((q_front, q_BHnD), 2), k, v)[:, :, count:]
