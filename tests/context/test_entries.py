"""Entries in place of tokens: what a rank asks of the device, seen without processes."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_lighthouse import LighthouseConfig
from lightning_lighthouse.context import entries, fronts
from lightning_lighthouse.context.entries import can_exchange_entries, exchange_entries
from lightning_lighthouse.context.group import Context


class Names(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rank", [0, 1])
def test_no_list_of_places_goes_to_the_device(rank, monkeypatch):
    """Where one does, the host waits for the device: places are indexed one by one."""
    config = LighthouseConfig(2, 4, 64, backend="triton")
    context = Context(rank, 2, "nobody")
    assert can_exchange_entries(config, 256, context)
    monkeypatch.setattr(entries, "all_gather", lambda x, size, group: torch.stack([x] * size))
    monkeypatch.setattr(entries, "tokens_to_heads", lambda q, k, v, context: (q, k, v))
    monkeypatch.setattr(entries, "heads_to_shares", lambda o, context: o.permute(2, 0, 1, 3).unsqueeze(0))
    monkeypatch.setattr(fronts, "pass_on", lambda x, sent, received, group: x)
    qkv = [torch.randn(1, 2, 256, 4, requires_grad=True) for _ in range(3)]
    with Names() as seen:
        exchange_entries(*qkv, config, context).sum().backward()
    assert "stack" in seen.names or "cat" in seen.names
    assert not {"index", "index_put", "lift_fresh", "_local_scalar_dense"} & seen.names
