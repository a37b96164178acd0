"""Packers: every token once, no sequence incomplete, long documents whole; whatever the documents."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from texts import stored_sequences

from lightning_lighthouse import LighthouseRecipe
from lightning_lighthouse.data.manifest import Manifest
from lightning_lighthouse.data.preparing import packing
from lightning_lighthouse.data.preparing.packing import Packed, WholePacker, make_packer
from lightning_lighthouse.data.preparing.prepare import prepare

# Tokens are numbers that occur once, so that each can be followed
LENGTHS = st.lists(st.integers(1, 40) | st.integers(1, 4), min_size=1, max_size=60)


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    ends = np.cumsum(lengths)
    return [np.arange(end - length, end, dtype=np.uint32) for end, length in zip(ends, lengths, strict=True)]


def pack(kind: str, documents: list[np.ndarray], block: int) -> tuple[list[tuple[bool, list[int]]], packing.Packer]:
    packer = make_packer(kind, block, np.uint32)
    packed = [sequences for document in documents for sequences in packer.add(document)] + packer.close()
    return [(is_long, row.tolist()) for is_long, rows in packed for row in rows], packer


@pytest.mark.parametrize("kind", ["pack", "whole"])
@given(lengths=LENGTHS, block=st.integers(2, 23))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_token_comes_once_and_no_sequence_is_incomplete(kind: str, lengths: list[int], block: int) -> None:
    documents = documents_of(lengths)
    sequences, packer = pack(kind, documents, block)
    assert all(len(row) == block for _, row in sequences)
    tokens = [token for _, row in sequences for token in row]
    assert len(set(tokens)) == len(tokens)
    assert packer.waiting_tokens == sum(lengths) - len(tokens) < block
    place = {token: number for number, (_, row) in enumerate(sequences) for token in row}
    # what is dropped is a place as well
    places = [{place.get(token) for token in document.tolist()} for document in documents]
    fits = [len(document) <= block for document in documents]
    assert packer.cut_documents == sum(fit and len(where) > 1 for fit, where in zip(fits, places, strict=True))


@given(lengths=LENGTHS, block=st.integers(2, 23))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_a_long_document_opens_a_sequence(lengths: list[int], block: int) -> None:
    documents = documents_of(lengths)
    sequences, _ = pack("whole", documents, block)
    first = {row[0]: (is_long, row) for is_long, row in sequences}
    for document in map(np.ndarray.tolist, documents):
        pieces = [document[start : start + block] for start in range(0, len(document), block)]
        for piece in pieces:
            opens = first.get(piece[0], (False, []))
            if len(piece) == block:
                assert opens == (True, piece), "a document longer than a sequence is cut by its own length only"
            if opens[0]:
                assert len(piece) > block // 2
                assert opens[1][: len(piece)] == piece
    assert sum(is_long for is_long, _ in sequences) <= sum(length // (block // 2 + 1) for length in lengths)


def test_with_enough_short_text_no_long_document_is_cut() -> None:
    rng = np.random.default_rng(42)
    lengths = [int(rng.integers(51, 101)) if i % 2 else int(rng.integers(1, 50)) for i in range(997)]
    lengths += [7] * 997
    documents = documents_of(lengths)
    cut = {}
    for kind in ("pack", "whole"):
        sequences, _ = pack(kind, documents, 100)
        place = {token: number for number, (_, row) in enumerate(sequences) for token in row}
        long = [document.tolist() for document in documents if 50 < len(document) <= 100]
        cut[kind] = sum(len({place.get(token) for token in document}) > 1 for document in long)
    assert cut["whole"] == 0
    # the same documents, packed as one stream
    assert cut["pack"] > 300


def test_little_waits_in_memory() -> None:
    packer = WholePacker(100, np.uint32)
    waiting = 0
    for document in documents_of([60] * 501):
        packer.add(document)
        waiting = max(waiting, packer.waiting_tokens)
    # all are long and no gap can be filled: some are cut
    assert waiting < (packing.HELD_DOCUMENTS + 2) * 100
    assert packer.cut_documents > 0


def test_sequences_hold_the_types_that_are_stored() -> None:
    for kind in ("pack", "whole"):
        packer = make_packer(kind, 5, np.uint16)
        packed = [p for n in (3, 9, 4, 7) for p in packer.add(np.ones(n, dtype=np.uint16))] + packer.close()
        assert {sequences.dtype for _, sequences in packed} == {np.dtype(np.uint16)}
        assert all(isinstance(sequences, Packed) and sequences.sequences.shape[1] == 5 for sequences in packed)


def test_whole_documents_in_a_prepared_folder(tmp_path: Path) -> None:
    # 97 documents of 200 letters, longer than half of a sequence, and 2,000 short ones
    long = [chr(ord("a") + i % 26) * 200 + f"{i:03d}" for i in range(97)]
    short = [f"short {i:04d}" for i in range(2000)]
    texts = [text for i in range(2000) for text in ([long[i // 20]] if not i % 20 and i < 1940 else []) + [short[i]]]
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = {}
    for documents in ("pack", "whole"):
        folder = tmp_path / documents
        prepare(str(folder), seq_len=299, source=str(source), validation_fraction=0, documents=documents)
        stored = [bytes(row[row < 256].astype(np.uint8)).decode() for row in stored_sequences(folder)]
        found[documents] = sum(any(text in row for row in stored) for text in long)
        counts = Manifest.load(folder).train
        assert counts.tokens == counts.sequences * 300 + counts.dropped_tokens
        assert counts.long_sequences == (97 if documents == "whole" else 0)
    assert found["whole"] == 97 > found["pack"]
    starts = Counter(row[0] for row in stored_sequences(tmp_path / "whole").tolist())
    # each opens a sequence
    assert sum(count for token, count in starts.items() if chr(token) in "abcdefghijklmnopqrtuvwxyz") >= 90


def test_document_ids_hold_for_whole_documents(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    texts = ["x" * int(rng.integers(1, 300)) for _ in range(101)]
    source = tmp_path / "text.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = LighthouseRecipe(
        99, source=str(source), output_dir=str(tmp_path / "out"), documents="whole", document_ids=True, num_workers=0
    )
    data.prepare_data()
    data.setup("fit")
    for batch in data.train_dataloader():
        tokens, ids = batch["tokens"][0].tolist(), batch["document_ids"][0].tolist()
        # the number grows behind each end, and nowhere else
        assert [b - a for a, b in pairwise(ids)] == [int(token == 256) for token in tokens[:-1]]
