"""Trainings over two processes that are spoilt on one of them, started by torchrun: `guard_run.py STRATEGY OUTPUT`.

Every rank writes `OUTPUT/rank<r>.json`: for each case the message, and whether the weights are finite and those of the
step before.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from all_lighthouse import all_lighthouse
from faulty import FaultyLinear, Spoil
from foreign import ForeignModule, Sequences
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.utils.data import DataLoader

from lightning_lighthouse import LighthouseConfig
from lightning_lighthouse.training.nonfinite import NonFiniteError

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)
CASES = {"forward": (2, "forward"), "dense": (5, "forward"), "backward": (2, "backward")}


class Sharded(ForeignModule):
    """The module of the other tests, sharded by FSDP2."""

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for part in [*self.model.blocks, self.model]:
            fully_shard(part, mesh=self.device_mesh["data_parallel"])


class Weights(Callback):
    """What this rank holds of the weights, after each step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.kept = held(pl_module)


def held(module) -> list[torch.Tensor]:
    locals_ = (p.detach().to_local() if hasattr(p, "to_local") else p.detach() for p in module.parameters())
    return [local.clone() for local in locals_]


def main(name: str, output: Path) -> None:
    results = {}
    for case, (batch, where) in CASES.items():
        strategy = DDPStrategy(process_group_backend="gloo")
        if name == "fsdp2":
            strategy = ModelParallelStrategy(2, 1, process_group_backend="gloo")
        torch.manual_seed(0)
        module, weights = Sharded() if name == "fsdp2" else ForeignModule(), Weights()
        module.model.blocks[2].attn.qkv.__class__ = FaultyLinear
        trainer = Trainer(
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            use_distributed_sampler=False,
            max_steps=8,
            callbacks=[all_lighthouse(4, CONFIG), Spoil(batch, where, rank=1), weights],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=output,
        )
        tokens = Sequences(32).tokens[int(os.environ["RANK"]) :: 2]
        try:
            trainer.fit(module, DataLoader(tokens, 2))
        except NonFiniteError as error:
            now = held(module)
            results[case] = {
                "message": str(error),
                "finite": all(bool(weight.isfinite().all()) for weight in now),
                "unchanged": all(torch.equal(a, b) for a, b in zip(now, weights.kept, strict=True)),
            }
    (output / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    # a thread of gloo's that still runs while the interpreter ends can abort the process
    torch.distributed.destroy_process_group()
