"""For those who train with transformers: its models as LightningModules, a callback for its Trainer.

Names are imported on first use: one needs transformers, the other its Trainer.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_lighthouse.huggingface.decoder import HuggingFaceDecoder
    from lightning_lighthouse.huggingface.trainer_callback import LighthouseTrainerCallback

_HOMES = {"HuggingFaceDecoder": "decoder", "LighthouseTrainerCallback": "trainer_callback"}

__all__ = ["HuggingFaceDecoder", "LighthouseTrainerCallback"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
