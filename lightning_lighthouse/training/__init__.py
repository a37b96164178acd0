"""The phases inside Lightning's Trainer: the callback, and what its hooks call."""

from lightning_lighthouse.training.callback import LighthouseCallback

__all__ = ["LighthouseCallback"]
