"""How long the documents are that sequences of a prepared folder hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lightning_lighthouse.data.manifest import Manifest
from lightning_lighthouse.data.preparing.splits import TRAIN

# Sequences that are looked at: their mean length is then known to some percent
SAMPLE = 200


def sampled_documents(folder: Path, split: str = TRAIN, most: int = SAMPLE) -> list[list[int]]:
    """The tokens of each document in sequences spread evenly over a split, as a model reads them.

    Args:
        folder: Prepared.
        split: Of it.
        most: Sequences to look at.

    Returns:
        For each sequence its documents, `seq_len` tokens together.

    Raises:
        FileNotFoundError: The folder is not prepared.
        ValueError: The data is damaged.
    """
    # it imports litdata, which takes seconds
    from lightning_lighthouse.data.loading import UNSIGNED, SequenceDataset, locate_documents

    manifest = Manifest.load(folder)
    share = {"num_replicas": 1, "rank": 0}
    dataset = SequenceDataset(folder / split, manifest, shuffle=False, seed=0, share=share)
    count = min(most, len(dataset))
    sampled = []
    for number in np.unique(np.linspace(0, len(dataset) - 1, count).round().astype(int)).tolist():
        stored = dataset[number]
        # the last token is a target alone
        tokens = stored.numpy().view(UNSIGNED[stored.dtype])[:-1]
        places = np.empty((2, tokens.size), np.int64)
        sampled.append(locate_documents(tokens, manifest.end_of_document, *places))
    return sampled
