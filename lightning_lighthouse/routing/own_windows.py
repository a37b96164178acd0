"""Layers of transformers' models that look back through windows, or chunks, which they were made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lightning_lighthouse.notices import log_once


def own_window(layer: nn.Module) -> int | None:
    """How many tokens back an attention layer sees by its own making; None for all, or where nothing says so."""
    if hasattr(layer, "sliding_window"):
        return layer.sliding_window  # type: ignore[return-value]
    config: Any = getattr(layer, "config", None)
    kinds, number = getattr(config, "layer_types", None), getattr(layer, "layer_idx", None)
    if kinds and isinstance(number, int) and kinds[number] == "full_attention":
        return None
    return getattr(config, "sliding_window", None)


def own_chunk(layer: nn.Module) -> int | None:
    """Tokens of a chunk that attention does not look out of; None where there are none."""
    return getattr(getattr(layer, "config", None), "attention_chunk_size", None)


def mixed_windows(layers: Mapping[str, nn.Module]) -> dict[str, int]:
    """The windows that some of these layers have by their making, and others do not, by name; {} if all are alike."""
    windowed = {name: window for name, layer in layers.items() if (window := own_window(layer))}
    return windowed if len(windowed) < len(layers) else {}


def without_windowed(layers: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The layers of a model that see all of a sequence, where it mixes them with others, which keep their windows.

    A model whose layers are all alike is left as it is: sequences within its windows need none.
    """
    windowed = mixed_windows(layers)
    if not windowed:
        return layers
    first, size = next(iter(windowed.items()))
    others = f" and {len(windowed) - 1} other layers keep their" if len(windowed) > 1 else " keeps its"
    log_once(f"own windows {list(windowed)}", f"{first}{others} own windows, of {size} tokens")
    return {name: layer for name, layer in layers.items() if name not in windowed}
