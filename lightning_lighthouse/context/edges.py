"""Windows and chunks over shared sequences: what crosses the edges of the ranks is all that they exchange.

The first tokens of a rank see some of the rank before, and sinks of the first one. Those keys and values are put in
front of the rank's own, together with queries that nobody needs, and the ordinary attention runs on both. Where a
window and its sinks are more tokens than a rank has, heads are exchanged for tokens instead.
"""

# B batch, H query heads, G key/value heads, D head dim; n tokens of a rank

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lightning_lighthouse.attention.inputs import plain
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
    if window + sink_tokens > q_BHnD.shape[2]:
        return exchange_tokens(attend, q_BHnD, k_BGnD, v_BGnD, context)
    # the first rank sees all that it can
    reach = [0] + [window - 1] * (context.size - 1)
    sinks = [0] + [sink_tokens] * (context.size - 1)
    return _with_others(attend, q_BHnD, k_BGnD, v_BGnD, sinks, reach, context)


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
    (count,) = plain(q_BHnD.shape[2])
    reach = [rank * count % window for rank in range(context.size)]
    if max(reach) >= count:
        return exchange_tokens(attend, q_BHnD, k_BGnD, v_BGnD, context)
    return _with_others(attend, q_BHnD, k_BGnD, v_BGnD, [0] * context.size, reach, context)


def _with_others(
    attend: Attend,
    q_BHnD: Tensor,
    k_BGnD: Tensor,
    v_BGnD: Tensor,
    sinks: list[int],
    reach: list[int],
    context: Context,
) -> Tensor:
    """Attend with keys and values of other ranks in front of this rank's own: `[B, H, n, D]`.

    All in one exchange, in which every rank gets as many: some of its own again, at least one, which go behind the
    others, where nothing sees them. Else a compiler would leave out what is empty on one rank, and the others would
    wait.

    Args:
        attend: Given as many queries.
        q_BHnD: Of this rank's tokens.
        k_BGnD: Of the same.
        v_BGnD: Of the same.
        sinks: So many of the sequence's first tokens for each rank, and then
        reach: so many of those right before it.
        context: The ranks.
    """
    rank, (count,) = context.rank, plain(q_BHnD.shape[2])
    needed = [sum(both) for both in zip(sinks, reach, strict=True)]
    if not any(needed):
        return attend(q_BHnD, k_BGnD, v_BGnD)
    num_front = needed[rank]
    num_again = max(needed) + 1 - num_front
    slices, sent, received = [], [0] * context.size, [0] * context.size
    for other in range(context.size):
        first = sinks[other] if rank == 0 else 0
        last = reach[other] if other == rank + 1 else 0
        again = num_again if other == rank else 0
        slices += [slice(0, first), slice(count - last, count), slice(0, again)]
        sent[other] = first + last + again
    # cut first: the gradient of a slice is as long as the whole, which is not to be doubled
    parts = [torch.cat((k_BGnD[:, :, here], v_BGnD[:, :, here]), 3) for here in slices if here.start < here.stop]
    received[0] += sinks[rank]
    received[rank - 1] += reach[rank]
    received[rank] += num_again
    sent_EBGD = torch.cat(parts, 2).permute(2, 0, 1, 3)
    arrived = pass_on(sent_EBGD, sent, received, context.group).permute(1, 2, 0, 3)
    k_more, v_more = arrived.chunk(2, 3)
    q_more = q_BHnD.new_zeros((*q_BHnD.shape[:2], num_front + num_again, q_BHnD.shape[3]))
    q, k, v = (
        torch.cat((more[:, :, :num_front], own, more[:, :, num_front:]), 2)
        for own, more in ((q_BHnD, q_more), (k_BGnD, k_more), (v_BGnD, v_more))
    )
    return attend(q, k, v)[:, :, num_front : num_front + count]
