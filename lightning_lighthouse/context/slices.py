"""This rank's part of a batch, whatever its form, and a mark by which ranks know that they were given the same one.

| a batch | its slice |
|---|---|
| `[B, N + 1]`, or `{"tokens": [B, N + 1]}` | n + 1 tokens: neighbours share one, so inputs and targets stay aligned |
| `{"input_ids": [B, N]}`, as for transformers | n tokens, `position_ids`, and labels shifted before they are cut |

What else has as many columns is cut alike.
"""

# B batch, N tokens, W ranks, n = N / W

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.context.group import Context, current

TOKENS, INPUTS, LABELS, POSITIONS = "tokens", "input_ids", "labels", "position_ids"
POSITION_NAMES = (POSITIONS, "cache_position")
# Says of whole sequences what a slice does not hold
DOCUMENTS = "documents"
# Of a target that no loss counts, as in torch's cross-entropy
IGNORED = -100


def slice_tokens(tokens_BN: Tensor) -> Tensor:
    """This rank's tokens with the target of its last one: `[B, N + 1] -> [B, n + 1]`; all where none are shared.

    Raises:
        SettingError: The ranks cannot share N tokens evenly.
    """
    context = current()
    return tokens_BN if context is None else _cut(tokens_BN, tokens_BN.shape[1], *_bounds(tokens_BN, 1, context))


def num_inputs(batch: Any) -> int | None:
    """Tokens N of a sequence that attention sees; None where the form of the batch is not known."""
    found = _tokens(batch)
    return None if found is None else found[0].shape[1] - found[1]


def slice_batch(batch: Any, context: Context) -> Any:
    """This rank's part of a batch of a known form.

    Raises:
        SettingError: The ranks cannot share N tokens evenly.
    """
    found = _tokens(batch)
    assert found is not None, "the caller has asked"
    tokens, more = found
    start, end = _bounds(tokens, more, context)
    if not isinstance(batch, Mapping):
        return _cut(batch, tokens.shape[1], start, end)
    batch = {name: value for name, value in batch.items() if name != DOCUMENTS}
    shifted = _shifted(batch, context) if not more else {}
    sliced = {name: _cut(value, tokens.shape[1], start, end, name) for name, value in {**batch, **shifted}.items()}
    if not more and POSITIONS not in batch:
        positions = torch.arange(start, end, device=tokens.device)
        sliced[POSITIONS] = positions.expand(len(tokens), -1)
    return sliced


def shorten(batch: Any, num_tokens: int) -> Any:
    """The first tokens of each sequence of a batch of a known form."""
    found = _tokens(batch)
    assert found is not None, "the caller has asked"
    tokens, more = found
    if not isinstance(batch, Mapping):
        return batch[:, : num_tokens + more]
    items = {name: value for name, value in batch.items() if name != DOCUMENTS}
    return {name: _cut(value, tokens.shape[1], 0, num_tokens + more, name) for name, value in items.items()}


def mark_of(batch: Any, device: torch.device) -> Tensor:
    """A number, `[1]` int64, that differs for other whole numbers in a batch, and for the same in another order."""
    marks: list[Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            values = tensor.detach().flatten().long()
            # sums and products wrap around, alike on every device
            weights = torch.arange(1, values.numel() + 1, device=values.device) * 0x9E3779B1
            marks.append(((values + 1) * weights).sum().to(device) * (2 * len(marks) + 1))
        return tensor

    apply_to_collection(batch, Tensor, add, allow_frozen=True)
    return torch.stack(marks).sum().view(1) if marks else torch.zeros(1, dtype=torch.int64, device=device)


def _tokens(batch: Any) -> tuple[Tensor, int] | None:
    """The token ids of a batch, `[B, .]`, and how many more they are than attention sees."""
    if isinstance(batch, Tensor):
        is_tokens = batch.ndim == 2 and not (batch.is_floating_point() or batch.is_complex())
        return (batch, 1) if is_tokens else None
    if isinstance(batch, Mapping):
        for name, more in ((TOKENS, 1), (INPUTS, 0)):
            value = batch.get(name)
            if isinstance(value, Tensor) and value.ndim == 2:
                return value, more
    return None


def _bounds(tokens: Tensor, more: int, context: Context) -> tuple[int, int]:
    total = tokens.shape[1] - more
    if total % context.size or not total:
        raise SettingError(
            f"{total:,} tokens cannot be shared by {context.size} ranks; choose seq_len a multiple of {context.size}"
        )
    count = total // context.size
    return context.rank * count, (context.rank + 1) * count + more


def _cut(value: Any, width: int, start: int, end: int, name: str = "") -> Any:
    if not isinstance(value, Tensor):
        return value
    # positions may be the same for all sequences, `[N]`, or of several axes, `[axes, B, N]`
    dim = value.ndim - 1 if name in POSITION_NAMES else 1
    if value.ndim > dim >= 0 and value.shape[dim] == width:
        # transformers views what it is given as one dimension
        return value.narrow(dim, start, end - start).contiguous()
    return value


def _shifted(batch: Mapping[str, Any], context: Context) -> dict[str, Any]:
    """What the loss of transformers takes: targets that cross the edges of ranks, and how many a rank has on average.

    So the mean over the ranks is that of all targets, also where one rank has fewer of them.
    """
    labels = batch.get(LABELS)
    if not isinstance(labels, Tensor) or "shift_labels" in batch:
        return {}
    targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:]
    return {"shift_labels": targets, "num_items_in_batch": (targets != IGNORED).sum().double() / context.size}
