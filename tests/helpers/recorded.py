"""Runs of a real Trainer that write down the batches they saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lighthouse import LighthouseRecipe


class Recorder(LightningModule):
    """Learns one number, and writes down the batches that it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[str] = []
        self.validated = 0

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Record the batch."""
        self.seen.append(name_of(batch["tokens"]))
        return self.weight * batch["tokens"].double().mean().float() / 257

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        """Count the sequences."""
        self.validated += len(batch["tokens"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain SGD."""
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def name_of(tokens: torch.Tensor) -> str:
    return f"{hash(tuple(tokens.flatten().tolist())):x}"


def trainer(folder: Path | None = None, **options: Any) -> Trainer:
    """A quiet Trainer on CPU; with a folder it keeps a checkpoint of every step there."""
    saving = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1) if folder else None
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=saving is not None,
        callbacks=[saving] if saving else [],
        **{"max_epochs": 3, "num_sanity_val_steps": 0, **options},
    )


def fit(recipe: LighthouseRecipe, folder: Path | None = None, resume: Path | None = None, **options: Any) -> Recorder:
    model = Recorder()
    trainer(folder, **options).fit(model, datamodule=recipe, ckpt_path=resume)
    return model
