"""Cases for the selections that see no later token, and the tiles that make them small."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from drawn import draw
from hypothesis import strategies as st

from lightning_lighthouse import LighthouseConfig, lighthouse_attention
from lightning_lighthouse.attention import config

BLIND = ["causal", "strided", "random"]


@contextmanager
def small_tiles(winners):
    """Several tiles under few tokens: the published size of a tile and the causal one need thousands."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "TILE_WINNERS", 4 * winners)
        patch.setattr(config, "CAUSAL_TILE_WINNERS", winners)
        yield


def moved(selection, tokens, levels, p, top_k, tile_winners, heads, batch, last, seed, backend="reference"):
    """Whether an output up to token `last` differs in any bit once all later tokens were replaced."""
    settings = LighthouseConfig(
        levels, p, top_k, selection=selection, backend=backend, combine="mean" if seed % 2 else "sum"
    )
    with small_tiles(tile_winners):
        last = last % (tokens - 1)
        qkv = draw(batch, *heads, tokens, dim=3, dtype=torch.float32, seed=seed)
        # the norms differ by far on both sides, so that every comparison across `last` turns out otherwise
        scale = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)).view(-1, 1) * 4
        qkv = [x * scale for x in qkv]
        changed = [torch.cat((x[:, :, : last + 1], -3 * x[:, :, last + 1 :].flip(2)), 2) for x in qkv]
        outputs = [lighthouse_attention(*inputs, settings)[:, :, : last + 1] for inputs in (qkv, changed)]
    return not torch.equal(*outputs)


CASES = {
    "tokens": st.integers(12, 211),
    "levels": st.integers(2, 4),
    "p": st.integers(2, 5),
    "top_k": st.integers(1, 17),
    "tile_winners": st.integers(1, 5),
    "heads": st.sampled_from([(1, 1), (2, 2), (3, 1), (4, 2)]),
    "batch": st.integers(1, 2),
    "last": st.integers(0, 10**6),
    "seed": st.integers(0, 10**6),
}
