"""Lightning plugin for long-context pre-training with Lighthouse Attention (arXiv 2605.06554).

Train any LightningModule with `LighthouseCallback` in its Trainer:

    Trainer(callbacks=[LighthouseCallback(switch_at=0.9)])

Names are imported on first use, so that the attention alone needs neither Lightning nor litdata.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_lighthouse.adapters.transformers_mask import register_lighthouse_sdpa
    from lightning_lighthouse.attention import lighthouse_attention, select_entries
    from lightning_lighthouse.callback import LighthouseCallback
    from lightning_lighthouse.config import LighthouseConfig
    from lightning_lighthouse.data.recipe import LighthouseRecipe
    from lightning_lighthouse.data.settings import WeightedSource
    from lightning_lighthouse.huggingface import LighthouseTrainerCallback
    from lightning_lighthouse.patch import patch_attention
    from lightning_lighthouse.plateau import PlateauRule
    from lightning_lighthouse.probe import FutureLeakProbe
    from lightning_lighthouse.routing import causal_attention

__version__ = "0.1.0"

_HOMES = {
    "FutureLeakProbe": "probe",
    "LighthouseCallback": "callback",
    "LighthouseConfig": "config",
    "LighthouseRecipe": "data.recipe",
    "PlateauRule": "plateau",
    "WeightedSource": "data.settings",
    "LighthouseTrainerCallback": "huggingface",
    "causal_attention": "routing",
    "lighthouse_attention": "attention",
    "patch_attention": "patch",
    "register_lighthouse_sdpa": "adapters.transformers_mask",
    "select_entries": "attention",
}

__all__ = [
    "FutureLeakProbe",
    "LighthouseCallback",
    "LighthouseConfig",
    "LighthouseRecipe",
    "LighthouseTrainerCallback",
    "PlateauRule",
    "WeightedSource",
    "causal_attention",
    "lighthouse_attention",
    "patch_attention",
    "register_lighthouse_sdpa",
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
