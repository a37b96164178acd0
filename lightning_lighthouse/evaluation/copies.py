"""Copies: is a passage cheaper the second time, and how far back may the first one be?"""

# P tokens of a passage

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from lightning_lighthouse.evaluation.measures import Material, Place, Unit, Values
from lightning_lighthouse.evaluation.scoring import Scorer

NAME = "copies"
PASSAGE = 128


def distances(longest: int) -> tuple[int, list[int]]:
    """The tokens of a passage, and how far apart both are: 256, doubling, as far as `longest` tokens hold."""
    passage = max(2, min(PASSAGE, longest // 8))
    found, distance = [], 2 * passage
    while distance + 2 * passage <= longest:
        found.append(distance)
        distance *= 2
    return passage, found


def units(longest: int) -> list[Unit]:
    """One sequence a sample and distance: some text, the passage, text up to the distance, the passage again.

    A row: loss of the passage the second time minus the first, in nats per token, `distance` tokens apart from start to
    start; beside it both losses. `score` is the share of the first loss that is gone the second time, 1 for a perfect
    copy, over the tokens behind the passage's first one, which nobody can know.
    """
    passage, all_distances = distances(longest)
    # as much text before the passage as it is long, so that its first loss is one of text
    return [
        Unit(NAME, distance + 2 * passage, distance + 2 * passage, partial(_run, passage, distance))
        for distance in all_distances
    ]


def _run(passage: int, distance: int, scorer: Scorer, material: Material, index: int) -> Iterator[tuple[Place, Values]]:
    text = material.text.draw(distance + passage, index)
    tokens = torch.cat([text, text[passage : 2 * passage]])[None]
    losses = scorer.losses(tokens[:, :-1], tokens[:, 1:])[0].double().cpu()
    # a target's loss stands one place before it
    first = losses[passage - 1 : 2 * passage - 1]
    second = losses[passage - 1 + distance : 2 * passage - 1 + distance]
    score = 1.0 - (second[1:].sum() / first[1:].sum().clamp(min=1e-12)).item()
    before, after = first.mean().item(), second.mean().item()
    reach = distance + 2 * passage
    values = {"value": after - before, "first": before, "second": after, "score": score}
    yield {"distance": distance, "reach": reach}, values
