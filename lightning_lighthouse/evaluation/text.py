"""Validation text as every evaluation reads it: the tokens of a batch, and the loss of each."""

# B batch, N tokens, V vocabulary

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.routing.given_documents import require_documents

# Tokens whose logits are turned into float32 at a time
CHUNK = 8192


@dataclass(frozen=True)
class Text:
    """A batch of validation text.

    Args:
        inputs: `[B, N]` token ids that the model reads.
        targets: `[B, N]`, the token that follows each of them.
        num_targets: How many of the N targets are real, from the left.
        documents: Of the N tokens, where attention stays inside them.
    """

    inputs: Tensor
    targets: Tensor
    num_targets: int
    documents: Documents | None = None


def read_text(batch: Any, module: nn.Module | None = None, asker: str = "FutureLeakProbe") -> Text:
    """The text of a batch: a tensor or a mapping.

    Args:
        batch: `[B, N + 1]` token ids, or a mapping that holds them as "tokens": the last N are predicted from the
            first N. Or a mapping with "input_ids" `[B, N]`, as transformers has it, whose last token predicts nothing.
        module: Reads the batch; its documents are wanted too. None: they are not.
        asker: Who needs it, for messages.

    Raises:
        TypeError: The batch holds no token ids.
        ValueError: The batch is padded or masked.
    """
    given = f"a mapping of {', '.join(map(repr, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    has_ids = isinstance(batch, Mapping) and "tokens" not in batch
    tokens = batch.get("input_ids" if has_ids else "tokens") if isinstance(batch, Mapping) else batch
    if isinstance(tokens, Tensor):
        given = f"{tokens.dtype} {list(tokens.shape)}"
    if not isinstance(tokens, Tensor) or tokens.is_floating_point() or tokens.ndim != 2 or tokens.shape[1] < 3:
        raise TypeError(
            f"{asker} needs validation batches of token ids, [batch, at least 3 tokens], alone or in a mapping "
            f"as 'tokens' or 'input_ids', got {given}"
        )
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and not bool((mask != 0).all()):
        raise ValueError(f"{asker} needs validation batches without padding, got an attention_mask with zeros")
    documents = None if module is None else require_documents(module, batch)
    tokens = tokens.detach().clone()
    if has_ids:
        return Text(tokens, tokens.roll(-1, dims=1), tokens.shape[1] - 1, documents)
    if documents is not None and documents.num_tokens == tokens.shape[1]:
        documents = documents.drop_last()
    return Text(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), tokens.shape[1] - 1, documents)


def token_losses(module: nn.Module, inputs: Tensor, targets: Tensor, asker: str = "FutureLeakProbe") -> Tensor:
    """The cross-entropy of each target, in nats, from the module's `token_losses(inputs, targets)` or its logits.

    Args:
        module: Has a method `token_losses`, both arguments and the result `[B, N]`; or `module(inputs)` returns logits
            `[B, N, V]` or an object that has them as `logits`.
        inputs: `[B, N]`.
        targets: `[B, N]`, the token after each input.
        asker: Who needs them, for messages.

    Returns:
        `[B, N]` float32.

    Raises:
        TypeError: The module offers neither.
    """
    if callable(own := getattr(module, "token_losses", None)):
        losses = own(inputs, targets)
        if not isinstance(losses, Tensor) or losses.shape != targets.shape:
            raise TypeError(
                f"{type(module).__name__}.token_losses must return one loss for each target, {list(targets.shape)}, "
                f"got {_describe(losses)}"
            )
        return losses.float()
    output = module(inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != targets.shape:
        raise TypeError(
            f"{asker} needs the loss of each token: give {type(module).__name__} a method "
            "token_losses(inputs, targets), all [batch, tokens], or a forward(inputs) that returns logits "
            f"[batch, tokens, vocabulary] or an object with such .logits; forward returned {_describe(output)}"
        )
    rows = zip(logits.flatten(0, 1).split(CHUNK), targets.flatten().split(CHUNK), strict=True)
    return torch.cat([F.cross_entropy(x.float(), y, reduction="none") for x, y in rows]).view_as(targets)


def _describe(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
