"""What a transformers model is called with: the keyword arguments that say where documents lie.

The model's own forward is left as it is. A hook before it looks at what is handed in, in eager code; inside a frame
that torch.compile traces nothing can be read, and the frame carries the check.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lighthouse.routing.packing import POSITIONS, refusal, restarts

# Where transformers keeps the name of the attention; never written to a saved config
FIELD = "_attn_implementation_internal"

Look = Callable[[Mapping[str, Any]], None]


def config_of(module: nn.Module) -> Any:
    """The config of a module of transformers, or of a wrapper around one; else None."""
    config = getattr(module, "config", None)
    return config if hasattr(config, FIELD) else None


def find_models(model: nn.Module) -> list[nn.Module]:
    """The whole models of transformers within `model`, also one within another: any may be called with positions."""
    return [
        module
        for module in model.modules()
        if config_of(module) is not None and callable(getattr(module, "get_input_embeddings", None))
    ]


@contextmanager
def look_before_forward(model: nn.Module, look: Look, must_be_unpacked: Callable[[], bool]) -> Iterator[None]:
    """Call `look` inside with the named arguments of each forward of a transformers model, before it.

    Args:
        model: Searched for such models.
        look: Given the arguments by name; not called while a frame is traced.
        must_be_unpacked: Whether a frame that is traced checks that positions do not restart.
    """
    hooks = []
    for module in find_models(model):
        # a wrapper of torch.compile takes anything
        inner = getattr(module, "_orig_mod", module)
        names = list(inspect.signature(type(inner).forward).parameters)[1:]

        def before(called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str] = names) -> None:
            if torch.compiler.is_compiling():
                if must_be_unpacked():
                    _assert_unpacked(kwargs.get(POSITIONS))
                return
            look({**dict(zip(names, args, strict=False)), **kwargs})

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))

    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _assert_unpacked(positions: Any) -> None:
    if isinstance(positions, Tensor) and positions.ndim == 2 and not positions.is_floating_point():
        torch._assert_async(~restarts(positions).any(), refusal(f"{POSITIONS} restart"))
