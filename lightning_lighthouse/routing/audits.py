"""Which layers of a patch were judged: each once, by the first batch in which it is routed.

A layer may be dense in the first phase, or handed back, and be routed in a later one. An audit is open wherever a layer
is routed that was not judged yet; one that was found dense is not judged again, so that a warning is said once.
"""

from __future__ import annotations

from torch import nn

from lightning_lighthouse.attention.layer_types import DENSE
from lightning_lighthouse.checks import warn
from lightning_lighthouse.routing.audit import Audit
from lightning_lighthouse.routing.scope import Scope


class Audits:
    """Opens and closes the audit of a scope.

    Args:
        scope: Its calls leave their notes in the audit that is open.
        targets: The layers by name that may be routed.
    """

    def __init__(self, scope: Scope, targets: dict[str, nn.Module]) -> None:
        self._scope, self._targets = scope, targets
        self._judged: set[str] = set()
        # the layers that were judged and not routed, with the reason; those of them that nobody asked for yet
        self.missing: dict[str, str] = {}
        self._untold: dict[str, str] = {}
        # of the audit that is open
        self._may_wait = False
        self._config = scope.settings.config

    @property
    def has_run(self) -> bool:
        """Whether there is something to judge by, or a layer found dense that was not told."""
        return bool(self._untold) or (self._scope.audit is not None and self._scope.audit.saw_a_layer)

    def ask(self, may_wait: bool = False) -> None:
        """Have those layers judged that are routed from the next call on and never were.

        Args:
            may_wait: Leave the audit open until a layer ran: for a patch that was on before, whose check may come
                before the next batch.
        """
        routed = {name: layer for name, layer in self._targets.items() if _is_routed(layer)}
        audit = self._scope.audit
        if audit is not None and audit.saw_a_layer:
            if routed.keys() <= audit.targets.keys():
                return
            # a layer that joins has left no notes yet, and those of the others are not its own
            self._judge(audit)
            audit = None
        self._may_wait = may_wait and (audit is None or self._may_wait)
        self._config = self._scope.settings.config
        is_open = not self._judged.issuperset(routed)
        self._scope.audit = Audit(routed, told=frozenset(self._judged)) if is_open else None

    def finish(self) -> dict[str, str]:
        """Judge by the open audit, which closes it; return the layers found dense since this was last called."""
        audit = self._scope.audit
        if audit is not None and (audit.saw_a_layer or not self._may_wait):
            self._judge(audit)
        untold, self._untold = self._untold, {}
        return untold

    def _judge(self, audit: Audit) -> None:
        self._scope.audit = None
        found = audit.unrouted()
        self.missing |= found
        self._untold |= found
        first_judged = {name: layer for name, layer in audit.targets.items() if name not in self._judged}
        self._judged |= set(first_judged)
        flat_scores = audit.spread.warning(first_judged, self._config)
        for line in filter(None, (*audit.trains_nothing(), flat_scores)):
            warn(line)


def _is_routed(layer: nn.Module) -> bool:
    return bool(layer.__dict__["_lighthouse_route"].layer_type != DENSE)
