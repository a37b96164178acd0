"""A short training of the decoder with documents, also over two processes: `documents_run.py OUTPUT` under torchrun.

Every rank reads a row of its own, with documents of its own, and writes `OUTPUT/rank<r>.pt`, its weights; one process
alone reads both rows in one batch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from all_lighthouse import all_lighthouse
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, IterableDataset

from lightning_lighthouse import Documents, LighthouseConfig
from lightning_lighthouse.model import Decoder

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)
LENGTHS = [[41, 1, 55], [97]]
STEPS, SWITCH = 6, 4


def decoder(kind: type[Decoder] = Decoder, **settings: Any) -> Decoder:
    torch.manual_seed(0)
    sizes = {"num_layers": 2, "dim": 16, "num_heads": 2, "ffn_dim": 24, "vocab_size": 31, "warmup_steps": 2}
    return kind(**{**sizes, **settings}).double()


def rows(step: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randint(31, (sum(lengths),), generator=generator) for lengths in LENGTHS]


class Batches(IterableDataset):
    """Batches of the rows with these numbers."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers

    def __iter__(self) -> Any:
        for step in range(STEPS):
            documents = Documents([LENGTHS[number] for number in self.numbers])
            yield {"tokens": torch.stack([rows(step)[number] for number in self.numbers]), "documents": documents}


def train(model: Decoder, data: Any, callbacks: list[Any], folder: Path, **settings: Any) -> Decoder:
    path = settings.pop("ckpt_path", None)
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": STEPS,
        "max_epochs": -1,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 2,
    }
    trainer = Trainer(default_root_dir=folder, callbacks=callbacks, **{**quiet, **settings})
    trainer.fit(model, data, ckpt_path=path, weights_only=None if path is None else True)
    return model


def main(output: Path) -> None:
    rank = int(os.environ.get("RANK", -1))
    settings = {} if rank < 0 else {"devices": 2, "strategy": "ddp"}
    data = DataLoader(Batches([0, 1] if rank < 0 else [rank]), batch_size=None)
    callback = all_lighthouse(SWITCH, CONFIG, documents=True)
    settings |= {"val_check_interval": None, "use_distributed_sampler": False}
    model = train(decoder(restart_positions=True), data, [callback], output, **settings)
    output.mkdir(exist_ok=True)
    torch.save(model.state_dict(), output / f"rank{max(rank, 0)}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
