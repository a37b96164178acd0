"""What crosses the edges of ranks, as operators: in a group of one, and what the rest of a group would add to it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import library

from lightning_lighthouse.attention.operators import OPERATORS
from lightning_lighthouse.context import edges, fronts
from lightning_lighthouse.context.collectives import register


@pytest.fixture
def alone():
    """The name of a group of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield register(dist.group.WORLD)
    dist.destroy_process_group()


def test_both_operators_are_what_torch_asks_of_one(alone):
    shares = torch.randn(2, 7, 3, 2, 5, requires_grad=True)
    rows, is_read = torch.randint(7, (3, 4, 2)), torch.rand(3, 4, 2) < 0.5
    library.opcheck(OPERATORS.append_front.default, (shares, rows, is_read, 4, 0, 1, alone))
    library.opcheck(OPERATORS.append_front_bwd.default, (torch.randn(3, 4, 11, 5), rows, is_read, 2, 7, 0, 1, alone))
    k, v = (torch.randn(2, 3, 7, 5, requires_grad=True) for _ in range(2))
    library.opcheck(OPERATORS.add_edges.default, (k, v, [0], [0], 0, alone))
    library.opcheck(OPERATORS.add_edges_bwd.default, (k.detach(), v.detach(), [0], [0], 0, alone))


def test_the_front_is_what_the_rank_before_sent_and_its_gradient_goes_back(monkeypatch):
    """A ring of one rank, which is its own neighbour."""
    monkeypatch.setattr(fronts, "pass_on", lambda x, sent, received, group: x)
    shares = torch.randn(2, 7, 1, 2, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.tensor([[[6, 5]] * 4])
    is_read = torch.tensor([[[True, False]] * 4])
    out = fronts._append_front_operator(shares, rows, is_read, 4, 0, 1, "nobody")
    whole = shares.permute(2, 0, 3, 1, 4).flatten(1, 2)
    nothing = whole.new_zeros(1, 4, 1, 3)
    expected = torch.cat((whole, whole[:, :, 6:7], nothing, nothing, nothing), 2)
    assert torch.equal(out, expected)
    assert out.transpose(1, 2).is_contiguous()
    dout = torch.randn_like(out)
    (found,), (exact,) = (torch.autograd.grad(x, shares, dout) for x in (out, expected))
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-15)


def test_sinks_get_the_sum_of_what_all_ranks_say_of_them(monkeypatch):
    """The first of three ranks, to which two hand back gradients of two sinks, one of them those of an edge too."""
    returned = torch.randn(2 + 3 + 2, 1, 2, 2 * 5, dtype=torch.float64)
    monkeypatch.setattr(edges, "pass_on", lambda x, sent, received, group: returned)
    dk, dv = torch.randn(2, 1, 2, 7, 5, dtype=torch.float64)
    found = edges._add_edges_bwd_operator(dk, dv, [0, 2, 2], [0, 3, 3], 0, "nobody")
    # to the next rank two sinks and the last three tokens, to the one behind it the sinks
    for x, exact, more in zip(found, (dk, dv), returned.permute(1, 2, 0, 3).chunk(2, 3), strict=True):
        exact = exact.clone()
        exact[:, :, :2] += more[:, :, :2] + more[:, :, 5:]
        exact[:, :, 4:] += more[:, :, 2:5]
        torch.testing.assert_close(x, exact, rtol=0, atol=1e-15)


def test_rows_go_to_the_next_rank_and_their_gradients_to_the_one_before(monkeypatch):
    ways = []
    monkeypatch.setattr(fronts, "pass_on", lambda x, sent, received, group: ways.append((sent, received)) or x)
    shares = torch.randn(1, 5, 1, 2, 3, requires_grad=True)
    rows, is_read = torch.full((1, 2, 1), 4), torch.ones(1, 2, 1, dtype=torch.bool)
    fronts._append_front_operator(shares, rows, is_read, 1, 1, 3, "nobody").sum().backward()
    assert ways == [([0, 0, 1], [1, 0, 0]), ([1, 0, 0], [0, 0, 1])]
