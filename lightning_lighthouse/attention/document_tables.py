"""Where the windows, tiles and gathered rows of documents lie in one launch over a batch: tables on the host.

They follow from the lengths and the settings alone, so they are the same for all layers and heads. All sequences lie
one behind the other, B N tokens. A document of n tokens gets ceil(n / w) windows, the last one partly filled, and an
empty one behind them: what the kernels shift out of a document's last window lands there.
"""

# B sequences, N tokens of each, D documents, U windows, T tiles, L levels, p pooling factor, w tokens of a coarsest
# window, e windows of a whole tile

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lightning_lighthouse.attention.host_tables import boundaries, once_a_batch, to_device
from lightning_lighthouse.attention.operators import pack, unpack
from lightning_lighthouse.attention.pyramid import PyramidShape

Numbers = np.ndarray


class DocumentTables(NamedTuple):
    """Tables of one batch, int64.

    Args:
        windows: `[2, U]`, for each window its first token and how many are its own, 0 in an empty one.
        tiles: `[4, T]`, for each tile its first window, how many are the document's, its rank in the document, and its
            first gathered row.
        boundaries: `[D + 1]`, the first gathered row of each document, and the end.
    """

    windows: Numbers
    tiles: Numbers
    boundaries: Numbers


class Capacity(NamedTuple):
    """What suffices for every batch with so many documents.

    Args:
        documents: Of the whole batch.
        windows: The empty ones included.
        rows: Gathered rows.
    """

    documents: int
    windows: int
    rows: int


def make_tables(lengths: Numbers, shape: PyramidShape, rule: str) -> DocumentTables:
    """The tables for documents of `lengths` `[D]`, one behind the other.

    Args:
        lengths: Tokens, all above 0.
        shape: Of a whole sequence.
        rule: `selection` of the config.
    """
    w, e = shape.window(shape.num_levels - 1), shape.tile_entries
    filled = -(-lengths // w)
    windows_before, tokens_before = _before(filled + 1), _before(lengths)
    document_U, place_U = _places(filled + 1)
    count = np.clip(lengths[document_U] - place_U * w, 0, w)
    windows = np.stack((tokens_before[document_U] + place_U * w, count))

    document_T, rank = _places(-(-filled // e))
    real = np.minimum(e, filled[document_T] - rank * e)
    base = np.concatenate(([0], tile_rows(real, rank, shape, rule).cumsum()))
    tiles = np.stack((windows_before[document_T] + rank * e, real, rank, base[:-1]))
    return DocumentTables(windows, tiles, np.append(base[:-1][rank == 0], base[-1]))


def tile_rows(real: Numbers, rank: Numbers, shape: PyramidShape, rule: str) -> Numbers:
    """Gathered rows kept for tiles with `real` windows: as many as there are, or at most as scores may have it.

    Args:
        real: Windows of each tile that belong to its document, 1 to e.
        rank: Of each tile in its document.
        shape: Of a whole sequence.
        rule: `selection` of the config.
    """
    p, e = shape.pooling_factor, shape.tile_entries
    rows = candidates = real
    all_candidates = e
    for level in range(shape.num_levels - 1, 0, -1):
        count = min(shape.winners[level], all_candidates)
        if rule in ("published", "random"):
            won = -(-real * count // e)
        else:
            # evenly spaced ones among the first candidates; behind a tile, how many win there depends on scores
            evenly = -(-candidates * count // all_candidates)
            won = evenly if rule == "strided" else np.where(rank == 0, evenly, np.minimum(count, candidates))
        candidates, all_candidates = p * won, p * count
        rows = rows + candidates
    return rows


def _before(counts: Numbers) -> Numbers:
    return np.cumsum(counts) - counts


def _places(counts: Numbers) -> tuple[Numbers, Numbers]:
    """For each of so many things of every document: the document, and which one of its things it is."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - _before(counts)[owner]


@lru_cache(maxsize=64)
def capacity(shape: PyramidShape, batch: int, max_documents: int, rule: str) -> Capacity:
    """What suffices for `batch` sequences of this shape with at most `max_documents` each, on average.

    A full tile has g rows, g / e a window. Each document has one other tile, and one of rank above 0 only if it has
    more than e windows.
    """
    w, e = shape.window(shape.num_levels - 1), shape.tile_entries
    documents = batch * max_documents
    filled = (batch * shape.num_tokens + documents * (w - 1)) // w
    real = np.arange(1, e + 1)
    first, later = (
        int((e * tile_rows(real, np.full(e, rank), shape, rule) - real * shape.tile_gathered).max()) for rank in (0, 1)
    )
    with_more_tiles = min(documents, filled // (e + 1))
    rows = filled * shape.tile_gathered + documents * first + with_more_tiles * max(0, later - first)
    return Capacity(documents, filled + documents, -(-rows // e))


class Packing(NamedTuple):
    """What operators are told of the documents of all batches, as numbers that they can take.

    Args:
        numbers: Sequences of a batch, `max_documents`, and the shape of a whole sequence.
        rule: `selection` of the config.
    """

    numbers: list[int]
    rule: str

    @classmethod
    def of(cls, shape: PyramidShape, batch: int, max_documents: int, rule: str) -> Packing:
        """The same from what they are."""
        return cls([batch, max_documents, *pack(shape)], rule)

    @property
    def shape(self) -> PyramidShape:
        """Of a whole sequence."""
        return unpack(self.numbers[2:])

    @property
    def capacity(self) -> Capacity:
        """What suffices for every batch."""
        return capacity(self.shape, *self.numbers[:2], self.rule)


class PlacedTables(NamedTuple):
    """The tables of one batch where operators read them.

    Args:
        windows: `[2, U]` int32 on the device, as in `DocumentTables`.
        tiles: `[4, T]` int32 on the device.
        host: Boundaries of the gathered rows, on the CPU, as `Documents.host` has those of the tokens.
    """

    windows: Tensor
    tiles: Tensor
    host: Tensor


def place_tables(host: Tensor, packing: Packing, device: torch.device) -> PlacedTables:
    """The tables on `device`, made once a batch.

    Args:
        host: That of `Documents`.
        packing: Of all batches.
        device: That of q.

    Raises:
        RuntimeError: The batch has more documents than there is memory for.
    """

    def make() -> PlacedTables:
        ends = boundaries(host)
        most = packing.capacity.documents
        if len(ends) - 1 > most:
            # eager code has chosen dense attention long before
            raise RuntimeError(
                f"{len(ends) - 1} documents in a batch exceed max_documents x batch = {most} in compiled code; call "
                "settle_documents(documents, config) before it, or raise max_documents"
            )
        tables = make_tables(np.diff(ends), packing.shape, packing.rule)
        rows = torch.from_numpy(np.concatenate(([len(ends) - 1], tables.boundaries)))
        return PlacedTables(to_device(tables.windows, device), to_device(tables.tiles, device), rows)

    return once_a_batch(host, ("tables", *packing.numbers, packing.rule), device, make)
