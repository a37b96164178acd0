"""An evaluation: all measures that are asked for, sample by sample, over one model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from lightning_lighthouse.evaluation import context_gain, copies, lookups, loss_by_position, own_tasks, passkey
from lightning_lighthouse.evaluation.measures import Found, Material, Unit
from lightning_lighthouse.evaluation.samples import Phrases
from lightning_lighthouse.evaluation.scoring import Scorer

MEASURES = (loss_by_position.NAME, context_gain.NAME, copies.NAME, passkey.NAME, lookups.NAME)


class Agreement(Protocol):
    """What ranks share: see `undisturbed.Ranks`."""

    share: int
    num_shares: int

    def reduce(self, values: list[float]) -> list[float]:
        """The sums over the shares."""


class Alone:
    """One process."""

    share, num_shares = 0, 1

    def reduce(self, values: list[float]) -> list[float]:
        """What is there."""
        return values


@dataclass(frozen=True)
class Asked:
    """What is to be measured.

    Args:
        measures: Names, from `MEASURES`.
        lengths: Tokens of the sequences for passkey and lookups; the longest is that of the others.
        own_tasks: Files of prompts and answers.
    """

    measures: Sequence[str]
    lengths: Sequence[int]
    own_tasks: Sequence[str | Path] = ()

    def units(self, phrases: Phrases | None) -> list[Unit]:
        """All parts of it, by measure; without phrases only what needs none.

        Raises:
            SettingError: The tokenizer does not tell digits apart, or a file of `own_tasks` is not as it should be.
        """
        longest = max(self.lengths)
        found: dict[str, list[Unit]] = {
            loss_by_position.NAME: loss_by_position.units(longest),
            context_gain.NAME: context_gain.units(longest),
            copies.NAME: copies.units(longest),
        }
        if phrases is not None:
            for measure in (passkey, lookups):
                if measure.NAME in self.measures:
                    found[measure.NAME] = measure.units(self.lengths, phrases)
            found[own_tasks.NAME] = own_tasks.units(self.own_tasks, phrases)
        return [unit for name in (*self.measures, own_tasks.NAME) for unit in found.get(name, [])]


def num_rounds(unit: Unit, num_samples: int, num_shares: int) -> int:
    """How many samples of a unit each rank runs: as many on every rank, so that none waits for another."""
    return math.ceil((num_samples if unit.max_samples is None else unit.max_samples) / num_shares)


def measure(
    scorer: Scorer,
    material: Material,
    units: Sequence[Unit],
    num_samples: int,
    training_length: int | None = None,
    ranks: Agreement | None = None,
    on_sample: Callable[[], None] = lambda: None,
) -> dict[str, list[dict[str, Any]]]:
    """Run all units; every rank calls it and gets the same rows.

    Args:
        scorer: The model.
        material: Text, phrases and seed.
        units: From `Asked.units`.
        num_samples: Of each place, all ranks together; they share them.
        training_length: Tokens of a training sequence; places beyond it are marked. None: not known.
        ranks: None: one process.
        on_sample: Called behind each sample.

    Returns:
        Rows by measure, for `evaluation.json`.
    """
    ranks = ranks or Alone()
    rows: dict[str, list[dict[str, Any]]] = {}
    for unit in units:
        found = Found()
        total = num_samples if unit.max_samples is None else unit.max_samples
        for index in range(num_rounds(unit, num_samples, ranks.num_shares)):
            number = index * ranks.num_shares + ranks.share
            found.add(list(unit.run(scorer, material, number % total)), counts=number < total)
            on_sample()
        rows.setdefault(unit.measure, []).extend(found.rows(ranks.reduce(found.sums()), training_length))
    return rows
