"""The tables of documents against the reference, which knows none, and the memory that suffices for all batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from drawn import draw
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import cut
from selecting import small_tiles

from lightning_lighthouse import Documents, LighthouseConfig
from lightning_lighthouse.attention import reference
from lightning_lighthouse.attention.document_tables import (
    Packing,
    capacity,
    make_tables,
    place_tables,
    tile_rows,
)
from lightning_lighthouse.attention.pyramid import PyramidShape

SELECTIONS = ["causal", "strided", "published", "random"]
SIZES = {
    "tokens": st.integers(40, 400),
    "levels": st.integers(2, 4),
    "p": st.integers(2, 4),
    "top_k": st.integers(2, 24),
    "tile_winners": st.integers(1, 5),
    "mean": st.sampled_from([1, 4, 20, 90, 1000]),
    "seed": st.integers(0, 999),
}


def test_tables_of_a_small_batch():
    # windows of 4 tokens, tiles of 2 windows, 1 winner at each level
    shape = PyramidShape(30, 3, 2, 4, 2, (0, 1, 1))
    tables = make_tables(np.array([8, 1, 21]), shape, "causal")
    assert tables.windows.T.tolist() == [
        *([0, 4], [4, 4], [8, 0]),
        *([8, 1], [12, 0]),
        *([9, 4], [13, 4], [17, 4], [21, 4], [25, 4], [29, 1], [33, 0]),
    ]
    # 2 + 2 + 2 rows in a full tile; 1 + 2 + 2 where one window stands
    assert tables.tiles.T.tolist() == [[0, 2, 0, 0], [3, 1, 0, 6], [5, 2, 0, 11], [7, 2, 1, 17], [9, 2, 2, 23]]
    assert tables.boundaries.tolist() == [0, 6, 11, 29]


@pytest.mark.parametrize("selection", SELECTIONS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(**SIZES)
def test_rows_are_those_of_the_reference(selection, tokens, levels, p, top_k, tile_winners, mean, seed):
    """As many as are gathered from the document; under "causal" at most, where scores decide how many are real."""
    with small_tiles(tile_winners):
        config = LighthouseConfig(levels, p, top_k, selection=selection)
        shape = config.pyramid(tokens)
    lengths = cut(tokens, mean, seed)
    boundaries = make_tables(np.array(lengths), shape, selection).boundaries
    for number, n in list(enumerate(lengths))[:5]:
        own = shape.of_document(n)
        q, k, v = draw(1, 1, 1, n, dim=2, seed=seed)
        index = reference.select_document(reference.score(q, k, v, own, config), own, config).index[0, 0]
        starts = torch.tensor([own.start(level) for level in range(levels)])
        level_of = torch.searchsorted(starts, index.long(), right=True) - 1
        entry = index - starts[level_of]
        # padding that was selected gets no row
        windows = -(-n // own.window(levels - 1))
        real = entry < windows * torch.tensor([p ** (levels - 1 - level) for level in range(levels)])[level_of]
        kept = boundaries[number + 1] - boundaries[number]
        assert real.sum() <= kept
        if selection != "causal" or own.num_tiles == 1:
            assert real.sum() == kept


@pytest.mark.parametrize("selection", SELECTIONS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(batch=st.integers(1, 3), spare=st.integers(0, 5), **SIZES)
def test_memory_suffices(selection, batch, spare, tokens, levels, p, top_k, tile_winners, mean, seed):
    with small_tiles(tile_winners):
        shape = LighthouseConfig(levels, p, top_k, selection=selection).pyramid(tokens)
    lengths = [cut(tokens, mean, seed + row) for row in range(batch)]
    most = max(-(-sum(map(len, lengths)) // batch), 1) + spare
    flat = np.array([n for row in lengths for n in row])
    room, tables = capacity(shape, batch, most, selection), make_tables(flat, shape, selection)
    assert room.documents == batch * most >= len(flat)
    assert room.windows >= tables.windows.shape[1]
    assert room.rows >= tables.boundaries[-1]


def test_a_whole_tile_has_the_rows_of_today():
    shape = LighthouseConfig(top_k=1536).pyramid(98_304)
    for rule in SELECTIONS:
        rows = tile_rows(np.array([128, 128]), np.array([0, 1]), shape, rule)
        assert rows.tolist() == [shape.tile_gathered] * 2
        assert make_tables(np.array([98_304]), shape, rule).boundaries[-1] == shape.num_gathered


def test_memory_of_the_default_is_below_twice_that_without_documents():
    config = LighthouseConfig()
    shape = config.pyramid(98_304)
    room = capacity(shape, 1, config.resolve_max_documents(98_304), "causal")
    assert shape.num_gathered < room.rows < 2 * shape.num_gathered


def test_tables_are_made_once_a_batch():
    shape = LighthouseConfig(top_k=64).pyramid(2000)
    documents, others = Documents([[900, 1100]]), Documents([[1100, 900]])
    packing = Packing.of(shape, 1, 16, "causal")
    tables = place_tables(documents.host, packing, torch.device("cpu"))
    assert place_tables(documents.host, packing, torch.device("cpu")) is tables
    assert place_tables(others.host, packing, torch.device("cpu")) is not tables
    assert place_tables(documents.host, packing._replace(rule="strided"), torch.device("cpu")) is not tables
    for _ in range(20):
        place_tables(Documents([[2000]]).host, packing, torch.device("cpu"))
    assert torch.equal(place_tables(documents.host, packing, torch.device("cpu")).windows, tables.windows)


def test_more_documents_than_memory_is_kept_for_are_refused():
    packing = Packing.of(LighthouseConfig(top_k=64).pyramid(2000), 1, 2, "causal")
    with pytest.raises(RuntimeError, match="3 documents in a batch exceed max_documents x batch = 2"):
        place_tables(Documents([[900, 1000, 100]]).host, packing, torch.device("cpu"))
