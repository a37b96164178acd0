"""The plateau rule: switch when the dense validation loss stops gaining. Pure Python."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lightning_lighthouse.checks import check_type
from lightning_lighthouse.phases.ledger import Validation
from lightning_lighthouse.phases.schedule import check_switch_at


@dataclass(frozen=True)
class PlateauRule:
    """Switch before `switch_at` if the dense validation loss stops gaining per second of training.

    A validation gains if its loss is below that of the last one that gained by more than `min_gain_per_second` times
    the training seconds between them. After `patience` validations in a row that did not, the rest of the steps is
    dense. The number of steps stays what the Trainer was told, so that an earlier switch means more dense steps, which
    are slower: the run takes longer. With `min_gain_per_second=0` the clock does not matter, and two runs with equal
    losses switch at the same step.

    Args:
        patience: Validations in a row without a gain; at least 1.
        min_gain_per_second: Units of the validation loss, nats as a rule, for each second of training; at least 0.
        earliest: No switch before this: a step (an int >= 0) or a fraction of the steps, as for `switch_at`.

    Raises:
        TypeError: A value has the wrong type.
        ValueError: A value is out of range.
    """

    patience: int = 3
    min_gain_per_second: float = 0.0
    earliest: int | float = 0

    def __post_init__(self) -> None:
        check_type("patience", self.patience, int)
        check_type("min_gain_per_second", self.min_gain_per_second, int | float)
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")
        if not 0 <= self.min_gain_per_second < math.inf:
            raise ValueError(f"min_gain_per_second must be finite and at least 0, got {self.min_gain_per_second}")
        check_switch_at(self.earliest, "earliest")

    def is_reached(self, validations: Iterable[Validation]) -> bool:
        """Whether the newest of these validations, oldest first, is the last one to wait for. NaN is no gain."""
        best, since, waited = math.inf, 0.0, 0
        for validation in validations:
            if best - validation.loss > self.min_gain_per_second * (validation.seconds - since):
                best, since, waited = validation.loss, validation.seconds, 0
            else:
                waited += 1
        return waited >= self.patience
