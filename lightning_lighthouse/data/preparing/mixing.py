"""Several sources by weight, and long and short sequences by share: one training split in exact proportions.

Sequences are taken from whichever kind is furthest behind its share, so every stretch of the result has the shares that
were asked for. No sequence comes twice: the split ends where the first kind runs out, and what the others still have is
left out. Sources are read only as far as they are needed.
"""

from __future__ import annotations

import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from lightning_lighthouse.data.preparing.packing import Packed

# Sequences that wait in memory for their turn; what is more waits on disk
WAITING_BYTES = 64 * 2**20

# What a source gives: the sequences completed by its next document; None at its end
Reader = Callable[[], list[Packed] | None]


class MixedSource:
    """The sequences of one source, of each kind in the order of its documents.

    Args:
        read: The source.
        folder: Where sequences wait that do not fit in memory.
        by_length: Whether long and short sequences are asked for apart.
    """

    def __init__(self, read: Reader, folder: Path, by_length: bool) -> None:
        self.ended = False
        self._read = read
        self._by_length = by_length
        self._waiting = {is_long: Queue(folder) for is_long in (False, True)}

    @property
    def waiting(self) -> int:
        """Sequences that were read and not taken."""
        return sum(len(queue) for queue in self._waiting.values())

    def take(self, is_long: bool) -> Packed | None:
        """The next sequence of a kind, as `[1, block]`; None if there is no other."""
        queue = self._waiting[is_long]
        while not len(queue) and not self.ended:
            read = self._read()
            self.ended = read is None
            for packed in read or []:
                self._waiting[packed.is_long and self._by_length].push(packed)
        return queue.pop() if len(queue) else None


class Share(NamedTuple):
    """A kind of sequences in a mix.

    Args:
        source: Number of the source.
        is_long: Whether long sequences are meant, where long and short ones are told apart.
        fraction: Of all sequences.
    """

    source: int
    is_long: bool
    fraction: float


def shares_of(weights: Sequence[float], long_fraction: float | None) -> list[Share]:
    """The kinds of sequences that a mix is made of.

    Args:
        weights: Of each source.
        long_fraction: Of the long sequences within each source; None takes them as they come.
    """
    kinds = {False: 1.0} if long_fraction is None else {False: 1 - long_fraction, True: long_fraction}
    return [
        Share(number, is_long, weight / sum(weights) * fraction)
        for number, weight in enumerate(weights)
        for is_long, fraction in kinds.items()
        if fraction
    ]


def mix(sources: Sequence[MixedSource], shares: Sequence[Share]) -> Iterator[tuple[Share, Packed]]:
    """Take sequences in the proportions asked for, until one is needed that is not there.

    Args:
        sources: Where they come from.
        shares: From `shares_of`.

    Returns:
        One sequence after the other, each as `[1, block]`, with the kind that it was taken for.

    Raises:
        LookupError: The kind that is needed first of all has no sequence; its argument is the share.
    """
    taken = [0] * len(shares)
    while True:
        due = sum(taken) + 1
        # the first of those that are equally far behind
        behind = max(range(len(shares)), key=lambda i: (shares[i].fraction * due - taken[i], -i))
        packed = sources[shares[behind].source].take(shares[behind].is_long)
        if packed is None and not taken[behind]:
            raise LookupError(shares[behind])
        if packed is None:
            return
        taken[behind] += 1
        yield shares[behind], packed


class Queue:
    """Sequences, first in, first out; beyond `WAITING_BYTES` in an unnamed file.

    Args:
        folder: Where that file goes.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._kinds: deque[bool] = deque()
        self._memory: deque[np.ndarray] = deque()
        self._file: IO[bytes] | None = None
        self._read = 0

    def __len__(self) -> int:
        return len(self._kinds)

    def push(self, packed: Packed) -> None:
        """Append sequences."""
        for sequence in packed.sequences:
            # once some wait in the file, all that come later do
            if self._file is None and (len(self._memory) + 1) * sequence.nbytes <= WAITING_BYTES:
                self._memory.append(sequence)
            else:
                self._push_file(sequence)
            self._kinds.append(packed.is_long)

    def pop(self) -> Packed:
        """The first sequence, as `[1, block]`; there is one."""
        is_long = self._kinds.popleft()
        if self._memory:
            return Packed(is_long, self._memory.popleft()[None])
        assert self._file is not None
        self._file.seek(self._read)
        sequence = np.frombuffer(self._file.read(self._size), dtype=self._dtype)
        self._read += self._size
        if not self._kinds:
            self._file.close()
            self._file, self._read = None, 0
        return Packed(is_long, sequence[None])

    def _push_file(self, sequence: np.ndarray) -> None:
        if self._file is None:
            # it has no name in the folder, so nothing is left of it, also after a kill
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - open as long as it is needed
            self._size, self._dtype = sequence.nbytes, sequence.dtype
        self._file.seek(0, os.SEEK_END)
        self._file.write(sequence.tobytes())
