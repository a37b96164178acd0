"""Documents from a litdata folder that holds tokens, as `litdata.optimize` with a `TokensLoader` writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_lighthouse.data.manifest import INDEX, MANIFEST
from lightning_lighthouse.data.settings import BYTES
from lightning_lighthouse.data.tokenizers import Tokenizer, token_dtype


class TokenDocument(NamedTuple):
    """One document.

    Args:
        tokens: `[n]`, the end-of-document token last, in the type that is stored.
        bytes_read: Bytes of the file that it took: for the progress bar.
    """

    tokens: np.ndarray
    bytes_read: int


def is_token_folder(source: Path) -> bool:
    """Whether litdata wrote that folder."""
    if not (source / INDEX).is_file():
        return False
    try:
        content = json.loads((source / INDEX).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source / INDEX} is cut short or altered: {error}") from None
    # a folder of text may have an index.json of its own
    return isinstance(content, dict) and {"chunks", "config"} <= set(content)


def token_files(folder: Path) -> list[Path]:
    """The chunks of a litdata folder, in order.

    Raises:
        FileNotFoundError: One is missing.
        ValueError: The folder holds no plain tokens.
    """
    if (folder.parent / MANIFEST).is_file():
        raise ValueError(f"source {folder} is part of the prepared folder {folder.parent}; give that one")
    files = [folder / name for name in _read_index(folder)[1]]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is missing, {folder / INDEX} names it")
    return files


def read_token_documents(folder: Path, tokenizer: Tokenizer) -> Iterator[TokenDocument]:
    """Walk through the documents of a litdata folder.

    An item of the folder is a document, or several where end-of-document tokens stand inside. The token is added to
    a document that lacks it.

    Args:
        folder: From `is_token_folder`.
        tokenizer: What made the tokens.

    Raises:
        ValueError: A chunk is damaged, or holds a token that the tokenizer has not; the message names it.
    """
    stored, _ = _read_index(folder)
    dtype, end = token_dtype(tokenizer.vocab_size), tokenizer.end_of_document
    for path in token_files(folder):
        for item in _items(path, stored):
            if item.size and (item.min() < 0 or item.max() >= tokenizer.vocab_size):
                worst = item.min() if item.min() < 0 else item.max()
                raise ValueError(
                    f"{path} holds token {worst}, the tokenizer has {tokenizer.vocab_size}: set tokenizer to the one "
                    f"that made the tokens ({BYTES!r}, or the path of a tokenizer.json)"
                )
            tokens = item.astype(dtype)
            if tokens.size and tokens[-1] != end:
                tokens = np.append(tokens, np.array([end], dtype=dtype))
            for document in np.split(tokens, np.flatnonzero(tokens == end)[:-1] + 1):
                # an end alone is the document without text that is left out elsewhere
                yield TokenDocument(document[: 0 if document.size == 1 else None], document.size * stored.itemsize)


def _items(path: Path, stored: np.dtype[Any]) -> Iterator[np.ndarray]:
    """The items of a chunk: their number, where each begins and the last ends, 4 bytes each, and then the items."""
    content = np.memmap(path, mode="r", dtype=np.uint8) if path.stat().st_size else np.empty(0, np.uint8)
    count = int(content[:4].view("<u4")[0]) if content.size >= 4 else 0
    head = 4 * (count + 2)
    offsets = content[4:head].view("<u4").astype(np.int64) if content.size >= head else np.zeros(1, np.int64)
    if not count or offsets[0] != head or offsets[-1] != content.size or (np.diff(offsets) % stored.itemsize).any():
        raise ValueError(f"{path} is damaged or cut short: its table of contents does not fit its {content.size} bytes")
    for begin, stop in pairwise(offsets.tolist()):
        yield np.frombuffer(content[begin:stop], dtype=stored)


def _read_index(folder: Path) -> tuple[np.dtype[Any], list[str]]:
    """The type of the stored tokens, and the names of the chunks."""
    index = json.loads((folder / INDEX).read_bytes())
    try:
        names = [Path(chunk["filename"]).name for chunk in index["chunks"]]
        return _numpy_type(folder, index["config"]), names
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder / INDEX} is cut short or altered: litdata wrote no such chunks or config") from None


def _numpy_type(folder: Path, config: dict[str, Any]) -> np.dtype[Any]:
    """The type of the stored tokens."""
    from litdata.constants import _NUMPY_DTYPES_MAPPING, _TORCH_DTYPES_MAPPING

    formats = config.get("data_format") or []
    name, _, number = str(formats[0] if len(formats) == 1 else formats).partition(":")
    if name not in ("no_header_tensor", "no_header_numpy") or config.get("compression") or config.get("encryption"):
        kind = "compressed or encrypted data" if name.startswith("no_header") else f"data of the format {formats}"
        raise ValueError(f"source {folder} is a litdata folder of {kind}, not of plain tokens; give the text instead")
    if not number.isdecimal():
        raise KeyError(number)
    types = _NUMPY_DTYPES_MAPPING if name == "no_header_numpy" else _TORCH_DTYPES_MAPPING
    stored = str(types[int(number)]).removeprefix("torch.")
    # NumPy does not know all of torch's
    if not re.fullmatch(r"u?int\d+", stored):
        raise ValueError(f"source {folder} is a litdata folder of {stored}, not of tokens; give the text instead")
    return np.dtype(stored)
