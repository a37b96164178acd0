"""Why a call of SDPA was not routed, and what to do about it: every reason with its remedy.

A layer of transformers knows its config, so that its remedy can name the setting to change and its value.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from lightning_lighthouse.checks import quoted
from lightning_lighthouse.routing.own_windows import own_chunk, own_window

ROUTED = "routed"
ENTERED = "entered"
EXITED = "exited"
# as ENTERED, in train mode under no_grad: routed all the same
ENTERED_WITHOUT_GRADIENTS = "entered without gradients"
# as ENTERED, in train mode, of a layer that nothing is trained by: the frozen part of a model, or a teacher
ENTERED_FROZEN = "entered frozen"
# a call that is not routed, and stays inside documents
INSIDE = "dense inside documents"
NO_REASONS = frozenset({ENTERED, EXITED, ENTERED_WITHOUT_GRADIENTS, ENTERED_FROZEN, INSIDE})

MASK = "attn_mask was given"
NOT_CAUSAL = "is_causal is False"
DROPOUT = "dropout_p is not 0"
LAYOUT = "q, k and v are not plain [batch, heads, tokens, head dim] tensors"
LENGTHS = "query and key lengths differ"
SIZES = "batch sizes or head dims of q, k and v differ"
HEADS = "query heads are not a multiple of key/value heads"
CHECKPOINT_INSIDE = "checkpoint() inside the attention module"
INFERENCE = "it ran without gradients in eval mode"
TEACHER = "it ran without gradients in train mode, while others ran with them"
NO_CALL = "no call of scaled_dot_product_attention was seen"
NOT_RUN = "its forward did not run"
NEED_WEIGHTS = "need_weights is True"
NO_CAUSAL_MASK = "is_causal was given without attn_mask"
PADDING = "key_padding_mask was given"
NOT_SELF = "query, key and value are not the same tensor"
NOT_BATCHED = "the input is not a plain tensor of 3 dimensions"
EXTRA_KEYS = "add_bias_kv or add_zero_attn is set"

# how a model is named that is one layer
ITSELF = "the module itself"

LEAVE_DENSE = "leave it dense with dense_layers"

REMEDIES = {
    MASK: "a mask is never ignored; where it is only the causal one, pass attn_mask=None and is_causal=True, and where "
    "it keeps documents apart, that and documents=True",
    NOT_CAUSAL: f"pass is_causal=True if the layer is causal; else it cannot be routed, {LEAVE_DENSE}",
    DROPOUT: "set the dropout of the attention weights to 0; other dropout may stay",
    LAYOUT: "pass q, k and v as plain tensors of 4 dimensions, heads before tokens",
    LENGTHS: f"cross-attention or a cache, which cannot be routed: {LEAVE_DENSE}",
    SIZES: f"q, k and v must have one batch size and one head dim (latent attention has two): {LEAVE_DENSE}",
    HEADS: f"{LEAVE_DENSE}",
    CHECKPOINT_INSIDE: "call checkpoint() around the block, not inside its attention",
    INFERENCE: f"a frozen part of the model: {LEAVE_DENSE}; to route it all the same, put it into train mode, or ask "
    "for on(inference=True)",
    TEACHER: f"a frozen teacher's outputs are then not its own: {LEAVE_DENSE}, or choose the layers to train with "
    "select",
    NO_CALL: "attention is written out, or runs another kernel: call torch.nn.functional.scaled_dot_product_attention "
    "or lightning_lighthouse.causal_attention in its forward",
    NOT_RUN: f"the model did not call this module, or called another of its methods: {LEAVE_DENSE}, or choose the "
    "modules with select",
    NEED_WEIGHTS: "that is the default of nn.MultiheadAttention: pass need_weights=False",
    NO_CAUSAL_MASK: "to nn.MultiheadAttention is_causal is a hint about attn_mask: pass the causal attn_mask too",
    PADDING: "a padding mask is never ignored: train without padding",
    NOT_SELF: f"pass one tensor as query, key and value; cross-attention cannot be routed, {LEAVE_DENSE}",
    NOT_BATCHED: "pass [batch, tokens, dim], or [tokens, batch, dim] with batch_first=False",
    EXTRA_KEYS: f"such a layer cannot be routed: make it without, or {LEAVE_DENSE}",
}

# What a layer that is routed and trains nothing may mean, by what it is
FROZEN = (
    "routed layers that train nothing, for neither their weights nor their inputs need gradients: {}; right for the "
    f"frozen first layers of a model, but a teacher's outputs are then not its own: {LEAVE_DENSE}, or choose the "
    "layers to train with select"
)
COPIES = (
    "copies of {}, made since the model was patched, run without gradients in train mode and attend as the originals "
    "do: right for an average of the model, but a reference's outputs are then not its own: put it into eval mode, or "
    "copy the model before, as in setup, and choose the layers to train with select"
)

# Remedies while documents are set, where leaving a layer dense is none
SELECT = "leave it out with select"
IN_DOCUMENTS = {
    MASK: "a mask is never ignored: pass attn_mask=None and is_causal=True, and no padding but as documents of its own",
    NOT_CAUSAL: f"pass is_causal=True if the layer is causal, else {SELECT}",
    LENGTHS: f"cross-attention or a cache knows no documents: {SELECT}",
    SIZES: f"q, k and v must have one batch size and one head dim: {SELECT}",
    HEADS: SELECT,
    EXTRA_KEYS: f"make it without, or {SELECT}",
    NOT_SELF: f"pass one tensor as query, key and value, or {SELECT}",
    PADDING: "pass padding as documents of its own, at the end of each sequence",
}

# Fields of a transformers config that hold the dropout of the attention weights.
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout")


def remedy(reason: str, layer: nn.Module) -> str:
    """What to do about `reason` in `layer`; "" for a reason that says so itself."""
    config = getattr(layer, "config", None)
    if hasattr(config, "_attn_implementation"):
        return _remedy_of_transformers(reason, layer, config) or REMEDIES.get(reason, "")
    return REMEDIES.get(reason, "")


def _remedy_of_transformers(reason: str, layer: nn.Module, config: Any) -> str:
    if reason == MASK:
        windows = {"sliding_window": own_window(layer), "attention_chunk_size": own_chunk(layer)}
        windowed = [
            f"sequences longer than {name}={size} cannot be routed: {LEAVE_DENSE}; else "
            for name, size in windows.items()
            if size
        ]
        return "".join(windowed) + (
            "call the model without attention_mask: padding cannot be routed; documents packed by position_ids can, "
            "with documents=True; where there are none and the model is compiled as a whole, transformers makes a mask "
            "because it cannot look: compile the blocks instead, or set hf_assume_causal=True; a family that always "
            f"adds a mask of its own cannot be routed: {LEAVE_DENSE}"
        )
    if reason == DROPOUT:
        values = {name: getattr(config, name, None) for name in _DROPOUTS}
        named = [f"{name}=0 (now {value})" for name, value in values.items() if value]
        return f"set {', '.join(named)} in the model's config" if named else ""
    if reason == NO_CALL:
        softcap = getattr(config, "attn_logit_softcapping", None)
        if softcap is not None:
            return (
                f"attn_logit_softcapping={softcap} is beyond SDPA, and so beyond Lighthouse: such a model cannot be "
                "routed, choose one without softcapping"
            )
        name = config._attn_implementation
        if not _has_sdpa(layer):
            return "transformers has no attn_implementation='sdpa' for this family: it cannot be routed"
        if name not in ("sdpa", "lighthouse_sdpa"):
            return (
                f"the model was made with attn_implementation={quoted(name)}: make it with attn_implementation='sdpa'"
            )
    return ""


def _has_sdpa(layer: nn.Module) -> bool:
    """Whether a model made of such layers may be made with "sdpa": its class says so, in the file of the layer's."""
    kinds = vars(sys.modules[type(layer).__module__]).values()
    answers = [kind._supports_sdpa for kind in kinds if isinstance(kind, type) and hasattr(kind, "_supports_sdpa")]
    return any(answers) or not answers


class CrossingError(ValueError):
    """A call of attention would go across the documents that are set."""


# While compiling it runs at trace time; an error raised in traced code itself would be told as one of the compiler's.
@torch.compiler.assume_constant_result
def refuse(line: str) -> None:
    """Raise CrossingError."""
    raise CrossingError(line)


def crossing(reason: str, layer: nn.Module | None) -> str:
    """The line for a call that cannot stay inside the documents which are set.

    Args:
        reason: The first rule that it breaks.
        layer: The patched module that runs; None while a frame is traced.
    """
    advice = remedy(reason, layer) if layer is not None else REMEDIES.get(reason, "")
    # documents are set already
    advice = IN_DOCUMENTS.get(reason, advice)
    if reason == MASK and layer is not None and (size := own_window(layer) or own_chunk(layer)):
        advice = (
            f"it sees {size} tokens back by a mask of its own, which knows no documents: train such a model on "
            "sequences of one document, or within its windows, or across documents with documents='ignore'"
        )
    return f"{name_of(layer)} would attend across documents: {reason}" + (f"; {advice}" if advice else "")


def name_of(layer: nn.Module | None) -> str:
    """How a message calls a patched module."""
    route = None if layer is None else vars(layer).get("_lighthouse_route")
    return getattr(route, "name", "") or ("an attention layer" if layer is None else type(layer).__name__)
