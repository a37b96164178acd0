"""Every rank takes part in what crosses the edges, with as many tokens; without processes."""

from __future__ import annotations

import pytest
import torch

from lightning_lighthouse.context import edges
from lightning_lighthouse.context.edges import shared_chunk, shared_window
from lightning_lighthouse.context.group import Context

RANKS, COUNT = 5, 12
SHARED = {
    "window": (shared_window, {"window": 7}),
    "sinks": (shared_window, {"window": 1, "sink_tokens": 3}),
    "all of a rank": (shared_window, {"window": 9, "sink_tokens": 3}),
    "chunk": (shared_chunk, {"window": 9}),
    "chunk of nearly a rank": (shared_chunk, {"window": 11}),
}


@pytest.mark.parametrize("case", SHARED)
def test_no_rank_sends_or_receives_nothing(case, monkeypatch):
    """A compiler leaves out an exchange that is empty on a rank, and its backward pass where nothing was sent."""
    attend, options = SHARED[case]
    seen = []

    def pass_on(x, sent, received, group):
        assert len(x) == sum(sent)
        seen.append((sent, received))
        return x.new_zeros((sum(received), *x.shape[1:]))

    monkeypatch.setattr(edges, "pass_on", pass_on)
    q, kv = torch.zeros(1, 2, COUNT, 3), torch.zeros(1, 1, COUNT, 3)
    for rank in range(RANKS):
        assert attend(q, kv, kv, Context(rank, RANKS, "no group"), **options).shape == q.shape
    sent, received = ([pair[way] for pair in seen] for way in (0, 1))
    assert len(sent) == RANKS
    # what one sends is what the other expects
    assert [list(column) for column in zip(*received, strict=True)] == sent
    assert min(map(sum, sent)) > 0
    assert len(set(map(sum, received))) == 1


def test_nothing_is_sent_where_chunks_end_with_ranks(monkeypatch):
    monkeypatch.setattr(edges, "pass_on", None)
    q = torch.zeros(1, 2, COUNT, 3)
    assert shared_chunk(q, q, q, Context(1, RANKS, "no group"), 6).shape == q.shape
