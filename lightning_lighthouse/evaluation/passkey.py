"""Passkey: is one digit found that stands somewhere in a long text (arXiv 2605.06554, appendix F)?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from lightning_lighthouse.evaluation.measures import Material, Place, Unit, Values
from lightning_lighthouse.evaluation.samples import DIGITS, Phrases, seeded
from lightning_lighthouse.evaluation.scoring import Scorer

NAME = "passkey"
# the paper's
DEPTHS = (0, 15, 30, 50, 70, 85, 100)
NEEDLE = "\nThe pass key is {digit}. Remember it: {digit} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"


def units(lengths: Sequence[int], phrases: Phrases) -> list[Unit]:
    """One sequence a sample, length and depth: validation text with a sentence in it, and a question at its end.

    A row: the share of samples in which the right digit is the likeliest of the ten, with `length` tokens in all and
    the sentence behind `depth` percent of the text. The digits of ten samples are all ten; chance is 0.1. Lengths that
    are less than half text are left out.
    """
    phrased = len(phrases.encode(NEEDLE.format(digit=0))) + len(phrases.question(QUESTION)[0])
    lengths = [length for length in lengths if length >= 2 * phrased]
    return [Unit(NAME, length, length, partial(_run, length, depth)) for length in lengths for depth in DEPTHS]


def _run(length: int, depth: int, scorer: Scorer, material: Material, index: int) -> Iterator[tuple[Place, Values]]:
    assert material.phrases is not None
    # each ten samples have all ten digits, in an order of their own
    order = torch.randperm(10, generator=seeded(material.seed, NAME, length, depth, index // 10))
    digit = int(order[index % 10])
    needle = material.phrases.encode(NEEDLE.format(digit=DIGITS[digit]))
    question, candidates = material.phrases.question(QUESTION)
    text = material.text.draw(length - len(needle) - len(question), index)
    before = round(len(text) * depth / 100)
    tokens = torch.cat([text[:before], needle, text[before:], question])[None]
    found = int(scorer.choices(tokens, candidates)[0].argmax())
    yield {"length": length, "depth": depth, "reach": length}, {"value": float(found == digit)}
