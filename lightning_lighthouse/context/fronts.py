"""Rows that reach over the edge between two ranks: the last ones of a rank, behind those of the next.

One operator each way, in which the rows of a rank are copied once, where torch would copy them to join the heads, copy
them again to append a few, and in the backward pass fill and add as many to give these few their gradients.
"""

# B batch, H query heads, D head dim, u shares of the heads, s rows of a rank, F rows of a front, W ranks

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_lighthouse.attention.operators import Operator
from lightning_lighthouse.context.collectives import pass_on
from lightning_lighthouse.context.group import Context


def _shift(x: Tensor, rank: int, size: int, by: int, group: str) -> Tensor:
    """Send x to the rank `by` behind this one, and return what came from the rank `by` before it, in a ring."""
    sent = [int(other == (rank + by) % size) for other in range(size)]
    received = [int(other == (rank - by) % size) for other in range(size)]
    with torch.no_grad():
        return pass_on(x.unsqueeze(0), sent, received, group)[0]


def _append_front(shares: Tensor, rows: Tensor, is_read: Tensor, room: int, rank: int, size: int, group: str) -> Tensor:
    out = _empty(shares, rows, is_read, room, rank, size, group)
    count, num_front = shares.shape[1], rows.shape[2]
    out[:, :, :count].unflatten(1, (shares.shape[0], -1)).copy_(shares.permute(2, 0, 3, 1, 4))
    index = rows.unsqueeze(-1).expand(-1, -1, -1, shares.shape[4])
    front = _shift(out.gather(2, index), rank, size, 1, group)
    out[:, :, count : count + num_front] = torch.where(is_read.unsqueeze(-1), front, 0)
    out[:, :, count + num_front :] = 0
    return out


def _empty(shares: Tensor, rows: Tensor, is_read: Tensor, room: int, rank: int, size: int, group: str) -> Tensor:
    parts, count, batch, few, dim = shares.shape
    heads = parts * few
    return shares.new_empty_strided(
        (batch, heads, count + room, dim), ((count + room) * heads * dim, dim, heads * dim, 1)
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    shares, rows, is_read, _, *ctx.where = inputs
    ctx.save_for_backward(rows, is_read)
    ctx.parts, ctx.count = shares.shape[:2]


def _append_front_bwd(
    dout: Tensor, rows: Tensor, is_read: Tensor, parts: int, count: int, rank: int, size: int, group: str
) -> Tensor:
    dshares = _empty_shares(dout, rows, is_read, parts, count, rank, size, group)
    dshares.copy_(_by_share(dout[:, :, :count], parts))
    front = dout[:, :, count : count + rows.shape[2]]
    # the gradient of a row that nobody reads is whatever was in memory
    back = _shift(torch.where(is_read.unsqueeze(-1), front, 0), rank, size, -1, group)
    index = _by_share(rows.unsqueeze(-1).expand_as(back), parts)
    # not into a permuted view, which a deterministic sum would copy whole
    return dshares.scatter_add_(1, index, _by_share(back, parts))


def _by_share(x_BHsD: Tensor, parts: int) -> Tensor:
    """`[u, s, B, H / u, D]`, as a view."""
    return x_BHsD.unflatten(1, (parts, -1)).permute(1, 3, 0, 2, 4)


def _empty_shares(
    dout: Tensor, rows: Tensor, is_read: Tensor, parts: int, count: int, rank: int, size: int, group: str
) -> Tensor:
    batch, heads, _, dim = dout.shape
    return dout.new_empty(parts, count, batch, heads // parts, dim)


def _backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    rows, is_read = ctx.saved_tensors
    dshares = _append_front_bwd_operator(dout, rows, is_read, ctx.parts, ctx.count, *ctx.where)
    return dshares, *[None] * 6


_append_front_bwd_operator = Operator(_append_front_bwd, _empty_shares)
_append_front_operator = Operator(_append_front, _empty, _keep, _backward)


def append_front(shares_usBHD: Tensor, rows_BHF: Tensor, is_read_BHF: Tensor, room: int, context: Context) -> Tensor:
    """The rows of a rank, and behind them F rows of the rank before: `[B, H, s + room, D]`, in memory `[B, s, H, D]`.

    Args:
        shares_usBHD: Rows of this rank, one share of the heads behind the other: `[u, s, B, H / u, D]`.
        rows_BHF: int64; which rows of this rank the next one gets.
        is_read_BHF: bool; which of the rows that arrive are read here, the others are zeros.
        room: At least F; what lies behind them is zero.
        context: The ranks; the first one gets the rows of the last, of which it must read none.
    """
    out: Tensor = _append_front_operator(
        shares_usBHD, rows_BHF, is_read_BHF, room, context.rank, context.size, context.group
    )
    return out
