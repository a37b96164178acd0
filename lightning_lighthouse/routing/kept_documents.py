"""What a patch does with documents: sets them for its calls, sees to it that each layer heeds them, or refuses them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.checks import SettingError, shown
from lightning_lighthouse.routing.adapters.transformers_inputs import look_before_forward
from lightning_lighthouse.routing.adapters.transformers_mask import CausalStatement
from lightning_lighthouse.routing.audit import Audit, explain_documents
from lightning_lighthouse.routing.packing import DocumentsSetting, PackingCheck, told
from lightning_lighthouse.routing.scope import Scope
from lightning_lighthouse.routing.targets import find_targets


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
        self._packing = PackingCheck()
        self._contexts = ExitStack()
        self._contexts.enter_context(told(model, setting))
        if setting is False:
            self._contexts.enter_context(look_before_forward(model, self._look, self._refuses))

    def _refuses(self) -> bool:
        # off it is the user's model as it was, with all that transformers makes of its inputs
        return self._statement.holds or self.watches_evaluation

    def _look(self, inputs: Mapping[str, Any]) -> None:
        if self._refuses():
            self._packing.look(inputs)

    def set(self, documents: Documents | None) -> None:
        """See `Patch.set_documents`."""
        if documents is not None and not isinstance(documents, Documents):
            raise TypeError(f"documents must be Documents or None, got {shown(repr(documents))}")
        if documents is not None and not self.are_kept:
            raise ValueError("set_documents needs patch_attention(..., documents=True)")
        self._scope.documents = documents
        has_masks = bool(self._statement.configs)
        self._statement.starts = documents.position_ids("cpu") == 0 if documents is not None and has_masks else None
        if documents is not None and self._scope.documents_audit is None and not self._has_audited:
            self.audit()

    def demand(self, training: bool) -> None:
        """From now on calls without documents are mistakes, or not."""
        self._scope.demands_documents = training and self.are_kept

    def audit(self) -> None:
        """Make sure at the next `check` that each layer attended inside documents, if any ran until then."""
        self._scope.documents_audit = Audit(self._layers, of_documents=True)

    def check(self) -> None:
        """Make sure that every layer attended inside the documents that were set; the first call that can tell decides.

        Raises:
            RuntimeError: A layer was not seen to; the message names each with the reason.
        """
        audit = self._scope.documents_audit
        if audit is None or not audit.saw_a_layer:
            return
        self._scope.documents_audit, self._has_audited = None, True
        if missing := audit.unrouted():
            raise RuntimeError(explain_documents(missing, len(self._layers)))

    def check_config(self, config: LighthouseConfig) -> None:
        """Raise SettingError if a Lighthouse layer could not stay inside documents."""
        if self.are_kept and config.scorer == "dilated" and config.reads_scores:
            raise SettingError(
                'scorer=\'dilated\' does not know documents yet; use scorer="norm", or selection="strided"'
            )

    @contextmanager
    def none(self) -> Iterator[None]:
        """Inside there are no documents, nor are any demanded; after it those of before."""
        scope, statement = self._scope, self._statement
        before = scope.documents, statement.starts, scope.demands_documents
        scope.documents, statement.starts, scope.demands_documents = None, None, False
        try:
            yield
        finally:
            if not self._is_over:
                scope.documents, statement.starts, scope.demands_documents = before

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


def find_others(model: nn.Module, layers: dict[str, nn.Module], targets: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """What attends beside the routed layers, by name: the dense layers, and those that `select` leaves out.

    Args:
        model: Searched through.
        layers: That `select` chose.
        targets: Those of them that are routed.
    """
    try:
        found = find_targets(model)
    except ValueError:
        # what `select` names by itself
        found = {}
    return {name: module for name, module in {**layers, **found}.items() if name not in targets}
