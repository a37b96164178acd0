"""Every form in which a batch can say where its documents lie gives the same documents."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import make_dataclass
from types import SimpleNamespace

import pytest
import torch

from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.routing.contradictions import contradictions
from lightning_lighthouse.routing.given_documents import read_documents

LENGTHS = [[40, 57], [1, 13, 83]]
SAME = [[40, 57], [40, 57]]
PACKED = Documents(LENGTHS)
TOKENS = torch.zeros(2, 97, dtype=torch.long)
IDS, POSITIONS = PACKED.document_ids("cpu"), PACKED.position_ids("cpu")

FORMS = {
    "documents": {"documents": PACKED},
    "documents themselves": PACKED,
    "ids": {"tokens": TOKENS, "document_ids": IDS},
    "ids themselves": IDS,
    "ids that come again": {"document_ids": IDS % 2},
    "ids in a dataclass": make_dataclass("Batch", ["tokens", "document_ids"])(TOKENS, IDS),
    "ids in named fields": namedtuple("Batch", ["tokens", "document_ids"])(TOKENS, IDS),
    "ids in an object": SimpleNamespace(tokens=TOKENS, document_ids=IDS),
    "ids in an array": {"tokens": TOKENS, "document_ids": IDS.numpy()},
    "indices": {"seq_idx": IDS.int()},
    "positions": {"input_ids": TOKENS, "position_ids": POSITIONS},
    "positions from one on": {"position_ids": POSITIONS + 2},
    "positions under a mask of ones": {"position_ids": POSITIONS, "attention_mask": torch.ones(2, 97)},
    "positions under segments": {"position_ids": POSITIONS, "attention_mask": IDS + 1},
    "positions that go on under segments": {
        "position_ids": torch.arange(97).expand(2, -1),
        "attention_mask": IDS + 1,
    },
    "segments alone": {"input_ids": TOKENS, "attention_mask": IDS + 1},
    "positions of four axes": {
        "input_ids": TOKENS,
        "position_ids": torch.cat([POSITIONS[None], torch.arange(97).expand(3, 2, -1)]),
    },
    "boundaries through all rows": {"input_ids": TOKENS, "cu_seq_lens_q": torch.tensor([0, 40, 97, 98, 111, 194])},
    "documents before ids before positions": {
        "documents": PACKED,
        "document_ids": torch.zeros_like(IDS),
        "position_ids": torch.arange(97).expand(2, -1),
    },
    "ids before boundaries and positions": {
        "document_ids": IDS,
        "cu_seq_lens_q": torch.tensor([0, 97]),
        "position_ids": torch.arange(97).expand(2, -1),
    },
}


@pytest.mark.parametrize("given", FORMS.values(), ids=FORMS)
def test_every_form_gives_the_same_lengths(given):
    assert read_documents(given) == PACKED


ONE_ROW = {
    "boundaries": {"input_ids": TOKENS[:1], "cu_seq_lens_q": torch.tensor([0, 40, 97], dtype=torch.int32)},
    "boundaries of keys": {"input_ids": TOKENS[:1], "cu_seq_lens_k": torch.tensor([0, 40, 97])},
    "boundaries before positions": {"position_ids": torch.arange(97)[None], "cu_seq_lens_q": torch.tensor([0, 40, 97])},
    "boundaries of a row without a batch": {"input_ids": TOKENS[0], "cu_seq_lens_q": torch.tensor([0, 40, 97])},
    "boundaries of a row without a batch, before positions": {
        "input_ids": TOKENS[0],
        "position_ids": torch.arange(97),
        "cu_seq_lens_q": torch.tensor([0, 40, 97]),
    },
    "ids of one dimension": IDS[0],
}


@pytest.mark.parametrize("given", ONE_ROW.values(), ids=ONE_ROW)
def test_forms_of_one_row(given):
    assert read_documents(given) == Documents(LENGTHS[:1])


def test_one_row_of_positions_stands_for_all():
    given = {"input_ids": TOKENS, "position_ids": POSITIONS[:1]}
    assert read_documents(given) == Documents(SAME)


def test_padding_behind_segments_is_a_document():
    segments = IDS + 1
    segments[:, 90:] = 0
    found = read_documents({"attention_mask": segments, "position_ids": torch.arange(97).expand(2, -1)})
    assert found == Documents([[40, 50, 7], [1, 13, 76, 7]]) == read_documents({"attention_mask": segments})


@pytest.mark.parametrize("positions_of_padding", [0, 1, "on"])
def test_padding_is_a_document_whatever_its_positions(positions_of_padding):
    positions, mask = POSITIONS.clone(), torch.ones(2, 97)
    mask[:, 90:] = 0
    if positions_of_padding != "on":
        positions[:, 90:] = positions_of_padding
    found = read_documents({"position_ids": positions, "attention_mask": mask})
    assert found == Documents([[40, 50, 7], [1, 13, 76, 7]])


@pytest.mark.parametrize(
    "given",
    [
        {"tokens": TOKENS},
        {"document_ids": "x", "documents": [3, 4]},
        {"position_ids": POSITIONS.expand(3, 2, -1)},
        {"input_ids": TOKENS, "attention_mask": torch.ones(2, 97, dtype=torch.long)},
        [TOKENS, IDS],
        None,
    ],
    ids=["tokens", "other things", "axes", "mask", "list", "nothing"],
)
def test_what_says_nothing_gives_none(given):
    assert read_documents(given) is None


@pytest.mark.parametrize("ids", [IDS.double(), IDS[None]], ids=["floats", "three axes"])
def test_ids_that_cannot_be_read_are_an_error(ids):
    # positions that go on would be taken instead
    with pytest.raises(ValueError, match=r"ids must be integers \[batch, tokens\], got Tensor"):
        read_documents({"document_ids": ids, "position_ids": torch.arange(97).expand(2, -1)})


@pytest.mark.parametrize("mask", [{}, {"attention_mask": torch.ones(1, 300)}], ids=["", "mask"])
def test_positions_of_a_small_type_end_where_it_does(mask):
    positions = torch.cat([torch.arange(256), torch.arange(44)])[None].to(torch.uint8)
    documents = Documents([[256, 44]])
    assert read_documents({"position_ids": positions, **mask}) == documents
    assert Documents.from_positions(positions) == documents
    assert not any(found for _, found in contradictions(documents, {"position_ids": positions, **mask}))
