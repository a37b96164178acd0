"""What a training step of a transformer computes, in floating-point operations a token: the one place for it.

    6 P + 6 * sum over layers of H (d_qk + d_v) * pairs

P parameters, all but embeddings that are only looked up: a product with each in the forward pass and two in the
backward pass. H query heads, d_qk and d_v the widths of a head; pairs is the number of tokens, or entries, that a query
is compared with, as is usual without regard to causality: N in dense attention, whose triangle is half of that. What
norms, softmax, the pyramid and a recomputation cost is left out, as is usual too.
"""

# N tokens, H query heads, S gathered entries

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from torch import nn

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.document_tables import make_tables
from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.attention.layer_types import CHUNK, LIGHTHOUSE, WINDOW
from lightning_lighthouse.routing.own_windows import own_window

# under which names attention modules, and the configs that they hold, keep their sizes
_HEADS = ("num_heads", "num_attention_heads", "n_head", "n_heads", "heads")
_KV_HEADS = ("num_kv_heads", "num_key_value_heads", "n_kv_heads", "n_query_groups", "num_query_groups")
_QK_DIM = ("qk_head_dim", "head_dim", "head_size", "attention_head_size", "dim_head")
_V_DIM = ("v_head_dim",)
_WIDTH = ("embed_dim", "hidden_size", "n_embd", "d_model")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class AttentionSize:
    """The sizes of one attention layer that its FLOPs follow from.

    Args:
        qk_width: H d_qk.
        v_width: H d_v.
        own_window: Tokens that it looks back by its own making; None for all.
    """

    qk_width: int
    v_width: int
    own_window: int | None = None


def attention_size(layer: nn.Module) -> AttentionSize | None:
    """The sizes of an attention module, by the names of its attributes and of its config's, or by its first Linear.

    Returns:
        None where neither says it.
    """
    heads = _look_up(layer, _HEADS)
    if heads is not None:
        width = _look_up(layer, _WIDTH)
        dim = _look_up(layer, _QK_DIM) or (width // heads if width else None)
        if dim is not None:
            return AttentionSize(heads * dim, heads * (_look_up(layer, _V_DIM) or dim), own_window(layer))
    first = next((module for module in layer.modules() if isinstance(module, nn.Linear)), None)
    # that makes q, or q, k and v, all as wide as the model; what else it may be says nothing of heads
    if first is not None and first.out_features in (first.in_features, 3 * first.in_features):
        return AttentionSize(first.in_features, first.in_features, own_window(layer))
    return None


def kv_heads(layer: nn.Module) -> tuple[int, int] | None:
    """Query heads H and key/value heads G of an attention module, by the names of its attributes and of its config's.

    Returns:
        None where it does not say H; where it does not say G, that is H.
    """
    heads = _look_up(layer, _HEADS)
    return None if heads is None else (heads, _look_up(layer, _KV_HEADS) or heads)


def _look_up(layer: nn.Module, names: Iterable[str]) -> int | None:
    for holder in (layer, getattr(layer, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if type(value) is int and value > 0:
                return value
    return None


def pairs_per_token(
    layer_type: str,
    num_tokens: int,
    config: LighthouseConfig | None = None,
    window: int | None = None,
    sink_tokens: int = 0,
) -> float:
    """How many tokens, or entries, a token of a layer is compared with, on average.

    Args:
        layer_type: One of LAYER_TYPES.
        num_tokens: N, of a sequence.
        config: Of Lighthouse Attention; None: the defaults.
        window: Of the types "window" and "chunk"; None: all tokens.
        sink_tokens: Of "window".

    Returns:
        N for dense attention; at most N. S^2 / N for Lighthouse: S entries that attend to S.
    """
    if layer_type == LIGHTHOUSE:
        shape = (config or LighthouseConfig()).pyramid(num_tokens)
        return shape.num_gathered**2 / num_tokens if shape.compresses else float(num_tokens)
    if layer_type in (WINDOW, CHUNK) and window is not None:
        sinks = sink_tokens if layer_type == WINDOW else 0
        return float(min(window + sinks, num_tokens))
    return float(num_tokens)


def pairs_inside(
    layer_type: str,
    documents: Documents,
    config: LighthouseConfig | None = None,
    window: int | None = None,
    sink_tokens: int = 0,
) -> float:
    """The same where attention stays inside the documents of a batch; chunks as if one began with each document.

    Args:
        layer_type: One of LAYER_TYPES.
        documents: Of the batch.
        config: Of Lighthouse Attention; None: the defaults.
        window: Of the types "window" and "chunk"; None: all tokens.
        sink_tokens: Of "window".
    """
    total = documents.batch_size * documents.num_tokens
    lengths = np.fromiter(chain.from_iterable(documents.lengths), np.int64)
    if layer_type in (WINDOW, CHUNK) and window is not None:
        sinks = sink_tokens if layer_type == WINDOW else 0
        return float((lengths * np.minimum(lengths, window + sinks)).sum()) / total
    config = config or LighthouseConfig()
    room = documents.batch_size * config.resolve_max_documents(documents.num_tokens)
    if layer_type == LIGHTHOUSE and documents.num_documents <= room:
        shape = config.pyramid(documents.num_tokens)
        rows = np.diff(make_tables(lengths, shape, config.selection).boundaries).astype(np.float64)
        if shape.compresses and rows.sum() < total:
            return float((rows**2).sum()) / total
    return documents.attended_length


def attention_flops_per_token(sizes: Sequence[AttentionSize], pairs: Sequence[float]) -> float:
    """FLOPs of all attention layers for a token, forward and backward.

    Args:
        sizes: Of each layer.
        pairs: Of each layer, from `pairs_per_token`; a window of the layer's own bounds them.
    """
    total = 0.0
    for size, compared in zip(sizes, pairs, strict=True):
        seen = compared if size.own_window is None else min(compared, size.own_window)
        total += 6 * (size.qk_width + size.v_width) * seen
    return total


def train_flops_per_token(
    num_parameters: float, sizes: Sequence[AttentionSize] = (), pairs: Sequence[float] = ()
) -> float:
    """FLOPs of a training step for a token: the formula above.

    Args:
        num_parameters: P, from `num_used_parameters`.
        sizes: Of each attention layer.
        pairs: Of each attention layer.
    """
    return 6 * num_parameters + attention_flops_per_token(sizes, pairs)


def num_used_parameters(model: nn.Module) -> float:
    """P: the parameters that a token is multiplied with.

    Embeddings count only where another module has the same table, as a head tied to them does. Of experts those count
    that a token is sent to, on average, by transformers' names for their numbers.
    """
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    elsewhere = {
        id(parameter)
        for module in model.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    share = _share_of_experts(model)
    total = 0.0
    for name, parameter in model.named_parameters():
        if id(parameter) not in looked_up or id(parameter) in elsewhere:
            total += parameter.numel() * (share if "experts" in name.split(".") else 1.0)
    return total


def _share_of_experts(model: nn.Module) -> float:
    configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    for config in configs:
        chosen = getattr(config, "num_experts_per_tok", None)
        known = [getattr(config, name) for name in _EXPERTS if type(getattr(config, name, None)) is int]
        if type(chosen) is int and known and known[0] > 0:
            return chosen / known[0]
    return 1.0
