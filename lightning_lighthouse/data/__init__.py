"""Text to training batches: prepared once into packed sequences, then streamed.

Names are imported on first use, so that preparing and verifying data needs no Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_lighthouse.data.manifest import Manifest
    from lightning_lighthouse.data.module import LighthouseRecipe
    from lightning_lighthouse.data.preparing.prepare import prepare
    from lightning_lighthouse.data.settings import WeightedSource

_HOMES = {
    "LighthouseRecipe": "module",
    "Manifest": "manifest",
    "WeightedSource": "settings",
    "prepare": "preparing.prepare",
}

__all__ = ["LighthouseRecipe", "Manifest", "WeightedSource", "prepare"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
