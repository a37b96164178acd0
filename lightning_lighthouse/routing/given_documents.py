"""Where the documents of a batch lie, from whatever form the batch says it in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.routing.packing import (
    BOUNDARIES,
    DOCUMENTS,
    IDS,
    MASK,
    by_name,
    ids_of,
    is_packed,
    segments,
    sizes,
    token_positions,
)


def read_documents(given: Any) -> Documents | None:
    """The documents that `given` tells, or None where it tells nothing.

    A batch on the host costs no wait. Of one on a GPU the numbers are copied to the host, once.

    Args:
        given: `Documents`; ids of documents, `[batch, tokens]`; or a mapping, a named tuple, a dataclass or another
            object, of which the first that exists counts: "documents", `Documents`; "document_ids" or "seq_idx",
            `[batch, tokens]`; "cu_seq_lens_q", the boundaries of documents in the tokens of all rows; "position_ids",
            `[batch, tokens]`, or `[4, batch, tokens]` with those of the text first; an "attention_mask" that numbers
            segments. Of positions, tokens that "attention_mask" masks are a document of their own for each run of them,
            and segments are kept apart.

    Raises:
        ValueError: What lies under a name of ids, or of boundaries, is none.
    """
    if isinstance(given, Documents):
        return given
    if isinstance(given, Tensor):
        return Documents.from_ids(_rows(given)) if _is_for_tokens(given) else None
    given = by_name(given)
    if given is None:
        return None
    if isinstance(given.get(DOCUMENTS), Documents):
        return given[DOCUMENTS]
    ids = next((found for name in IDS if (found := ids_of(given.get(name))) is not None), None)
    if ids is not None:
        return Documents.from_ids(_rows(ids))
    shape = sizes(given)
    boundaries = next((given[name] for name in BOUNDARIES if isinstance(given.get(name), Tensor)), None)
    if boundaries is not None and shape is not None:
        return Documents.from_cu_seqlens(boundaries, shape[1])
    positions = token_positions(given)
    if not _is_for_tokens(positions):
        numbers = segments(given)
        return None if numbers is None or not bool((numbers > 1).any()) else Documents.from_ids(_rows(numbers))
    positions = _rows(positions).long()
    # some hand in one row for all
    if shape is not None and positions.shape[0] == 1 < shape[0]:
        positions = positions.expand(shape[0], -1)
    mask = given.get(MASK)
    if isinstance(mask, Tensor) and mask.shape == positions.shape:
        return Documents.from_ids(_segmented(positions, mask.to(positions.device)))
    return Documents.from_positions(positions)


def documents_of(module: nn.Module, batch: Any) -> Documents | None:
    """The documents of a batch that `module` is about to get, or None where there are none.

    Args:
        module: Its method `documents(batch)`, if it has one, goes before all that the batch says by itself. It returns
            any form that a batch may have, ids as a tensor too, or None.
        batch: On the host, where it can be. A tensor is one of tokens, and tells nothing.

    Raises:
        TypeError: The method returns what documents cannot be read from.
    """
    own = getattr(module, DOCUMENTS, None)
    told = own(batch) if callable(own) else None
    documents = read_documents(told)
    # what the batch says by itself would be taken for what the method says
    if documents is None and told is not None and by_name(told) is None:
        raise TypeError(
            f"{type(module).__name__}.documents(batch) must return lightning_lighthouse.Documents, ids of documents as "
            f"an integer tensor [batch, tokens], a mapping that holds them, or None, got {_described(told)}"
        )
    if documents is None and not isinstance(batch, Tensor):
        documents = read_documents(batch)
    return documents


def documents_of_prompt(module: nn.Module, batch: Any) -> Documents | None:
    """The same, of a batch that may hold prompts: None too where all that is apart from the text is padding.

    What goes on with a prompt attends to keys and values of tokens before, which no documents are known of.

    Raises:
        SettingError: It packs documents, but not where they are looked for.
    """
    if is_packed(batch):
        return require_documents(module, batch)
    return documents_of(module, batch) if callable(getattr(module, DOCUMENTS, None)) else None


def require_documents(module: nn.Module, batch: Any) -> Documents:
    """The same, of a batch that must have them.

    Raises:
        SettingError: It has none.
    """
    documents = documents_of(module, batch)
    if documents is None and is_packed(batch):
        raise SettingError(
            f"documents=True, but the documents of this batch lie inside a part of the {type(batch).__name__} that it "
            f"is: add a method documents(batch) to {type(module).__name__} that returns those of the tokens it reads"
        )
    if documents is None:
        raise SettingError(
            'documents=True, but the batch holds none: add "document_ids" [batch, tokens], as LighthouseRecipe does '
            'with document_ids=True, "documents" (lightning_lighthouse.Documents), or a method documents(batch) to '
            f"{type(module).__name__}"
        )
    return documents


def _segmented(positions_BN: Tensor, mask_BN: Tensor) -> Tensor:
    """Numbers of documents, where those of padding, 0 in the mask, hold no text, whatever its positions."""
    jumps = positions_BN[:, 1:] != positions_BN[:, :-1] + 1
    starts = (mask_BN[:, 1:] != mask_BN[:, :-1]) | (jumps & (mask_BN[:, 1:] != 0))
    return torch.nn.functional.pad(starts.long(), (1, 0)).cumsum(1)


def _is_for_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.ndim in (1, 2) and value.numel() > 0


def _described(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _rows(value: Tensor) -> Tensor:
    return value[None] if value.ndim == 1 else value
