"""In how many bits a model of transformers runs where nobody says it."""

from __future__ import annotations

import torch


def dtype_on(device: str, weights: torch.dtype) -> torch.dtype:
    """What a model runs in where nothing is said.

    On a GPU attention with grouped heads in 32 bits has no kernel but the one that holds all scores at once: 39 GB for
    9 heads of 32,768 tokens. So it is the 16 bits of a training in mixed precision.

    Args:
        device: "cuda" or "cpu".
        weights: Their own.
    """
    if device == "cpu" or weights != torch.float32:
        return weights
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
