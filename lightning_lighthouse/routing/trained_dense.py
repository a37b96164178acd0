"""Was a model trained with dense attention before Lighthouse Attention? Then its levels had better be averaged.

Where a token is reached by several levels, combine="sum" gives it a vector that many times as long. A model learns
that from nothing; one that was trained dense is thrown off by it (docs/log.md, 2026-11-27).
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.layer_types import DENSE, LIGHTHOUSE
from lightning_lighthouse.checks import quoted, warn


class TrainedDense:
    """What is known of the model of one patch.

    Args:
        model: Patched; a model of transformers says where its weights come from.
    """

    def __init__(self, model: nn.Module) -> None:
        self._reason = ""
        for module in model.modules():
            origin = getattr(module, "name_or_path", "")
            if isinstance(origin, str) and origin:
                self._reason = f"weights that come from {quoted(origin)} were trained dense"
                break
        self._is_told = False

    def train(self, config: LighthouseConfig, layer_types: Collection[str]) -> None:
        """A training step is to come: say once what throws the model off.

        Args:
            config: Of Lighthouse Attention.
            layer_types: Of the layers that are patched.
        """
        if set(layer_types) == {DENSE}:
            self._reason = self._reason or "the model was trained dense before"
        elif LIGHTHOUSE in layer_types and self._reason and config.combine == "sum" and not self._is_told:
            self._is_told = True
            warn(
                f"{self._reason}, and combine='sum' adds what several levels say: such a model begins far off; set "
                "combine='mean'"
            )
