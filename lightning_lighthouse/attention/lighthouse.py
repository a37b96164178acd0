"""Lighthouse Attention as one function: score > select > gather > attend > scatter (arXiv 2605.06554, section 3).

The stages come from one of two backends with the same names: `reference` (plain PyTorch, everywhere) or `kernels`
(Triton, CUDA). Attention itself is stock SDPA on the short gathered sequence. In training the kernels run as one
operator around it (`fused_lighthouse.py`).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lightning_lighthouse.attention.backends import choose_stages
from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.dilated_scorer import dilated_scores
from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.attention.documents_lighthouse import documents_lighthouse
from lightning_lighthouse.attention.documents_sdpa import documents_sdpa
from lightning_lighthouse.attention.inputs import autocast, check_inputs
from lightning_lighthouse.attention.pyramid import PyramidShape
from lightning_lighthouse.attention.rotation import Rotation, check_rotation
from lightning_lighthouse.attention.sdpa import causal_sdpa, kernel_of
from lightning_lighthouse.checks import check_count
from lightning_lighthouse.notices import notice_once

DEFAULT = LighthouseConfig()


def lighthouse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: LighthouseConfig | None = None,
    *,
    scale: float | None = None,
    step: Tensor | None = None,
    first_head: int = 0,
    documents: Documents | None = None,
    rotation: Rotation | None = None,
) -> Tensor:
    """Causal self-attention over a pyramid of pooled q, k and v.

    A sequence too short to be compressed gets dense causal SDPA, and one notice. So does a batch of very many or very
    short documents, inside them.

    Args:
        q: `[B, Hq, N, D]`; positional rotation already applied.
        k: `[B, Hkv, N, D]`, Hq a multiple of Hkv.
        v: `[B, Hkv, N, D]`.
        config: Settings; None for the defaults.
        scale: Factor of the attention logits; None: `D ** -0.5`.
        step: The training step that selection="random" draws for, a 0-dim int64 tensor on the CPU; None: step 0.
        first_head: Number of the first of these key/value heads among those of the layer, where they are split over
            calls or ranks: selection="random" draws for each head by its number.
        documents: Of these sequences: no token sees anything of another document. None: a sequence is one.
        rotation: How q and k were rotated; needed, and read, with `rotate="after"` alone.

    Returns:
        `[B, Hq, N, D]`, in the dtype of q, or that of autocast.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit together, the backend cannot run on the device, the documents
            are of another batch, the scorer knows none, or the rotation is wider than a head or missing.
        TypeError: `first_head` is no int, or `documents` are none.
    """
    config = config or DEFAULT
    q, k, v = autocast(q, k, v)
    check_inputs(q, k, v)
    check_count("first_head", first_head)
    rotation = check_rotation(rotation, config, q.shape[3])
    shape = config.pyramid(q.shape[2])
    if not shape.compresses:
        notice_once(
            "short",
            f"{shape.num_tokens} tokens are too short to gain: Lighthouse would gather {shape.num_gathered} entries "
            f"(num_levels={config.num_levels}, pooling_factor={config.pooling_factor}, "
            f"top_k={config.resolve_top_k(shape.num_tokens)}); such sequences get dense attention",
        )
        if documents is not None:
            return documents_sdpa(q, k, v, documents, scale=scale, backend=config.sdpa)
        return causal_sdpa(q, k, v, scale=scale, backend=config.sdpa)
    if documents is not None:
        return documents_lighthouse(
            q, k, v, documents, config, scale=scale, step=step, first_head=first_head, rotation=rotation
        )

    stages = choose_stages(config, q.device, q.dtype)
    kernel = _fused_kernel(stages, q, k, v, config)
    if kernel is not None:
        # Triton is imported only where it is used
        from lightning_lighthouse.attention.fused_lighthouse import fused_lighthouse

        scores = None
        # norms are taken inside
        if config.scorer != "norm" or not config.reads_scores:
            with torch.no_grad():
                scores = score_entries(stages, q, k, v, shape, config, scale=scale)
        return fused_lighthouse(
            q, k, v, scores, shape, config, kernel, scale=scale, step=step, first_head=first_head, rotation=rotation
        )
    # the selection is a choice, not a function: no gradient reaches the scores
    with torch.no_grad():
        scores = score_entries(stages, q, k, v, shape, config, scale=scale)
        selection = stages.select(scores, shape, config, step, first_head)
    qs, ks, vs = stages.gather(q, k, v, selection, shape, rotation)
    o = causal_sdpa(qs, ks, vs, scale=scale, backend=config.sdpa)
    return stages.scatter(o, selection, shape, config)


def _fused_kernel(stages: ModuleType, q: Tensor, k: Tensor, v: Tensor, config: LighthouseConfig) -> str | None:
    """The kernel of attention with which all stages run as one operator; None where they run one by one.

    They do in the reference, around SDPA that is more than one kernel, and without gradients: SDPA then leaves out what
    its backward would read.
    """
    wants_gradient = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    return kernel_of(q, k, config.sdpa) if stages.FUSED and wants_gradient else None


def score_entries(
    stages: ModuleType,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: PyramidShape,
    config: LighthouseConfig,
    *,
    scale: float | None,
) -> Any:
    """The scores of all entries by the scorer of `config`, as `select` of the same backend takes them."""
    if config.scorer == "dilated" and config.reads_scores:
        return stages.pool_scores(*dilated_scores(q, k, v, config, scale=scale), shape, config)
    return stages.score(q, k, v, shape, config)


def select_entries(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: LighthouseConfig | None = None,
    *,
    scale: float | None = None,
    step: Tensor | None = None,
    first_head: int = 0,
) -> Tensor:
    """The entries that are gathered, in the order of the gathered sequence, also of one too short to gain.

    Args:
        q: `[B, Hq, N, D]`.
        k: `[B, Hkv, N, D]`.
        v: `[B, Hkv, N, D]`; read by some scorers only.
        config: Settings; None for the defaults.
        scale: Factor of the attention logits; None: `D ** -0.5`. Read by some scorers only.
        step: As in `lighthouse_attention`.
        first_head: As there.

    Returns:
        `[B, Hkv, S]` int32, positions in the concatenation of all levels, finest first:
        entry (l, i) is at `config.pyramid(N).start(l) + i`.
    """
    config = config or DEFAULT
    q, k, v = autocast(q, k, v)
    check_inputs(q, k, v)
    check_count("first_head", first_head)
    shape = config.pyramid(q.shape[2])
    stages = choose_stages(config, q.device, q.dtype)
    with torch.no_grad():
        scores = score_entries(stages, q, k, v, shape, config, scale=scale)
        return stages.select(scores, shape, config, step, first_head).index
