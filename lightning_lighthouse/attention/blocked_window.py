"""Windows by stock SDPA alone: blocks of tokens against the block before them and themselves, in O(N x window).

The first `window + sink_tokens` tokens see everything before them: dense causal attention. From there on all sinks lie
before the window of every token, so that blocks of queries against [sinks | keys] differ in nothing but their place
and share one small mask.
"""

# B batch, H query heads, G key/value heads, N tokens, D head dim, M blocks, C tokens of a block,
# K keys that a block sees: sinks, the window before it, and itself

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lighthouse.attention.sdpa import causal_sdpa, masked_sdpa

# Narrower windows take blocks of this many tokens: fewer would make many tiny attentions.
MIN_BLOCK = 64


def blocked_window(
    q_BHND: Tensor,
    k_BGND: Tensor,
    v_BGND: Tensor,
    window: int,
    *,
    sink_tokens: int,
    scale: float | None,
    backend: str,
) -> Tensor:
    """Each token sees itself, the `window - 1` tokens before it and the first `sink_tokens`.

    Args:
        q_BHND: `[B, H, N, D]`.
        k_BGND: `[B, G, N, D]`.
        v_BGND: `[B, G, N, D]`.
        window: Tokens, at least 1; with `sink_tokens` less than N.
        sink_tokens: At least 0.
        scale: Factor of the attention logits; None: `D ** -0.5`.
        backend: As in `causal_sdpa`.

    Returns:
        `[B, H, N, D]`.

    Raises:
        ValueError: The named backend cannot run this call.
    """
    start = window + sink_tokens
    block = max(window, MIN_BLOCK)
    head_BHND = causal_sdpa(*(x[:, :, :start] for x in (q_BHND, k_BGND, v_BGND)), scale=scale, backend=backend)

    q_blocks_BHMCD = _cut(q_BHND[:, :, start:], block, block)
    q_blocks = _fold(q_blocks_BHMCD)
    k_blocks, v_blocks = (
        _fold(_with_sinks(_cut(x[:, :, sink_tokens:], window + block, block), x[:, :, :sink_tokens]))
        for x in (k_BGND, v_BGND)
    )
    mask_CK = _block_mask(block, window, sink_tokens, q_BHND.device)
    o_blocks = masked_sdpa(q_blocks, k_blocks, v_blocks, mask_CK, scale=scale, backend=backend)
    tail_BHND = o_blocks.unflatten(0, (-1, q_blocks_BHMCD.shape[2])).transpose(1, 2).flatten(2, 3)
    return torch.cat((head_BHND, tail_BHND[:, :, : q_BHND.shape[2] - start]), 2)


def _cut(x_BHND: Tensor, length: int, step: int) -> Tensor:
    """Pieces of `length` tokens that begin `step` tokens apart, `[B, H, M, length, D]`; zeros fill the last one."""
    pad = -(x_BHND.shape[2] - length) % step
    return F.pad(x_BHND, (0, 0, 0, pad)).unfold(2, length, step).transpose(3, 4)


def _with_sinks(x_BGMCD: Tensor, sinks_BGSD: Tensor) -> Tensor:
    if sinks_BGSD.shape[2] == 0:
        return x_BGMCD
    sinks_BGMSD = sinks_BGSD.unsqueeze(2).expand(-1, -1, x_BGMCD.shape[2], -1, -1)
    return torch.cat((sinks_BGMSD, x_BGMCD), 3)


def _fold(x_BHMCD: Tensor) -> Tensor:
    """Blocks become batch elements."""
    return x_BHMCD.transpose(1, 2).flatten(0, 1)


def _block_mask(block: int, window: int, sink_tokens: int, device: torch.device) -> Tensor:
    """What each token of a block sees, `[C, K]`."""
    query = torch.arange(block, device=device).unsqueeze(1)
    # keys begin a window before the block
    distance = query - torch.arange(-window, block, device=device)
    seen = (distance >= 0) & (distance < window)
    return F.pad(seen, (sink_tokens, 0), value=True)
