"""Two trainings over two processes, with a probe and without, started by torchrun: `probe_run.py STRATEGY OUTPUT`.

Every rank writes `OUTPUT/rank<r>.json`: what its probe found, and the losses of both trainings.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from all_lighthouse import all_lighthouse
from foreign import ForeignModule, Sequences
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_lighthouse import FutureLeakProbe, LighthouseConfig
from lightning_lighthouse.model import Decoder
from lightning_lighthouse.runs.final_weights import is_sharded

STEPS, SWITCH = 6, 4
CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8, selection="published")


class Module(ForeignModule):
    """The module of the other tests, with logits to ask for."""

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)


class Recorded(Decoder):
    """Our own decoder, which FSDP2 shards; it keeps its losses."""

    def __init__(self, vocab_size: int = 31) -> None:
        super().__init__(num_layers=4, dim=16, num_heads=2, ffn_dim=24, vocab_size=vocab_size)
        self.losses: list[float] = []
        self.validation_losses: list[float] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validation_losses.append(self.loss(batch).item())
        super().validation_step(batch, batch_idx)


def train(name: str, probe: FutureLeakProbe | None, output: Path) -> Module | Recorded:
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    module: Module | Recorded
    if name == "ddp":
        module, strategy = Module(), DDPStrategy(process_group_backend="gloo")
    else:
        module = Recorded()
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        use_distributed_sampler=False,
        max_steps=STEPS,
        max_epochs=-1,
        val_check_interval=2,
        callbacks=[all_lighthouse(SWITCH, CONFIG), *([probe] if probe else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=output,
    )
    # each rank has its own part of the text
    batches, validation = (Sequences(count, tokens=64, seed=seed).tokens[rank::2] for count, seed in ((12, 0), (8, 1)))
    trainer.fit(module, DataLoader(batches), DataLoader(validation))
    assert is_sharded(module) == (name == "fsdp2")
    return module


def main(name: str, output: Path) -> None:
    rank = int(os.environ["RANK"])
    # ranks that stop by their own clocks or their own sums would wait for each other for ever; fsdp2 is to finish
    limit = 0.3 if name == "ddp" else 10.0
    probe = FutureLeakProbe(max_stderr=1e-4, max_seconds=limit + rank, max_total_seconds=60)
    probed, alone = train(name, probe, output), train(name, None, output)
    result = {
        "probe": [asdict(found) for found in probe.results],
        "probed": [probed.losses, probed.validation_losses],
        "alone": [alone.losses, alone.validation_losses],
    }
    (output / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
