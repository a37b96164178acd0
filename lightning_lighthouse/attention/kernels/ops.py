"""What the operators of the kernels share, and how far the kernels reach."""

from __future__ import annotations

from torch import Tensor

from lightning_lighthouse.attention.operators import Operator, empty_heads_inner, pack, unpack

__all__ = ["Operator", "empty_heads_inner", "pack", "unpack", "within_reach"]

# The kernels compute offsets between the channels of one row in int32; all others in int64.
MAX_OFFSET = 2**31 - 1


def within_reach(x_BHRD: Tensor) -> Tensor:
    """The tensor itself, or a contiguous copy where the channels of a row lie too far apart for the kernels."""
    # as in memory ordered [B, D, H, N]: 160 channels of 16 heads and 2^20 tokens
    return x_BHRD.contiguous() if (x_BHRD.shape[-1] - 1) * x_BHRD.stride(-1) > MAX_OFFSET else x_BHRD
