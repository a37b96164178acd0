"""Check that every attention layer that should be routed was.

A layer that silently stays dense is the failure that this file exists for: the run would be slow and nobody would know.
Each call of SDPA in scope leaves a note: "routed", or the reason why it stayed dense. In eager code a note carries its
layer. Under torch.compile a note is left once, when a frame is traced, and layers that share a frame share it; a frame
traced before leaves none, so what was once seen to be routed is remembered for the life of the module.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from types import CodeType
from weakref import WeakSet

from torch import nn

from lightning_lighthouse.reasons import CHECKPOINT_INSIDE, ENTERED, NO_CALL, NOT_RUN, ROUTED, remedy
from lightning_lighthouse.spread import ScoreSpread

_seen_routed: WeakSet[nn.Module] = WeakSet()


class Audit:
    """Notes of the first routed batch.

    Args:
        targets: The routed layers by name.
    """

    def __init__(self, targets: dict[str, nn.Module]) -> None:
        self._targets = targets
        self._by_layer: dict[nn.Module, set[str]] = defaultdict(set)
        self._traced: set[str] = set()
        self.spread = ScoreSpread()

    def excuse(self, names: Collection[str]) -> None:
        """Ask nothing of these layers: they are meant to be dense."""
        self._targets = {name: layer for name, layer in self._targets.items() if name not in names}

    @property
    def saw_a_layer(self) -> bool:
        """Whether any layer ran, or was traced."""
        return bool(self._by_layer or self._traced)

    def add(self, layer: nn.Module | None, note: str) -> None:
        """Record that a layer ran, or what became of its call: `layer` is None while a frame is traced."""
        if layer is None:
            self._traced.add(note)
        else:
            self._by_layer[layer].add(note)

    def unrouted(self) -> dict[str, str]:
        """The layers that were not routed, with the reason and what to do. Layers that were are remembered."""
        missing = {}
        for name, layer in self._targets.items():
            notes = self._by_layer.get(layer) or self._traced
            if notes == {ENTERED}:
                notes = notes | self._of_shared_code(layer)
            reasons = notes - {ENTERED}
            # several layers share a traced frame: one dense call among them leaves all of them in doubt
            doubtful = layer not in self._by_layer and reasons != {ROUTED}
            # routed forward, dense in the recompute of an outer reentrant checkpoint: wrong gradients
            doubtful |= CHECKPOINT_INSIDE in reasons
            if ROUTED in reasons and not doubtful:
                _seen_routed.add(layer)
            elif reasons:
                missing[name] = "; ".join(_explained(reason, layer) for reason in sorted(reasons - {ROUTED}))
            elif layer not in _seen_routed:
                missing[name] = _explained(NO_CALL if notes else NOT_RUN, layer)
        return missing

    def _of_shared_code(self, layer: nn.Module) -> set[str]:
        """Notes of the layers with whose compiled forwards that of this one shares a frame."""
        code = _compiled_code(layer)
        others = [
            notes for other, notes in self._by_layer.items() if code is not None and _compiled_code(other) is code
        ]
        return set().union(*others)


def _compiled_code(layer: nn.Module) -> CodeType | None:
    """The code of a layer's forward where torch.compile was called with that alone: layers share its frames."""
    former = layer.__dict__.get("_lighthouse_chained") or type(layer).forward
    function = getattr(former, "_torchdynamo_orig_callable", None)
    return getattr(function, "__code__", None)


def _explained(reason: str, layer: nn.Module) -> str:
    advice = remedy(reason, layer)
    return f"{reason} ({advice})" if advice else reason


def explain(missing: dict[str, str], num_targets: int) -> str:
    """One line that names every layer that stayed dense and why, grouped by reason."""
    by_reason = defaultdict(list)
    for name, reason in missing.items():
        by_reason[reason].append(name or "the module itself")
    parts = [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return (
        f"{len(missing)} of {num_targets} attention layers that should be routed to Lighthouse stayed dense: "
        + " | ".join(parts)
    )
