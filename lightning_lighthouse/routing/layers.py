"""The routing itself: a scope around each routed module, and a stand-in for SDPA that looks at scope and call.

Two changes, both undone when the patch is restored:

- each routed attention module gets an instance `forward` that marks its patch as in scope while it runs. Dynamo guards
  on instance forwards, not on hooks, so compiled models follow the phase, with one recompile a frame at each new phase;
- `torch.nn.functional.scaled_dot_product_attention`, and bare copies of it in loaded modules, become
  `causal_attention`, which sends a call to Lighthouse when a patch in scope is on and the call is plain causal
  self-attention, and to the stock function otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lighthouse.attention.lighthouse import lighthouse_attention
from lightning_lighthouse.attention.sdpa import stock_sdpa
from lightning_lighthouse.routing.adapters import multihead
from lightning_lighthouse.routing.reasons import (
    CHECKPOINT_INSIDE,
    DROPOUT,
    ENTERED,
    EXITED,
    HEADS,
    INFERENCE,
    LAYOUT,
    LENGTHS,
    MASK,
    NOT_CAUSAL,
    ROUTED,
    SIZES,
)
from lightning_lighthouse.routing.targets import SDPA

if TYPE_CHECKING:
    from lightning_lighthouse.routing.patch import Patch

# All that are not restored yet.
patches: list[Patch] = []
_bare_copies: list[tuple[dict[str, Any], str]] = []
_checkpoint_setting = ExitStack()


class Route:
    """The way of one routed module's calls. Copies of the module share it, as they share the patch.

    Args:
        is_returned: Handed back to dense attention, also while the patch is on.
    """

    def __init__(self, is_returned: bool = False) -> None:
        self.is_returned = is_returned

    def __deepcopy__(self, memo: dict[int, Any]) -> Route:
        return self


def patch_of(module: nn.Module) -> Patch | None:
    """The patch that routes `module`, also one that was restored since it was copied."""
    return module.__dict__.get("_lighthouse_patch")


def bind(module: nn.Module, patch: Patch) -> None:
    """Give `module` the instance forward of `patch`, and replace copies of SDPA that it keeps."""
    if patch_of(module) is not None:
        # a copy made while the original was patched, which has been restored since
        unbind(module)
    module.__dict__["_lighthouse_patch"] = patch
    module.__dict__["_lighthouse_route"] = Route()
    module.__dict__["_lighthouse_chained"] = module.__dict__.get("forward")
    module.__dict__["forward"] = MethodType(forward, module)
    kept = {name: value for name, value in vars(module).items() if _keeps_sdpa(value)}
    module.__dict__["_lighthouse_kept"] = kept
    module.__dict__.update({name: _replaced(value) for name, value in kept.items()})


def unbind(module: nn.Module) -> None:
    """Undo `bind`."""
    module.__dict__.pop("forward", None)
    chained = module.__dict__.pop("_lighthouse_chained", None)
    if chained is not None:
        module.__dict__["forward"] = chained
    module.__dict__.update(module.__dict__.pop("_lighthouse_kept", {}))
    module.__dict__.pop("_lighthouse_patch", None)
    module.__dict__.pop("_lighthouse_route", None)


def _keeps_sdpa(value: Any) -> bool:
    return value is stock_sdpa or (isinstance(value, partial) and value.func is stock_sdpa)


def _replaced(value: Any) -> Any:
    return partial(causal_attention, *value.args, **value.keywords) if isinstance(value, partial) else causal_attention


# Named `forward` so that pickle, which stores a bound method by its name, finds the class's own on loading.
def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The instance forward of a routed module: its former forward, with the patch in scope."""
    patch = self._lighthouse_patch
    outer_scope = patch.in_scope
    is_returned = self._lighthouse_route.is_returned
    patch.in_scope = not is_returned
    is_inference = False
    if not torch.compiler.is_compiling():
        outer = patch.layer, patch.autograd_mark
        patch.layer, patch.autograd_mark = self, _autograd_mark()
        is_inference = not patch.with_inference and not self.training and _is_without_gradients()
    if not is_returned and patch.is_on:
        _note(INFERENCE if is_inference else ENTERED)
    if is_inference:
        patch.in_scope = False
    try:
        out = _run(self, patch, args, kwargs)
        # while tracing no layer is known, so the audit counts calls between entry and exit
        if torch.compiler.is_compiling() and not is_returned and patch.is_on:
            _note(EXITED)
        return out
    finally:
        patch.in_scope = outer_scope
        if not torch.compiler.is_compiling():
            patch.layer, patch.autograd_mark = outer


def _run(layer: Any, patch: Patch, args: Any, kwargs: Any) -> Any:
    """The former forward of a layer in scope."""
    if layer._lighthouse_chained is not None:
        return layer._lighthouse_chained(*args, **kwargs)
    if patch.in_scope and patch.is_on and multihead.is_served(layer):
        reason = multihead.why_dense(layer, *args, **kwargs)
        if not reason:
            return multihead.forward(layer, *args, **kwargs)
        _note(reason)
        # dense in eager code too, as it is when compiled
        patch.in_scope = False
    return type(layer).forward(layer, *args, **kwargs)


def _is_without_gradients() -> bool:
    """Whether gradients are off, and not only for the first of two forwards of a reentrant checkpoint.

    Such a forward runs in an autograd function, which turns forward-mode gradients off too; `torch.no_grad` does not.
    """
    if torch.is_grad_enabled():
        return False
    return torch.is_inference_mode_enabled() or torch._C._is_fwd_grad_enabled()


def _autograd_mark() -> tuple[bool, Any]:
    """Differs between a module's forward and the body of a `checkpoint()` inside it.

    The recompute of such a body runs outside the module, so it would be dense after a routed forward: wrong gradients
    without an error. Calls inside it therefore stay dense both times.
    """
    top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return torch.is_grad_enabled(), top_hooks(True) if top_hooks else None


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Scaled dot-product attention that is routed where its module is; the arguments are those of torch's.

    It stands in for `F.scaled_dot_product_attention` while a model is patched. A model that keeps a copy of SDPA where
    none is found can call it by itself: it is torch's own function in modules that are not routed.

    Args:
        query: `[B, Hq, N, D]`.
        key: `[B, Hkv, N, D]`.
        value: `[B, Hkv, N, D]`.
        attn_mask: A call with a mask is never routed.
        dropout_p: Must be 0 to be routed.
        is_causal: Must be True to be routed.
        scale: Factor of the attention logits; None: `D ** -0.5`.
        enable_gqa: Whether Hq may be a multiple of Hkv.

    Returns:
        `[B, Hq, N, D]`.
    """
    patch = None
    for candidate in patches:
        if candidate.in_scope and candidate.is_on:
            patch = candidate
    reason = _why_dense(patch, query, key, value, attn_mask, dropout_p, is_causal) if patch is not None else ""
    if patch is None or reason != ROUTED:
        if patch is not None:
            _note(reason)
        return stock_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    _note(ROUTED)
    # a compiled frame holds nothing of this
    if not torch.compiler.is_compiling() and patch.audit is not None:
        patch.audit.spread.add(patch.layer, query, key, patch.config)
    step = patch.step if patch.config.selection == "random" else None
    return lighthouse_attention(query, key, value, patch.config, scale=scale, step=step)


def _why_dense(
    patch: Patch,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
) -> str:
    """ROUTED for plain causal self-attention, else the first rule that the call breaks."""
    if not torch.compiler.is_compiling() and patch.autograd_mark != _autograd_mark():
        return CHECKPOINT_INSIDE
    if attn_mask is not None:
        return MASK
    if not is_causal:
        return NOT_CAUSAL
    if dropout_p != 0:
        return DROPOUT
    if query.is_nested or query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return LAYOUT
    if query.shape[2] != key.shape[2]:
        return LENGTHS
    if key.shape != value.shape or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        return SIZES
    if query.shape[1] % key.shape[1] != 0:
        return HEADS
    return ROUTED


@torch.compiler.assume_constant_result
def _note(reason: str) -> None:
    """Tell the audit of the patch in scope. Runs at trace time while compiling, on every call in eager."""
    audited = [patch for patch in patches if patch.is_on and patch.audit is not None]
    # while a frame is traced the scope is Dynamo's alone: no patch shows it
    for patch in [patch for patch in audited if patch.in_scope] or audited:
        assert patch.audit is not None
        patch.audit.add(patch.layer, reason)


def swap() -> None:
    """Put `causal_attention` in the place of SDPA."""
    setattr(F, SDPA, causal_attention)
    _checkpoint_setting.enter_context(_scope_allowed_in_checkpoint())
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("torch", "lightning_lighthouse"):
            continue
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if value is stock_sdpa:
                module.__dict__[attribute] = causal_attention
                _bare_copies.append((module.__dict__, attribute))


def unswap() -> None:
    """Undo `swap`."""
    setattr(F, SDPA, stock_sdpa)
    for namespace, attribute in _bare_copies:
        # somebody else's later replacement is theirs
        if namespace.get(attribute) is causal_attention:
            namespace[attribute] = stock_sdpa
    _bare_copies.clear()
    _checkpoint_setting.close()


@contextmanager
def _scope_allowed_in_checkpoint() -> Iterator[None]:
    """Let Dynamo trace `patch.in_scope` under activation checkpointing where it cannot see that it is undone.

    Newer torch does see it. Until then the setting tells Dynamo not to replay such a side effect in the recompute,
    which is right for one that ends with the module's forward.
    """
    from torch._dynamo import config, side_effects

    if hasattr(side_effects.SideEffects, "snapshot_attr_mutation"):
        yield
        return
    with config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        yield
