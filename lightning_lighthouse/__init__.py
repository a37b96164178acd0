"""Lightning plugin for long-context pre-training with Lighthouse Attention (arXiv 2605.06554).

Train any LightningModule with `LighthouseCallback` in its Trainer:

    Trainer(callbacks=[LighthouseCallback(switch_at=0.9)])

Names are imported on first use, so that the attention alone needs neither Lightning nor litdata.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_lighthouse.attention.config import LighthouseConfig
    from lightning_lighthouse.attention.documents import Documents
    from lightning_lighthouse.attention.lighthouse import lighthouse_attention, select_entries
    from lightning_lighthouse.attention.rotation import Rotation
    from lightning_lighthouse.checks import LighthouseWarning
    from lightning_lighthouse.context.group import local_positions, whole_sequences
    from lightning_lighthouse.context.slices import slice_tokens
    from lightning_lighthouse.data.module import LighthouseRecipe
    from lightning_lighthouse.data.settings import WeightedSource
    from lightning_lighthouse.evaluation.leak_probe import FutureLeakProbe
    from lightning_lighthouse.evaluation.long_context import LongContextEvaluation
    from lightning_lighthouse.huggingface.trainer_callback import LighthouseTrainerCallback
    from lightning_lighthouse.phases.phase import Phase
    from lightning_lighthouse.phases.plateau import PlateauRule
    from lightning_lighthouse.routing.adapters.transformers_mask import register_lighthouse_sdpa
    from lightning_lighthouse.routing.calls import causal_attention
    from lightning_lighthouse.routing.context_parallel import context_parallel
    from lightning_lighthouse.routing.patch import patch_attention
    from lightning_lighthouse.training.callback import LighthouseCallback
    from lightning_lighthouse.training.context_strategies import ContextParallelDDPStrategy, ContextParallelStrategy

_HOMES = {
    "ContextParallelDDPStrategy": "training.context_strategies",
    "ContextParallelStrategy": "training.context_strategies",
    "Documents": "attention.documents",
    "FutureLeakProbe": "evaluation.leak_probe",
    "LighthouseCallback": "training.callback",
    "LighthouseConfig": "attention.config",
    "LighthouseRecipe": "data.module",
    "LighthouseWarning": "checks",
    "Phase": "phases.phase",
    "PlateauRule": "phases.plateau",
    "Rotation": "attention.rotation",
    "WeightedSource": "data.settings",
    "LongContextEvaluation": "evaluation.long_context",
    "LighthouseTrainerCallback": "huggingface.trainer_callback",
    "causal_attention": "routing.calls",
    "context_parallel": "routing.context_parallel",
    "lighthouse_attention": "attention.lighthouse",
    "local_positions": "context.group",
    "patch_attention": "routing.patch",
    "register_lighthouse_sdpa": "routing.adapters.transformers_mask",
    "select_entries": "attention.lighthouse",
    "slice_tokens": "context.slices",
    "whole_sequences": "context.group",
}

__all__ = [
    "ContextParallelDDPStrategy",
    "ContextParallelStrategy",
    "Documents",
    "FutureLeakProbe",
    "LighthouseCallback",
    "LighthouseConfig",
    "LighthouseRecipe",
    "LighthouseTrainerCallback",
    "LighthouseWarning",
    "LongContextEvaluation",
    "Phase",
    "PlateauRule",
    "Rotation",
    "WeightedSource",
    "causal_attention",
    "context_parallel",
    "lighthouse_attention",
    "local_positions",
    "patch_attention",
    "register_lighthouse_sdpa",
    "select_entries",
    "slice_tokens",
    "whole_sequences",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def _version() -> str:
    """Of the installed package; a source tree beside it has none of its own."""
    try:
        return version(__name__)
    except PackageNotFoundError:
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
