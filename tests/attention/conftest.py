"""Shared by the tests of attention."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def poison(monkeypatch):
    """Fill fresh memory with NaN, or with a number that is no slot, so that what no kernel writes shows."""

    def poisoned(make):
        def empty(*args, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x.fill_(-(2**30) + 7)

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))
    monkeypatch.setattr(torch.Tensor, "new_empty_strided", poisoned(torch.Tensor.new_empty_strided))
