"""`Documents`: every way to say where documents lie says the same, and a wrong one is an error of one line."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lighthouse import Documents, LighthouseConfig, attention


@st.composite
def cut_sequences(draw):
    """Lengths of the documents of up to 3 sequences of one number of tokens."""
    num_tokens = draw(st.integers(1, 60))
    ends = draw(st.lists(st.sets(st.integers(1, num_tokens)), min_size=1, max_size=3))
    return [np.diff(sorted({0, num_tokens, *some})).tolist() for some in ends]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=cut_sequences())
def test_every_form_says_the_same(lengths):
    documents = Documents(lengths)
    flat = [n for sequence in lengths for n in sequence]
    ids, positions = documents.document_ids(), documents.position_ids()
    assert ids.tolist() == [[d for d, n in enumerate(row) for _ in range(n)] for row in lengths]
    assert positions.tolist() == [[i for n in row for i in range(n)] for row in lengths]
    cu = torch.tensor([0, *flat]).cumsum(0)
    for other in (
        Documents.from_ids(ids),
        Documents.from_positions(positions),
        # an id may come again
        Documents.from_ids(ids % 2),
        Documents.from_cu_seqlens(cu, documents.num_tokens),
        Documents.from_cu_seqlens([*cu.tolist(), cu[-1].item(), cu[-1].item()], documents.num_tokens),
        Documents([[0, *row, 0] for row in lengths]),
        Documents(tuple(tuple(np.int32(n) for n in row) for row in lengths)),
        pickle.loads(pickle.dumps(documents)),
    ):
        assert other == documents
        assert hash(other) == hash(documents)
        assert torch.equal(other.host, documents.host)
    assert documents.lengths == tuple(tuple(row) for row in lengths)
    assert documents.host[: len(flat) + 2].tolist() == [len(flat), *cu.tolist()]
    assert (documents.host[len(flat) + 1 :] == cu[-1]).all()


def test_numbers_of_a_batch():
    documents = Documents([[700, 324], [1024]])
    assert (documents.batch_size, documents.num_tokens, documents.num_documents) == (2, 1024, 3)
    assert documents.longest == 1024
    assert documents.is_packed
    assert not Documents([[5], [5]]).is_packed
    assert documents.attended_length == (700**2 + 324**2 + 1024**2) / 2048
    assert documents != Documents([[324, 700], [1024]])
    assert repr(documents) == "Documents([[700, 324], [1024]])"
    assert eval(repr(documents)) == documents
    assert len(repr(Documents([[1] * 5000]))) < 200
    assert attention.Documents is Documents


def test_targets_shifted_by_one():
    assert Documents([[3, 2], [4, 1]]).drop_last() == Documents([[3, 1], [4]])
    with pytest.raises(ValueError, match="nothing left"):
        Documents([[1]]).drop_last()


def test_positions_follow_the_rule_of_transformers():
    positions = torch.tensor([[0, 1, 2, 0, 1, 7, 8, 8]])
    assert Documents.from_positions(positions) == Documents([[3, 2, 2, 1]])


def test_tokens_behind_the_last_boundary_are_a_document():
    assert Documents.from_cu_seqlens(torch.tensor([0, 3, 7]), 10) == Documents([[3, 4, 3]])


def test_lightning_carries_documents_along():
    from lightning.fabric.utilities.apply_func import move_data_to_device
    from lightning.pytorch.utilities.data import extract_batch_size

    documents = Documents([[4, 4], [8]])
    for batch in (
        {"tokens": torch.zeros(2, 9), "documents": documents},
        {"documents": documents, "tokens": torch.zeros(2, 9)},
    ):
        moved = move_data_to_device(batch, torch.device("meta"))
        assert moved["documents"] is documents
        assert moved["tokens"].device.type == "meta"
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert extract_batch_size(batch) == 2
    assert documents.pin_memory() is documents


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: Documents([[3, 4], [8]]), ValueError, ["7 in sequence 0", "8 in sequence 1"]),
        (lambda: Documents([[3, -1]]), ValueError, ["sequence 0", "at least 0", "-1"]),
        (lambda: Documents([[3], [2.5]]), TypeError, ["sequence 1", "ints", "2.5"]),
        (lambda: Documents([[True]]), TypeError, ["ints", "True"]),
        (lambda: Documents([3, 4]), TypeError, ["sequence 0", "[700, 324]", "3"]),
        (lambda: Documents(torch.ones(2, 2)), TypeError, ["[[700, 324], [1024]]", "Tensor"]),
        (lambda: Documents("ab"), TypeError, ["[[700, 324], [1024]]", "'ab'"]),
        (lambda: Documents([]), ValueError, ["at least one token", "[]"]),
        (lambda: Documents([[], []]), ValueError, ["at least one token"]),
        (lambda: Documents.from_ids(torch.zeros(3, dtype=torch.int64)), ValueError, ["ids", "[batch, tokens]", "[3]"]),
        (lambda: Documents.from_ids(torch.zeros(3, 2)), ValueError, ["ids", "integers", "[3, 2]"]),
        (lambda: Documents.from_positions([[0, 1]]), ValueError, ["position_ids", "list"]),
        (lambda: Documents.from_cu_seqlens(torch.tensor([0, 5, 3]), 5), ValueError, ["cu", "ascending"]),
        (lambda: Documents.from_cu_seqlens(np.uint32([0, 5, 3, 8]), 8), ValueError, ["cu", "ascending"]),
        (lambda: Documents.from_cu_seqlens([1, 5], 5), ValueError, ["begin with 0"]),
        (lambda: Documents.from_cu_seqlens([0, 3, 8], 4), ValueError, ["across token 4"]),
        (lambda: Documents.from_cu_seqlens([0, 3], 0), ValueError, ["num_tokens", "at least 1"]),
    ],
)
def test_mistakes_are_told_in_one_line(make, error, words):
    with pytest.raises(error) as caught:
        make()
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(("num_tokens", "expected"), [(100, 16), (4_096, 16), (98_304, 384), (1_048_576, 4_096)])
def test_default_capacity(num_tokens, expected):
    assert LighthouseConfig().resolve_max_documents(num_tokens) == expected
    assert LighthouseConfig(max_documents=7).resolve_max_documents(num_tokens) == 7
