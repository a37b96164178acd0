"""What a patch does with documents: sets them for its calls, sees to it that each layer heeds them, or refuses them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.attention.documents_lighthouse import settle_documents
from lightning_lighthouse.checks import SettingError, quoted
from lightning_lighthouse.routing.adapters.transformers_inputs import heard_inputs, require_unpacked, tensors_in
from lightning_lighthouse.routing.adapters.transformers_mask import CausalStatement
from lightning_lighthouse.routing.audit import Audit, explain_documents
from lightning_lighthouse.routing.contradictions import contradictions
from lightning_lighthouse.routing.given_documents import read_documents
from lightning_lighthouse.routing.packing import MASK, DocumentsSetting, PackedBatchError, PackingCheck, told
from lightning_lighthouse.routing.reasons import refuse
from lightning_lighthouse.routing.scope import Scope, is_without_gradients
from lightning_lighthouse.routing.targets import find_targets
from lightning_lighthouse.routing.token_mixers import require_attention_alone

# What transformers calls keys and values of tokens before
CACHES = ("past_key_values", "cache")


class KeptDocuments:
    """The documents of one patch.

    Args:
        model: Patched.
        setting: What was said of documents.
        scope: Of the patch.
        statement: What is known of the masks of a transformers model.
        layers: Every layer that must stay inside documents, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        setting: DocumentsSetting,
        scope: Scope,
        statement: CausalStatement,
        layers: dict[str, nn.Module],
    ) -> None:
        self.are_kept = setting is True
        # whether what runs while the patch is off is refused too where it packs documents
        self.watches_evaluation = False
        self._is_over = False
        self._scope, self._statement, self._layers = scope, statement, layers
        self._has_audited = False
        self._has_lighthouse = False
        self._packing = PackingCheck(ValueError if self.are_kept else PackedBatchError)
        self._contexts = ExitStack()
        self._contexts.enter_context(told(model, setting))
        # whether the documents that are set were told by the user, and are not read from what a model is called with
        self._are_told = False
        self._reads_inputs = self.are_kept
        if setting in (True, False):
            self._contexts.enter_context(heard_inputs(model, self, layers.values()))

    def hear(self, inputs: Mapping[str, Any]) -> None:
        """A transformers model is called: look whether it is packed, or read where documents lie."""
        if not self.are_kept:
            if self._refuses(inputs):
                self._packing.look(inputs)
        elif self._reads_inputs and self._are_told:
            if self._scope.documents is not None and not _has_cache(inputs):
                self._packing.refuse(contradictions(self._scope.documents, inputs))
        elif self._reads_inputs:
            # what a cache holds are no documents of these tokens
            self._set(None if _has_cache(inputs) else read_documents(inputs), is_checked=True)
            if self._scope.documents is None and self._scope.demands_documents and not is_without_gradients():
                raise SettingError(
                    "documents=True, but the model is called without position_ids or cu_seq_lens_q that say where "
                    "documents lie: let the collator return them, as DataCollatorWithFlattening does, or call "
                    "patch.set_documents before the forward"
                )

    def hear_within(self, inputs: Mapping[str, Any]) -> None:
        """What a wrapper makes of its inputs may be packed where they were not."""
        mask = inputs.get(MASK)
        # one made for each pair of tokens reaches attention, and is heeded there or refused
        is_made = mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2)
        if self.are_kept or is_made or not self._refuses(inputs):
            return
        if torch.compiler.is_compiling():
            require_unpacked(inputs)
        else:
            self._packing.look(inputs)

    def answered(self, output: Any) -> None:
        """A transformers model has run: what its backward computes again must see the documents that it ran with.

        Until then another forward may have been heard, as where one loss is that of two batches.
        """
        documents = self._scope.documents
        if documents is None or self._are_told or not self._reads_inputs:
            return

        def set_again(gradient: Tensor) -> None:
            if self._scope.documents is not documents and self._reads_inputs and not (self._are_told or self._is_over):
                self._set(documents, is_checked=True)

        for tensor in tensors_in(output):
            if tensor.requires_grad:
                tensor.register_hook(set_again)

    def trace(self, inputs: Mapping[str, Any]) -> None:
        """The same in a frame that is traced: it checks by itself, and reads nothing."""
        if not self.are_kept:
            if self._refuses(inputs):
                require_unpacked(inputs)
        elif self._reads_inputs and not self._are_told and self._scope.demands_documents:
            refuse(
                "documents=True cannot read what a model is called with that torch.compile compiles as a whole: "
                "compile its blocks, or call patch.set_documents before the forward"
            )

    def _refuses(self, inputs: Mapping[str, Any]) -> bool:
        # a prompt's padding has positions of its own, and a mask of other sizes than them
        if _has_cache(inputs) and not torch.is_grad_enabled():
            return False
        # off it is the user's model as it was, with all that transformers makes of its inputs
        return self._statement.holds or self.watches_evaluation

    def set(self, documents: Documents | None) -> None:
        """See `Patch.set_documents`."""
        if documents is not None and not isinstance(documents, Documents):
            raise TypeError(f"documents must be Documents or None, got {quoted(documents)}")
        if documents is not None and not self.are_kept:
            raise ValueError("set_documents needs patch_attention(..., documents=True)")
        self._are_told = documents is not None
        self._set(documents)

    def _set(self, documents: Documents | None, is_checked: bool = False) -> None:
        self._scope.documents = documents
        has_masks = bool(self._statement.configs)
        self._statement.starts = documents.position_ids("cpu") == 0 if documents is not None and has_masks else None
        # read from the same inputs that the mask is made of
        self._statement.fits_inputs = is_checked
        self._settle()
        if documents is not None and self._scope.documents_audit is None and not self._has_audited:
            self.audit()

    def _settle(self) -> None:
        # compiled frames cannot count documents: they read what is settled here
        if self._scope.documents is not None and self._scope.is_on and self._has_lighthouse:
            settle_documents(self._scope.documents, self._scope.settings.config)

    def attend(self, config: LighthouseConfig, has_lighthouse: bool) -> None:
        """Be told how layers attend from now on, when the scope knows it; SettingError where they could not inside."""
        if has_lighthouse and self.are_kept and config.scorer == "dilated" and config.reads_scores:
            raise SettingError(
                'scorer=\'dilated\' does not know documents yet; use scorer="norm", or selection="strided"'
            )
        self._has_lighthouse = has_lighthouse

    def demand(self, training: bool) -> None:
        """From now on calls without documents are mistakes, or not."""
        self._scope.demands_documents = training and self.are_kept
        self._settle()

    def audit(self, may_rest: bool = False) -> None:
        """Make sure at the next `check` that each layer attended inside documents, if any ran until then.

        Args:
            may_rest: Ask nothing of layers that do not run where others do, a copy of the model that has its averages.
        """
        self._scope.documents_audit = Audit(self._layers, of_documents=True, may_rest=may_rest)

    def check(self) -> bool:
        """Make sure that every layer attended inside the documents that were set; the first call that can tell decides.

        Returns:
            Whether it was this one; False where no layer ran.

        Raises:
            RuntimeError: A layer was not seen to; the message names each with the reason.
        """
        audit = self._scope.documents_audit
        if audit is None or not audit.saw_a_layer:
            return False
        self._scope.documents_audit, self._has_audited = None, True
        if missing := audit.unrouted():
            raise RuntimeError(explain_documents(missing, len(self._layers)))
        return True

    @contextmanager
    def none(self) -> Iterator[None]:
        """Inside there are no documents, nor are any demanded; after it those of before."""
        scope, statement = self._scope, self._statement
        before = scope.documents, statement.starts, scope.demands_documents, self._reads_inputs
        scope.documents, statement.starts, scope.demands_documents, self._reads_inputs = None, None, False, False
        are_told = self._are_told
        try:
            yield
        finally:
            self._are_told = are_told
            if not self._is_over:
                scope.documents, statement.starts, scope.demands_documents, self._reads_inputs = before

    def finish(self) -> None:
        """Check what has not been checked yet, as nothing comes after it."""
        self.check()
        self._packing.finish()

    def end(self) -> None:
        """Let go of the model."""
        self._is_over = True
        self._scope.documents = self._scope.documents_audit = None
        self._scope.demands_documents = False
        self._contexts.close()
        self._packing.forget()


def _has_cache(inputs: Mapping[str, Any]) -> bool:
    return any(inputs.get(name) is not None for name in CACHES)


def find_others(model: nn.Module, layers: dict[str, nn.Module], targets: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """What is to attend inside documents beside the routed layers, by name: dense ones, those that `select` leaves out.

    Args:
        model: Searched through.
        layers: That `select` chose.
        targets: Those of them that are routed.

    Raises:
        SettingError: Something that is no attention goes across documents.
    """
    require_attention_alone(model, layers.values())
    try:
        found = find_targets(model)
    except ValueError:
        # what `select` names by itself
        found = {}
    return {name: module for name, module in {**layers, **found}.items() if name not in targets}
