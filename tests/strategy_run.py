"""One training over several processes, started by torchrun: `strategy_run.py STRATEGY OUTPUT`.

Every rank writes `OUTPUT/rank<r>.json`: its losses, and whether each batch was routed.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from foreign import ForeignModule, SelfAttention, Sequences
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.utils.data import DataLoader

from lightning_lighthouse import LighthouseCallback, LighthouseConfig
from lightning_lighthouse.patch import _patches

STEPS = 8
SWITCH = 0.6
GLOBAL_BATCH = 4
CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)


class Sharded(ForeignModule):
    """The module of the other tests, sharded by FSDP2."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for block in self.model.blocks:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


class Phases(Callback):
    """Whether each batch is routed, asked of a layer of the model."""

    def __init__(self) -> None:
        self.routed: list[bool] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.routed.append(self.calls > 0)
        self.calls = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.calls = sum(patch.is_on for patch in _patches)


def strategies(name: str) -> tuple[Strategy | str, type[ForeignModule]]:
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo"), ForeignModule
    if name == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        return strategy, Sharded
    return "auto", ForeignModule


def main(name: str, output: Path) -> None:
    strategy, kind = strategies(name)
    processes = 1 if name == "single" else 2
    torch.manual_seed(0)
    module, phases = kind(), Phases()
    assert isinstance(module.model.blocks[1].attn, SelfAttention)
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        strategy=strategy,
        use_distributed_sampler=False,
        max_steps=STEPS,
        max_epochs=-1,
        callbacks=[LighthouseCallback(SWITCH, CONFIG), phases],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=output,
    )
    # each rank takes its part of every global batch, so that one process would see the same
    tokens = Sequences(GLOBAL_BATCH * STEPS).tokens[int(os.environ["RANK"]) :: processes]
    trainer.fit(module, DataLoader(tokens, GLOBAL_BATCH // processes))
    result = {"losses": module.losses, "routed": phases.routed}
    (output / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
