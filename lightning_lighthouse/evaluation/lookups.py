"""Key-value lookups: is the right one found among several numbers? Harder than a passkey, whose digit stands alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import pairwise

import torch

from lightning_lighthouse.evaluation.measures import Material, Place, Unit, Values
from lightning_lighthouse.evaluation.samples import DIGITS, Phrases, seeded
from lightning_lighthouse.evaluation.scoring import Scorer

NAME = "lookups"
PAIRS = 8
KEYS = "apple bridge candle desert engine forest garden hammer island jacket kitchen ladder mirror needle orange pencil"
PAIR = "\nThe number of the {key} is {digit}.\n"
QUESTION = "\nWhat is the number of the {key}? The number of the {key} is"


def units(lengths: Sequence[int], phrases: Phrases) -> list[Unit]:
    """One sequence a sample and length: text with 8 pairs of a word and a digit at even distances, and one question.

    A row: the share of samples in which the digit of the word that is asked for is the likeliest of the ten. No two
    words have the same digit. Chance is 0.1, and one of the digits that were seen is right in 0.125.
    Lengths that are less than half text are left out.
    """
    # of the longest word, in tokens
    key = max(KEYS.split(), key=lambda name: len(phrases.encode(PAIR.format(key=name, digit=0))))
    pair, (question, _) = phrases.encode(PAIR.format(key=key, digit=0)), phrases.question(QUESTION.format(key=key))
    lengths = [length for length in lengths if length >= 2 * (PAIRS * len(pair) + len(question))]
    return [Unit(NAME, length, length, partial(_run, length)) for length in lengths]


def _run(length: int, scorer: Scorer, material: Material, index: int) -> Iterator[tuple[Place, Values]]:
    assert material.phrases is not None
    generator = seeded(material.seed, NAME, length, index)
    names = KEYS.split()
    keys = [names[i] for i in torch.randperm(len(names), generator=generator)[:PAIRS]]
    digits = torch.randperm(len(DIGITS), generator=generator)[:PAIRS].tolist()
    asked = int(torch.randint(PAIRS, (), generator=generator))
    pairs = [
        material.phrases.encode(PAIR.format(key=key, digit=DIGITS[digit]))
        for key, digit in zip(keys, digits, strict=True)
    ]
    question, candidates = material.phrases.question(QUESTION.format(key=keys[asked]))
    text = material.text.draw(length - sum(map(len, pairs)) - len(question), index)
    # a pair in the middle of each eighth
    places = [0, *(round(len(text) * (2 * i + 1) / (2 * PAIRS)) for i in range(PAIRS)), len(text)]
    pieces = [text[start:end] for start, end in pairwise(places)]
    woven = [part for piece, pair in zip(pieces, pairs, strict=False) for part in (piece, pair)]
    tokens = torch.cat([*woven, pieces[-1], question])[None]
    found = int(scorer.choices(tokens, candidates)[0].argmax())
    yield {"length": length, "reach": length}, {"value": float(found == digits[asked])}
