"""Text for the tests of the data, and what a prepared folder holds of it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_lighthouse.data.manifest import Manifest

END = 256


def write_jsonl(path: Path, texts: Iterable[str], field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return path


def optimized(folder: Path, items: list[list[int]], dtype: Any = torch.int32) -> None:
    """A litdata folder of tokens, an item for each list, some 2,000 tokens in a chunk."""
    from litdata.streaming.item_loader import TokensLoader
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_size=2000, item_loader=TokensLoader())
    for i, item in enumerate(items):
        writer.add_item(i, torch.tensor(item, dtype=dtype))
    writer.done()
    (folder / "0.index.json").rename(folder / "index.json")


def stored_sequences(folder: Path, split: str = "train") -> np.ndarray:
    """All sequences of a split in stored order, read by litdata: `[sequences, seq_len + 1]`."""
    from litdata import StreamingDataset, TokensLoader

    block = Manifest.load(folder).settings.seq_len + 1
    dataset = StreamingDataset(str(folder / split), item_loader=TokensLoader(block_size=block))
    return np.stack([dataset[i] for i in range(len(dataset))])


def content(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def texts_of(count: int, seed: int = 42) -> list[str]:
    """Documents of a length between 1 and 700 characters, some of two bytes."""
    rng = np.random.default_rng(seed)
    words = ["pool", "score", "select", "gather", "attend", "scatter", "M\u00fcnchen", "\n", "def f(x):"]
    return [" ".join(rng.choice(words, size=rng.integers(1, 90))) for _ in range(count)]


def bytes_of(sequences: np.ndarray) -> bytes:
    return b"".join(sequences.ravel().astype(np.uint16).tobytes().split(np.uint16(END).tobytes())).replace(b"\0", b"")
