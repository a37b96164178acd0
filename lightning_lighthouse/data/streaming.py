"""A prepared folder as litdata's data set and loader.

Which sequence comes when is litdata's business: it shuffles, shares the sequences out among ranks and workers, and
knows where it stopped. What a sequence holds is checked here. Imported only where a loader is made: it imports litdata.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litdata import StreamingDataLoader, StreamingDataset, TokensLoader
from litdata.streaming.sampler import ChunkedIndex

from lightning_lighthouse.data.integrity import Manifest


class DamagedDataError(ValueError):
    """A stored token cannot be one. One line, also when a worker process raised it."""

    def __init__(self, message: str) -> None:
        # DataLoader puts the worker's traceback before the message
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class SequenceDataset(StreamingDataset):
    """Sequences of one split as dicts: `tokens` `[seq_len + 1]` int64, and their documents on request.

    Args:
        folder: The split's folder.
        manifest: Of the prepared folder.
        shuffle: Whether the order changes from epoch to epoch.
        seed: Of that order.
        document_ids: Whether to add `document_ids` and `positions`, like `tokens`.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, shuffle: bool, seed: int, document_ids: bool) -> None:
        super().__init__(
            str(folder.resolve()),
            item_loader=TokensLoader(block_size=manifest.settings.seq_len + 1),
            shuffle=shuffle,
            drop_last=True,
            seed=seed,
        )
        # on network file systems litdata would shuffle within a small window only: one order everywhere
        profile = getattr(self, "posix_fast", None)
        if profile is not None:
            self.posix_fast = replace(profile, kind="posix")
        self._folder = folder
        self._vocab_size = manifest.vocab_size
        self._end_of_document = manifest.end_of_document
        self._document_ids = document_ids

    def __getitem__(self, index: Any) -> Any:
        """One sequence; ValueError, naming the chunk, if a token is no token of the vocabulary."""
        stored = super().__getitem__(index)
        if stored.max() >= self._vocab_size:
            chunk = f"chunk-0-{index.chunk_index}.bin" if isinstance(index, ChunkedIndex) else "its chunks"
            raise DamagedDataError(
                f"{self._folder / chunk} holds token {stored.max()}, the vocabulary has {self._vocab_size}: the file "
                f"is damaged (lighthouse verify {self._folder.parent} names every bad file)"
            )
        sequence = {"tokens": torch.from_numpy(stored.astype(np.int64))}
        if self._document_ids:
            document_ids, positions = locate_documents(stored, self._end_of_document)
            sequence |= {"document_ids": torch.from_numpy(document_ids), "positions": torch.from_numpy(positions)}
        return sequence


def locate_documents(tokens: np.ndarray, end_of_document: int) -> tuple[np.ndarray, np.ndarray]:
    """Where documents lie in a sequence. An end-of-document token belongs to the document that it ends.

    Args:
        tokens: `[n]`, of any integer type.
        end_of_document: The id behind each document.

    Returns:
        Document of each token, counted from 0, and position within it, or within what the sequence holds of it:
        `[n]` int64 each.
    """
    starts = np.concatenate(([0], np.flatnonzero(tokens[:-1] == end_of_document) + 1))
    lengths = np.diff(starts, append=tokens.size)
    return np.repeat(np.arange(starts.size), lengths), np.arange(tokens.size) - np.repeat(starts, lengths)


class SequenceLoader(StreamingDataLoader):
    """litdata's loader, resumed so that the epochs after the resumed one are those of an unbroken run.

    Args:
        dataset: What to load.
        limit: Batches of an epoch (int) or share of them (float), as Trainer's `limit_train_batches`.
        options: Those of litdata's loader.
    """

    def __init__(self, dataset: SequenceDataset, *, limit: int | float = 1.0, **options: Any) -> None:
        super().__init__(dataset, **options)
        self._limit = limit

    def state_dict(self) -> dict[str, Any]:
        """litdata's position, and whether it is the end of the epoch."""
        batches = self._num_samples_yielded_streaming // self.batch_size
        last = int(len(self) * self._limit) if isinstance(self._limit, float) else min(len(self), self._limit)
        return {**super().state_dict(), "epoch_is_over": batches >= last}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Continue behind the last batch of `obj`; the recipe has compared the fingerprints, the path may differ."""
        dataset = {**obj["dataset"], "input_dir_path": self.dataset.input_dir.path}
        # under other ranks litdata rounds the position down to a global batch, which would repeat sequences
        stride = self.dataset.distributed_env.world_size * self.batch_size
        dataset["sample_in_epoch"] = -(-dataset["sample_in_epoch"] // stride) * stride
        super().load_state_dict({**obj, "dataset": dataset})
        # litdata tells the end of an epoch by the number of its sequences, which a limit or other ranks can change
        if obj["epoch_is_over"]:
            self.restore = False

    def __iter__(self) -> Iterator[Any]:
        """Batches of the rest of a resumed epoch, or of a whole one."""
        for batch in super().__iter__():
            # litdata forgets a loaded position when it sees the end of the epoch; Trainer counts batches and never asks
            # for the end, so the next epoch would repeat the rest of this one
            self.restore = False
            yield batch
