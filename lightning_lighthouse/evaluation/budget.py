"""What an evaluation may cost: a share of the run's time, and how many samples that is."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from lightning_lighthouse.evaluation.measures import Unit
from lightning_lighthouse.evaluation.measuring import num_rounds

# A standard error needs two
MIN_SAMPLES = 2


class Budget:
    """The time of a run and of its evaluations, resumed parts included.

    Args:
        max_share: Of the run's time; None: no limit.
    """

    def __init__(self, max_share: float | None) -> None:
        self.max_share = max_share
        self.spent = 0.0
        # of the parts of the run before this one
        self._before = 0.0
        self._start = time.perf_counter()
        # seconds for a token on one rank; None: not measured yet
        self.pace: float | None = None

    def start(self) -> None:
        """The run's time counts from now."""
        self._start = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds of the run so far, evaluations included."""
        return self._before + time.perf_counter() - self._start

    def state_dict(self) -> dict[str, float]:
        """For a checkpoint."""
        return {"spent": self.spent, "elapsed": self.elapsed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the times of a run."""
        self.spent, self._before = state["spent"], state["elapsed"]

    def affordable(
        self, units: Sequence[Unit], asked: int, num_shares: int, elapsed: float, keeps_room: bool
    ) -> tuple[int, float]:
        """How many samples of each place are within the share, and the seconds that these take.

        Args:
            units: What is to run.
            asked: At most so many.
            num_shares: Into which the ranks split the samples.
            elapsed: Seconds of the run, the same on all ranks.
            keeps_room: Leave as much again for an evaluation at the end.

        Returns:
            0 samples where fewer than two would be within it.
        """
        pace = self.pace or 0.0

        def seconds(samples: int) -> float:
            return pace * sum(unit.num_tokens * num_rounds(unit, samples, num_shares) for unit in units)

        if self.max_share is None:
            return asked, seconds(asked)
        allowed = self.max_share * elapsed - self.spent
        if keeps_room:
            allowed -= seconds(MIN_SAMPLES)
        # the ranks run rounds, in which each has a sample
        for samples in range(asked, MIN_SAMPLES - 1, -1):
            if seconds(samples) <= allowed:
                return samples, seconds(samples)
        return 0, seconds(MIN_SAMPLES)
