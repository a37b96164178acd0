"""Lighthouse Attention once more, written from the definition with Python loops: nothing shared with the package."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, levels: int, p: int, top_k: int, cover_prefix: bool = True, combine: str = "sum",
    selection: str = "published", tile_winners: int = 128, seed: int = 0, step: int = 0,
) -> tuple[Tensor, list[list[list[tuple[int, int]]]]]:  # fmt: skip
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
            entries = _select(s_q, s_k, levels, p, top_k, cover_prefix, selection, tile_winners, (seed, step, g))
            chosen[-1].append(entries)
            for h in heads:
                out[b, h] = _attend(q[b, h], k[b, g], v[b, g], entries, p, combine)
    return out, chosen


def _largest(values: list[float]) -> float:
    return math.nan if any(math.isnan(value) for value in values) else max(values)


def _select(s_q, s_k, levels, p, top_k, cover_prefix, selection, tile_winners, draw):
    tokens = len(s_q)
    tiles = max(1, top_k // tile_winners)
    per_tile = math.ceil(math.ceil(tokens / p ** (levels - 1)) / tiles)
    padding = [0.0] * (tiles * per_tile * p ** (levels - 1) - tokens)
    s_q, s_k = s_q + padding, s_k + padding

    def score(scores, level, entry):
        return _largest(scores[entry * p**level : (entry + 1) * p**level])

    def first(scores, level, entry):
        # NaN counts as minus infinity
        value = scores[entry * p**level]
        return -math.inf if math.isnan(value) else value

    entries = []
    # by level: the candidates of the tile before, and those of them that won by s_q
    before: dict[int, tuple[list[int], list[int]]] = {}
    for tile in range(tiles):
        candidates = list(range(tile * per_tile, (tile + 1) * per_tile))
        for level in range(levels - 1, -1, -1):
            entries += [(level, entry) for entry in candidates]
            if level == 0:
                break
            count = min(top_k // tiles, len(candidates))
            spaced = [candidates[m * len(candidates) // count] for m in range(count)]
            of_q, of_k = count - count // 2, count // 2
            if selection == "published":
                by_q = _best(candidates, lambda entry, at=level: score(s_q, at, entry), of_q, cover_prefix)
                rest = [entry for entry in candidates if entry not in by_q]
                won = by_q + _best(rest, lambda entry, at=level: score(s_k, at, entry), of_k, False)
            elif selection == "strided":
                won = spaced
            elif selection == "random":
                keys = {entry: _hash(*draw[:2], level, draw[2], entry) for entry in candidates}
                won = _best(candidates, keys.get, count, cover_prefix)
            else:
                by_q, by_k = spaced[::2], spaced[1::2]
                if tile > 0:
                    older, older_by_q = before[level]
                    older_q = [first(s_q, level, entry) for entry in older]
                    older_k = [first(s_k, level, entry) for entry in older if entry not in older_by_q]
                    by_q = _pass([(entry, first(s_q, level, entry)) for entry in candidates], older_q, of_q)
                    rest = [(entry, first(s_k, level, entry)) for entry in candidates if entry not in by_q]
                    by_k = _pass(rest, older_k, of_k)
                before[level] = candidates, by_q
                won = by_q + by_k
            candidates = [child for entry in sorted(won) for child in range(entry * p, (entry + 1) * p)]
    return sorted(entries, key=lambda pair: ((pair[1] + 1) * p ** pair[0], pair[0]))


def _best(candidates, score, count, cover_prefix):
    def rank(entry):
        value = math.inf if cover_prefix and entry == 0 else score(entry)
        return (math.isnan(value), -value if not math.isnan(value) else 0, entry)

    return sorted(candidates, key=rank)[:count]


def _pass(scored, older_scores, wanted):
    """One walk over the candidates: take what reaches the threshold, and everything once places would stay free."""
    if wanted == 0:
        return []
    threshold = sorted(older_scores)[-wanted]
    taken = []
    for position, (entry, score) in enumerate(scored):
        free = wanted - len(taken)
        if free > 0 and (score >= threshold or len(scored) - position <= free):
            taken.append(entry)
    return taken


def _hash(*words):
    """The upper 30 of 32 bits: Murmur3's finalizer after each word, and the golden ratio between them."""
    state = 0
    for word in words:
        state = ((state ^ word) + 2654435769) % 2**32
        for shift, factor in ((16, 2246822507), (13, 3266489909), (16, 1)):
            state = (state ^ state >> shift) * factor % 2**32
    return state // 4


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
