"""Documents as data has them, drawn: what attention inside documents is estimated and measured on."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

# Shorter ones are no texts
SHORTEST = 10

Draw = Callable[[np.random.Generator], float]


def _lognormal(median: int, sigma: float) -> Draw:
    return lambda random: random.lognormal(math.log(median), sigma)


# How many tokens the next document has. "one" and "whole" are sequences that begin with one of their own length.
KINDS: dict[str, Draw] = {
    "one": lambda random: math.inf,
    "books": _lognormal(120_000, 0.6),
    "whole": _lognormal(650, 0.95),
    "web": _lognormal(650, 1.3),
    "code": lambda random: int(random.integers(1000, 5001)),
    "web-short": _lognormal(650, 0.95),
    "chat": _lognormal(100, 0.7),
}
DESCRIPTIONS = {
    "one": "one document of all tokens",
    "books": "lognormal, median 120,000 tokens, sigma 0.6",
    "whole": "one of half to all of the tokens, web-short behind it",
    "web": "lognormal, median 650, sigma 1.3",
    "code": "1,000 to 5,000",
    "web-short": "lognormal, median 650, sigma 0.95",
    "chat": "lognormal, median 100, sigma 0.7",
}


def draw_sequences(kind: str, num_tokens: int, count: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Lengths of the documents in each of `count` sequences, `num_tokens` together.

    The sequences are cut from a stream of documents: what does not fit into one goes on in the next, but for "whole".

    Args:
        kind: A name in `KINDS`.
        num_tokens: N.
        count: Sequences.
        seed: Of the stream.
    """
    random, draw = np.random.default_rng(seed), KINDS[kind]
    sequences, rest = [], 0
    for _ in range(count):
        if kind == "whole":
            rest = int(random.integers(num_tokens // 2, num_tokens)) or num_tokens
        lengths: list[int] = []
        left = num_tokens
        while left:
            rest = rest or int(max(SHORTEST, min(draw(random), 10 * num_tokens)))
            lengths.append(min(rest, left))
            rest, left = rest - lengths[-1], left - lengths[-1]
        sequences.append(tuple(lengths))
    return sequences
