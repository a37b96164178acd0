"""How queries are shared out: every row once, to groups that have as much to do; without processes."""

from __future__ import annotations

import pytest
import torch

from lightning_lighthouse import LighthouseConfig, lighthouse_attention
from lightning_lighthouse.context import queries
from lightning_lighthouse.context.exchange import first_kv_head, num_neighbours
from lightning_lighthouse.context.group import Context
from lightning_lighthouse.context.queries import _of_group, chunks_of, num_rows, pieces_of

SIZES = [(2, 1, 7), (4, 2, 5), (4, 2, 8), (3, 2, 11), (6, 4, 5), (8, 2, 3), (12, 8, 7), (32, 8, 13), (5, 1, 1)]


@pytest.mark.parametrize(("ranks", "kv_heads", "count"), SIZES)
def test_every_row_goes_to_one_group_and_all_have_as_much_to_do(ranks, kv_heads, count):
    neighbours = num_neighbours(kv_heads, Context(0, ranks, "no group"))
    groups, total = ranks // neighbours, ranks * count
    chunks = chunks_of(total, groups)
    work = []
    for group in range(groups):
        arriving = []
        for rank in range(ranks):
            arriving += [rank * count + row for start, end in pieces_of(rank, count, chunks)[group]
                         for row in range(start, end)]  # fmt: skip
        # in order, so that each chunk is a run
        assert arriving == [row for start, end in _of_group(chunks, group) for row in range(start, end)]
        assert len(arriving) == neighbours * count
        work.append(sum(row + 1 for row in arriving))
    assert sum(work) == total * (total + 1) // 2
    # but for halves of rows
    assert max(work) - min(work) <= total
    for rank in range(ranks):
        assert sum(num_rows(pieces) for pieces in pieces_of(rank, count, chunks)) == count


def test_of_few_rows_every_group_has_all(monkeypatch):
    """40 tokens of 8 ranks and 1 head gather 11 rows: chunks of 11 / 16 would be empty, and those ranks would stop."""
    monkeypatch.setattr(queries, "pass_on", None)
    monkeypatch.setattr(queries, "exchange_tokens", lambda attend, q, k, v, context: attend(*whole))
    whole = [torch.randn(1, 1, 40, 4) for _ in range(3)]
    config = LighthouseConfig(2, 4, 1)
    assert config.pyramid(40).num_gathered < 16
    part = [x[:, :, :5] for x in whole]
    for rank in range(8):
        out = queries.shared_lighthouse(*part, config, Context(rank, 8, "nobody"))
        assert torch.equal(out, lighthouse_attention(*whole, config))


def test_neighbours_have_different_heads_and_groups_the_same():
    contexts = [Context(rank, 12, "no group") for rank in range(12)]
    assert [first_kv_head(8, context) for context in contexts] == [0, 2, 4, 6] * 3
    assert [first_kv_head(24, context) for context in contexts] == list(range(0, 24, 2))
    assert [first_kv_head(5, context) for context in contexts] == [0] * 12
