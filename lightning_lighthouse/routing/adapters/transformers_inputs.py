"""What a transformers model is called with: the keyword arguments that say where documents lie.

The model's own forward is left as it is. A hook before it looks at what is handed in, in eager code; inside a frame
that torch.compile traces nothing can be read, and the frame carries the check.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_lighthouse.routing.packing import PackedBatchError, refusal, signs
from lightning_lighthouse.routing.scope import Shared

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
    hearing = _Hearing(listener)
    hooks = []
    for module in find_models(model):
        # a wrapper of torch.compile takes anything
        inner = getattr(module, "_orig_mod", module)
        names = list(inspect.signature(type(inner).forward).parameters)[1:]
        before = _Before(hearing, names, matters=not set(layers).isdisjoint(module.modules()))
        hooks.append(module.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(module.register_forward_hook(_After(hearing), with_kwargs=True, always_call=True))
    try:
        yield
    finally:
        # copies of the model keep the hooks
        hearing.listener = None
        for hook in hooks:
            hook.remove()


class _Hearing:
    """What the hooks of all models have in common."""

    def __init__(self, listener: Listener) -> None:
        self.listener: Listener | None = listener
        # how many models run, one inside another; of the instance from the start: frames are compiled anew where it
        # first gets one
        self.count = 0


class _Hook(Shared):
    """Of a model and of its copies in this process, which are heard as it is, and not any more when it is not."""

    # A hook must be called with anything and return nothing; one of Python's own loads where this package is missing.
    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


class _Before(_Hook):
    """Runs before a model.

    Args:
        hearing: Of all models.
        names: Of the arguments of its forward.
        matters: Whether it is told of where another one runs it.
    """

    def __init__(self, hearing: _Hearing, names: list[str], matters: bool) -> None:
        self._hearing, self._names, self._matters = hearing, names, matters

    def __call__(self, called: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        listener = self._hearing.listener
        if listener is None:
            return
        self._hearing.count += 1
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        if self._hearing.count > 1:
            if self._matters:
                listener.hear_within(inputs)
        elif torch.compiler.is_compiling():
            listener.trace(inputs)
        else:
            listener.hear(inputs)


class _After(_Hook):
    """Runs after a model, also where it failed.

    Args:
        hearing: Of all models.
    """

    def __init__(self, hearing: _Hearing) -> None:
        self._hearing = hearing

    def __call__(self, called: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        listener = self._hearing.listener
        if listener is None:
            return
        self._hearing.count = max(0, self._hearing.count - 1)
        if not self._hearing.count and not torch.compiler.is_compiling():
            listener.answered(output)


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Every tensor that a model returns."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_in(value)


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
