"""The Triton twins of the stages in `reference`, under the same names; scores and selections are their own."""

from __future__ import annotations

from functools import lru_cache

import torch

try:
    import triton
except ImportError as missing:
    raise ImportError(
        "backend='triton' needs the package triton, which is not installed; install it or choose backend='reference'"
    ) from missing

from lightning_lighthouse.attention.kernels.documents import (
    gather_documents_fwd,
    scatter_documents_fwd,
    select_documents_fwd,
)
from lightning_lighthouse.attention.kernels.gather import gather
from lightning_lighthouse.attention.kernels.scatter import scatter
from lightning_lighthouse.attention.kernels.score import pool_scores, score
from lightning_lighthouse.attention.kernels.select import select
from lightning_lighthouse.attention.kernels.tiles import Selection

__all__ = [
    "FUSED",
    "Selection",
    "check_device",
    "gather",
    "gather_documents_fwd",
    "pool_scores",
    "scatter",
    "scatter_documents_fwd",
    "score",
    "select",
    "select_documents_fwd",
]


# Whether all stages can run as one operator
FUSED = True

# Older GPUs have no bf16
MIN_CAPABILITY = (8, 0)

_capability = lru_cache(torch.cuda.get_device_capability)


@torch.compiler.assume_constant_result
def check_device(device: torch.device) -> None:
    """Make sure that the kernels can run on `device`.

    Raises:
        ValueError: They cannot.
    """
    if triton.knobs.runtime.interpret:
        return
    if device.type != "cuda":
        raise ValueError(
            f"backend='triton' needs a CUDA device, q is on {device.type}; use backend='auto' or backend='reference', "
            "or set TRITON_INTERPRET=1 before the start to try the kernels slowly on the CPU"
        )
    if _capability(device) < MIN_CAPABILITY:
        raise ValueError(
            f"backend='triton' needs compute capability {MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}, "
            f"{device} has {'.'.join(map(str, _capability(device)))}; use backend='reference'"
        )
