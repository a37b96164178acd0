"""A loader that a resumed training goes on with where it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any


class ResumableBatches:
    """Batches in order, with the state that the Trainer saves: a resumed run goes on where it was."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = list(batches)
        self.done = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        while self.done < len(self.batches):
            self.done += 1
            yield self.batches[self.done - 1]
        self.done = 0

    def state_dict(self) -> dict[str, int]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.done = state["done"]
