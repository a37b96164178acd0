"""A hash of a few integers: random draws without a generator, so that a recomputation and every rank draw alike."""

from __future__ import annotations

from typing import Any

MASK = 2**32 - 1


def mix(state: Any, word: Any) -> Any:
    """The next state of 32 bits, after a word of up to 32 bits; either is a Python integer or an int64 tensor.

    The finalizer of MurmurHash3. Each of its steps is invertible, so from one state two words lead to two states.
    """
    x = ((state ^ word) + 0x9E3779B9) & MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK
    return x ^ (x >> 16)
