"""`Documents`: where the documents of a batch begin and end. Numbers on the host, so that nobody waits for a GPU."""

# B sequences, N tokens of each

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.checks import shown

DEFAULT = LighthouseConfig()


class Documents:
    """The documents in the sequences of a batch, by their lengths.

    It can travel in a batch: `to` and `pin_memory` return it as it is, and to iterate over it gives nothing, so that
    Lightning, which looks into a batch for its size, finds none here. Two are equal if their lengths are.

    Args:
        lengths: Tokens of each document, a list for each sequence: `[[700, 324], [1024]]`. Every sequence has N tokens.
            Lengths of 0 are dropped.

    Attributes:
        lengths: The same, as tuples.
        batch_size: B, sequences.
        num_tokens: N, tokens of each sequence.
        num_documents: Documents of all sequences.
        longest: Tokens of the longest document.
        is_packed: Whether a sequence has more than one document.
        is_crowded: Whether Lighthouse leaves the batch dense, as compiled frames read it: `settle_documents`.
        host: `[B N + 2]` int64 on the CPU, read inside operators: the number of documents, then the first token of
            each, counted through all sequences, then B N to the end. Its size says nothing of the documents.

    Raises:
        TypeError: `lengths` is not made of lists of ints.
        ValueError: A length is negative, or the sequences are empty or of different lengths.
    """

    def __init__(self, lengths: Sequence[Sequence[int]]) -> None:
        self.lengths = tuple(_checked(sequence, row) for row, sequence in enumerate(_listed(lengths)))
        sums = [sum(sequence) for sequence in self.lengths]
        if not sums or min(sums) < 1:
            raise ValueError(f"documents must have at least one token in every sequence, got {shown(lengths)}")
        if min(sums) != max(sums):
            row = next(row for row, total in enumerate(sums) if total != sums[0])
            raise ValueError(
                "the documents of every sequence must add up to the same number of tokens, got "
                f"{sums[0]} in sequence 0 and {sums[row]} in sequence {row}"
            )
        flat = np.fromiter(chain.from_iterable(self.lengths), np.int64)
        self.batch_size = len(sums)
        self.num_tokens = sums[0]
        self.num_documents = len(flat)
        self.longest = int(flat.max())
        self.is_crowded = self.num_documents > self.batch_size * DEFAULT.resolve_max_documents(self.num_tokens)
        self.is_packed = self.num_documents > self.batch_size
        self._hash = hash(self.lengths)
        host = np.full(self.batch_size * self.num_tokens + 2, flat.sum(), np.int64)
        host[0], host[1] = len(flat), 0
        host[2 : len(flat) + 2] = flat.cumsum()
        # made while validating, it may serve training too
        with torch.inference_mode(False):
            self.host = torch.from_numpy(host)

    @classmethod
    def from_ids(cls, ids: Tensor) -> Documents:
        """From the number of each token's document: one begins where the id differs from that before.

        An id may come again, for another document. Ids on a GPU are waited for.

        Args:
            ids: `[B, N]`, integers.
        """
        rows = _on_host("ids", ids)
        return cls([_between(row[1:] != row[:-1]) for row in rows])

    @classmethod
    def from_positions(cls, position_ids: Tensor) -> Documents:
        """From positions that restart: a document begins where one is not that before + 1, as in transformers.

        Args:
            position_ids: `[B, N]`, integers. On a GPU they are waited for.
        """
        # small unsigned types would count from their end on to 0
        rows = _on_host("position_ids", position_ids).astype(np.int64)
        return cls([_between(row[1:] != row[:-1] + 1) for row in rows])

    @classmethod
    def from_cu_seqlens(cls, cu: Tensor | Sequence[int], num_tokens: int) -> Documents:
        """From the boundaries of documents, as varlen attention takes them.

        Args:
            cu: `[D + 1]`, 0 and where each document ends, counted through all sequences one behind the other. Repeated
                boundaries, as padding has them, are no documents. On a GPU they are waited for.
            num_tokens: N, tokens of each sequence. Each of its ends must be a boundary; tokens behind the last
                boundary are one document more.
        """
        ends = np.asarray(cu.detach().cpu() if isinstance(cu, Tensor) else cu)
        # compared, for differences of unsigned numbers are never negative
        falls = ends.ndim == 1 and (ends[1:] < ends[:-1]).any()
        if ends.ndim != 1 or ends.size < 2 or ends.dtype.kind not in "iu" or ends[0] != 0 or falls:
            raise ValueError(f"cu must be ascending integers [documents + 1] that begin with 0, got {shown(cu)}")
        if type(num_tokens) is not int or num_tokens < 1:
            raise ValueError(f"num_tokens must be an int of at least 1, got {shown(repr(num_tokens))}")
        total = -(-max(int(ends[-1]), 1) // num_tokens) * num_tokens
        cuts = np.unique(np.append(ends, total))
        borders = np.arange(0, total + 1, num_tokens)
        if missing := np.setdiff1d(borders, cuts).tolist():
            raise ValueError(
                f"a document in cu goes across token {missing[0]}, where a sequence of {num_tokens} tokens ends"
            )
        parts = np.split(np.diff(cuts), np.searchsorted(cuts, borders[1:-1]))
        return cls([part.tolist() for part in parts])

    @property
    def attended_length(self) -> float:
        """Sum of n^2 over all documents of n tokens, by the number of tokens: what dense attention costs a token."""
        return sum(n * n for n in chain.from_iterable(self.lengths)) / (self.batch_size * self.num_tokens)

    def drop_last(self) -> Documents:
        """The documents without the last token of every sequence: of the inputs, where targets are shifted by one."""
        if self.num_tokens < 2:
            raise ValueError("documents of sequences of 1 token have nothing left without the last one")
        return Documents([(*sequence[:-1], sequence[-1] - 1) for sequence in self.lengths])

    def position_ids(self, device: torch.device | str | None = None) -> Tensor:
        """`[B, N]` int64: the position of each token in its document."""
        lengths, starts = self._flat()
        positions = np.arange(starts[-1] + lengths[-1]) - np.repeat(starts, lengths)
        return self._on(positions, device)

    def document_ids(self, device: torch.device | str | None = None) -> Tensor:
        """`[B, N]` int64: the number of each token's document in its sequence, from 0."""
        lengths, _ = self._flat()
        numbers = np.concatenate([np.arange(len(sequence)) for sequence in self.lengths])
        return self._on(np.repeat(numbers, lengths), device)

    def _flat(self) -> tuple[np.ndarray, np.ndarray]:
        cuts = self.host.numpy()[1 : self.num_documents + 2]
        return np.diff(cuts), cuts[:-1]

    def _on(self, values: np.ndarray, device: torch.device | str | None) -> Tensor:
        on_host = torch.from_numpy(values).view(self.batch_size, self.num_tokens)
        if torch.device(device or "cpu").type == "cuda":
            # from pageable memory the host would wait for the copy
            return on_host.pin_memory().to(device, non_blocking=True)
        return on_host.to(device)

    def to(self, *args: Any, **kwargs: Any) -> Documents:
        """Itself: documents stay on the host."""
        return self

    def pin_memory(self, *args: Any) -> Documents:
        """Itself."""
        return self

    def __iter__(self) -> Iterator[None]:
        return iter(())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Documents) and self.lengths == other.lengths

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return f"Documents({shown([list(sequence) for sequence in self.lengths])})"

    def __reduce__(self) -> tuple[type[Documents], tuple[Any]]:
        # the lengths say it all, and are shorter
        return Documents, (self.lengths,)


def check_covers(documents: Documents, q: Tensor) -> None:
    """Make sure that `documents` are those of q `[B, H, N, D]`.

    Raises:
        TypeError: They are no `Documents`.
        ValueError: They are of other sequences.
    """
    if not isinstance(documents, Documents):
        raise TypeError(f"documents must be lightning_lighthouse.Documents or None, got {_got(documents)}")
    if documents.batch_size != q.shape[0] or documents.num_tokens != q.shape[2]:
        raise ValueError(
            f"documents cover {documents.batch_size} x {documents.num_tokens} tokens, q has {q.shape[0]} x "
            f"{q.shape[2]}; for targets shifted by one pass documents.drop_last()"
        )


def _listed(lengths: Any) -> Any:
    if isinstance(lengths, Sequence) and not isinstance(lengths, str):
        return lengths
    raise TypeError(
        f"documents must be a list of lengths for each sequence, as [[700, 324], [1024]], got {_got(lengths)}"
    )


def _checked(sequence: Any, row: int) -> tuple[int, ...]:
    """The lengths of one sequence that are not 0."""
    where = f"documents of sequence {row}"
    if not isinstance(sequence, Sequence) or isinstance(sequence, str):
        raise TypeError(f"{where} must be a list of lengths, as [700, 324], got {_got(sequence)}")
    found = []
    for length in sequence:
        if isinstance(length, (bool, np.bool_)) or not hasattr(length, "__index__") or isinstance(length, Tensor):
            raise TypeError(f"{where} must be ints, got {_got(length)}")
        if index(length) < 0:
            raise ValueError(f"{where} must have lengths of at least 0, got {length}")
        if length:
            found.append(index(length))
    return tuple(found)


def _got(value: Any) -> str:
    return f"{shown(repr(value).splitlines()[0])} ({type(value).__name__})"


def _on_host(name: str, values: Tensor) -> np.ndarray:
    if not isinstance(values, Tensor) or values.ndim != 2 or values.is_floating_point() or values.is_complex():
        shape = list(values.shape) if isinstance(values, Tensor) else ""
        raise ValueError(f"{name} must be integers [batch, tokens], got {type(values).__name__} {shape}".rstrip())
    if values.numel() == 0:
        raise ValueError(f"{name} must have at least one token, got {list(values.shape)}")
    host: np.ndarray = values.detach().cpu().numpy()
    return host


def _between(begins: np.ndarray) -> list[int]:
    """Lengths of the documents of one sequence, told of each token but the first whether one begins at it."""
    cuts = np.flatnonzero(begins) + 1
    lengths: list[int] = np.diff(cuts, prepend=0, append=len(begins) + 1).tolist()
    return lengths
