"""Attention as pure tensor functions: q, k and v `[B, H, N, D]` to an output; no Lightning, no model, no run."""

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.attention.documents import Documents
from lightning_lighthouse.attention.lighthouse import lighthouse_attention, select_entries
from lightning_lighthouse.attention.rotation import Rotation

__all__ = ["Documents", "LighthouseConfig", "Rotation", "lighthouse_attention", "select_entries"]
