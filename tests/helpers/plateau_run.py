"""A training on two ranks whose validation losses differ, started by torchrun: `plateau_run.py OUTPUT [CHECKPOINT]`.

Rank 0's loss stalls after 4 steps, rank 1's never does. Every rank writes `OUTPUT/rank<r>.json`: whether each batch was
routed, its losses, and the switch.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from all_lighthouse import all_lighthouse
from foreign import ForeignModule, ResumableLoader, loader
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy

from lightning_lighthouse import LighthouseConfig, PlateauRule
from lightning_lighthouse.phases.schedule import LIGHTHOUSE

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)


class Told(ForeignModule):
    def validation_step(self, batch, batch_idx):
        stall = 4 if self.global_rank == 0 else 100
        self.log("val/loss", 9.0 - min(self.global_step, stall))


class Phases(Callback):
    def __init__(self) -> None:
        self.phases = ""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        callback = trainer.callbacks[0]
        self.phases += "L" if callback.phase_at(trainer.global_step) == LIGHTHOUSE else "d"


def main(output: Path, checkpoint: str | None) -> None:
    torch.manual_seed(0)
    module, phases = Told(), Phases()
    callback = all_lighthouse(0.9, CONFIG, plateau=PlateauRule(patience=2), return_steps=2, rewarm_steps=2)
    callbacks = [callback, phases]
    if checkpoint is None:
        callbacks.append(ModelCheckpoint(output, save_top_k=-1, save_on_train_epoch_end=False))
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        use_distributed_sampler=False,
        max_steps=16,
        max_epochs=-1,
        val_check_interval=2,
        num_sanity_val_steps=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=checkpoint is None,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=output,
    )
    data = ResumableLoader(64)
    data.batches = data.batches[int(os.environ["RANK"]) :: 2]
    trainer.fit(module, data, loader(2, seed=1), ckpt_path=checkpoint, weights_only=True)
    switch = callback.state_dict()["switch"]
    result = {"phases": phases.phases, "losses": module.losses, "switch": switch}
    (output / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
