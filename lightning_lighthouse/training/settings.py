"""What a fit in phases is told; `LighthouseCallback` describes each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from torch import nn

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.phases.phase import Phase
from lightning_lighthouse.phases.plateau import PlateauRule
from lightning_lighthouse.routing.packing import DocumentsSetting
from lightning_lighthouse.routing.rotary import RotarySetting
from lightning_lighthouse.routing.targets import DenseLayers


class Settings(Protocol):
    """The settings of the callback."""

    attention: LighthouseConfig
    dense_layers: DenseLayers
    select: str | None
    enabled: bool
    on_unroutable: Literal["raise", "warn"]
    allow_return: bool
    validation_metric: str
    plateau: PlateauRule | None
    return_steps: int
    rewarm_steps: int
    stop_on_nonfinite: bool
    hf_assume_causal: bool
    documents: DocumentsSetting
    rotary: RotarySetting | None

    @property
    def has_default_layers(self) -> bool:
        """Whether the user says nothing of how the layers attend."""

    def phases_for(self, layers: Mapping[str, nn.Module]) -> Sequence[Phase]:
        """The phases before the dense one of a model with these attention layers, also where `switch_at` gives one."""
