"""A decoder worth training: its network, and the LightningModule around it."""

from lightning_lighthouse.model.decoder import Decoder

__all__ = ["Decoder"]
