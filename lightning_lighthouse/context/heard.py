"""The queries and keys of attention, layer by layer, while somebody listens: to compare a shared sequence with itself.

Eager only: what is traced is not heard.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

# queries and keys of each call, by the name of the layer
Calls = dict[str, list[tuple[Tensor, Tensor]]]


class Listener:
    """Keeps some tokens of every call.

    Args:
        start: The first token that is kept.
        num_tokens: How many.
    """

    def __init__(self, start: int, num_tokens: int) -> None:
        self._kept = slice(start, start + num_tokens)
        self.calls: Calls = {}
        # names of the layers that run, the innermost last, and of those that ran
        self.running: list[str] = []
        self.ran: set[str] = set()

    def add(self, query: Tensor, key: Tensor) -> None:
        """A call of attention: `[B, H, N, D]`, `[B, G, N, D]`."""
        # copies: the whole tensors would stay in memory for each layer
        parts = query[..., self._kept, :].detach().clone(), key[..., self._kept, :].detach().clone()
        self.calls.setdefault(self.running[-1] if self.running else "", []).append(parts)


_listener: Listener | None = None


def hear(query: Tensor, key: Tensor) -> None:
    """A call of attention comes."""
    if _listener is not None and not torch.compiler.is_compiling():
        _listener.add(query, key)


def running() -> str:
    """The layer that runs, where somebody listens; else nothing."""
    return _listener.running[-1] if _listener is not None and _listener.running else ""


@contextmanager
def heard(layers: dict[str, nn.Module], start: int, num_tokens: int) -> Iterator[Listener]:
    """Listen inside to the calls of all layers.

    Args:
        layers: By name.
        start: The first token of each call that is kept.
        num_tokens: How many.
    """
    global _listener
    before, listener = _listener, Listener(start, num_tokens)
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(partial(_enter, listener, name)).remove)
            hooks.callback(layer.register_forward_hook(partial(_leave, listener), always_call=True).remove)
        _listener = listener
        try:
            yield listener
        finally:
            _listener = before


def _enter(listener: Listener, name: str, layer: nn.Module, inputs: Any) -> None:
    listener.running.append(name)
    listener.ran.add(name)


def _leave(listener: Listener, layer: nn.Module, inputs: Any, output: Any) -> None:
    listener.running.pop()
