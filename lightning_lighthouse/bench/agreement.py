"""Nothing is timed until the chosen backend has agreed with the reference on a small case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.attention.lighthouse import lighthouse_attention
from lightning_lighthouse.bench.timing import Layer, make_inputs
from lightning_lighthouse.checks import quoted

# The longest the padded small case may be, in its tokens: deep pyramids over few tokens are all padding.
MAX_PADDING = 4

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
DocumentAttend = Callable[[Tensor, Tensor, Tensor, Documents], Tensor]


def small_length(device: torch.device) -> int:
    """Tokens of the small case: a prime, and more on a GPU, whose kernels take larger blocks."""
    return 4099 if device.type == "cuda" else 1031


def small_case(device: torch.device, config: LighthouseConfig) -> tuple[int, LighthouseConfig]:
    """A short length, and a budget for `config` that makes two tiles where the length allows it.

    Raises:
        ValueError: The pyramid is too large for one.
    """
    num_tokens = small_length(device)
    for top_k in (256, 64, 16, 4, 1):
        case = replace(config, top_k=top_k)
        shape = case.pyramid(num_tokens)
        if shape.compresses and shape.padded_tokens <= MAX_PADDING * num_tokens:
            return num_tokens, case
    raise ValueError(
        f"num_levels={config.num_levels} and pooling_factor={config.pooling_factor} are too large to compare backends "
        f"on {num_tokens} tokens, without which nothing is timed"
    )


def disagreement(layer: Layer, config: LighthouseConfig) -> str | None:
    """How the chosen backend differs from the reference on a small case; None where it does not.

    Output and gradients may be off by twice the error of the reference in the layer's dtype, and one rounding. Both
    errors are those against float64.
    """
    num_tokens, chosen = small_case(layer.device, config)
    reference = replace(chosen, backend="reference")
    problem = difference(
        layer,
        num_tokens,
        lambda q, k, v: lighthouse_attention(q, k, v, chosen, rotation=layer.rotation),
        lambda q, k, v: lighthouse_attention(q, k, v, reference, rotation=layer.rotation),
        # fused attention knows no float64
        lambda q, k, v: lighthouse_attention(q, k, v, replace(reference, sdpa="math"), rotation=layer.rotation),
    )
    return None if problem is None else f"backend {quoted(config.backend)} is wrong on {layer.device.type}: {problem}"


def difference(
    layer: Layer, num_tokens: int, attend: Attend, twin: Attend, exact: Attend, fused: Attend | None = None
) -> str | None:
    """How output or gradients of `attend` are off by more than allowed; None where they are not.

    Args:
        layer: The layer; of its heads a few are compared.
        num_tokens: N.
        attend: What is to be timed.
        twin: The reference, in the layer's dtype; twice its error and one rounding are allowed.
        exact: The reference for float64.
        fused: The same by stock SDPA, whose sums round otherwise: the larger of its error and the twin's counts.
    """
    kv_heads = min(2, layer.kv_heads)
    small = replace(layer, heads=layer.heads // layer.kv_heads * kv_heads, kv_heads=kv_heads)
    inputs = make_inputs(small, num_tokens, seed=42)
    truths = _results([x.double() for x in inputs], exact)
    twins = [_results(inputs, twin)] + ([_results(inputs, fused)] if fused is not None else [])
    values = _results(inputs, attend)
    for i, name in enumerate(("output", "dq", "dk", "dv")):
        truth, value = truths[i], values[i]
        largest = truth.abs().max()
        of_twins = torch.stack([(each[i] - truth).abs().max() for each in twins]).max()
        allowed = 2 * of_twins / largest + torch.finfo(layer.dtype).eps
        error = (value - truth).abs().max() / largest
        # written so that a NaN fails
        if not error <= allowed:
            return f"{name} is off by {error:.2g} of its largest value, {allowed:.2g} is allowed"
    return None


def _results(inputs: list[Tensor], attend: Attend) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs[:3]]
    out = attend(*leaves)
    return [x.double() for x in (out.detach(), *torch.autograd.grad(out, leaves, inputs[3]))]
