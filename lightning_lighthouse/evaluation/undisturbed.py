"""What a measurement inside a run needs: the model as in validation, no trace left, and ranks that agree."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng


class Ranks:
    """What the ranks of a measurement agree on, so that all of them do the same number of forwards.

    Args:
        trainer: Its strategy, and how it shares the data.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._strategy = trainer.strategy
        shares = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        # which share of the data this rank sees, and of how many
        self.share: int = shares["rank"]
        self.num_shares: int = shares["num_replicas"]
        # ranks that split a model see the same text
        self._copies = trainer.world_size // shares["num_replicas"]
        self.start_clock()

    def start_clock(self) -> None:
        """Time counts from now."""
        self._start = time.perf_counter()

    def is_late(self, seconds: float) -> bool:
        """Whether more than `seconds` have passed, by the clock of rank 0."""
        return self._strategy.broadcast(time.perf_counter() - self._start > seconds)

    def seconds(self) -> float:
        """Seconds since the clock started, by that of rank 0."""
        return self._strategy.broadcast(time.perf_counter() - self._start)

    def broadcast(self, value: float) -> float:
        """That of rank 0."""
        return self._strategy.broadcast(value)

    def reduce(self, values: list[float], how: str = "sum") -> list[float]:
        """The sums over the shares of the data, or the minima over the ranks."""
        device = self._strategy.root_device
        tensor = torch.tensor(values, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        reduced: list[float] = self._strategy.reduce(tensor, reduce_op=how).tolist()
        return [value / self._copies for value in reduced] if how == "sum" else reduced


@contextmanager
def undisturbed(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """As in validation: no gradients, eval mode, the Trainer's precision; random numbers as if nothing had happened."""
    training = [part for part in module.modules() if part.training]
    module.eval()
    try:
        with isolate_rng(), torch.no_grad(), trainer.precision_plugin.forward_context():
            yield
    finally:
        for part in training:
            part.training = True
