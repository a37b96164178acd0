"""What a model is called with must not tell of other documents than those that were set for the batch.

A step may call its model twice, as where two answers are compared, while documents are set for the batch once: those of
the first call would hold for the second, without a word where both have the same sizes. As in `packing`, what lies on a
GPU is compared there, and the host does not wait for it but the first time.
"""

# B sequences, N tokens

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.attention.host_tables import once_a_batch
from lightning_lighthouse.routing.packing import BOUNDARIES, MASK, POSITIONS, restarts, segments, token_positions


def contradictions(documents: Documents, inputs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Each line of an error with whether it is one, a 0-dim bool tensor.

    Positions that do not restart, and boundaries and segments of fewer documents, say nothing: ids, which may be told
    of finer ones, come before them. Documents of other sizes are an error of the attention, which knows its layer.

    Args:
        documents: That are set.
        inputs: The keyword arguments of a model's forward.
    """
    sizes = documents.batch_size, documents.num_tokens
    positions, numbers = token_positions(inputs), segments(inputs)
    if isinstance(positions, Tensor) and positions.ndim in (1, 2) and positions.shape[-1] == sizes[1]:
        # small unsigned types would count from their end on to 0
        positions = positions.long()
        positions_BN = positions.expand(sizes) if positions.ndim == 1 or positions.shape[0] == 1 else positions
        if tuple(positions_BN.shape) == sizes:
            real = _real(inputs.get(MASK), positions_BN)
            differs = (positions_BN[:, 1:] != positions_BN[:, :-1] + 1) != _starts(documents, positions_BN)[:, 1:]
            yield _line(POSITIONS), (restarts(positions_BN) & real).any() & (differs & real).any()
    if numbers is not None and tuple(numbers.shape) == sizes:
        crossed = (numbers[:, 1:] != numbers[:, :-1]) & ~_starts(documents, numbers)[:, 1:]
        yield _line(MASK), (numbers > 1).any() & crossed.any()
    for name in BOUNDARIES:
        cu = inputs.get(name)
        if isinstance(cu, Tensor) and cu.ndim == 1 and not cu.is_floating_point():
            flat = torch.nn.functional.pad(_starts(documents, cu).flatten(), (0, 1), value=True)
            yield _line(name), ~flat[cu.long().clamp(0, flat.numel() - 1)].all()


def _line(name: str) -> str:
    return (
        f"documents are set for this batch, but a model is called with {name} that keeps other tokens apart than the "
        "documents do: let both say the same, and join the batches of a step that calls its model twice"
    )


def _starts(documents: Documents, beside: Tensor) -> Tensor:
    device = beside.device
    return once_a_batch(documents.host, ("starts",), device, lambda: documents.position_ids(device) == 0).view(
        documents.batch_size, documents.num_tokens
    )


def _real(mask: Any, positions_BN: Tensor) -> Tensor:
    """Whether a token and the one before are both text: `[B, N - 1]`; padding has whatever positions it was given."""
    if not isinstance(mask, Tensor) or mask.shape != positions_BN.shape:
        return torch.ones_like(positions_BN[:, 1:], dtype=torch.bool)
    real_BN = mask.to(positions_BN.device) != 0
    return real_BN[:, 1:] & real_BN[:, :-1]
