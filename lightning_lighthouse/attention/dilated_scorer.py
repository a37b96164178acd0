"""The "dilated" scorer: how far attention itself moves a token, seen at a stride (the appendix of arXiv 2605.06554).

The norms of q and k say little where a model normalises both. This scorer asks attention instead: every `dilation`-th
token forms a short sequence, in which q attends to k, and k to q. It costs two forward passes of dense attention,
divided by `dilation`. Stock SDPA does the work, so both backends share this file.
"""

# B batch, Hq query heads, G key/value heads, N tokens, D head dim, d dilation

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.sdpa import causal_sdpa


def dilated_scores(
    q_BHND: Tensor, k_BGND: Tensor, v_BGND: Tensor, config: LighthouseConfig, *, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Scores `(s_q, s_k)` of the tokens, each `[B, G, N]` in fp32 or wider; neither sees a later token.

    s_q is the norm of what q receives when it attends to k with values v; s_k that of k attending to q, once for every
    query head. Under grouped heads both are the maximum over the query heads of the group.
    """
    groups, num_tokens = k_BGND.shape[1:3]
    ratio = q_BHND.shape[1] // groups
    q, k, v = (_fold(x, config.dilation) for x in (q_BHND, k_BGND, v_BGND))
    by_q = causal_sdpa(q, k, v, scale=scale, backend=config.sdpa)
    # here the keys are the query heads
    k, v = (x.repeat_interleave(ratio, dim=1) for x in (k, v))
    by_k = causal_sdpa(k, q, v, scale=scale, backend=config.sdpa)

    dtype = torch.promote_types(q.dtype, torch.float32)
    norms = (torch.linalg.vector_norm(out, dim=-1, dtype=dtype) for out in (by_q, by_k))
    s_q, s_k = (_unfold(norm, config.dilation, num_tokens).unflatten(1, (groups, ratio)).amax(2) for norm in norms)
    return s_q, s_k


def _fold(x_BHND: Tensor, dilation: int) -> Tensor:
    """`[B, H, N, D] -> [B d, H, ceil(N / d), D]`: sequence j of a batch element holds tokens j, j + d, ...

    Padding stands at the right, where causal attention never looks back from a real token.
    """
    pad = -x_BHND.shape[2] % dilation
    if pad:
        x_BHND = F.pad(x_BHND, (0, 0, 0, pad))
    return x_BHND.unflatten(2, (-1, dilation)).movedim(3, 1).flatten(0, 1)


def _unfold(x_BHn: Tensor, dilation: int, num_tokens: int) -> Tensor:
    """`[B d, H, ceil(N / d)] -> [B, H, N]`, the inverse for one number a token."""
    return x_BHn.unflatten(0, (-1, dilation)).movedim(1, 3).flatten(2)[..., :num_tokens]
