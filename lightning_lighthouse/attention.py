"""Lighthouse Attention as one function: score > select > gather > attend > scatter (arXiv 2605.06554, section 3).

The stages come from one of two backends with the same names: `reference` (plain PyTorch, everywhere) or `kernels`
(Triton, CUDA). Attention itself is stock SDPA on the short gathered sequence.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from lightning_lighthouse import reference
from lightning_lighthouse.config import LighthouseConfig
from lightning_lighthouse.notices import log_once, notice_once
from lightning_lighthouse.sdpa import causal_sdpa

DEFAULT = LighthouseConfig()


def lighthouse_attention(
    q: Tensor, k: Tensor, v: Tensor, config: LighthouseConfig | None = None, *, scale: float | None = None
) -> Tensor:
    """Causal self-attention over a pyramid of pooled q, k and v.

    A sequence too short to be compressed gets dense causal SDPA, and one notice.

    Args:
        q: `[B, Hq, N, D]`; positional rotation already applied.
        k: `[B, Hkv, N, D]`, Hq a multiple of Hkv.
        v: `[B, Hkv, N, D]`.
        config: Settings; None for the defaults.
        scale: Factor of the attention logits; None: `D ** -0.5`.

    Returns:
        `[B, Hq, N, D]`, in the dtype of q.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, or the backend cannot run on the device.
    """
    config = config or DEFAULT
    _check(q, k, v)
    shape = config.pyramid(q.shape[2])
    if not shape.compresses:
        notice_once(
            f"{shape.num_tokens} tokens are too short to gain: Lighthouse would gather {shape.num_gathered} entries "
            f"(num_levels={config.num_levels}, pooling_factor={config.pooling_factor}, "
            f"top_k={config.resolve_top_k(shape.num_tokens)}); such sequences get dense attention"
        )
        return causal_sdpa(q, k, v, scale=scale, backend=config.sdpa)

    stages = _stages(config, q.device)
    # the selection is a choice, not a function: no gradient reaches the scores
    with torch.no_grad():
        selection = stages.select(stages.score(q, k, v, shape, config), shape, config)
    qs, ks, vs = stages.gather(q, k, v, selection, shape)
    o = causal_sdpa(qs, ks, vs, scale=scale, backend=config.sdpa)
    return stages.scatter(o, selection, shape, config)


def select_entries(q: Tensor, k: Tensor, v: Tensor, config: LighthouseConfig | None = None) -> Tensor:
    """The entries that `lighthouse_attention` would gather, in the order of the gathered sequence.

    Args:
        q: `[B, Hq, N, D]`.
        k: `[B, Hkv, N, D]`.
        v: `[B, Hkv, N, D]`; read by some scorers only.
        config: Settings; None for the defaults.

    Returns:
        `[B, Hkv, S]` int32, positions in the concatenation of all levels, finest first:
        entry (l, i) is at `config.pyramid(N).start(l) + i`.
    """
    config = config or DEFAULT
    _check(q, k, v)
    shape = config.pyramid(q.shape[2])
    stages = _stages(config, q.device)
    with torch.no_grad():
        return stages.select(stages.score(q, k, v, shape, config), shape, config).index


def _stages(config: LighthouseConfig, device: torch.device) -> ModuleType:
    backend = config.backend
    if backend == "auto":
        backend = "triton" if device.type == "cuda" else "reference"
        log_once(f"backend='auto' runs '{backend}' on {device.type}")
    if backend == "reference":
        return reference
    # Triton is imported only where it is used
    from lightning_lighthouse import kernels

    kernels.check_device(device)
    return kernels


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    sizes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"q, k and v must be [batch, heads, tokens, head dim], got {sizes}")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"k and v must have one shape, and batch, tokens and head dim of q, got {sizes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"the query heads must be a multiple of the key/value heads, got {sizes}")
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise ValueError(f"q, k and v must have one floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k and v must be on one device, got {q.device}, {k.device}, {v.device}")
