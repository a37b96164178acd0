"""The ranks that share a sequence, and which of its tokens this one holds.

Rank r of W holds tokens `[r n, (r + 1) n)`, n = N / W: a run, so that positions are an offset and windows stay whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_lighthouse.context.collectives import register


@dataclass(eq=False)
class Context:
    """The group that shares a sequence, seen from one of its ranks.

    Args:
        rank: Of this process within the group.
        size: Ranks of the group, W.
        group: Name of the process group, by which the collectives find it.
        num_tokens: Tokens of this rank's slice, which every call of attention must have; None: not known.
    """

    rank: int
    size: int
    group: str
    num_tokens: int | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Context:
        """The context of a process group that this process belongs to."""
        return cls(dist.get_rank(group), dist.get_world_size(group), register(group))


# None: sequences are whole. A module's global, on which Dynamo guards.
_current: Context | None = None


def current() -> Context | None:
    """The context whose sequences are shared now; None: each process has its own, whole."""
    return _current


@contextmanager
def entered(context: Context | None) -> Iterator[None]:
    """Let `context` be the current one inside."""
    global _current
    before, _current = _current, context
    try:
        yield
    finally:
        _current = before


@contextmanager
def whole_sequences() -> Iterator[None]:
    """Inside, each process attends over the sequences that it has: for prompts, and whatever else no group shares."""
    with entered(None):
        yield


def local_positions(num_tokens: int, device: torch.device | None = None) -> Tensor:
    """The positions `[n]` int64 of this rank's tokens within the whole sequence; from 0 on where none is shared.

    Args:
        num_tokens: Of this rank, n.
        device: Of the result; None: torch's default.
    """
    positions = torch.arange(num_tokens, device=device)
    context = current()
    return positions if context is None else positions + context.rank * num_tokens
