"""Lighthouse Attention once more, written from the definition with Python loops: nothing shared with the package."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, levels: int, p: int, top_k: int, cover_prefix: bool = True, combine: str = "sum"
) -> tuple[Tensor, list[list[list[tuple[int, int]]]]]:
    """Output `[B, Hq, N, D]`, and the gathered `(level, entry)` pairs by batch and key/value head."""
    out = torch.zeros_like(q)
    chosen = []
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        chosen.append([])
        for g in range(k.shape[1]):
            heads = range(g * group, (g + 1) * group)
            s_q = [_largest([q[b, h, j].norm().item() for h in heads]) for j in range(q.shape[2])]
            s_k = [k[b, g, j].norm().item() for j in range(q.shape[2])]
            entries = _select(s_q, s_k, levels, p, top_k, cover_prefix)
            chosen[-1].append(entries)
            for h in heads:
                out[b, h] = _attend(q[b, h], k[b, g], v[b, g], entries, p, combine)
    return out, chosen


def _largest(values: list[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _select(s_q, s_k, levels, p, top_k, cover_prefix):
    tokens = len(s_q)
    tiles = max(1, top_k // 128)
    per_tile = math.ceil(math.ceil(tokens / p ** (levels - 1)) / tiles)
    padding = [0.0] * (tiles * per_tile * p ** (levels - 1) - tokens)
    s_q, s_k = s_q + padding, s_k + padding

    def entry_score(scores, level, entry):
        return _largest(scores[entry * p**level : (entry + 1) * p**level])

    entries = []
    for tile in range(tiles):
        candidates = list(range(tile * per_tile, (tile + 1) * per_tile))
        for level in range(levels - 1, -1, -1):
            entries += [(level, entry) for entry in candidates]
            if level == 0:
                break
            count = min(top_k // tiles, len(candidates))

            def rank(scores, entry, level=level, forced=False):
                score = math.inf if forced and entry == 0 else entry_score(scores, level, entry)
                return (math.isnan(score), -score if not math.isnan(score) else 0, entry)

            by_q = sorted(candidates, key=lambda entry: rank(s_q, entry, forced=cover_prefix))[: math.ceil(count / 2)]
            rest = [entry for entry in candidates if entry not in by_q]
            by_k = sorted(rest, key=lambda entry: rank(s_k, entry))[: count // 2]
            candidates = [child for entry in sorted(by_q + by_k) for child in range(entry * p, (entry + 1) * p)]
    return sorted(entries, key=lambda pair: ((pair[1] + 1) * p ** pair[0], pair[0]))


def _attend(q, k, v, entries, p, combine):
    tokens, dim = q.shape

    def pool(x):
        rows = [x[entry * p**level : (entry + 1) * p**level].sum(0) / p**level for level, entry in entries]
        return torch.stack(rows)

    logits = pool(q) @ pool(k).T / math.sqrt(dim)
    logits = logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -math.inf)
    o = logits.softmax(-1) @ pool(v)

    out, fan_in = torch.zeros_like(q), torch.zeros(tokens)
    for row, (level, entry) in zip(o, entries, strict=True):
        window = p**level
        for token in range(entry * window + window - 1, min(entry * window + 2 * window - 1, tokens)):
            out[token] += row
            fan_in[token] += 1
    return out / fan_in.clamp(min=1)[:, None] if combine == "mean" else out
