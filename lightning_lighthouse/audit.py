"""Check that every attention layer that should be routed was.

A layer that silently stays dense is the failure that this file exists for: the run would be slow and nobody would know.
Each call of SDPA in scope leaves a note: "routed", or the reason why it stayed dense. In eager code a note carries its
layer. Under torch.compile a note is left once, when a frame is traced, and layers that share a frame share it; a frame
traced before leaves none, so what was once seen to be routed is remembered for the life of the module.
"""

from __future__ import annotations

from collections import defaultdict
from weakref import WeakSet

from torch import nn

ROUTED = "routed"
CHECKPOINT_INSIDE = "checkpoint() inside the attention module"

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

    def add(self, layer: nn.Module | None, reason: str) -> None:
        """Record a call: `layer` is None while a frame is traced."""
        if layer is None:
            self._traced.add(reason)
        else:
            self._by_layer[layer].add(reason)

    def unrouted(self) -> dict[str, str]:
        """The layers that were not routed, with the reason. Layers that were are remembered."""
        missing = {}
        for name, layer in self._targets.items():
            reasons = self._by_layer.get(layer) or self._traced
            # several layers share a traced frame: one dense call among them leaves all of them in doubt
            doubtful = layer not in self._by_layer and reasons != {ROUTED}
            # routed forward, dense in the recompute of an outer reentrant checkpoint: wrong gradients
            doubtful |= CHECKPOINT_INSIDE in reasons
            if ROUTED in reasons and not doubtful:
                _seen_routed.add(layer)
            elif reasons:
                missing[name] = "; ".join(sorted(reasons - {ROUTED}))
            elif layer not in _seen_routed:
                missing[name] = _why_silent(layer)
        return missing


def _why_silent(layer: nn.Module) -> str:
    """Why a layer made no call: an attention layer of transformers knows how its model was made."""
    reason = "no call of scaled_dot_product_attention was seen"
    config = getattr(layer, "config", None)
    implementation = getattr(config, "_attn_implementation", "sdpa")
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None:
        return f"{reason}, and none can be: attn_logit_softcapping={softcap} is beyond SDPA, and so beyond Lighthouse"
    if implementation != "sdpa":
        return f"{reason}: the model was made with attn_implementation={implementation!r}, make it with 'sdpa'"
    return reason


def explain(missing: dict[str, str], num_targets: int) -> str:
    """One line that names every layer that stayed dense and why, grouped by reason."""
    by_reason = defaultdict(list)
    for name, reason in missing.items():
        by_reason[reason].append(name or "the module itself")
    parts = [f"{', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return (
        f"{len(missing)} of {num_targets} attention layers that should be routed to Lighthouse stayed dense: "
        + " | ".join(parts)
        + ". Remedies: make the call plain causal (is_causal=True, attn_mask=None, dropout 0; transformers: "
        "attn_implementation='sdpa', attention_dropout=0), let it pass through the module's forward, choose other "
        "modules with select, or leave these layers dense with dense_layers"
    )
