"""Windows and chunks over shared sequences: what crosses the edges of the ranks is all that they exchange.

The first tokens of a rank see some of the rank before, and sinks of the first one. Those keys and values are put in
front of the rank's own, by one operator each way, which copies these once and in which every rank takes part, whatever
a compiler leaves out where little is sent. Then ordinary attention runs, of the rank's own queries. Where a window and
its sinks are more tokens than a rank has, heads are exchanged for tokens instead.
"""

# B batch, H query heads, G key/value heads, D head dim; n tokens of a rank, F of other ranks in front of them, E rows
# that are sent

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lighthouse.attention.inputs import plain
from lightning_lighthouse.attention.operators import Operator, empty_heads_inner
from lightning_lighthouse.attention.windows import chunk_attention, lower_right_window, window_attention
from lightning_lighthouse.context.collectives import pass_on
from lightning_lighthouse.context.exchange import exchange_tokens
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
    k, v = _add_edges_operator(k_BGnD, v_BGnD, sinks, reach, context.rank, context.group)
    return lower_right_window(q_BHnD, k, v, window, sink_tokens=sink_tokens, scale=scale, sdpa=sdpa)


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
    if not any(reach):
        return attend(q_BHnD, k_BGnD, v_BGnD)
    k, v = _add_edges_operator(k_BGnD, v_BGnD, [0] * context.size, reach, context.rank, context.group)
    # queries that nobody needs, for chunks are folded
    front = reach[context.rank]
    return attend(F.pad(q_BHnD, (0, 0, front, 0)), k, v)[:, :, front:]


def _counts(sinks: list[int], reach: list[int], rank: int) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """First and last tokens that this rank sends to each, how many these are, and how many come from each."""
    ranks = range(len(reach))
    given = [(sinks[other] if rank == 0 else 0, reach[other] if other == rank + 1 else 0) for other in ranks]
    received = [0 for _ in ranks]
    if rank:
        received[0] += sinks[rank]
        received[rank - 1] += reach[rank]
    return given, [first + last for first, last in given], received


def _add_edges(
    k: Tensor, v: Tensor, sinks: list[int], reach: list[int], rank: int, group: str
) -> tuple[Tensor, Tensor]:
    given, sent, received = _counts(sinks, reach, rank)
    count, front = k.shape[2], sum(received)
    places = [
        slice(0, first) if is_first else slice(count - last, count) for first, last in given for is_first in (1, 0)
    ]
    both = [torch.cat((k[:, :, place], v[:, :, place]), 3) for place in places]
    with torch.no_grad():
        arrived = pass_on(torch.cat(both, 2).permute(2, 0, 1, 3), sent, received, group).permute(1, 2, 0, 3)
    extended = _empty_extended(k, v, sinks, reach, rank, group)
    for x, own, more in zip(extended, (k, v), arrived.chunk(2, 3), strict=True):
        x[:, :, :front] = more
        x[:, :, front:] = own
    return extended


def _empty_extended(
    k: Tensor, v: Tensor, sinks: list[int], reach: list[int], rank: int, group: str
) -> tuple[Tensor, Tensor]:
    rows = k.shape[2] + (sinks[rank] + reach[rank] if rank else 0)
    return empty_heads_inner(k, rows), empty_heads_inner(v, rows)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, *ctx.how = inputs


def _add_edges_bwd(
    dk: Tensor, dv: Tensor, sinks: list[int], reach: list[int], rank: int, group: str
) -> tuple[Tensor, Tensor]:
    given, sent, received = _counts(sinks, reach, rank)
    front = sum(received)
    edges = torch.cat((dk[:, :, :front], dv[:, :, :front]), 3).permute(2, 0, 1, 3)
    with torch.no_grad():
        returned = pass_on(edges, received, sent, group).permute(1, 2, 0, 3)
    own = _empty_own(dk, dv, sinks, reach, rank, group)
    own[0].copy_(dk[:, :, front:])
    own[1].copy_(dv[:, :, front:])
    # of all ranks that saw the sinks, in one rounding
    wide = torch.promote_types(dk.dtype, torch.float32)
    firsts, last = [], returned[:, :, :0]
    for part, (first, _) in zip(returned.split(sent, 2), given, strict=True):
        firsts += [part[:, :, :first].to(wide)] if first else []
        last = part[:, :, first:] if part.shape[2] > first else last
    for x, more in zip(own, last.chunk(2, 3), strict=True):
        x[:, :, x.shape[2] - more.shape[2] :] += more
    if firsts:
        for x, more in zip(own, torch.stack(firsts).sum(0).chunk(2, 3), strict=True):
            x[:, :, : more.shape[2]] += more
    return own


def _empty_own(
    dk: Tensor, dv: Tensor, sinks: list[int], reach: list[int], rank: int, group: str
) -> tuple[Tensor, Tensor]:
    rows = dk.shape[2] - (sinks[rank] + reach[rank] if rank else 0)
    return empty_heads_inner(dk, rows), empty_heads_inner(dv, rows)


def _backward(ctx: Any, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:
    return *_add_edges_bwd_operator(dk, dv, *ctx.how), None, None, None, None


_add_edges_bwd_operator = Operator(_add_edges_bwd, _empty_own)
# `[B, G, n, D]` twice to `[B, G, F + n, D]` twice: so many of the sequence's first tokens for each rank, `sinks`, then
# so many of those right before it, `reach`; the first rank gets none
_add_edges_operator = Operator(_add_edges, _empty_extended, _keep, _backward)
