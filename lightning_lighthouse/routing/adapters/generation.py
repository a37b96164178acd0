"""`generate` stays dense while a patch is on: its first pass over the prompt looks like training, and must not be."""

from __future__ import annotations

from contextlib import ExitStack
from types import MethodType
from typing import Any

from torch import nn

# On a module: the patches that pause while it generates, and the instance `generate` that it had before.
_PATCHES = "_lighthouse_generating"
_FORMER = "_lighthouse_generate"


def bind(model: nn.Module, patch: Any) -> None:
    """Let every module of `model` with a method `generate` pause `patch` while that runs."""
    for module in model.modules():
        if not callable(getattr(type(module), "generate", None)):
            continue
        # of a model that was pickled while it was patched nothing but None is left
        before = tuple(patch for patch in module.__dict__.get(_PATCHES, ()) if patch is not None)
        if not before:
            module.__dict__[_FORMER] = module.__dict__.get("generate")
            module.__dict__["generate"] = MethodType(generate, module)
        module.__dict__[_PATCHES] = (*before, patch)


def unbind(model: nn.Module) -> None:
    """Give every module its own `generate` back that no patch but restored ones waits for."""
    for module in model.modules():
        if _PATCHES not in module.__dict__:
            continue
        module.__dict__[_PATCHES] = tuple(patch for patch in module.__dict__[_PATCHES] if patch.is_patched)
        if module.__dict__[_PATCHES]:
            continue
        del module.__dict__[_PATCHES]
        module.__dict__.pop("generate", None)
        former = module.__dict__.pop(_FORMER, None)
        if former is not None:
            module.__dict__["generate"] = former


# Named as in the class, for pickle.
def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The instance `generate` of a patched model: its former one, dense."""
    with ExitStack() as pauses:
        for patch in self.__dict__[_PATCHES]:
            pauses.enter_context(patch.paused())
        former = self.__dict__[_FORMER]
        return former(*args, **kwargs) if former is not None else type(self).generate(self, *args, **kwargs)
