"""Causal attention of a sequence's last queries: the last of them sees every key.

torch aligns `is_causal` with the first query and key. Two of its CUDA kernels align it with the last ones where asked
below SDPA, so that no mask is made there: flash and the memory-efficient one; cuDNN's does not.
"""

# M queries, N keys

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lighthouse.attention.inputs import plain
from lightning_lighthouse.attention.operators import Operator
from lightning_lighthouse.attention.sdpa import BACKENDS, ask_torch, causal_sdpa, masked_sdpa
from lightning_lighthouse.checks import quoted
from lightning_lighthouse.notices import log_once

aten = torch.ops.aten

# The efficient kernel's name for a causal mask that ends at the last query and key
FROM_LOWER_RIGHT = 2
# Those that know such a mask, best first
FUSED = ("flash", "efficient")


def lower_right_sdpa(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, backend: str) -> Tensor:
    """Causal SDPA of the last M queries of N tokens, with grouped heads.

    Args:
        q: `[B, Hq, M, D]`, M at most N.
        k: `[B, Hkv, N, D]`.
        v: `[B, Hkv, N, D]`.
        scale: Factor of the attention logits; None: `D ** -0.5`.
        backend: "auto": the first of "flash", "efficient" and "math" that can. Or that one.

    Returns:
        `[B, Hq, M, D]`.

    Raises:
        ValueError: The named backend cannot run this call.
    """
    num_queries, num_keys = q.shape[2], k.shape[2]
    if num_queries == num_keys:
        return causal_sdpa(q, k, v, scale=scale, backend=backend)
    chosen = "math"
    if q.device.type == "cuda":
        chosen = _choose(backend, q.device, q.dtype, *plain(q.shape[1], k.shape[1], q.shape[3]))
    factor = q.shape[3] ** -0.5 if scale is None else scale
    if chosen == "flash":
        # in eights of channels, which flash asks for
        padded = [F.pad(x, (0, -x.shape[3] % 8)) if x.shape[3] % 8 else x for x in (q, k, v)]
        out: Tensor = aten._scaled_dot_product_flash_attention(*padded, 0.0, True, False, scale=factor)[0]
        return out[..., : q.shape[3]]
    if chosen == "efficient":
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        attended: Tensor = _efficient(q, k, v, factor)
        return attended.transpose(1, 2)
    mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril(num_keys - num_queries)
    return masked_sdpa(q, k, v, mask, scale=scale, backend="math" if q.device.type == "cuda" else backend)


def _lower_right_efficient(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._efficient_attention_forward(
        q, k, v, None, None, None, None, None, 0.0, FROM_LOWER_RIGHT, True, scale=scale
    )
    return out, lse


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    *qkv, ctx.scale = inputs
    ctx.save_for_backward(*qkv, *output)
    ctx.mark_non_differentiable(output[1])


def _lower_right_efficient_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    # the state of a generator; without dropout nobody reads it
    state = q.new_empty((), dtype=torch.int64)
    dq, dk, dv, _ = aten._efficient_attention_backward(
        dout, q, k, v, None, out, None, None, q.shape[1], k.shape[1], lse, 0.0, state, state, FROM_LOWER_RIGHT, False,
        scale=scale,
    )  # fmt: skip
    return dq, dk, dv


_efficient_bwd = Operator(_lower_right_efficient_bwd, lambda dout, q, k, v, *_: tuple(map(torch.empty_like, (q, k, v))))


def _backward(ctx: Any, dout: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    return *_efficient_bwd(dout, q, k, v, out, lse, ctx.scale), None


# torch's own operator does not compile: what tells the shapes of its backward (2.14) lacks an argument
_efficient = Operator(_lower_right_efficient, _lower_right_efficient, _keep, _backward, keeps=True)


@torch.compiler.assume_constant_result
def _choose(backend: str, device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> str:
    enabled = {
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
    }
    # what the user turned off stays off, unless it is asked for by name
    names = tuple(name for name in FUSED if enabled[name]) if backend == "auto" else (backend,)
    chosen = _choose_once(names, device, dtype, heads, kv_heads, dim)
    what = f"{dtype} on {device.type} with {heads} and {kv_heads} heads of {dim}, fewer queries than keys"
    if chosen is None and backend not in ("auto", "math"):
        raise ValueError(f"sdpa={quoted(backend)} cannot run attention in {what}; use sdpa='auto'")
    chosen = chosen or "math"
    message = f"sdpa={quoted(backend)} runs {quoted(chosen)} for {what}"
    log_once(message, message)
    return chosen


@lru_cache(maxsize=256)
def _choose_once(
    names: tuple[str, ...], device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, dim: int
) -> str | None:
    assert all(name in BACKENDS for name in names)
    for name in names:
        # the efficient kernel knows no grouped heads
        groups = heads if name == "efficient" else kv_heads
        if name in FUSED and ask_torch([name], device, dtype, heads, groups, dim, True, False) == name:
            return name
    return None
