"""What the ranks of a sequence exchange around attention: heads for tokens.

Outside of attention a rank has all heads of n tokens; inside it has H / W and G / W heads of all N. One all-to-all
takes q, k and v there, and another one takes the output back, so that any attention runs as in one process, to the same
bits. Their gradients go the same way back, and carry what the other ranks' losses say.

Where W does not divide G, only u neighbours share the heads out among them, and W / u groups of such neighbours do the
same; `queries.py` is for attention that is too much work for that.
"""

# B batch, H query heads, G key/value heads, N tokens, D head dim; W ranks, r rank, n = N / W tokens of a rank, u ranks
# that share the heads out

from __future__ import annotations

from collections.abc import Callable
from math import gcd

import torch
from torch import Tensor

from lightning_lighthouse.attention.inputs import plain
from lightning_lighthouse.context.collectives import all_to_all, pass_on
from lightning_lighthouse.context.group import Context

# q, k and v to the output
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def num_neighbours(num_kv_heads: int, context: Context) -> int:
    """How many neighbouring ranks share the heads out among them, u = gcd(W, G): all of them where W divides G."""
    return gcd(context.size, *plain(num_kv_heads))


def first_kv_head(num_kv_heads: int, context: Context) -> int:
    """The number of the first key/value head that this rank has inside of attention, of `num_kv_heads` G in all."""
    neighbours = num_neighbours(num_kv_heads, context)
    return context.rank % neighbours * (num_kv_heads // neighbours)


def exchange_tokens(attend: Attend, q_BHnD: Tensor, k_BGnD: Tensor, v_BGnD: Tensor, context: Context) -> Tensor:
    """Attention over the whole sequence, for this rank's tokens: `[B, H, n, D]`.

    Args:
        attend: Given `[B, H / u, N, D]` and twice `[B, G / u, N, D]`: heads `[r' H / u, (r' + 1) H / u)`, r' = r mod u,
            and so on. W / u ranks do the same.
        q_BHnD: Of this rank's tokens.
        k_BGnD: Of the same.
        v_BGnD: Of the same.
        context: The ranks.
    """
    neighbours = num_neighbours(k_BGnD.shape[1], context)
    return heads_to_tokens(attend(*tokens_to_heads(q_BHnD, k_BGnD, v_BGnD, context)), context, neighbours)


def tokens_to_heads(q_BHnD: Tensor, k_BGnD: Tensor, v_BGnD: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """All heads of n tokens to a share of the heads of all tokens: `[B, H, n, D] -> [B, H / u, N, D]`, in one go.

    What is returned are views of the buffer that arrived.
    """
    neighbours, parts = num_neighbours(k_BGnD.shape[1], context), (q_BHnD, k_BGnD, v_BGnD)
    heads = [x.shape[1] // neighbours for x in parts]
    # [u, n, B, heads, D], to each group of u ranks: what arrives is [N, B, heads, D] without a copy
    share = torch.cat([x.unflatten(1, (neighbours, -1)).permute(1, 3, 0, 2, 4) for x in parts], 3)
    sent = to_all_groups(share, context)
    # split as it lies there, so that the three gradients are put together as they are sent
    arrived = all_to_all(sent, context.group).flatten(0, 1).split(heads, 2)
    q, k, v = (x.permute(1, 2, 0, 3) for x in arrived)
    return q, k, v


def to_all_groups(x: Tensor, context: Context) -> Tensor:
    """What goes to u neighbours, sent to those of every group: `[u, ...] -> [W, ...]`; gradients are summed."""
    groups = context.size // x.shape[0]
    return x if groups == 1 else x.expand(groups, *x.shape).flatten(0, 1)


def heads_to_tokens(o_BHND: Tensor, context: Context, neighbours: int | None = None) -> Tensor:
    """The way back: `[B, H / u, N, D] -> [B, H, n, D]`; `neighbours` is u, None where all share the heads out."""
    # in memory as [B, n, H, D], which a model reshapes for free
    return heads_to_shares(o_BHND, context, neighbours).permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2)


def heads_to_shares(o_BHND: Tensor, context: Context, neighbours: int | None = None) -> Tensor:
    """The same as it arrives, one share of the heads behind the other: `[u, n, B, H / u, D]`."""
    blocks = o_BHND.unflatten(2, (context.size, -1))
    if neighbours is None or neighbours == context.size:
        return all_to_all(blocks.permute(2, 3, 0, 1, 4), context.group)
    # each group has the whole sequence, and hands round its own tokens
    first, (count,) = context.rank // neighbours * neighbours, plain(blocks.shape[3])
    rows = blocks[:, :, first : first + neighbours].permute(2, 3, 0, 1, 4).flatten(0, 1)
    splits = [count if first <= rank < first + neighbours else 0 for rank in range(context.size)]
    return pass_on(rows, splits, splits, context.group).unflatten(0, (neighbours, -1))
