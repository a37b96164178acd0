"""What a step shows of its attention: what each layer compared with what, and what the scores had to rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.attention.layer_types import CHUNK, DENSE, LIGHTHOUSE, WINDOW, spread_over
from lightning_lighthouse.checks import is_named
from lightning_lighthouse.model.flops import (
    AttentionSize,
    attention_size,
    num_used_parameters,
    pairs_inside,
    pairs_per_token,
    train_flops_per_token,
)
from lightning_lighthouse.model.language_model import LanguageModel
from lightning_lighthouse.notices import say
from lightning_lighthouse.routing.layers import scope_of
from lightning_lighthouse.routing.score_spread import SpreadMeter
from lightning_lighthouse.routing.targets import find_targets
from lightning_lighthouse.runs import layout
from lightning_lighthouse.training.stopwatch import token_ids

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    from lightning_lighthouse.phases.ledger import PhaseTotals
    from lightning_lighthouse.phases.phase import Phase
    from lightning_lighthouse.routing.patch import Patch


class AttentionCurves:
    """Follows the attention of a fit, batch by batch.

    Args:
        trainer: Of the fit.
        module: In training.
        patch: Of the model; None in a dense baseline.
        select: As `patch_attention` takes it.
        keeps_documents: Whether attention stays inside the documents of a batch.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        patch: Patch | None,
        select: str | None,
        *,
        keeps_documents: bool,
    ) -> None:
        self._trainer, self._module, self._patch = trainer, module, patch
        self._keeps_documents = keeps_documents
        self._layers = patch.layers if patch is not None else _layers(module, select)
        # FSDP1 has cut the parameters into flat pieces, which tell no sizes
        is_flat = is_named(trainer.strategy, "FSDPStrategy")
        self._sizes = None if is_flat else _sizes(self._layers)
        self._num_parameters = num_used_parameters(module)
        if is_flat:
            say("FSDP1 shows no sizes of parameters, so there is no MFU")
        elif self._sizes is None:
            say("the sizes of the attention layers are not known, so there is no MFU")
        # tokens of a sequence: in the batch, and those that attention sees
        self._counted = self._num_tokens = 0
        self._types: tuple[str, ...] = ()
        self._meter: SpreadMeter | None = None
        # by what each layer does, and how many tokens it sees
        self._known: dict[Any, tuple[float, float]] = {}
        # by the name of a phase, at a length
        self._costs: tuple[int, dict[str, float]] | None = None
        # of the phase, when the last point was read
        self._calls = (0, 0)

    def start_phase(self, totals: PhaseTotals) -> None:
        """The batch to come is the first of a phase, or of a fit."""
        self._calls = totals.routed_calls, totals.dense_calls

    def begin(self, batch: Any, is_due: bool) -> None:
        """A batch begins, in its phase; where a point is due, the spread of its scores is measured."""
        ids = token_ids(batch)
        self._counted = 0 if ids is None or ids.ndim == 0 else ids.shape[-1]
        whole = getattr(self._trainer.strategy, "tokens_before_slicing", None)
        if whole is not None and ids is not None and ids.ndim == 2:
            # attention sees the sequence, of which this rank holds a slice
            self._counted = whole // ids.shape[0]
        self._num_tokens = self._length(self._counted)
        self._types = () if self._patch is None else tuple(self._patch.attending)
        self._meter = SpreadMeter() if is_due and self._patch is not None and self._patch.is_on else None
        if self._patch is not None:
            self._patch.scope.spread = self._meter

    def flops(self, tokens: int) -> tuple[float, float]:
        """FLOPs of this batch, and of the same if all layers were dense; zeros where they are not known.

        Args:
            tokens: Of the batch, as `count_tokens` counts them.
        """
        if self._sizes is None or not self._num_tokens:
            return 0.0, 0.0
        seen = tokens * self._num_tokens / self._counted
        of_phase, of_dense = self._flops_per_token(self._sizes)
        return seen * of_phase, seen * of_dense

    def _flops_per_token(self, sizes: list[AttentionSize]) -> tuple[float, float]:
        documents = self._documents()
        if documents is not None:
            # each batch has its own
            return self._counted_by(partial(pairs_inside, documents=documents), sizes)
        settings = None if self._patch is None else self._patch.scope.settings
        key = self._num_tokens, self._types, settings
        if key not in self._known:
            self._known[key] = self._counted_by(partial(pairs_per_token, num_tokens=self._num_tokens), sizes)
        return self._known[key]

    def _counted_by(self, pairs: Callable[..., float], sizes: list[AttentionSize]) -> tuple[float, float]:
        """FLOPs of a token as the layers attend, and as dense ones would."""
        told = {}
        if self._patch is not None:
            settings = self._patch.scope.settings
            told = {"config": settings.config, "window": settings.window, "sink_tokens": settings.sink_tokens}
        by_kind = {kind: pairs(kind, **told) for kind in {DENSE, *self._types}}
        dense = [by_kind[DENSE]] * len(sizes)
        own = [by_kind[kind] for kind in self._types] if self._patch is not None else dense
        both = [train_flops_per_token(self._num_parameters, sizes, compared) for compared in (own, dense)]
        return both[0], both[1]

    def _documents(self) -> Documents | None:
        """Those that attention stays inside in this batch."""
        if not self._keeps_documents:
            return None
        scopes = [self._patch.scope] if self._patch is not None else map(scope_of, self._layers.values())
        return next((scope.documents for scope in scopes if scope is not None), None)

    def costs(self, names: Sequence[str], phases: Sequence[Phase], config: LighthouseConfig) -> dict[str, float] | None:
        """FLOPs of a token by the name of each phase, dense too; None where they are not known.

        Args:
            names: Of the phases, the dense one last.
            phases: Those before it.
            config: Of those that have none of their own.
        """
        if self._sizes is None or self._patch is None or not self._num_tokens:
            return None
        if self._costs is None or self._costs[0] != self._num_tokens:
            layers, count = self._patch.layers, self._num_tokens
            found = {DENSE: train_flops_per_token(self._num_parameters, self._sizes, [float(count)] * len(layers))}
            for name, phase in zip(names, phases, strict=False):
                told = phase.attention or config, phase.window, phase.sink_tokens
                types = zip(layers, spread_over(phase.layer_types, len(layers)), strict=True)
                kinds = [kind if layer in self._patch.targets else DENSE for layer, kind in types]
                pairs = [pairs_per_token(kind, count, *told) for kind in kinds]
                found[name] = train_flops_per_token(self._num_parameters, self._sizes, pairs)
            self._costs = count, found
        return self._costs[1]

    def values(self, totals: PhaseTotals) -> dict[str, float]:
        """What a point shows; nothing in a dense baseline."""
        if self._patch is None:
            return {}
        values = {layout.ROUTED_SHARE: self._routed_share(totals)}
        self._patch.scope.spread = None
        settings = self._patch.scope.settings
        if self._meter is not None and (spread := self._meter.mean()) is not None:
            values[layout.SCORE_SPREAD] = spread
        if settings.window is not None and {WINDOW, CHUNK} & set(self._types):
            values[layout.WINDOW] = float(settings.window)
        if LIGHTHOUSE in self._types and self._num_tokens:
            shape = settings.config.pyramid(self._num_tokens)
            values[layout.TOP_K] = float(settings.config.resolve_top_k(self._num_tokens))
            for level in range(shape.num_levels if shape.compresses else 0):
                values[f"{layout.ENTRIES}{level}"] = float(shape.num_tiles * shape.candidates(level))
        return values

    def _routed_share(self, totals: PhaseTotals) -> float:
        """Of all attention layers' calls since the last point, those that were not dense: counted, not planned."""
        if not self._types:
            return 0.0
        before, self._calls = self._calls, (totals.routed_calls, totals.dense_calls)
        routed, dense = (new - old for new, old in zip(self._calls, before, strict=True))
        share = routed / (routed + dense) if routed + dense else 0.0
        return share * sum(kind != DENSE for kind in self._types) / len(self._types)

    def _length(self, counted: int) -> int:
        """Tokens of a sequence that attention sees, of those in the batch."""
        asked = getattr(getattr(self._trainer, "datamodule", None), "seq_len", None)
        # the last one is only predicted
        is_shifted = isinstance(self._module, LanguageModel) or asked == counted - 1
        return counted - 1 if is_shifted and counted > 1 else counted


def _layers(module: nn.Module, select: str | None) -> dict[str, nn.Module]:
    """The attention layers of a model that is not patched; none where they are not found."""
    try:
        return find_targets(module, select)
    except ValueError:
        return {}


def _sizes(layers: dict[str, nn.Module]) -> list[AttentionSize] | None:
    sizes = [attention_size(layer) for layer in layers.values()]
    known = [size for size in sizes if size is not None]
    return known if known and len(known) == len(sizes) else None
