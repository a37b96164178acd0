"""Lightning plugin for long-context pre-training with Lighthouse Attention (arXiv 2605.06554).

Train any LightningModule with `LighthouseCallback` in its Trainer:

    Trainer(callbacks=[LighthouseCallback(switch_at=0.9)])

Names are imported on first use, so that the attention alone needs neither Lightning nor litdata.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_lighthouse.attention import lighthouse_attention, select_entries
    from lightning_lighthouse.callback import LighthouseCallback
    from lightning_lighthouse.config import LighthouseConfig
    from lightning_lighthouse.data.recipe import LighthouseRecipe
    from lightning_lighthouse.patch import patch_attention

__version__ = "0.1.0"

_HOMES = {
    "LighthouseCallback": "callback",
    "LighthouseConfig": "config",
    "LighthouseRecipe": "data.recipe",
    "lighthouse_attention": "attention",
    "patch_attention": "patch",
    "select_entries": "attention",
}

__all__ = [
    "LighthouseCallback",
    "LighthouseConfig",
    "LighthouseRecipe",
    "lighthouse_attention",
    "patch_attention",
    "select_entries",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
