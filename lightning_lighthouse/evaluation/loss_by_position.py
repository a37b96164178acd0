"""Loss by position: does a token profit from all the text before it?"""

# N tokens

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from lightning_lighthouse.evaluation.measures import Material, Place, Unit, Values
from lightning_lighthouse.evaluation.scoring import Scorer

NAME = "loss_by_position"
# the first bin ends here, and each next one is as long as all before it
FIRST_BIN = 64


def bins(longest: int) -> list[tuple[int, int]]:
    """The positions from and until which a mean is taken: doubling, up to `longest`."""
    edges = [0]
    while (end := max(FIRST_BIN, 2 * edges[-1])) < longest:
        edges.append(end)
    return list(pairwise([*edges, longest]))


def units(longest: int) -> list[Unit]:
    """One sequence of `longest` tokens a sample.

    A row: the mean loss, in nats, of the targets that follow the tokens `position` to `until - 1`. Tokens of one
    sequence are not independent: its standard error is that over sequences, and they are what is counted.
    """

    def run(scorer: Scorer, material: Material, index: int) -> Iterator[tuple[Place, Values]]:
        text = material.text.draw(longest + 1, index)[None]
        losses = scorer.losses(text[:, :-1], text[:, 1:])[0].double().cpu()
        for start, end in bins(longest):
            yield {"position": start, "until": end, "reach": end}, {"value": losses[start:end].mean().item()}

    return [Unit(NAME, longest, longest, run)]
