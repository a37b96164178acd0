"""The instance forward of each routed module: its former forward, with its scope entered.

Dynamo guards on instance forwards, not on hooks, so compiled models follow the phase, with one recompile a frame at
each new phase.
"""

from __future__ import annotations

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_lighthouse.attention.layer_types import DENSE, LIGHTHOUSE
from lightning_lighthouse.attention.sdpa import stock_sdpa
from lightning_lighthouse.routing.adapters import multihead
from lightning_lighthouse.routing.calls import causal_attention
from lightning_lighthouse.routing.reasons import (
    ENTERED,
    ENTERED_FROZEN,
    ENTERED_WITHOUT_GRADIENTS,
    EXITED,
    INFERENCE,
    crossing,
    name_of,
    refuse,
)
from lightning_lighthouse.routing.scope import (
    UNSELECTED,
    Scope,
    Shared,
    autograd_mark,
    is_without_gradients,
    note,
)


class Route(Shared):
    """The way of one routed module's calls.

    Args:
        name: The module's.
        layer_type: How they attend while the patch is on: one of LAYER_TYPES.
        is_selected: Whether each of them must stay inside documents where some are set, or be an error.
    """

    def __init__(self, name: str = "", layer_type: str = LIGHTHOUSE, is_selected: bool = True) -> None:
        self.name, self.layer_type, self.is_selected = name, layer_type, is_selected


def scope_of(module: nn.Module) -> Scope | None:
    """The scope that `module` enters, also one whose patch was restored since the module was copied."""
    return module.__dict__.get("_lighthouse_scope")


def bind(module: nn.Module, scope: Scope, route: Route) -> None:
    """Give `module` an instance forward that enters `scope`, and replace copies of SDPA that it keeps."""
    if scope_of(module) is not None:
        # a copy made while the original was patched, which has been restored since
        unbind(module)
    module.__dict__["_lighthouse_scope"] = scope
    module.__dict__["_lighthouse_route"] = route
    module.__dict__["_lighthouse_chained"] = module.__dict__.get("forward")
    module.__dict__["forward"] = MethodType(forward, module)
    module.__dict__["_lighthouse_kept"] = replace_kept(module)


def unbind(module: nn.Module) -> None:
    """Undo `bind`."""
    module.__dict__.pop("forward", None)
    chained = module.__dict__.pop("_lighthouse_chained", None)
    if chained is not None:
        module.__dict__["forward"] = chained
    module.__dict__.update(module.__dict__.pop("_lighthouse_kept", {}))
    module.__dict__.pop("_lighthouse_scope", None)
    module.__dict__.pop("_lighthouse_stayed_dense", None)
    module.__dict__.pop("_lighthouse_route", None)


def replace_kept(module: nn.Module) -> dict[str, Any]:
    """Replace the copies of SDPA that a module keeps; return them by attribute."""
    kept = {name: value for name, value in vars(module).items() if _keeps_sdpa(value)}
    module.__dict__.update({name: _replaced(value) for name, value in kept.items()})
    return kept


def _keeps_sdpa(value: Any) -> bool:
    return value is stock_sdpa or (isinstance(value, partial) and value.func is stock_sdpa)


def _replaced(value: Any) -> Any:
    return partial(causal_attention, *value.args, **value.keywords) if isinstance(value, partial) else causal_attention


STAYED_DENSE = (
    "{} is frozen and in eval mode, so that the first forward of a reentrant checkpoint left it dense, and the second "
    "would route it: put it into train mode, leave it dense with dense_layers, or checkpoint with use_reentrant=False"
)
SET_THEM = "call patch.set_documents before the forward, to hold until its backward is done"


def _may_lack_documents(layer: nn.Module) -> bool:
    """Whether a call without documents is nobody's mistake: one of a layer left out, or one that trains nothing."""
    if not layer._lighthouse_route.is_selected:  # type: ignore[union-attr]
        return True
    return not torch.compiler.is_compiling() and not layer.training and is_without_gradients()


# Named `forward` so that pickle, which stores a bound method by its name, finds the class's own on loading.
def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The instance forward of a routed module: its former forward, with the scope entered."""
    scope = self._lighthouse_scope
    outer_type = scope.layer_type
    # only there: a dense frame must not depend on the type, which would be a frame for each
    layer_type = self._lighthouse_route.layer_type if scope.is_on else DENSE
    is_routed = layer_type != DENSE
    has_documents = scope.documents is not None
    dense_type = ""
    if has_documents:
        dense_type = DENSE if self._lighthouse_route.is_selected else UNSELECTED
    scope.layer_type = layer_type if is_routed else dense_type
    entry = ENTERED
    if not torch.compiler.is_compiling():
        outer = scope.layer, scope.autograd_mark
        scope.layer, scope.autograd_mark = self, autograd_mark()
        entry = _entry(self, scope, args, kwargs)
    if is_routed or has_documents:
        note(entry if is_routed else ENTERED)
    if entry == INFERENCE:
        scope.layer_type = dense_type
    try:
        if not has_documents and scope.demands_documents and not _may_lack_documents(self):
            refuse(f"{name_of(scope.layer)} was told of no documents: with documents=True, {SET_THEM}")
        out = _run(self, scope, args, kwargs)
        # while tracing no layer is known, so the audit counts calls between entry and exit
        if torch.compiler.is_compiling() and (is_routed or has_documents):
            note(EXITED)
        return out
    finally:
        scope.layer_type = outer_type
        if not torch.compiler.is_compiling():
            scope.layer, scope.autograd_mark = outer


def _entry(layer: nn.Module, scope: Scope, args: Any, kwargs: Any) -> str:
    """The note that a call in eager code begins with; INFERENCE stays dense."""
    if scope.with_inference:
        return ENTERED
    if is_without_gradients():
        return ENTERED_WITHOUT_GRADIENTS if layer.training else INFERENCE
    # in train mode it is only said, so that it need not be asked of every call
    if layer.training and scope.audit is None:
        return ENTERED
    if _needs_gradients(layer, args, kwargs):
        stayed_dense = scope.is_on and layer.__dict__.pop("_lighthouse_stayed_dense", False)
        # one that was unfrozen since needs gradients in both forwards
        if stayed_dense and not any(parameter.requires_grad for parameter in layer.parameters()):
            raise RuntimeError(STAYED_DENSE.format(name_of(layer)))
        return ENTERED
    if layer.training:
        return ENTERED_FROZEN
    if scope.is_on and not torch.is_grad_enabled():
        # the first forward of a reentrant checkpoint does not show whether a second one comes
        layer.__dict__["_lighthouse_stayed_dense"] = True
    return INFERENCE


def _needs_gradients(layer: nn.Module, args: Any, kwargs: Any) -> bool:
    """Whether a backward goes through a layer, by its weights and inputs: a frozen teacher may run without no_grad."""
    tensors = (value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor))
    return any(tensor.requires_grad for tensor in (*layer.parameters(), *tensors))


def _run(layer: Any, scope: Scope, args: Any, kwargs: Any) -> Any:
    """The former forward of a layer in scope."""
    if layer._lighthouse_chained is not None:
        return layer._lighthouse_chained(*args, **kwargs)
    is_looked_at = scope.layer_type and (scope.is_on or scope.documents is not None)
    if is_looked_at and multihead.is_served(layer):
        reason = multihead.why_dense(layer, *args, **kwargs)
        if not reason:
            return multihead.forward(layer, *args, **kwargs)
        if scope.documents is not None and scope.layer_type != UNSELECTED:
            refuse(crossing(reason, scope.layer))
        note(reason)
        # dense in eager code too, as it is when compiled
        scope.layer_type = ""
    return type(layer).forward(layer, *args, **kwargs)
