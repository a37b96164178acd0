"""Documents drawn for tests, and settings under which they have several tiles."""

from __future__ import annotations

import random
from contextlib import contextmanager
from itertools import accumulate, pairwise

import torch
from drawn import draw
from selecting import small_tiles

from lightning_lighthouse import Documents, LighthouseConfig, lighthouse_attention

# batch, query heads, key/value heads, tokens, levels, pooling factor, top_k, winners of a tile, mean length
CASES = {
    "short ones": (1, 2, 2, 256, 3, 2, 24, 3, 30),
    "grouped heads, two sequences": (2, 4, 2, 200, 3, 2, 18, 2, 60),
    "factor of 4, many tiles": (1, 2, 1, 601, 2, 4, 30, 2, 300),
    "four levels": (2, 2, 2, 211, 4, 2, 12, 2, 70),
    "of a few tokens": (1, 1, 1, 173, 3, 3, 6, 2, 3),
    "one of all tokens": (1, 2, 1, 307, 3, 3, 16, 2, 10**6),
}


def cut(tokens, mean, seed):
    """Lengths that add up to `tokens`, some of them of one token."""
    rng = random.Random(seed)
    lengths = []
    while (left := tokens - sum(lengths)) > 0:
        lengths.append(min(left, max(1, int(rng.expovariate(1 / mean)))))
    return lengths


def documents_of(batch, tokens, mean, seed=0):
    return Documents([cut(tokens, mean, seed + row) for row in range(batch)])


@contextmanager
def packed_case(case, selection="causal", **more):
    """q, k and v whose norms differ, so that thresholds bite; settings with small tiles; documents."""
    batch, heads, groups, tokens, levels, p, top_k, winners, mean = case
    q, k, v = draw(batch, heads, groups, tokens, dim=4)
    scale = torch.rand(tokens, 1, generator=torch.Generator().manual_seed(7), dtype=q.dtype).exp() ** 2
    config = LighthouseConfig(levels, p, top_k, selection=selection, **more)
    with small_tiles(winners):
        assert config.pyramid(tokens).compresses
        yield (q * scale, k * scale, v), config, documents_of(batch, tokens, mean)


def spans(documents):
    """The sequence of each document and its tokens."""
    for row, lengths in enumerate(documents.lengths):
        for first, end in pairwise(accumulate(lengths, initial=0)):
            yield row, slice(first, end)


def run(qkv, config, documents, **more):
    return lighthouse_attention(*qkv, config, documents=documents, **more)
