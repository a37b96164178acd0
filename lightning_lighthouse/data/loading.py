"""A prepared folder as litdata's data set and loader.

Which sequence comes when is litdata's business: it shuffles, shares the sequences out among ranks and workers, and
knows where it stopped. What a sequence holds is checked here. Imported only where a loader is made: it imports litdata.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litdata import StreamingDataLoader, StreamingDataset, TokensLoader
from litdata.streaming.sampler import ChunkedIndex
from litdata.utilities.env import _DistributedEnv
from torch.utils.data import SequentialSampler

from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.data.manifest import Manifest
from lightning_lighthouse.data.position import Topology, is_shared_anew, move_position
from lightning_lighthouse.data.workers import shield_from_group, shield_workers


class DamagedDataError(ValueError):
    """A stored token cannot be one. One line, also when a worker process raised it."""

    def __init__(self, message: str) -> None:
        # DataLoader puts the worker's traceback before the message
        super().__init__(message.rpartition(f"{type(self).__name__}: ")[2].strip())


class SequenceDataset(StreamingDataset):
    """Sequences of one split as they are stored: `[seq_len + 1]`, the bits of a narrow unsigned type.

    Args:
        folder: The split's folder.
        manifest: Of the prepared folder.
        shuffle: Whether the order changes from epoch to epoch.
        seed: Of that order.
        share: As Trainer's `distributed_sampler_kwargs`: which of how many shares of the sequences this process reads;
            None: that of its rank among all processes.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, *, shuffle: bool, seed: int, share: Mapping[str, int] | None = None
    ) -> None:
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
        if share is not None:
            found = _DistributedEnv.detect()
            # an order of nodes there is only where every process reads a share of its own
            num_nodes = found.num_nodes if share["num_replicas"] == found.world_size else 1
            self.distributed_env = _DistributedEnv(share["num_replicas"], share["rank"], num_nodes)
        self._folder = folder
        self._vocab_size = manifest.vocab_size

    def __getitem__(self, index: Any) -> Any:
        """One sequence; ValueError, naming the chunk, if a token is no token of the vocabulary."""
        stored = super().__getitem__(index)
        if stored.max() >= self._vocab_size:
            chunk = f"chunk-0-{index.chunk_index}.bin" if isinstance(index, ChunkedIndex) else "its chunks"
            raise DamagedDataError(
                f"{self._folder / chunk} holds token {stored.max()}, the vocabulary has {self._vocab_size}: the file "
                f"is damaged (lighthouse verify {self._folder.parent} names every bad file)"
            )
        # torch has no stack for unsigned types; a copy, for the chunk may be unmapped
        return torch.from_numpy(stored.view(SIGNED[stored.dtype.itemsize]).copy())


# Stands for the unsigned type of as many bytes
SIGNED = {2: np.int16, 4: np.int32}
UNSIGNED = {torch.int16: np.uint16, torch.int32: np.uint32}


def locate_documents(
    tokens: np.ndarray, end_of_document: int, document_ids: np.ndarray, positions: np.ndarray
) -> list[int]:
    """Where documents lie in a sequence. An end-of-document token belongs to the document that it ends.

    Args:
        tokens: `[n]`, of any integer type.
        end_of_document: The id behind each document.
        document_ids: `[n]`, filled with the document of each token, counted from 0.
        positions: `[n]`, filled with the position within that document, or within what the sequence holds of it.

    Returns:
        The tokens of each document.
    """
    starts = np.concatenate(([0], np.flatnonzero(tokens[:-1] == end_of_document) + 1))
    lengths = np.diff(starts, append=tokens.size)
    document_ids[:] = np.repeat(np.arange(starts.size), lengths)
    # a running sum of ones that falls back to 0 at each start
    positions[:] = 1
    positions[starts] -= np.concatenate(([1], lengths[:-1]))
    np.cumsum(positions, out=positions)
    listed: list[int] = lengths.tolist()
    return listed


class SequenceLoader(StreamingDataLoader):
    """litdata's loader, resumed so that the epochs after the resumed one are those of an unbroken run.

    Batches are dicts: `tokens` `[batch_size, seq_len + 1]` int64, and on request `document_ids` and `positions` alike,
    and `documents`.
    Workers hand over what is stored: int64 would be four times the bytes, and with documents twelve times.

    Args:
        dataset: What to load.
        end_of_document: The id behind each document, where documents are wanted; else None.
        limit: Batches of an epoch (int) or share of them (float), as Trainer's `limit_train_batches`.
        epochs_done: Epochs that other loaders of this data have shown.
        options: Those of litdata's loader.
    """

    def __init__(
        self,
        dataset: SequenceDataset,
        *,
        end_of_document: int | None,
        limit: int | float = 1.0,
        epochs_done: int = 0,
        **options: Any,
    ) -> None:
        # the first shields workers that are forked from their beginning on, the other those that are not
        shield_workers(self)
        super().__init__(dataset, worker_init_fn=shield_from_group, **options)
        self.current_epoch = epochs_done
        if not dataset.shuffle:
            # by its type Lightning knows a loader that does not shuffle, which it would make anew for overfit_batches;
            # torch asks the sampler of batches, and forbids to set this one
            self.__dict__["sampler"] = SequentialSampler(dataset)
        self._end_of_document = end_of_document
        self._limit = limit
        # batches of this epoch that came before a resume with another global batch, for who counts batches
        self.batches_before: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """litdata's position, and whether it is the end of the epoch."""
        state = super().state_dict()
        # of all ranks, and also of what came before a resume
        batches = state["dataset"]["sample_in_epoch"] // self._topology.stride
        return {**state, "epoch_is_over": batches >= self._last_batch}

    def load_state_dict(self, obj: dict[str, Any]) -> None:
        """Continue behind the last batch of `obj`; the recipe has compared the fingerprints, the path may differ."""
        position = move_position(obj["dataset"], self._topology, self.dataset.input_dir.path)
        # litdata would keep 1 there, and a run resumed twice within a later epoch get the order of the first
        position["current_epoch"] = self.dataset.current_epoch = obj["current_epoch"]
        # litdata compares with all processes, of which several may read the same
        as_all_processes = {**position, "world_size": _DistributedEnv.detect().world_size}
        super().load_state_dict({**obj, "dataset": as_all_processes})
        self.dataset.load_state_dict(position)
        if is_shared_anew(position):
            self.dataset._elastic_drop_first = position["sample_in_epoch"]
        is_over = obj["epoch_is_over"]
        if obj["dataset"]["world_size"] * obj["dataset"]["batch_size"] != self._topology.stride:
            self.batches_before = position["sample_in_epoch"] // self._topology.stride
            is_over = is_over or self.batches_before >= self._last_batch
            if is_over:
                self.batches_before = self._last_batch
        # litdata tells the end of an epoch by the number of its sequences, which a limit or other ranks can change
        if is_over:
            self.restore = False

    @property
    def _last_batch(self) -> int:
        """Batches of an epoch."""
        return int(len(self) * self._limit) if isinstance(self._limit, float) else min(len(self), self._limit)

    @property
    def _topology(self) -> Topology:
        return Topology(self.dataset.distributed_env.world_size, max(1, self.num_workers), self.batch_size)

    def __iter__(self) -> Iterator[Any]:
        """Batches of the rest of a resumed epoch, or of a whole one."""
        for batch in super().__iter__():
            # litdata forgets a loaded position when it sees the end of the epoch; Trainer counts batches and never asks
            # for the end, so the next epoch would repeat the rest of this one
            self.restore = False
            yield widen(batch, self._end_of_document)


def widen(stored: torch.Tensor, end_of_document: int | None) -> dict[str, torch.Tensor | Documents]:
    """Stored sequences as a model takes them.

    Args:
        stored: `[batch_size, n]`, from `SequenceDataset`.
        end_of_document: Where documents are wanted; else None.

    Returns:
        `tokens`, and on request `document_ids` and `positions`: `[batch_size, n]` int64 each, in pinned memory where
        there is a GPU; then `documents` too, of the same n tokens.
    """
    names = ("tokens",) if end_of_document is None else ("tokens", "document_ids", "positions")
    pinned = torch.cuda.is_available()
    batch = {name: torch.empty(stored.shape, dtype=torch.int64, pin_memory=pinned) for name in names}
    rows = stored.numpy().view(UNSIGNED[stored.dtype])
    np.copyto(batch["tokens"].numpy(), rows)
    if end_of_document is None:
        return {**batch}
    document_ids, positions = batch["document_ids"].numpy(), batch["positions"].numpy()
    lengths = [locate_documents(row, end_of_document, document_ids[i], positions[i]) for i, row in enumerate(rows)]
    return {**batch, "documents": Documents(lengths)}
