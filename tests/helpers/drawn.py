"""Queries, keys and values drawn for a test."""

from __future__ import annotations

import torch


def draw(batch=1, q_heads=2, kv_heads=2, tokens=64, dim=8, dtype=torch.float64, seed=42):
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(batch, heads, tokens, dim, generator=generator, dtype=dtype)
        for heads in (q_heads, kv_heads, kv_heads)
    )
