"""What a transformers model is called with: the keyword arguments that say where documents lie.

The model's own forward is left as it is. A hook before it looks at what is handed in, in eager code; inside a frame
that torch.compile traces nothing can be read, and the frame carries the check.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_lighthouse.routing.packing import PackedBatchError, refusal, signs

# Where transformers keeps the name of the attention; never written to a saved config
FIELD = "_attn_implementation_internal"


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


class Listener(Protocol):
    """Whoever wants to know what transformers models are called with."""

    def hear(self, inputs: Mapping[str, Any]) -> None:
        """A model is about to run, in eager code, with these arguments by name; it runs in no other."""

    def hear_within(self, inputs: Mapping[str, Any]) -> None:
        """A model within another one that runs, with layers of interest in it, is about to run, traced or not."""

    def answered(self, output: Any) -> None:
        """That model has run, and returns this; None where it failed."""

    def trace(self, inputs: Mapping[str, Any]) -> None:
        """The same as `hear` while torch.compile traces a frame, where no value can be read."""


@contextmanager
def heard_inputs(model: nn.Module, listener: Listener, layers: Collection[nn.Module]) -> Iterator[None]:
    """Tell `listener`, inside, of each forward of a transformers model within `model` before it runs.

    A model within another, as a decoder under its head, mostly gets the same arguments, but a wrapper may make some of
    its own. It is told of in another way, and only where one of `layers` is in it, which a tower of images has not.
    """
    hooks = []
    # how many of them run, one inside another
    running = _Running()
    for module in find_models(model):
        # a wrapper of torch.compile takes anything
        inner = getattr(module, "_orig_mod", module)
        names = list(inspect.signature(type(inner).forward).parameters)[1:]
        matters = not set(layers).isdisjoint(module.modules())

        def before(
            called: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            names: list[str] = names,
            matters: bool = matters,
        ) -> None:
            running.count += 1
            inputs = {**dict(zip(names, args, strict=False)), **kwargs}
            if running.count > 1:
                if matters:
                    listener.hear_within(inputs)
            elif torch.compiler.is_compiling():
                listener.trace(inputs)
            else:
                listener.hear(inputs)

        def after(called: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            running.count = max(0, running.count - 1)
            if not running.count and not torch.compiler.is_compiling():
                listener.answered(output)

        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(after, with_kwargs=True, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Every tensor that a model returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_in(value)


class _Running:
    def __init__(self) -> None:
        # of the instance from the start: frames are compiled anew where it first gets one
        self.count = 0


def require_unpacked(inputs: Mapping[str, Any]) -> None:
    """Let the frame that is traced check that a batch is not packed, where values tell; else PackedBatchError."""
    for sign, found in signs(inputs):
        if isinstance(found, Tensor):
            torch._assert_async(~found, refusal(sign))
        elif found:
            _refuse(refusal(sign))


# While compiling it runs at trace time; an error raised in traced code itself would be told as one of the compiler's.
@torch.compiler.assume_constant_result
def _refuse(line: str) -> None:
    raise PackedBatchError(line)
