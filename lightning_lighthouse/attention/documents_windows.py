"""Windows and chunks inside documents, in few calls where documents are short.

A document that a window spans is dense, and so is each chunk: those of a batch go to the operator for dense attention
inside documents together. Only a document longer than its window is a call of its own.
"""

# B sequences, N tokens

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_lighthouse.attention.documents import Documents, check_covers
from lightning_lighthouse.attention.documents_sdpa import documents_sdpa
from lightning_lighthouse.attention.host_tables import once_a_batch

HOST = torch.device("cpu")


class _Piece(NamedTuple):
    """Tokens of a sequence: documents that a window spans, one behind the other, or one that is longer."""

    row: int
    first: int
    end: int
    is_spanned: bool


class _Cut(NamedTuple):
    """The pieces of a batch, in their order, and the documents of the spanned ones, as one sequence."""

    pieces: list[_Piece]
    spanned: Documents | None


# compiled frames leave it to plain Python, for they would be traced anew for each batch's lengths
@torch.compiler.disable
def windows_inside(
    attend: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents,
    reach: int,
    *,
    scale: float | None,
    sdpa: str,
) -> Tensor:
    """What `attend` returns for q, k and v of each document by itself, in their places: `[B, Hq, N, D]`.

    Args:
        attend: Windows, for q, k and v of a document of more than `reach` tokens.
        q: `[B, Hq, N, D]`.
        k: `[B, Hkv, N, D]`.
        v: `[B, Hkv, N, D]`.
        documents: Of these sequences.
        reach: Tokens, up to which a document is dense.
        scale: As in `documents_sdpa`.
        sdpa: The backend there.

    Raises:
        TypeError: `documents` are none.
        ValueError: They are of another batch, or the named backend cannot run this call.
    """
    check_covers(documents, q)
    if documents.longest <= reach:
        return documents_sdpa(q, k, v, documents, scale=scale, backend=sdpa)
    cut = once_a_batch(documents.host, ("windows", reach), HOST, lambda: _cut(documents, reach))
    parts = [[x[piece.row : piece.row + 1, :, piece.first : piece.end] for x in (q, k, v)] for piece in cut.pieces]
    spanned = [part for part, piece in zip(parts, cut.pieces, strict=True) if piece.is_spanned]
    outputs: Iterator[Tensor] = iter(())
    if cut.spanned is not None:
        q_all, k_all, v_all = (torch.cat(x, 2) for x in zip(*spanned, strict=True))
        out = documents_sdpa(q_all, k_all, v_all, cut.spanned, scale=scale, backend=sdpa)
        outputs = iter(out.split([part[0].shape[2] for part in spanned], 2))
    rows: list[list[Tensor]] = [[] for _ in range(documents.batch_size)]
    for part, piece in zip(parts, cut.pieces, strict=True):
        rows[piece.row].append(next(outputs) if piece.is_spanned else attend(*part))
    return torch.cat([torch.cat(row, 2) for row in rows])


@torch.compiler.disable
def chunks_inside(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int, *, scale: float | None, sdpa: str
) -> Tensor:
    """Chunks of `window` tokens from the first token of each document on, as documents of their own: `[B, Hq, N, D]`.

    Args:
        q: As in `windows_inside`.
        k: As there.
        v: As there.
        documents: As there.
        window: Tokens of a chunk.
        scale: As there.
        sdpa: As there.

    Raises:
        TypeError: `documents` are none.
        ValueError: They are of another batch, or the named backend cannot run this call.
    """
    check_covers(documents, q)
    chunks = once_a_batch(documents.host, ("chunks", window), HOST, lambda: _chunks(documents, window))
    return documents_sdpa(q, k, v, chunks, scale=scale, backend=sdpa)


def _cut(documents: Documents, reach: int) -> _Cut:
    pieces: list[_Piece] = []
    spanned: list[int] = []
    for row, lengths in enumerate(documents.lengths):
        first = 0
        for is_spanned, run in groupby(lengths, lambda length: length <= reach):
            for part in [list(run)] if is_spanned else [[length] for length in run]:
                pieces.append(_Piece(row, first, first + sum(part), is_spanned))
                first += sum(part)
                spanned += part if is_spanned else []
    return _Cut(pieces, Documents([spanned]) if spanned else None)


def _chunks(documents: Documents, window: int) -> Documents:
    return Documents(
        [
            [size for length in lengths for size in (*[window] * (length // window), length % window)]
            for lengths in documents.lengths
        ]
    )
