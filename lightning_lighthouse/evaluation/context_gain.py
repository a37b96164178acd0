"""Gain from context: how much worse is the end of a text predicted where less of the text before it is shown?"""

from __future__ import annotations

from collections.abc import Iterator

from lightning_lighthouse.evaluation.measures import Material, Place, Unit, Values
from lightning_lighthouse.evaluation.scoring import Scorer

NAME = "context_gain"
TAIL = 1024


def lengths(longest: int) -> tuple[int, list[int]]:
    """The tokens at the end whose loss counts, and the lengths that are shown instead of the whole sequence."""
    # a short sequence has as much context beside it
    tail = max(1, min(TAIL, longest // 4))
    return tail, [length for length in (tail, 4 * tail, 16 * tail) if length < longest]


def units(longest: int) -> list[Unit]:
    """One sequence a sample, whole, and its end of each length.

    A row: loss of the last 1,024 tokens with the whole sequence minus with only its last `length` tokens, in nats;
    below 0 where the text before those helps. A sequence below 4,096 tokens: of its last quarter.
    """
    tail, shown = lengths(longest)

    def run(scorer: Scorer, material: Material, index: int) -> Iterator[tuple[Place, Values]]:
        text = material.text.draw(longest + 1, index)[None]

        def loss(length: int) -> float:
            part = text[:, -length - 1 :]
            return scorer.losses(part[:, :-1], part[:, 1:])[0, -tail:].double().mean().item()

        whole = loss(longest)
        for length in shown:
            yield {"length": length, "reach": longest}, {"value": whole - loss(length)}

    return [Unit(NAME, longest + sum(shown), longest, run)] if shown else []
