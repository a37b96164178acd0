"""Which tokens of a batch a loss counts, by the names that transformers gives to what says it: labels, and masks."""

# B batch, N tokens that are read, one fewer than the batch holds

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.context.collectives import all_gather
from lightning_lighthouse.context.group import current
from lightning_lighthouse.context.slices import IGNORED, INPUTS, LABELS
from lightning_lighthouse.routing.packing import BOUNDARIES, DOCUMENTS, EMBEDDINGS, IDS, MASK, POSITIONS

# What transformers, or who collates for it, changes the loss by, and nothing here does
UNREAD = (
    INPUTS, EMBEDDINGS, "token_type_ids", "shift_labels", "num_items_in_batch", "loss_mask", "completion_mask",
    "assistant_masks",
)  # fmt: skip


def padding(batch: Mapping[str, Any] | Tensor, tokens: Tensor) -> Iterator[tuple[str, bool | Tensor]]:
    """What could show that a batch is padded: the line to refuse it with, and whether it is, 0-dim bool.

    Raises:
        SettingError: The mask is none of its tokens.
    """
    mask = _mask_of(batch, tokens)
    if mask is not None:
        yield (
            f"the {MASK} of this batch has zeros, and padding would be trained on as text: pack documents instead "
            f"(docs/use/documents.md), or set {LABELS} to {IGNORED} on padding that stands behind the text, and leave "
            f"{MASK} out",
            (mask == 0).any(),
        )


def tells_documents(batch: Mapping[str, Any] | Tensor) -> bool:
    """Whether the documents of a batch are read from its mask, so that padding is apart from the text."""
    if not isinstance(batch, Mapping) or any(batch.get(name) is not None for name in (DOCUMENTS, *IDS, *BOUNDARIES)):
        return False
    mask, positions = batch.get(MASK), batch.get(POSITIONS)
    # positions of another form are read without it
    return mask is not None and (positions is None or positions.shape == mask.shape)


def targets_of(
    batch: Mapping[str, Any] | Tensor, tokens: Tensor, leaves_padding_out: bool = False
) -> tuple[Tensor, int | Tensor]:
    """What the first N tokens are to predict, `[B, N]`, -100 where nothing; and how many that are.

    Where ranks share the sequences it is how many a rank has on average, so that the mean over ranks is that of all.

    Args:
        batch: As a language model gets it. Its labels are those of transformers: as long as the tokens, `[B, N + 1]`,
            each in the place of its token, so that the first predicts nothing.
        tokens: `[B, N + 1]` of it.
        leaves_padding_out: Where the mask is 0 nothing is predicted.

    Raises:
        SettingError: It holds what is not read here, or labels of another form.
    """
    held = batch if isinstance(batch, Mapping) else {}
    unread = [name for name in UNREAD if held.get(name) is not None]
    if unread:
        raise SettingError(
            f"{', '.join(unread)} of this batch would change the loss, and {'is' if len(unread) == 1 else 'are'} not "
            f"read here: leave out of a batch what is not tokens, {LABELS} or documents"
        )
    labels, mask = held.get(LABELS), _mask_of(batch, tokens) if leaves_padding_out else None
    if labels is None and mask is None:
        return tokens[:, 1:], tokens[:, 1:].numel()
    labels = tokens if labels is None else labels
    if not isinstance(labels, Tensor) or labels.shape != tokens.shape or labels.dtype != torch.int64:
        raise SettingError(
            f"{LABELS} must be int64, as long as the tokens, {list(tokens.shape)}, and not shifted, got "
            f"{_described(labels)}"
        )
    targets = labels[:, 1:]
    if mask is not None:
        targets = targets.masked_fill(mask[:, 1:] == 0, IGNORED)
    count, context = (targets != IGNORED).sum(), current()
    if context is not None:
        count = all_gather(count.view(1), context.size, context.group).sum() / context.size
    return targets, count


def mean_of(total: Tensor, count: int | Tensor) -> Tensor:
    """The mean of so many losses; 0 of none."""
    return total / (count if isinstance(count, int) else count + (count == 0))


def _mask_of(batch: Mapping[str, Any] | Tensor, tokens: Tensor) -> Tensor | None:
    """The mask of the tokens `[B, N + 1]`: of one of N the last target goes with the token before it."""
    mask = batch.get(MASK) if isinstance(batch, Mapping) else None
    if mask is None:
        return None
    length = tokens.shape[1]
    allowed = [(len(tokens), length), (len(tokens), length - 1)]
    if not isinstance(mask, Tensor) or tuple(mask.shape) not in allowed:
        raise SettingError(
            f"{MASK} must be {list(allowed[0])} or {list(allowed[1])} for tokens {list(tokens.shape)}, got "
            f"{_described(mask)}"
        )
    return mask if mask.shape[1] == length else torch.cat((mask, mask[:, -1:]), 1)


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
