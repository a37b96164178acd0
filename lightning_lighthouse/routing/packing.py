"""What in a batch shows that it packs documents, and the refusal to attend across them without a word.

Batches are told by the names that the field gives to such tensors. A tensor in host memory is looked at there, each of
them. What lies on a GPU is looked at by the GPU: the host waits for the first verdict of a check, because whoever packs
does so from the first batch on as a rule, and for none after it. Later verdicts are copied while the batch trains, and
are read when it has ended if they have arrived, else with the batch behind it, so that the host can run ahead as ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any, Literal
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor, nn

from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.checks import SettingError, quoted

# True: attention stays inside documents. False: a packed batch is an error. "ignore": it attends across documents.
DocumentsSetting = bool | Literal["ignore"]
IGNORE: Literal["ignore"] = "ignore"

DOCUMENTS = "documents"
# Numbers that change where a document begins
IDS = ("document_ids", "seq_idx")
# Where documents begin in the tokens of all rows together, and at last how many tokens there are
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
POSITIONS = "position_ids"
MASK = "attention_mask"
# What batches call their token ids, `[batch, tokens]`, and what stands for them, `[batch, tokens, width]`
TOKENS = ("tokens", "input_ids")
EMBEDDINGS = "inputs_embeds"
# Axes of positions whose first are those of the text
TEXT_AND_AXES = 4
# How deep batches are searched: dictionaries in lists in a dictionary of several loaders
DEPTH = 3


class PackedBatchError(ValueError):
    """A batch packs documents, and nobody said what to do about it."""


def check_documents(documents: DocumentsSetting, hf_assume_causal: bool) -> None:
    """Raise ValueError if `documents` is no setting; SettingError if the other one says that there are none."""
    if type(documents) is not bool and documents != IGNORE:
        raise ValueError(f"documents must be true, false or {IGNORE!r}, got {quoted(documents)}")
    if documents is True and hf_assume_causal:
        raise SettingError(
            "documents=True and hf_assume_causal=True exclude each other: the one says that batches hold documents, "
            "the other that they hold none; leave hf_assume_causal out, for documents=True builds no mask either"
        )


def refusal(sign: str) -> str:
    """The line that a batch is refused with.

    Args:
        sign: How it shows that it is packed.
    """
    return (
        f"this batch packs documents ({sign}), and attention would go across them: set documents=True to keep it "
        f"inside each of them, or documents={IGNORE!r} to let it go across"
    )


def restarts(positions: Tensor) -> Tensor:
    """Where a token has no higher position than the one before it: `[..., N] -> [..., N - 1]` bool."""
    return positions[..., 1:] <= positions[..., :-1]


def token_positions(batch: Mapping[str, Any]) -> Any:
    """The positions of a batch, `[batch, tokens]` where they are any.

    Models of images may get four axes, `[4, batch, tokens]`: those of the text, then three that rotate.
    """
    positions, shape = batch.get(POSITIONS), sizes(batch)
    if shape is None or not isinstance(positions, Tensor) or positions.ndim != 3:
        return positions
    # else they are others, of a batch of four
    is_texts = positions.shape[0] == TEXT_AND_AXES and positions.shape[1] in (1, shape[0])
    return positions[0] if is_texts else positions


def segments(batch: Mapping[str, Any]) -> Tensor | None:
    """The attention mask of a batch, `[batch, tokens]`, where it may number segments from 1 on; 0 is padding."""
    mask = _integers(batch.get(MASK))
    return None if mask is None or mask.dtype == torch.bool else mask


def sizes(batch: Mapping[str, Any]) -> tuple[int, int] | None:
    """Sequences of a batch, and tokens of each; a row without a batch is one. None where nothing shows them."""
    for name in (*TOKENS, EMBEDDINGS, POSITIONS):
        value = batch.get(name)
        if not isinstance(value, Tensor):
            continue
        shape = tuple(value.shape[:-1] if name == EMBEDDINGS else value.shape)
        if shape and (len(shape) <= 2 or name != POSITIONS):
            shape = shape if len(shape) > 1 else (1, *shape)
            return shape[0], shape[1]
    return None


def signs(batch: Mapping[str, Any]) -> Iterator[tuple[str, bool | Tensor]]:
    """What could show that a batch is packed: each sign with whether it does, a 0-dim bool tensor where data decides.

    Args:
        batch: Named tensors, or the keyword arguments of a model's forward. `documents` is a `Documents`; ids and
            positions are `[batch, tokens]`; positions of three axes, `[3, batch, tokens]`, show nothing.
    """
    documents = batch.get(DOCUMENTS)
    if isinstance(documents, Documents):
        yield "documents of a sequence are several", documents.is_packed
    for name in IDS:
        ids = ids_of(batch.get(name))
        if ids is not None:
            yield f"{name} of a sequence differ", (ids[..., 1:] != ids[..., :-1]).any()
    shape = sizes(batch)
    for name in BOUNDARIES:
        boundaries = batch.get(name)
        if isinstance(boundaries, Tensor) and boundaries.ndim == 1:
            yield f"{name} name several documents", boundaries.numel() > 2 and _cut(boundaries, shape)
    positions, mask = _integers(token_positions(batch)), batch.get(MASK)
    if positions is not None:
        found = restarts(positions)
        if isinstance(mask, Tensor) and mask.shape == positions.shape:
            # padding has whatever positions it was given
            real = mask.to(positions.device) != 0
            found = found & real[..., 1:] & real[..., :-1]
        yield f"{POSITIONS} restart", found.any()
    numbers = segments(batch)
    if numbers is not None:
        yield f"{MASK} numbers several segments", (numbers > 1).any()


def is_packed(batch: Any) -> bool:
    """Whether a batch shows that it is packed; waits for what is on a GPU."""
    return any(bool(found) for part in named_parts(batch) for _, found in signs(part))


def _cut(boundaries: Tensor, shape: tuple[int, int] | None) -> Tensor:
    """Whether a document ends inside a row; the last one may end before it does, and padding repeat where."""
    inside = boundaries != 0 if shape is None else boundaries % shape[1] != 0
    return (inside & (boundaries != boundaries[-1])).any()


def ids_of(value: Any) -> Tensor | None:
    """A tensor or an array under a name of ids, whatever its type and shape; None where there is none."""
    value = torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" else value
    return value if isinstance(value, Tensor) and value.ndim and value.numel() else None


def _integers(value: Any) -> Tensor | None:
    """A tensor of whole numbers for each token, or None."""
    if not isinstance(value, Tensor) or value.is_floating_point() or value.ndim not in (1, 2) or not value.numel():
        return None
    return value


def by_name(batch: Any) -> Mapping[str, Any] | None:
    """What a batch holds, by name: a mapping, a named tuple, a dataclass or another object; None without names."""
    if isinstance(batch, Mapping):
        return batch
    if is_dataclass(batch) and not isinstance(batch, type):
        return {field.name: getattr(batch, field.name, None) for field in fields(batch)}
    if isinstance(batch, tuple):
        return batch._asdict() if hasattr(batch, "_asdict") else None
    return None if isinstance(batch, Tensor | list) else getattr(batch, "__dict__", None)


def named_parts(batch: Any, depth: int = DEPTH) -> Iterator[Mapping[str, Any]]:
    """Everything in a batch that names what it holds."""
    named = by_name(batch)
    if named is not None:
        yield named
    if depth:
        # the attributes of whatever object may lead anywhere, to a whole data set
        holds = isinstance(batch, Mapping | list | tuple) or is_dataclass(batch)
        values = () if not holds else named.values() if named is not None else batch
        for value in values:
            yield from named_parts(value, depth - 1)


class PackingCheck:
    """Raises PackedBatchError at a batch that shows packing; see above for when.

    Args:
        error: Raised by `refuse`, where it is another one.
    """

    def __init__(self, error: type[ValueError] = PackedBatchError) -> None:
        self._error = error
        self._has_waited = False
        # what the GPU has been asked: lines of errors, its answers, and when they have arrived
        self._asked: deque[tuple[list[str], Tensor, torch.cuda.Event]] = deque()
        # positions and mask that were looked at last, and their versions: layers of a model pass the same ones on
        self._last: list[tuple[ref[Tensor], int] | None] = []

    # a module that keeps one is copied and pickled
    def __deepcopy__(self, memo: dict[int, Any]) -> PackingCheck:
        return PackingCheck(self._error)

    def __reduce__(self) -> tuple[type, tuple[type[ValueError]]]:
        return PackingCheck, (self._error,)

    def look(self, batch: Any) -> None:
        """Look at a batch, or at the keyword arguments of a forward."""
        parts = (part for part in named_parts(batch) if not self._is_known(part))
        self.refuse((refusal(sign), found) for part in parts for sign, found in signs(part))

    def refuse(self, faults: Iterable[tuple[str, bool | Tensor]]) -> None:
        """Raise, with its line, where one of these is found."""
        self.read()
        on_gpu: list[tuple[str, Tensor]] = []
        for line, found in faults:
            if isinstance(found, Tensor) and found.device.type == "cuda":
                on_gpu.append((line, found))
            elif bool(found):
                raise self._error(line)
        if on_gpu:
            self._ask(on_gpu)

    def finish(self) -> None:
        """Wait for what is not answered yet: no batch comes that would."""
        self.read(waits=True)

    def forget(self) -> None:
        """Drop what is not answered yet."""
        self._asked.clear()

    def _is_known(self, part: Mapping[str, Any]) -> bool:
        """Whether positions and mask are those that were looked at last, handed on by a model to its parts."""
        given = [value if isinstance(value := part.get(name), Tensor) else None for name in (POSITIONS, MASK)]
        if all(x is None for x in given) or any(name in part for name in (DOCUMENTS, *IDS, *BOUNDARIES)):
            return False
        last, self._last = self._last, [None if x is None else (ref(x), version_of(x)) for x in given]
        return len(last) == len(given) and all(
            known is None if x is None else known is not None and known[0]() is x and known[1] == version_of(x)
            for x, known in zip(given, last, strict=True)
        )

    def _ask(self, found: list[tuple[str, Tensor]]) -> None:
        lines, flags = [line for line, _ in found], torch.stack([flag for _, flag in found])
        answers = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True)
        answers.copy_(flags, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._asked.append((lines, answers, arrived))
        if not self._has_waited:
            self._has_waited = True
            self.read(waits=True)

    def read(self, waits: bool = False) -> None:
        """Read the answers that have arrived, or wait for all of them."""
        while self._asked and (waits or self._asked[0][2].query()):
            lines, answers, arrived = self._asked.popleft()
            arrived.synchronize()
            for line, is_so in zip(lines, answers.tolist(), strict=True):
                if is_so:
                    self._asked.clear()
                    raise self._error(line)


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 where nobody counts."""
    # inference tensors count no versions
    return 0 if tensor.is_inference() else tensor._version


# What the user has said of documents, by module; a module that is not here belongs to no patch and no callback.
_told: WeakKeyDictionary[nn.Module, DocumentsSetting] = WeakKeyDictionary()


@contextmanager
def told(model: nn.Module, documents: DocumentsSetting) -> Iterator[None]:
    """Let every module of `model` know inside what was said of documents."""
    modules = list(model.modules())
    before = {module: _told[module] for module in modules if module in _told}
    _told.update(dict.fromkeys(modules, documents))
    try:
        yield
    finally:
        for module in modules:
            _told.pop(module, None)
        _told.update(before)


def said_of_documents(module: nn.Module) -> DocumentsSetting | None:
    """What was said of documents to a patch or callback that has this module; None where there is none."""
    return _told.get(module)
