"""nn.MultiheadAttention, which hides its SDPA call from the compiler.

Dynamo puts `F.multi_head_attention_forward` into the graph whole, so that the call inside stays stock and compiled
models would be dense without a word. While Lighthouse is on, `patch` therefore runs `forward` from here in place of the
class's own: the same projections around a visible call. It trusts the hint `is_causal` as torch does.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lighthouse.routing.reasons import (
    DROPOUT,
    EXTRA_KEYS,
    NEED_WEIGHTS,
    NO_CAUSAL_MASK,
    NOT_BATCHED,
    NOT_CAUSAL,
    NOT_SELF,
    PADDING,
)


def is_served(module: nn.Module) -> bool:
    """Whether `forward` may stand in: nn.MultiheadAttention, or a subclass that keeps its forward."""
    return isinstance(module, nn.MultiheadAttention) and type(module).forward is nn.MultiheadAttention.forward


def why_dense(
    module: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> str:
    """The first rule that a call breaks, or "" for plain causal self-attention.

    The arguments are those of `nn.MultiheadAttention.forward`.
    """
    if need_weights:
        return NEED_WEIGHTS
    if query is not key or key is not value:
        return NOT_SELF
    if not is_causal:
        return NOT_CAUSAL
    if attn_mask is None:
        return NO_CAUSAL_MASK
    if key_padding_mask is not None:
        return PADDING
    if module.dropout != 0 and module.training:
        return DROPOUT
    if query.dim() != 3 or query.is_nested:
        return NOT_BATCHED
    if module.bias_k is not None or module.add_zero_attn:
        return EXTRA_KEYS
    return ""


def forward(module: nn.MultiheadAttention, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """Causal self-attention of `query` with the weights of `module`, for calls that `why_dense` accepts.

    Args:
        module: Holds the projections.
        query: `[batch, tokens, dim]` if the module is batch first, else `[tokens, batch, dim]`.

    Returns:
        The attended tokens, in the layout of `query`, and None for the weights.
    """
    x = query if module.batch_first else query.transpose(0, 1)
    joint = F.linear(x, module.in_proj_weight, module.in_proj_bias)
    q, k, v = (part.unflatten(-1, (module.num_heads, -1)).transpose(1, 2) for part in joint.chunk(3, dim=-1))
    # by attribute: the name is swapped while a model is patched
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    y = F.linear(y.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)
    return y if module.batch_first else y.transpose(0, 1), None
