"""Documents to whole sequences: one stream that is cut, or long documents kept whole; and the chunks that hold them.

No token is ever added to fill a sequence, and none is dropped but the last, incomplete sequence of a split.
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from lightning_lighthouse.data.manifest import INDEX
from lightning_lighthouse.data.settings import WHOLE

# litdata's usual size: large enough to stream, small enough to shuffle
CHUNK_BYTES = 64 * 2**20
# Sequences of short text that wait for long documents: more of them, and fewer long documents must be cut
FILLER_SEQUENCES = 8
# Long documents that wait for short text before one of them is cut; at 98,304 tokens of 2 bytes these are 12 MiB
HELD_DOCUMENTS = 64


class Packed(NamedTuple):
    """Whole sequences of one kind.

    Args:
        is_long: Whether each begins with a long document, or a piece of one, that fills more than half of it.
        sequences: `[n, block]`.
    """

    is_long: bool
    sequences: np.ndarray


class Packer(Protocol):
    """Turns documents into whole sequences."""

    @property
    def cut_documents(self) -> int:
        """Documents that fit into one sequence and are spread over several."""

    def add(self, tokens: np.ndarray) -> list[Packed]:
        """Take one document, `[n]`; return the sequences that are complete now."""

    def close(self) -> list[Packed]:
        """Return what is left of whole sequences."""

    @property
    def waiting_tokens(self) -> int:
        """Tokens that are in no sequence yet; after `close`, those of the incomplete last one."""


def make_packer(documents: str, block: int, dtype: type[np.unsignedinteger]) -> Packer:
    """The packer for `documents`, "pack" or "whole", and sequences of `block` tokens."""
    return WholePacker(block, dtype) if documents == WHOLE else StreamPacker(block, dtype)


class StreamPacker:
    """All documents as one stream, cut at every multiple of `block` tokens."""

    def __init__(self, block: int, dtype: type[np.unsignedinteger]) -> None:
        self.cut_documents = 0
        self._partial = np.empty(block, dtype=dtype)
        self._filled = 0

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the sequence that is being filled."""
        return self._filled

    def add(self, tokens: np.ndarray) -> list[Packed]:
        """Append one document to the stream."""
        block, filled = self._partial.size, self._filled
        self.cut_documents += filled + tokens.size > block >= tokens.size
        packed = []
        if filled:
            head = tokens[: block - filled]
            self._partial[filled : filled + head.size] = head
            self._filled += head.size
            if self._filled < block:
                return []
            packed.append(Packed(False, self._partial[None].copy()))
            tokens = tokens[head.size :]
        whole = tokens.size // block * block
        if whole:
            packed.append(Packed(False, tokens[:whole].reshape(-1, block)))
        self._filled = tokens.size - whole
        self._partial[: self._filled] = tokens[whole:]
        return packed

    def close(self) -> list[Packed]:
        """Nothing: every whole sequence was returned at once."""
        return []


class WholePacker:
    """Long documents whole, short ones in the gaps behind them.

    A document of more than half a sequence is long, and opens a sequence of its own. One that is longer than a sequence
    is cut only by its own length: into whole sequences and a rest, which is long or short again. Short documents are
    a stream, which fills the gaps and then sequences of its own. Where the gaps have more room than there is short
    text, the shortest long document that waits becomes part of the stream.
    """

    def __init__(self, block: int, dtype: type[np.unsignedinteger]) -> None:
        self._block = block
        self._dtype = dtype
        self._filler = Filler()
        # whether it is a whole document, and its tokens
        self._long: list[tuple[bool, np.ndarray]] = []

    @property
    def cut_documents(self) -> int:
        """Documents that fit into one sequence and are spread over several."""
        return self._filler.cut_documents

    @property
    def waiting_tokens(self) -> int:
        """Tokens of the documents that wait."""
        return self._filler.size + sum(tokens.size for _, tokens in self._long)

    def add(self, tokens: np.ndarray) -> list[Packed]:
        """Take one document."""
        cut = tokens.size // self._block * self._block
        packed = [Packed(True, tokens[:cut].reshape(-1, self._block))] if cut else []
        # a copy, for a rest must not hold a whole book in memory
        rest = (not cut, tokens[cut:].copy() if cut else tokens)
        if rest[1].size > self._block // 2:
            self._long.append(rest)
        elif rest[1].size:
            self._filler.push(*rest)
        self._fill(packed)
        while len(self._long) > HELD_DOCUMENTS:
            self._yield_shortest()
            self._fill(packed)
        while not self._long and self._filler.size >= (FILLER_SEQUENCES + 1) * self._block:
            packed.append(Packed(False, self._filler.take(self._block)[None]))
        return packed

    def close(self) -> list[Packed]:
        """Sequences of all that waits, but for the last, incomplete one."""
        packed: list[Packed] = []
        while len(self._long) > 1:
            self._yield_shortest()
            self._fill(packed)
        while not self._long and self._filler.size >= self._block:
            packed.append(Packed(False, self._filler.take(self._block)[None]))
        return packed

    def _fill(self, packed: list[Packed]) -> None:
        """Complete the sequences of the long documents that wait, as far as the short text goes."""
        while self._long and self._filler.size >= self._block - self._long[0][1].size:
            _, tokens = self._long.pop(0)
            sequence = np.empty(self._block, dtype=self._dtype)
            sequence[: tokens.size] = tokens
            if tokens.size < self._block:
                sequence[tokens.size :] = self._filler.take(self._block - tokens.size)
            packed.append(Packed(True, sequence[None]))

    def _yield_shortest(self) -> None:
        shortest = min(range(len(self._long)), key=lambda i: self._long[i][1].size)
        self._filler.push(*self._long.pop(shortest))


class Filler:
    """Short text, first in, first out, cut wherever it is asked for."""

    def __init__(self) -> None:
        self.size = 0
        self.cut_documents = 0
        # whether it is a whole document, and its tokens
        self._pieces: deque[tuple[bool, np.ndarray]] = deque()

    def push(self, is_document: bool, tokens: np.ndarray) -> None:
        """Append a piece, a whole document or the rest of one."""
        self._pieces.append((is_document, tokens))
        self.size += tokens.size

    def take(self, count: int) -> np.ndarray:
        """The next `count` tokens; there are as many."""
        taken, missing = [], count
        while missing:
            is_document, tokens = self._pieces.popleft()
            if tokens.size > missing:
                self._pieces.appendleft((False, tokens[missing:]))
                self.cut_documents += is_document
                tokens = tokens[:missing]
            taken.append(tokens)
            missing -= tokens.size
        self.size -= count
        return np.concatenate(taken)


class ChunkWriter:
    """Writes whole sequences into the chunks of a litdata folder.

    Args:
        folder: Where chunks and index go.
        block: Tokens of a sequence.
        dtype: Of a stored token.
    """

    def __init__(self, folder: Path, block: int, dtype: type[np.unsignedinteger]) -> None:
        from litdata.streaming.item_loader import TokensLoader
        from litdata.streaming.writer import BinaryWriter

        self.sequences = self.long_sequences = 0
        self._folder = folder
        rows = max(1, CHUNK_BYTES // (block * np.dtype(dtype).itemsize))
        self._chunk = np.empty((rows, block), dtype=dtype)
        self._filled = 0
        self._num_chunks = 0
        self._writer = BinaryWriter(str(folder), chunk_size=self._chunk.size, item_loader=TokensLoader())
        # chunk names carry the writer's rank; every node must write the same names
        self._writer._rank = 0

    def add(self, packed: Packed) -> None:
        """Append sequences."""
        sequences = packed.sequences
        self.sequences += len(sequences)
        self.long_sequences += len(sequences) * packed.is_long
        while len(sequences):
            taken = sequences[: len(self._chunk) - self._filled]
            self._chunk[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            sequences = sequences[len(taken) :]
            if self._filled == len(self._chunk):
                self._flush()

    def close(self) -> None:
        """Write what is left, and the index."""
        if self._filled:
            self._flush()
        if self._num_chunks:
            self._writer.done()
            (self._folder / f"0.{INDEX}").rename(self._folder / INDEX)

    def _flush(self) -> None:
        self._writer.add_item(self._num_chunks, self._chunk[: self._filled].reshape(-1))
        self._num_chunks += 1
        self._filled = 0
