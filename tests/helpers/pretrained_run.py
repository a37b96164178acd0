"""A training of a saved model over one process or two: `pretrained_run.py FOLDER OUTPUT PROCESSES`.

Writes the final weights and the training losses to OUTPUT, and a checkpoint to OUTPUT.ckpt: by two processes a folder.
"""

from __future__ import annotations

import sys

import torch
from all_lighthouse import all_lighthouse
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from pretrained import draw_tokens
from torch.utils.data import DataLoader

from lightning_lighthouse import LighthouseConfig
from lightning_lighthouse.huggingface import HuggingFaceDecoder
from lightning_lighthouse.runs.final_weights import _gather_weights


class Recorded(HuggingFaceDecoder):
    """Keeps its losses, and its weights at the end."""

    def on_fit_start(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, outputs, *_) -> None:
        self.losses.append(outputs["loss"].item())

    def on_train_end(self) -> None:
        # every process takes part
        self.final = _gather_weights(self)
        self.trainer.save_checkpoint(f"{output}.ckpt")


if __name__ == "__main__":
    folder, output, processes = sys.argv[1], sys.argv[2], int(sys.argv[3])
    strategy = "auto"
    if processes > 1:
        strategy = ModelParallelStrategy(processes, 1, process_group_backend="gloo")
    module = Recorded(folder, learning_rate=1e-2, warmup_steps=1)
    config = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        use_distributed_sampler=False,
        max_steps=6,
        callbacks=[all_lighthouse(switch_at=0.5, attention=config)],
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([{"tokens": draw_tokens()}] * 6, batch_size=None))
    if trainer.is_global_zero:
        torch.save({"losses": module.losses, "weights": module.final}, output)
