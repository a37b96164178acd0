"""How the attention layers of a model attend where a user says nothing of it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_lighthouse.attention.layer_types import LIGHTHOUSE, MIXTURE, counted_back
from lightning_lighthouse.routing.own_windows import mixed_windows


def default_layer_types(layers: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """How each attention layer of a model attends: windows, and Lighthouse in every fourth, the last one included.

    Whatever sees the whole sequence comes last then, as in models that are made of windows and global layers. Such a
    model brings its windows along, and all of its global layers attend by Lighthouse.

    Args:
        layers: All of them, by name, in their order.

    Returns:
        One type for each, or one for all.
    """
    return (LIGHTHOUSE,) if mixed_windows(layers) else counted_back(MIXTURE, len(layers))
