"""Which call of which module gets which attention, and back; plain PyTorch, no Lightning."""

from lightning_lighthouse.routing.calls import causal_attention
from lightning_lighthouse.routing.patch import Patch, patch_attention

__all__ = ["Patch", "causal_attention", "patch_attention"]
