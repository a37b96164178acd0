"""Every rank takes part in what crosses the edges; without processes."""

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
def test_every_rank_gets_what_the_others_send_forward_and_backward(case, monkeypatch):
    attend, options = SHARED[case]
    seen = []

    def pass_on(x, sent, received, group):
        assert len(x) == sum(sent)
        seen.append((sent, received))
        return x.new_zeros((sum(received), *x.shape[1:]))

    monkeypatch.setattr(edges, "pass_on", pass_on)
    q, k, v = (torch.zeros(1, heads, COUNT, 3, requires_grad=True) for heads in (2, 1, 1))
    for rank in range(RANKS):
        out = attend(q, k, v, Context(rank, RANKS, "no group"), **options)
        assert out.shape == q.shape
        out.sum().backward()
    # all take part, twice
    assert len(seen) == 2 * RANKS
    sent, received = ([pair[way] for pair in seen[::2]] for way in (0, 1))
    assert [list(column) for column in zip(*received, strict=True)] == sent
    assert seen[1::2] == [(received, sent) for sent, received in seen[::2]]


def test_nothing_is_sent_where_chunks_end_with_ranks(monkeypatch):
    monkeypatch.setattr(edges, "pass_on", None)
    q = torch.zeros(1, 2, COUNT, 3)
    assert shared_chunk(q, q, q, Context(1, RANKS, "no group"), 6).shape == q.shape
