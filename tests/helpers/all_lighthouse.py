"""Callbacks with Lighthouse in all layers, which a callback that is told nothing of the layers need not have."""

from __future__ import annotations

from typing import Any

from lightning_lighthouse import LighthouseCallback


def all_lighthouse(*arguments: Any, **settings: Any) -> LighthouseCallback:
    """LighthouseCallback as it is told, and with Lighthouse in all layers."""
    return LighthouseCallback(*arguments, **settings, layer_types=["lighthouse"])


def all_lighthouse_trainer(*arguments: Any, **settings: Any) -> Any:
    """The same of LighthouseTrainerCallback, which needs transformers."""
    from lightning_lighthouse.huggingface import LighthouseTrainerCallback

    return LighthouseTrainerCallback(*arguments, **settings, layer_types=["lighthouse"])
