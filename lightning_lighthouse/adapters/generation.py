"""`generate` stays dense while a patch is on: its first pass over the prompt looks like training, and must not be."""

from __future__ import annotations

from types import MethodType
from typing import Any

from torch import nn


def bind(model: nn.Module, patch: Any) -> None:
    """Let every module of `model` with a method `generate` pause `patch` while that runs."""
    for module in model.modules():
        if callable(getattr(type(module), "generate", None)):
            module.__dict__["_lighthouse_generating"] = patch
            module.__dict__["_lighthouse_generate"] = module.__dict__.get("generate")
            module.__dict__["generate"] = MethodType(generate, module)


def unbind(model: nn.Module) -> None:
    """Give every module its own `generate` back."""
    for module in model.modules():
        if module.__dict__.pop("_lighthouse_generating", None) is None:
            continue
        module.__dict__.pop("generate", None)
        chained = module.__dict__.pop("_lighthouse_generate", None)
        if chained is not None:
            module.__dict__["generate"] = chained


# Named as in the class, for pickle.
def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """The instance `generate` of a patched model: its former one, dense."""
    with self._lighthouse_generating.paused():
        chained = self._lighthouse_generate
        return chained(*args, **kwargs) if chained is not None else type(self).generate(self, *args, **kwargs)
