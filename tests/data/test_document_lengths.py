"""The lengths of documents in prepared sequences are those of the batches that a training gets."""

from __future__ import annotations

import json

import numpy as np
import pytest

from lightning_lighthouse import LighthouseRecipe
from lightning_lighthouse.data.document_lengths import sampled_documents
from lightning_lighthouse.data.preparing.prepare import prepare

SEQ_LEN = 127


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(42)
    text = ("a" * int(rng.integers(1, 300)) for _ in range(97))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": document}) + "\n" for document in text))
    prepare(str(folder / "prepared"), seq_len=SEQ_LEN, source=str(folder / "text.jsonl"), validation_fraction=0.2)
    return folder / "prepared"


def test_all_sequences_of_a_small_split_are_looked_at(prepared):
    data = LighthouseRecipe(source=str(prepared), seq_len=SEQ_LEN, num_workers=0, document_ids=True)
    data.setup("fit")
    expected = [batch["documents"].drop_last() for batch in data.val_dataloader()]
    found = sampled_documents(prepared, "validation")
    assert [[n for n in row if n] for row in found] == [list(documents.lengths[0]) for documents in expected]


def test_a_sample_is_spread_over_a_split(prepared):
    whole = sampled_documents(prepared)
    assert sampled_documents(prepared, most=2) == [whole[0], whole[-1]]
    assert all(sum(lengths) == SEQ_LEN for lengths in whole)
