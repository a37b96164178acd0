"""Two trainings over two processes, with an evaluation and without: `evaluation_run.py STRATEGY OUTPUT`, by torchrun.

Every rank writes `OUTPUT/rank<r>.json`: what its evaluation found, and the losses of both trainings.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from all_lighthouse import all_lighthouse
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from long_contexts import text_of
from probe_run import CONFIG, Recorded
from torch.utils.data import DataLoader

from lightning_lighthouse import LongContextEvaluation
from lightning_lighthouse.data.tokenizers import ByteTokenizer

STEPS, SWITCH, TOKENS = 4, 2, 256


def train(name: str, evaluation: LongContextEvaluation | None, output: Path) -> Recorded:
    rank = int(os.environ["RANK"])
    torch.manual_seed(0)
    strategy: DDPStrategy | ModelParallelStrategy = DDPStrategy(process_group_backend="gloo")
    if name == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    # over bytes
    module = Recorded(vocab_size=257)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        use_distributed_sampler=False,
        max_steps=STEPS,
        max_epochs=-1,
        val_check_interval=1,
        callbacks=[all_lighthouse(SWITCH, CONFIG), *([evaluation] if evaluation else [])],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=output,
    )
    # each rank has its own part of the text; one has less of it, where ranks need not validate together
    fewer = rank if name == "ddp" else 0
    train, validation = (text_of(16 * (TOKENS + 1), seed).view(16, -1)[rank::2] for seed in (0, 1))
    trainer.fit(module, DataLoader(train), DataLoader(validation[: 8 - fewer]))
    return module


def main(name: str, output: Path) -> None:
    # three samples for two ranks: one of them runs one for nothing
    evaluation = LongContextEvaluation(
        2, lengths=[TOKENS, 1024], num_samples=3, max_share=None, own_mode=True, tokenizer=ByteTokenizer()
    )
    evaluated, alone = train(name, evaluation, output), train(name, None, output / "alone")
    result = {
        "results": evaluation.results,
        "evaluated": [evaluated.losses, evaluated.validation_losses],
        "alone": [alone.losses, alone.validation_losses],
    }
    (output / f"rank{os.environ['RANK']}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
