"""What the ranks of a sequence exchange around attention: heads for tokens.

Outside of attention a rank has all heads of n tokens; inside it has H / W and G / W heads of all N. One all-to-all
takes q, k and v there, and another one takes the output back, so that any attention runs as in one process, to the same
bits. Their gradients go the same way back, and carry what the other ranks' losses say.
"""

# B batch, H query heads, G key/value heads, N tokens, D head dim; W ranks, r rank, n = N / W tokens of a rank

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lighthouse.context.collectives import all_to_all
from lightning_lighthouse.context.group import Context

# q, k and v to the output
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def exchange_tokens(attend: Attend, q_BHnD: Tensor, k_BGnD: Tensor, v_BGnD: Tensor, context: Context) -> Tensor:
    """Attention over the whole sequence, for this rank's tokens: `[B, H, n, D]`.

    Args:
        attend: Given `[B, H / W, N, D]` and twice `[B, G / W, N, D]`: heads `[r H / W, (r + 1) H / W)`, and so on.
        q_BHnD: Of this rank's tokens.
        k_BGnD: Of the same.
        v_BGnD: Of the same.
        context: W must divide G.
    """
    return heads_to_tokens(attend(*tokens_to_heads(q_BHnD, k_BGnD, v_BGnD, context)), context)


def tokens_to_heads(q_BHnD: Tensor, k_BGnD: Tensor, v_BGnD: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
    """All heads of n tokens to a share of the heads of all tokens: `[B, H, n, D] -> [B, H / W, N, D]`, in one go.

    What is returned are views of the buffer that arrived.
    """
    ranks, parts = context.size, (q_BHnD, k_BGnD, v_BGnD)
    heads = [x.shape[1] // ranks for x in parts]
    # [W, n, B, heads, D]: what arrives is [N, B, heads, D] without a copy
    sent = torch.cat([x.unflatten(1, (ranks, -1)).permute(1, 3, 0, 2, 4) for x in parts], 3)
    q, k, v = all_to_all(sent, context.group).flatten(0, 1).permute(1, 2, 0, 3).split(heads, 1)
    return q, k, v


def heads_to_tokens(o_BHND: Tensor, context: Context) -> Tensor:
    """The way back: `[B, H / W, N, D] -> [B, H, n, D]`."""
    sent = o_BHND.unflatten(2, (context.size, -1)).permute(2, 3, 0, 1, 4)
    return all_to_all(sent, context.group).permute(2, 0, 3, 1, 4).flatten(1, 2)
