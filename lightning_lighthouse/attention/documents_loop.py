"""A loop over documents, for attention that has no kernel which knows them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_lighthouse.attention.documents import Documents


# compiled frames leave it to plain Python, for they would be traced anew for each batch's lengths
@torch.compiler.disable
def each_document(attend: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """What `attend` returns for q, k and v of each document by itself, in their places: `[B, H, N, D]`."""
    sequences = []
    for row, lengths in enumerate(documents.lengths):
        parts = [x[row : row + 1].split(lengths, 2) for x in (q, k, v)]
        sequences.append(torch.cat([attend(*part) for part in zip(*parts, strict=True)], 2))
    return torch.cat(sequences)
