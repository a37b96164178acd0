"""Sequences shared by several ranks: which calls of attention can be, and SDPA replaced while some are.

A call that cannot be shared is an error, never a result over this rank's tokens alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_lighthouse.context.group import Context
from lightning_lighthouse.context.heard import running
from lightning_lighthouse.routing.reasons import DROPOUT, LENGTHS, MASK, NOT_CAUSAL, ROUTED, name_of
from lightning_lighthouse.routing.scope import Scope

PROMPTS = "run a prompt or another sequence of its own inside lightning_lighthouse.whole_sequences()"
REMEDIES = {
    MASK: "pass attn_mask=None and is_causal=True: neither padding nor packed documents can be shared by ranks",
    NOT_CAUSAL: "pass is_causal=True if the layer is causal; else the model cannot be trained with shared sequences",
    DROPOUT: "set the dropout of the attention weights to 0; other dropout may stay",
    LENGTHS: f"a cache or cross-attention cannot be shared; {PROMPTS}",
}


class SharedCallError(RuntimeError):
    """A call of attention cannot be shared by the ranks of a sequence."""


def check_shared(context: Context, scope: Scope | None, query: Tensor, reason: str) -> None:
    """Refuse a call that would see this rank's tokens alone.

    Args:
        context: The ranks that share the sequence.
        scope: That of the layer, where it is patched.
        query: `[B, H, n, D]`.
        reason: ROUTED for plain causal self-attention, else the rule that the call breaks.

    Raises:
        SharedCallError: It is no such call, has another length than this rank's slice, or is one inside documents.
    """
    name = running() or name_of(None if scope is None else scope.layer)
    if reason != ROUTED:
        remedy = REMEDIES.get(reason)
        advice = f"; {remedy}" if remedy else ""
        _refuse(f"{name} cannot share a sequence over {context.size} ranks: {reason}{advice}")
    if scope is not None and scope.documents is not None:
        _refuse(f"{name} cannot share a sequence over {context.size} ranks: attention stays inside documents")
    if context.num_tokens is not None and query.shape[2] != context.num_tokens:
        _refuse(
            f"{name} sees {query.shape[2]:,} tokens, this rank's slice has {context.num_tokens:,}: attend over the "
            f"whole slice, or {PROMPTS}"
        )


# While compiling this runs at trace time; an error raised in traced code would be told as one of the compiler's.
@torch.compiler.assume_constant_result
def _refuse(line: str) -> None:
    raise SharedCallError(line)
