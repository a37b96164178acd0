"""What the operators of the kernels share: shapes as integers, and the memory of their tensors."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from lightning_lighthouse.attention.operators import NAMESPACE, Operator, empty_heads_inner
from lightning_lighthouse.attention.pyramid import PyramidShape

__all__ = ["NAMESPACE", "Operator", "empty_heads_inner", "pack", "unpack", "within_reach"]

# The kernels compute offsets between the channels of one row in int32; all others in int64.
MAX_OFFSET = 2**31 - 1


def pack(shape: PyramidShape) -> list[int]:
    """A shape as the flat integers that an operator can take."""
    return [shape.num_tokens, shape.num_levels, shape.pooling_factor, shape.num_tiles, shape.tile_entries,
            *shape.winners]  # fmt: skip


def unpack(sizes: list[int]) -> PyramidShape:
    """The inverse of `pack`."""
    # symbols, as Dynamo traces sizes that change, have no hash
    is_traced = any(isinstance(size, torch.SymInt) for size in sizes)
    return _unpack(*sizes) if is_traced else _unpack_cached(*sizes)


def _unpack(*sizes: int) -> PyramidShape:
    tokens, levels, factor, tiles, tile_entries, *winners = sizes
    return PyramidShape(tokens, levels, factor, tiles, tile_entries, tuple(winners))


_unpack_cached = lru_cache(maxsize=256)(_unpack)


def within_reach(x_BHRD: Tensor) -> Tensor:
    """The tensor itself, or a contiguous copy where the channels of a row lie too far apart for the kernels."""
    # as in memory ordered [B, D, H, N]: 160 channels of 16 heads and 2^20 tokens
    return x_BHRD.contiguous() if (x_BHRD.shape[-1] - 1) * x_BHRD.stride(-1) > MAX_OFFSET else x_BHRD
