"""Route a model's causal self-attention to Lighthouse Attention and back; plain PyTorch, no Lightning.

Two changes, both undone by `restore`:

- each routed attention module gets an instance `forward` that marks its patch as in scope while it runs. Dynamo guards
  on instance forwards, not on hooks, so compiled models follow the phase, with one recompile a frame at each new phase;
- `torch.nn.functional.scaled_dot_product_attention`, and bare copies of it in loaded modules, become `routed_sdpa`,
  which sends a call to Lighthouse when a patch in scope is on and the call is plain causal self-attention, and to the
  stock function otherwise.

No parameter is added and no module renamed: `state_dict` never changes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_lighthouse.adapters import multihead
from lightning_lighthouse.attention import lighthouse_attention
from lightning_lighthouse.audit import CHECKPOINT_INSIDE, ROUTED, Audit
from lightning_lighthouse.config import LighthouseConfig
from lightning_lighthouse.sdpa import stock_sdpa
from lightning_lighthouse.targets import SDPA, choose_routed, find_targets

_patches: list[Patch] = []
_bare_copies: list[tuple[dict[str, Any], str]] = []
_checkpoint_setting = ExitStack()


class Patch:
    """Handle of a patched model, made by `patch_attention`. Off at first.

    As a context manager it is on inside and restores the model at the end.
    """

    def __init__(self, model: nn.Module, targets: dict[str, nn.Module], config: LighthouseConfig) -> None:
        self.model = model
        self.targets = targets
        self.config = config
        self.is_on = False
        self.audit: Audit | None = None
        # Set and reset by the routed modules while they run. A plain bool that returns to its old value: Dynamo
        # refuses any other side effect inside activation checkpointing.
        self.in_scope = False
        # Eager only: the routed module that runs, and what autograd looked like when it started.
        self.layer: nn.Module | None = None
        self.autograd_mark: Any = None

    def on(self) -> None:
        """Route the calls of the routed layers to Lighthouse Attention."""
        if self not in _patches:
            raise RuntimeError("this patch was restored; patch the model anew")
        self.is_on = True

    def off(self) -> None:
        """Leave every call to stock SDPA."""
        self.is_on = False

    def restore(self) -> None:
        """Undo the patch: the model is as it was. Harmless when already restored."""
        self.is_on = self.in_scope = False
        self.layer = self.audit = None
        if self not in _patches:
            return
        _patches.remove(self)
        for module in self.targets.values():
            _unbind(module)
        if not _patches:
            _unswap()

    def __enter__(self) -> Patch:
        self.on()
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    # An EMA copy of a patched model follows the original: on with it, dense once it is restored.
    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        return self

    # A patch lives in one process: a pickled module comes back without it.
    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


def patch_attention(
    model: nn.Module,
    config: LighthouseConfig | None = None,
    *,
    dense_layers: list[int] | None = None,
    select: str | None = None,
) -> Patch:
    """Prepare the causal self-attention of `model` to be routed to Lighthouse Attention.

        with patch_attention(model, LighthouseConfig(top_k=512)):
            loss = model(tokens)

    Args:
        model: Any module whose attention calls `F.scaled_dot_product_attention(..., is_causal=True)`; compiled before
            or after, wrapped or not.
        config: Settings; None for the defaults.
        dense_layers: Attention layers that stay dense, negative from the end; [] for none. None: the first and last
            two of 16 or more, else the first and last.
        select: Glob over module names that chooses the attention modules.

    Returns:
        The handle, off: `on()`, `off()`, `restore()`.

    Raises:
        ValueError: No attention found, no layer left to route, or the model is patched already.
    """
    targets = choose_routed(find_targets(model, select), dense_layers)
    taken = [name for name, module in targets.items() if _patch_of(module) in _patches]
    if taken:
        raise ValueError(f"{type(model).__name__} is patched already ({taken[0]}); restore the first patch before")
    patch = Patch(model, targets, config or LighthouseConfig())
    if not _patches:
        _swap()
    _patches.append(patch)
    for module in targets.values():
        _bind(module, patch)
    return patch


def _patch_of(module: nn.Module) -> Patch | None:
    return module.__dict__.get("_lighthouse_patch")


def _bind(module: nn.Module, patch: Patch) -> None:
    module.__dict__["_lighthouse_patch"] = patch
    module.__dict__["_lighthouse_chained"] = module.__dict__.get("forward")
    module.__dict__["forward"] = MethodType(forward, module)


def _unbind(module: nn.Module) -> None:
    module.__dict__.pop("forward", None)
    chained = module.__dict__.pop("_lighthouse_chained", None)
    if chained is not None:
        module.__dict__["forward"] = chained
    module.__dict__.pop("_lighthouse_patch", None)


# Named `forward` so that pickle, which stores a bound method by its name, finds the class's own on loading.
def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The instance forward of a routed module: its former forward, with the patch in scope."""
    patch = self._lighthouse_patch
    outer_scope = patch.in_scope
    patch.in_scope = True
    if not torch.compiler.is_compiling():
        outer = patch.layer, patch.autograd_mark
        patch.layer, patch.autograd_mark = self, _autograd_mark()
    try:
        if self._lighthouse_chained is not None:
            return self._lighthouse_chained(*args, **kwargs)
        if patch.is_on and multihead.is_served(self):
            reason = multihead.why_dense(self, *args, **kwargs)
            if not reason:
                return multihead.forward(self, *args, **kwargs)
            _note(reason)
            # dense in eager code too, as it is when compiled
            patch.in_scope = False
        return type(self).forward(self, *args, **kwargs)
    finally:
        patch.in_scope = outer_scope
        if not torch.compiler.is_compiling():
            patch.layer, patch.autograd_mark = outer


def _autograd_mark() -> tuple[bool, Any]:
    """Differs between a module's forward and the body of a `checkpoint()` inside it.

    The recompute of such a body runs outside the module, so it would be dense after a routed forward: wrong gradients
    without an error. Calls inside it therefore stay dense both times.
    """
    top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return torch.is_grad_enabled(), top_hooks(True) if top_hooks else None


def routed_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stands in for `F.scaled_dot_product_attention` while a model is patched; same signature."""
    patch = None
    for candidate in _patches:
        if candidate.in_scope and candidate.is_on:
            patch = candidate
    reason = _why_dense(patch, query, key, value, attn_mask, dropout_p, is_causal) if patch is not None else ""
    if patch is None or reason != ROUTED:
        if patch is not None:
            _note(reason)
        return stock_sdpa(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    _note(ROUTED)
    return lighthouse_attention(query, key, value, patch.config, scale=scale)


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
        return "attn_mask was given"
    if not is_causal:
        return "is_causal is False"
    if dropout_p != 0:
        return "dropout_p is not 0"
    if query.is_nested or query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        return "q, k and v are not plain [batch, heads, tokens, head dim] tensors"
    if query.shape[2] != key.shape[2]:
        return "query and key lengths differ (cache or cross-attention)"
    if key.shape != value.shape or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        return "batch sizes or head dims of q, k and v differ"
    if query.shape[1] % key.shape[1] != 0:
        return "query heads are not a multiple of key/value heads"
    return ROUTED


@torch.compiler.assume_constant_result
def _note(reason: str) -> None:
    """Tell the audit of the patch in scope. Runs at trace time while compiling, on every call in eager."""
    audited = [patch for patch in _patches if patch.is_on and patch.audit is not None]
    # while a frame is traced the scope is Dynamo's alone: no patch shows it
    for patch in [patch for patch in audited if patch.in_scope] or audited:
        assert patch.audit is not None
        patch.audit.add(patch.layer, reason)


def _swap() -> None:
    setattr(F, SDPA, routed_sdpa)
    _checkpoint_setting.enter_context(_scope_allowed_in_checkpoint())
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("torch", "lightning_lighthouse"):
            continue
        for attribute, value in list(getattr(module, "__dict__", {}).items()):
            if value is stock_sdpa:
                module.__dict__[attribute] = routed_sdpa
                _bare_copies.append((module.__dict__, attribute))


def _unswap() -> None:
    setattr(F, SDPA, stock_sdpa)
    for namespace, attribute in _bare_copies:
        # somebody else's later replacement is theirs
        if namespace.get(attribute) is routed_sdpa:
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
