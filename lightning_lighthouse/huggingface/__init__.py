"""For those who train with transformers: a callback for its Trainer."""

from lightning_lighthouse.huggingface.trainer_callback import LighthouseTrainerCallback

__all__ = ["LighthouseTrainerCallback"]
