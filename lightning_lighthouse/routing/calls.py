"""A stand-in for SDPA that looks at scope and call.

While a model is patched, `torch.nn.functional.scaled_dot_product_attention`, and bare copies of it in loaded modules,
are `causal_attention`: it routes a call by the type of its layer when a scope that is on is entered and the call is
plain causal self-attention, and hands it to the stock function otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_lighthouse.attention.documents_sdpa import documents_sdpa
from lightning_lighthouse.attention.inputs import autocast, check_inputs
from lightning_lighthouse.attention.layer_types import CHUNK, DENSE, LIGHTHOUSE, WINDOW
from lightning_lighthouse.attention.lighthouse import lighthouse_attention
from lightning_lighthouse.attention.rotation import Rotation
from lightning_lighthouse.attention.sdpa import keep_gradient_order, stock_sdpa
from lightning_lighthouse.attention.windows import chunk_attention, window_attention
from lightning_lighthouse.context.edges import shared_chunk, shared_window
from lightning_lighthouse.context.entries import can_exchange_entries, exchange_entries
from lightning_lighthouse.context.exchange import exchange_tokens, first_kv_head, num_neighbours
from lightning_lighthouse.context.group import Context, current
from lightning_lighthouse.context.heard import hear
from lightning_lighthouse.context.queries import exchange_queries, shared_lighthouse
from lightning_lighthouse.routing.reasons import (
    CHECKPOINT_INSIDE,
    DROPOUT,
    HEADS,
    INSIDE,
    LAYOUT,
    LENGTHS,
    MASK,
    NOT_CAUSAL,
    ROUTED,
    SIZES,
    crossing,
    name_of,
    refuse,
)
from lightning_lighthouse.routing.scope import UNSELECTED, Scope, autograd_mark, note, scopes
from lightning_lighthouse.routing.shared_calls import check_shared
from lightning_lighthouse.routing.targets import SDPA

_bare_copies: list[tuple[dict[str, Any], str]] = []
_settings = ExitStack()
# patches, as one, and contexts that share sequences
_users = 0


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention that is routed where its module is; the arguments are those of torch's.

    It stands in for `F.scaled_dot_product_attention` while a model is patched. A model that keeps a copy of SDPA where
    none is found can call it by itself: it is torch's own function in modules that are not routed.

    Args:
        query: `[B, Hq, N, D]`.
        key: `[B, Hkv, N, D]`.
        value: `[B, Hkv, N, D]`.
        attn_mask: A call with a mask is never routed.
        dropout_p: Must be 0 to be routed.
        is_causal: Must be True to be routed.
        scale: Factor of the attention logits; None: `D ** -0.5`.
        enable_gqa: Whether Hq may be a multiple of Hkv.

    Returns:
        `[B, Hq, N, D]`.
    """
    scope = None
    for candidate in scopes:
        if candidate.layer_type and (candidate.is_on or candidate.documents is not None):
            scope = candidate
    reason = _why_dense(scope, query, key, value, attn_mask, dropout_p, is_causal) if scope is not None else ""
    context = current()
    hear(query, key)
    if context is not None:
        check_shared(context, scope, query, _why_not_plain(query, key, value, attn_mask, dropout_p, is_causal))
        return _attend_shared(context, scope, query, key, value, scale, reason)
    if scope is not None and scope.documents is not None and not _is_left_out(scope, query, reason):
        return _attend_inside(scope, query, key, value, scale, reason)
    if scope is None or reason != ROUTED or scope.layer_type == UNSELECTED:
        if scope is not None and scope.layer_type != UNSELECTED:
            note(reason)
        return stock_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    note(ROUTED)
    return _attend(scope, query, key, value, scale)


def _attend_shared(
    context: Context, scope: Scope | None, q: Tensor, k: Tensor, v: Tensor, scale: float | None, reason: str
) -> Tensor:
    """Attention over a sequence of which this rank has a part: for a share of the heads, over all of its tokens.

    Where the ranks cannot share the key/value heads out, they share out the queries too.
    """
    # before they are sent: autocast halves what goes over the wire, and other dtypes would be joined
    q, k, v = autocast(q, k, v)
    check_inputs(q, k, v)
    is_by_heads = num_neighbours(k.shape[1], context) == context.size
    if scope is not None and scope.layer_type != UNSELECTED:
        note(reason)
        is_local = scope.layer_type != LIGHTHOUSE or can_exchange_entries(scope.settings.config, q.shape[2], context)
        if reason == ROUTED and is_local:
            return _attend_locally(context, scope, q, k, v, scale)
        if reason == ROUTED and is_by_heads:
            attend = partial(_attend, scope, scale=scale, first_head=first_kv_head(k.shape[1], context))
            return exchange_tokens(attend, q, k, v, context)
        if reason == ROUTED:
            config, step, rotation = scope.settings.config, _measured(scope, q, k), _rotation(scope, q)
            return shared_lighthouse(q, k, v, config, context, scale=scale, step=step, rotation=rotation)
    if is_by_heads:
        return exchange_tokens(partial(_attend_causally, scale=scale), q, k, v, context)
    return exchange_queries(q, k, v, context, scale=scale, sdpa="auto")


def _attend_locally(context: Context, scope: Scope, q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """Attention that exchanges less than the heads of all tokens, as the type of the layer allows."""
    settings, sdpa = scope.settings, scope.settings.config.sdpa
    if scope.layer_type == LIGHTHOUSE:
        step, rotation = _measured(scope, q, k), _rotation(scope, q)
        return exchange_entries(q, k, v, settings.config, context, scale=scale, step=step, rotation=rotation)
    assert settings.window is not None
    if scope.layer_type == CHUNK:
        return shared_chunk(q, k, v, context, settings.window, scale=scale, sdpa=sdpa)
    sink_tokens = settings.sink_tokens
    return shared_window(q, k, v, context, settings.window, sink_tokens=sink_tokens, scale=scale, sdpa=sdpa)


def _attend_causally(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    out = stock_sdpa(q, k, v, is_causal=True, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    # the gradient comes from an exchange, in whatever order that has
    return keep_gradient_order(out)


def _is_left_out(scope: Scope, query: Tensor, reason: str) -> bool:
    """Whether a call of a layer that `select` leaves out is none that documents could be set for."""
    return scope.layer_type == UNSELECTED and (reason != ROUTED or not _has_sizes(scope, query))


def _has_sizes(scope: Scope, query: Tensor) -> bool:
    """Whether the documents are those of as many sequences, as long."""
    documents = scope.documents
    return documents is None or (documents.batch_size, documents.num_tokens) == (query.shape[0], query.shape[2])


def _attend_inside(scope: Scope, q: Tensor, k: Tensor, v: Tensor, scale: float | None, reason: str) -> Tensor:
    """Attention inside the documents that are set, or an error: never across them."""
    documents = scope.documents
    assert documents is not None
    if reason != ROUTED:
        refuse(crossing(reason, scope.layer))
    if not _has_sizes(scope, q):
        refuse(
            f"documents cover {documents.batch_size} x {documents.num_tokens} tokens, attention in "
            f"{name_of(scope.layer)} sees {q.shape[0]} x {q.shape[2]}; for targets shifted by one pass "
            "document_ids[:, :-1]"
        )
    if scope.layer_type in (DENSE, UNSELECTED):
        note(INSIDE)
        q, k, v = autocast(q, k, v)
        return documents_sdpa(q, k, v, documents, scale=scale, backend=scope.settings.config.sdpa)
    note(ROUTED)
    return _attend(scope, q, k, v, scale)


def _attend(scope: Scope, q: Tensor, k: Tensor, v: Tensor, scale: float | None, first_head: int = 0) -> Tensor:
    """Attention as the type of the layer asks, inside documents where some are set.

    `first_head` is the number of the first of these key/value heads among those of the layer.
    """
    settings, documents = scope.settings, scope.documents
    config = settings.config
    if scope.layer_type == WINDOW:
        assert settings.window is not None
        sink_tokens = settings.sink_tokens
        return window_attention(
            q, k, v, settings.window, sink_tokens=sink_tokens, scale=scale, sdpa=config.sdpa, documents=documents
        )
    if scope.layer_type == CHUNK:
        assert settings.window is not None
        return chunk_attention(q, k, v, settings.window, scale=scale, sdpa=config.sdpa, documents=documents)
    step = _measured(scope, q, k)
    return lighthouse_attention(
        q, k, v, config, scale=scale, step=step, first_head=first_head, documents=documents,
        rotation=_rotation(scope, q),
    )  # fmt: skip


def _rotation(scope: Scope, q: Tensor) -> Rotation | None:
    """How q and k were rotated, where pooling must know it."""
    if scope.settings.config.rotate == "before" or scope.rotary is None:
        return None
    return scope.rotary.rotation(q)


def _measured(scope: Scope, q: Tensor, k: Tensor) -> Tensor | None:
    """Show the audit queries and keys that are routed; return the step, where the selection draws for it."""
    config = scope.settings.config
    # a compiled frame holds nothing of this
    if not torch.compiler.is_compiling():
        if scope.audit is not None:
            scope.audit.spread.add(scope.layer, q, k, config)
        if scope.spread is not None:
            scope.spread.add(scope.layer, q, k, config)
    return scope.step if config.selection == "random" else None


def _why_dense(
    scope: Scope,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
) -> str:
    """ROUTED for plain causal self-attention, else the first rule that the call breaks."""
    if not torch.compiler.is_compiling() and scope.autograd_mark != autograd_mark():
        return CHECKPOINT_INSIDE
    return _why_not_plain(query, key, value, attn_mask, dropout_p, is_causal)


def _why_not_plain(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool
) -> str:
    """The same for a call of whatever layer."""
    if attn_mask is not None:
        return MASK
    if not is_causal:
        return NOT_CAUSAL
    if dropout_p != 0:
        return DROPOUT
    if query.is_nested or query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return LAYOUT
    if query.shape[2] != key.shape[2]:
        return LENGTHS
    if key.shape != value.shape or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        return SIZES
    if query.shape[1] % key.shape[1] != 0:
        return HEADS
    return ROUTED


def swap() -> None:
    """Put `causal_attention` in the place of SDPA, until `unswap` was called as often."""
    global _users
    _users += 1
    if _users == 1:
        setattr(F, SDPA, causal_attention)
        _settings.enter_context(_scope_allowed_in_checkpoint())
        _settings.enter_context(_every_layer_runs())
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("torch", "lightning_lighthouse"):
            continue
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if value is stock_sdpa:
                module.__dict__[attribute] = causal_attention
                _bare_copies.append((module.__dict__, attribute))


def unswap() -> None:
    """Undo `swap`. Harmless where it is undone."""
    global _users
    _users = max(0, _users - 1)
    if _users:
        return
    setattr(F, SDPA, stock_sdpa)
    for namespace, attribute in _bare_copies:
        # somebody else's later replacement is theirs
        if namespace.get(attribute) is causal_attention:
            namespace[attribute] = stock_sdpa
    _bare_copies.clear()
    _settings.close()


@contextmanager
def _every_layer_runs() -> Iterator[None]:
    """Keep torch from its kernel for whole encoder layers, which in eval mode passes the attention module by."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _scope_allowed_in_checkpoint() -> Iterator[None]:
    """Let Dynamo trace `scope.layer_type` under activation checkpointing where it cannot see that it is undone.

    Newer torch does see it. Until then the setting tells Dynamo not to replay such a side effect in the recompute,
    which is right for one that ends with the module's forward.
    """
    from torch._dynamo import config, side_effects

    if hasattr(side_effects.SideEffects, "snapshot_attr_mutation"):
        yield
        return
    with config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        yield
