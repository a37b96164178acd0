"""What all measures of long context have in common: places, samples, and rows with their standard errors."""

# N tokens

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_lighthouse.evaluation.samples import Haystack, Phrases
from lightning_lighthouse.evaluation.scoring import Scorer

# "reach" is how many tokens of context the place needs, and is left out of the rows
Place = dict[str, Any]
# what was found at a place in one sample, by name; "value" is the measure itself
Values = dict[str, float]


@dataclass(frozen=True)
class Material:
    """What a sample is made of.

    Args:
        text: Validation text.
        phrases: Sentences in the model's tokens; None where the tokenizer is not known.
        seed: Of what is drawn.
    """

    text: Haystack
    phrases: Phrases | None
    seed: int


@dataclass(frozen=True)
class Unit:
    """The smallest part of a measure that is run at a time: one sample at one place, or at several in one sequence.

    Args:
        measure: Its name, as in `evaluation.json`.
        num_tokens: That one sample sends through the model.
        context: The longest sequence among them.
        run: Takes the scorer, the material and the number of the sample; gives what was found, by place.
        max_samples: That there are; None: as many as are asked for.
    """

    measure: str
    num_tokens: int
    context: int
    run: Callable[[Scorer, Material, int], Iterator[tuple[Place, Values]]]
    max_samples: int | None = None


@dataclass
class Tally:
    """Running sums of one value, from which its mean and standard error follow."""

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        """Add one sample."""
        self.count += 1
        self.total += value
        self.squares += value * value

    @property
    def mean(self) -> float:
        """NaN without samples."""
        return self.total / self.count if self.count else math.nan

    @property
    def standard_error(self) -> float:
        """Of the mean; NaN with fewer than two samples."""
        if self.count < 2 or not math.isfinite(self.total):
            return math.nan
        # rounding can leave a small negative number
        variance = max(0.0, self.squares - self.total * self.total / self.count) / (self.count - 1)
        return math.sqrt(variance / self.count)


@dataclass
class Found:
    """What one unit found on this rank, place by place in a fixed order."""

    places: list[Place] = field(default_factory=list)
    tallies: list[dict[str, Tally]] = field(default_factory=list)

    def add(self, found: Sequence[tuple[Place, Values]], counts: bool = True) -> None:
        """Add one sample.

        Args:
            found: By place.
            counts: False: only the places are noted, as of a sample that another rank counts.
        """
        if not self.places:
            self.places = [place for place, _ in found]
            self.tallies = [{name: Tally() for name in values} for _, values in found]
        if counts:
            for tallies, (_, values) in zip(self.tallies, found, strict=True):
                for name, value in values.items():
                    tallies[name].add(value)

    def sums(self) -> list[float]:
        """All sums in a row, to be added up over the ranks."""
        return [
            number
            for tallies in self.tallies
            for tally in tallies.values()
            for number in (tally.count, tally.total, tally.squares)
        ]

    def rows(self, sums: Sequence[float], training_length: int | None) -> list[dict[str, Any]]:
        """The rows for `evaluation.json`.

        Args:
            sums: From `sums`, added up over the ranks.
            training_length: Tokens of a training sequence; a place that needs more is marked. None: not known.
        """
        numbers = iter(sums)
        rows = []
        for place, tallies in zip(self.places, self.tallies, strict=True):
            whole = {name: Tally(next(numbers), next(numbers), next(numbers)) for name in tallies}
            value = whole.pop("value")
            reach = place.get("reach", 0)
            row = {
                **{key: item for key, item in place.items() if key != "reach"},
                "value": value.mean,
                "standard_error": value.standard_error,
                "count": round(value.count),
                **{name: tally.mean for name, tally in whole.items()},
                "beyond_training": training_length is not None and reach > training_length,
            }
            rows.append(row)
        return rows


def lengths_up_to(longest: int) -> list[int]:
    """1,024 tokens and four times as many again and again, below `longest`; then that itself."""
    lengths = []
    length = 1024
    while length < longest:
        lengths.append(length)
        length *= 4
    return [*lengths, longest]


def lengths_within(
    asked: Sequence[int], num_tokens: int, tell: Callable[[str], None], is_required: bool = False
) -> list[int]:
    """The lengths that a text fills; where it fills none of them, the longest that it does.

    Args:
        asked: In tokens.
        num_tokens: Of the text; a sequence needs one behind its last.
        tell: Hears a line on those that are left out.
        is_required: Measure nothing else than what was asked for.

    Raises:
        ValueError: None fits, and one is required to.
    """
    longest = num_tokens - 1
    left_out = [length for length in asked if length > longest]
    if len(left_out) == len(asked) and is_required:
        raise ValueError(
            f"lengths must be at most {longest:,} for the {num_tokens:,} tokens of validation text, got {left_out}"
        )
    lengths = [length for length in asked if length <= longest] or [longest]
    if left_out:
        instead = f"; {longest:,} tokens are measured instead" if len(left_out) == len(asked) else ""
        tell(f"lengths {left_out} are left out: there are {num_tokens:,} tokens of validation text{instead}")
    return lengths
