"""Write down every bit of a run's losses, unbroken and resumed, to compare before and after a change of the code.

    python experiments/recorded_run.py before.json
    python experiments/recorded_run.py after.json && cmp before.json after.json

A small decoder trains 200 steps on one thread of a CPU, switches to dense attention at step 140, and validates every
25; then the same again, stopped behind step 120 and resumed from its checkpoint. The status is 1 if the second run's
losses are not the first's. Bits are those of one machine and one version of torch: make both files on the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import struct
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from lightning_lighthouse import LighthouseCallback, LighthouseConfig, LighthouseRecipe
from lightning_lighthouse.model import Decoder

STEPS = 200
SWITCH_AT = 0.7
# in the Lighthouse phase, inside an epoch, and not at a validation
STOP = 120
VALIDATE_EVERY = 25
SEQ_LEN = 1024
# 64 winners are two tiles: with fewer there is one, and the causal selection would read no scores
ATTENTION = LighthouseConfig(num_levels=3, pooling_factor=2, top_k=64, selection="causal")


class StoppedError(Exception):
    """The run was to be stopped here."""


class Record(Callback):
    """Notes the losses, and stops behind a step, leaving a checkpoint.

    Args:
        stop: Optimizer steps to do.
        checkpoint: Where it is written.
    """

    def __init__(self, stop: int | None = None, checkpoint: Path | None = None) -> None:
        self.train: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self.stop, self.checkpoint = stop, checkpoint

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the training loss."""
        self.train.append(outputs["loss"].item())
        if trainer.global_step == self.stop:
            trainer.save_checkpoint(self.checkpoint)
            raise StoppedError

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the validation loss."""
        self.validation.append((trainer.global_step, trainer.callback_metrics["val/loss"].item()))


def write_text(path: Path) -> None:
    """Sentences of made-up words: little, but something to learn."""
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randrange(2, 9))) for _ in range(100)]
    documents = (" ".join(draw.choices(words, k=draw.randrange(50, 900))) + "." for _ in range(50))
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))


def train(folder: Path, record: Record, *, seed: int, checkpoint: Path | None = None) -> None:
    """One run, from the start or from a checkpoint.

    Args:
        folder: Of the text and the prepared data.
        record: What it logs to.
        seed: Of the weights.
        checkpoint: None: from the start.
    """
    seed_everything(seed)
    model = Decoder(
        num_layers=3, dim=64, num_heads=4, num_kv_heads=2, ffn_dim=128,
        learning_rate=3e-3, warmup_steps=20, schedule="wsd",
    )  # fmt: skip
    data = LighthouseRecipe(
        SEQ_LEN,
        batch_size=2,
        source=str(folder / "text.jsonl"),
        output_dir=str(folder / "prepared"),
        validation_fraction=0.1,
        num_workers=1,
    )
    trainer = Trainer(
        accelerator="cpu",
        precision="32-true",
        deterministic=True,
        max_steps=STEPS,
        max_epochs=-1,
        val_check_interval=VALIDATE_EVERY,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        gradient_clip_val=1.0,
        callbacks=[LighthouseCallback(SWITCH_AT, ATTENTION, dense_layers=[0], layer_types=["lighthouse"]), record],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)


def losses(*records: Record) -> dict[str, Any]:
    """The losses of a run's parts in hexadecimal, and one digest of their bits."""
    steps = [loss for record in records for loss in record.train]
    validations = [pair for record in records for pair in record.validation]
    every = [*steps, *(loss for _, loss in validations)]
    return {
        "sha256": hashlib.sha256(struct.pack(f"<{len(every)}d", *every)).hexdigest(),
        "train": [loss.hex() for loss in steps],
        "validation": {step: loss.hex() for step, loss in validations},
    }


def main() -> int:
    """Train three times, and write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the JSON file to write")
    output = parser.parse_args().output
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        checkpoint = folder / "stopped.ckpt"
        write_text(folder / "text.jsonl")
        whole, before, after = Record(), Record(STOP, checkpoint), Record()
        train(folder, whole, seed=42)
        try:
            train(folder, before, seed=42)
        except StoppedError:
            # with other weights, so that all of them must come from the checkpoint
            train(folder, after, seed=43, checkpoint=checkpoint)
    found = {"unbroken": losses(whole), "resumed": losses(before, after)}
    output.write_text(json.dumps(found, indent=1) + "\n")
    for name, run in found.items():
        print(f"{name:<8} {run['sha256']}  {len(run['train'])} steps, {len(run['validation'])} validations")
    return 0 if found["unbroken"] == found["resumed"] else 1


if __name__ == "__main__":
    sys.exit(main())
