"""transformers builds no mask where the user states that it would be plain causal.

transformers makes one mask for all layers, by the name of their attention. Here the name `lighthouse_sdpa` is entered
in both of its tables: the attention is the entry "sdpa", which ends in a call of SDPA that is routed; the mask is
`mask_or_none`. While a statement holds, that gives no mask, so that every layer, dense ones too, runs plain causal
attention. Each batch is held to the statement: a mask that would differ from the causal one is an error, never ignored.
In eager code the error is raised at once; in compiled code, where nothing can be read while a graph is traced, the
graph carries the check.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.routing.adapters.transformers_inputs import FIELD, config_of
from lightning_lighthouse.routing.packing import IGNORE, DocumentsSetting

NAME = "lighthouse_sdpa"
ORDINARY = "sdpa"

_statements: list[CausalStatement] = []


class CausalStatement:
    """What is known of the masks which a model's training batches lead to.

    Args:
        model: Searched for transformers models.
        assume: Whether the user says of a model made with "sdpa" that all of them are plain causal; one made with
            "lighthouse_sdpa" says so itself.
        documents: What was said of packed documents. "ignore": masks that keep documents apart are not built. True:
            neither, because the attention keeps them apart.

    Raises:
        SettingError: `assume` without a transformers model whose attention is "sdpa".
    """

    def __init__(self, model: nn.Module, assume: bool, documents: DocumentsSetting = False) -> None:
        self.holds = False
        self.ignores_documents = documents == IGNORE
        # where documents begin in the batch that runs, [batch, tokens] bool on the host, while they are set
        self.starts: Tensor | None = None
        # whether they were read from what the model is called with, of which its mask is made
        self.fits_inputs = False
        found = {id(config): config for config in map(config_of, model.modules()) if config is not None}
        named = [config for config in found.values() if getattr(config, FIELD) == NAME]
        ordinary = [config for config in found.values() if getattr(config, FIELD) == ORDINARY]
        # those of which every mask is said to be causal
        self.assumed = named + (ordinary if assume else [])
        self._renamed = ordinary if assume or documents else []
        self.configs = named + self._renamed
        if assume and not self.configs:
            others = sorted({str(getattr(config, FIELD)) for config in found.values()})
            found_instead = f"attn_implementation={', '.join(others)}" if others else "none"
            raise SettingError(
                f"hf_assume_causal=True needs a transformers model made with attn_implementation='sdpa' in "
                f"{type(model).__name__}, found {found_instead}"
            )
        if not self.configs:
            return
        register_lighthouse_sdpa()
        for config in self._renamed:
            setattr(config, FIELD, NAME)
        _statements.append(self)

    def speaks_of(self, config: Any) -> bool:
        """Whether it says something now of the masks of a model with this config."""
        says = self.starts is not None or (self.holds and (self.ignores_documents or _is_among(config, self.assumed)))
        return says and _is_among(config, self.configs)

    def withdraw(self) -> None:
        """Give every config its former name. Harmless when done before."""
        self.holds, self.starts = False, None
        if self in _statements:
            _statements.remove(self)
        for config in self._renamed:
            if getattr(config, FIELD) == NAME:
                setattr(config, FIELD, ORDINARY)
        self._renamed = []


def register_lighthouse_sdpa() -> str:
    """Enter `lighthouse_sdpa` in transformers' tables of attention functions and of masks.

        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation=register_lighthouse_sdpa())

    Such a model is one of "sdpa", and states that its training batches are plain causal: without padding, without
    restarting positions. It needs `patch_attention` or one of the callbacks to be routed. Saved configs do not
    name the attention, so that the model loads anywhere.

    Returns:
        The name, "lighthouse_sdpa".

    Raises:
        ImportError: transformers is missing.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if NAME not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(NAME, sdpa_attention_forward)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask_or_none)
    return NAME


def mask_or_none(*args: Any, **settings: Any) -> Tensor | None:
    """The mask of "sdpa", or None under a statement that holds; the arguments are those of transformers' `sdpa_mask`.

    Windows, chunks, caches, bidirectional layers and masks with functions of the user's own get the mask of "sdpa".

    Raises:
        ValueError: The statement is wrong for this batch. RuntimeError in compiled code.
    """
    from transformers.masking_utils import sdpa_mask

    config = settings.get("config")
    speaking = [statement for statement in _statements if statement.speaks_of(config)]
    if args or not speaking or not _covers_whole_sequence(settings):
        return sdpa_mask(*args, **settings)
    statement, attention_mask = speaking[-1], settings.get("attention_mask")
    if statement.starts is not None:
        _check_documents(settings, statement.starts, fits_inputs=statement.fits_inputs)
        return None
    if not _is_among(config, statement.assumed) and attention_mask is not None:
        # documents are looked for only without one: all that it can mean is padding
        return sdpa_mask(*args, **settings)
    _check_padding(attention_mask)
    _check_pattern(settings, ignores_documents=statement.ignores_documents)
    return None


def _is_among(config: Any, configs: list[Any]) -> bool:
    return any(config is candidate for candidate in configs)


def _covers_whole_sequence(settings: dict[str, Any]) -> bool:
    """Whether every token attends from the first to itself: no cache, no window, nothing that cannot be looked into."""
    q_length, q_offset = settings.get("q_length"), settings.get("q_offset", 0)
    if q_length is None:
        # transformers before 5.3 gave the positions themselves
        positions = settings.get("cache_position")
        q_length = None if positions is None else positions.shape[0]
    return (
        q_length is not None
        and q_length == settings.get("kv_length")
        and not isinstance(q_offset, Tensor)
        and q_offset == 0
        and _sees_all(settings)
        and not settings.get("use_vmap", False)
        and "allow_is_bidirectional_skip" not in settings
        and not _asks_for_a_mask(settings)
    )


def _sees_all(settings: dict[str, Any]) -> bool:
    """Whether no window or chunk of the layer's own is shorter than the sequence."""
    size = settings.get("local_size")
    return size is None or size >= settings["kv_length"]


def _asks_for_a_mask(settings: dict[str, Any]) -> bool:
    """Whether the model builds on the mask itself, also where it is plain causal; with packing it is never left out."""
    from transformers.masking_utils import causal_mask_function

    is_plain = settings.get("mask_function", causal_mask_function) is causal_mask_function
    return is_plain and not settings.get("allow_is_causal_skip", True)


def _check_padding(attention_mask: Tensor | None) -> None:
    if attention_mask is not None:
        _require(attention_mask.bool().all(), "the attention_mask of this batch masks tokens (padding)")


def _check_pattern(settings: dict[str, Any], *, ignores_documents: bool) -> None:
    """Look along the first column, the diagonal and both its neighbours, which costs N and not N x N.

    Packed documents do not see the first token; tokens of a bidirectional block see the next.
    """
    seen = _seen(settings)
    if seen is None:
        return
    first, itself, before, behind = seen
    fits = itself.all() & ~behind.any()
    if not ignores_documents:
        fits = fits & first.all() & before.all()
    _require(
        fits,
        "this batch's mask differs from the causal one (documents packed by restarting position_ids, or blocks)",
    )


def _check_documents(settings: dict[str, Any], starts_BN: Tensor, *, fits_inputs: bool) -> None:
    """Look along the diagonal whether tokens see the one before them exactly inside the documents that are set.

    Padding is no more than a document, or several, as long as none of them holds both it and text.
    """
    batch, tokens = settings["batch_size"], settings["kv_length"]
    if tuple(starts_BN.shape) != (batch, tokens):
        # the attention says so, and has the names of the layers
        return
    mask = settings.get("attention_mask")
    if fits_inputs and mask is None:
        return
    starts_BN = starts_BN.to(settings.get("device", "cpu"))
    if mask is not None:
        real = mask.bool()
        _require_documents(
            (starts_BN[:, 1:] | (real[:, 1:] == real[:, :-1])).all(),
            "its attention_mask masks tokens of a document and not others of it",
        )
    seen = _seen(settings)
    if seen is None:
        return
    _, itself, before, behind = seen
    fits = itself.all() & ~behind.any() & (before[:, 1:] == ~starts_BN[:, 1:]).all()
    _require_documents(fits, "its mask, as by position_ids, keeps other tokens apart than the documents do")


def _seen(settings: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Whether each token sees the first, itself, the one before it (`[B, N]` each), and the next (`[B, N - 1]`).

    None for the plain causal mask.
    """
    from transformers.masking_utils import causal_mask_function

    sees = settings.get("mask_function", causal_mask_function)
    if sees is causal_mask_function:
        return None
    device = settings.get("device", "cpu")
    row = torch.arange(settings["batch_size"], device=device)[:, None]
    head = torch.zeros(1, 1, dtype=torch.long, device=device)
    token = torch.arange(settings["kv_length"], device=device)[None, :]
    first, itself = sees(row, head, token, torch.zeros_like(token)), sees(row, head, token, token)
    before = sees(row, head, token, (token - 1).clamp(min=0))
    return first, itself, before, sees(row, head, token[:, :-1], token[:, 1:])


def _require_documents(condition: Tensor, fault: str) -> None:
    _raise_unless(condition, f"documents are set for this batch, but {fault}: let both say the same")


def _require(condition: Tensor, fault: str) -> None:
    line = (
        f"masks were stated to be plain causal (hf_assume_causal=True, or attn_implementation={NAME!r}), but {fault}: "
        "train without padding and with positions that do not restart, or drop the statement, and set documents=True "
        "where documents are packed; no mask was ignored"
    )
    _raise_unless(condition, line)


def _raise_unless(condition: Tensor, line: str) -> None:
    if torch.compiler.is_compiling():
        torch._assert_async(condition, line)
    elif not bool(condition):
        raise ValueError(line)
