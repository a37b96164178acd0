"""The one door to torch's scaled dot-product attention."""

from __future__ import annotations

import torch
from torch import Tensor

# The builtin itself, not `F.scaled_dot_product_attention`: that name is swapped while a model is patched.
stock_sdpa = torch._C._nn.scaled_dot_product_attention


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, backend: str) -> Tensor:
    """Stock causal SDPA with grouped heads: q `[B, Hq, N, D]`, k and v `[B, Hkv, N, D]` -> `[B, Hq, N, D]`."""
    return stock_sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
