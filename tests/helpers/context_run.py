"""Trainings with shared sequences beside one process: `context_run.py FOLDER KIND:RANKS:SIZE:CASE,CASE...`.

Rank 0 writes `FOLDER/<KIND><RANKS>-<CASE>/result.json`, `by<SIZE>` behind the ranks where fewer share a sequence.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forked import run_ranks
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from resumable import ResumableBatches
from torch.utils.data import DataLoader, Dataset

from lightning_lighthouse import (
    ContextParallelDDPStrategy,
    ContextParallelStrategy,
    LighthouseCallback,
    LighthouseConfig,
    LighthouseRecipe,
    Phase,
)
from lightning_lighthouse.model import Decoder

SEQ_LEN, STEPS = 1012, 4
STRATEGIES = {"ddp": ContextParallelDDPStrategy, "fsdp": ContextParallelStrategy}
LIGHTHOUSE = {"attention": LighthouseConfig(top_k=64), "switch_at": 3, "layer_types": ["lighthouse"]}
LOCAL = {
    "phases": [Phase(1, ["chunk", "window"], window=100, sink_tokens=3), Phase(3, ["lighthouse", "window"], window=30)],
    "attention": LighthouseConfig(top_k=64, selection="random"),
}
CASES = {
    "plain": {},
    "local": {"callback": LOCAL},
    "recomputed": {"module": {"checkpoint": "block"}},
    "compiled": {"module": {"compile": True}, "backend": "aot_eager"},
    # tiles end with the ranks, which then exchange entries
    "even": {
        "seq_len": 1024,
        "callback": {"attention": LighthouseConfig(top_k=128)},
        "module": {"checkpoint": "block"},
    },
    "even-compiled": {
        "seq_len": 1024,
        "callback": {"attention": LighthouseConfig(top_k=128)},
        "module": {"checkpoint": "block", "compile": True},
        "backend": "aot_eager",
    },
    # leaves out what is not used: ranks whose graphs differ would wait for each other
    "inductor": {
        "seq_len": 1024,
        "callback": {"attention": LighthouseConfig(top_k=128)},
        "module": {"compile": True},
        "backend": "inductor",
    },
    "saved": {"save": 2, "trainer": {"max_steps": 2}},
    "resumed-one": {"resume": "one1-saved"},
    "resumed-ddp": {"resume": "ddp2-saved"},
    "resumed-four": {"resume": "ddp4-saved"},
    "recipe": {"recipe": True},
    "accumulated": {"trainer": {"accumulate_grad_batches": 2, "max_steps": 2}, "callback": {"switch_at": 1}},
}


class Rows(Dataset):
    """Seeded tokens."""

    def __init__(self, count: int, seed: int, seq_len: int, replica: int, replicas: int) -> None:
        tokens = torch.randint(257, (count, seq_len + 1), generator=torch.Generator().manual_seed(seed))
        self.tokens = tokens[replica::replicas]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"tokens": self.tokens[index]}


class Watched(Decoder):
    """Small, in float64, and with weights large enough for attention to matter."""

    def __init__(self, backend: str | None = None, **options: Any) -> None:
        super().__init__(
            num_layers=2, dim=32, num_heads=4, num_kv_heads=2, ffn_dim=48, warmup_steps=1, loss_chunk=300, **options
        )
        self.double()
        for parameter in self.parameters():
            if parameter.ndim == 2:
                parameter.data.mul_(4)
        self.backend = backend

    def configure_model(self) -> None:
        if self.backend is not None:
            for part in [*self.blocks, self.head]:
                part.compile(fullgraph=True, dynamic=False, backend=self.backend)
            self.hparams["compile"] = False
        super().configure_model()


class Notes(Callback):
    """Losses and norms over all ranks, the shapes that the steps saw."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.shapes: set[tuple[int, ...]] = set()
        self.tokens: list[list[list[int]]] = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [parameter.grad for parameter in pl_module.parameters()]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = outputs["loss"].detach().clone()
        self.losses.append(float(trainer.strategy.reduce(loss, reduce_op="mean")))
        self.shapes.add(tuple(batch["tokens"].shape))
        self.tokens.append(batch["tokens"].tolist())


def trainer_of(folder: Path, strategy: Any, callbacks: list[Callback], **options: Any) -> Trainer:
    settings = {
        "max_steps": STEPS,
        "val_check_interval": 2,
        "limit_val_batches": 2,
        "gradient_clip_val": 0.5,
        "enable_checkpointing": False,
        **options,
    }
    return Trainer(
        accelerator="cpu",
        strategy=strategy,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        # Lightning's own would shuffle
        use_distributed_sampler=False,
        callbacks=callbacks,
        default_root_dir=folder,
        **settings,
    )


def strategy_of(kind: str, size: int) -> Any:
    return STRATEGIES[kind](size, process_group_backend="gloo") if kind in STRATEGIES else "auto"


def loaders(ranks: int, size: int, seq_len: int) -> tuple[ResumableBatches, DataLoader]:
    """Two sequences a step over all ranks; neighbours read the same ones."""
    replica, replicas = int(os.environ.get("RANK", 0)) // size, ranks // size
    rows = [Rows(count, seed, seq_len, replica, replicas) for count, seed in ((2 * STEPS, 1), (4, 2))]
    batches = [{"tokens": tokens} for tokens in rows[0].tokens.split(2 // replicas)]
    return ResumableBatches(batches), DataLoader(rows[1], 2 // replicas)


def train(folder: Path, name: str, ranks: int, size: int, kind: str, case: dict[str, Any]) -> None:
    seed_everything(0, verbose=False)
    folder.mkdir(parents=True, exist_ok=True)
    torch._dynamo.reset()
    seq_len = case.get("seq_len", SEQ_LEN)
    notes, options = Notes(), LIGHTHOUSE | case.get("callback", {})
    if "phases" in options:
        del options["switch_at"], options["layer_types"]
    callback = LighthouseCallback(**options)
    module = Watched(case.get("backend"), **case.get("module", {}))
    callbacks = [callback, notes]
    if "save" in case:
        callbacks.append(ModelCheckpoint(folder, filename="saved", every_n_train_steps=case["save"]))
    options = case.get("trainer", {}) | ({"enable_checkpointing": True} if "save" in case else {})
    trainer = trainer_of(folder, strategy_of(kind, size), callbacks, devices=ranks, **options)
    if case.get("recipe"):
        recipe = LighthouseRecipe(
            seq_len=SEQ_LEN, source=str(folder.parent / "text.jsonl"), output_dir=str(folder.parent / "data"),
            batch_size=2 // (ranks // size), num_workers=0, validation_fraction=0.2,
        )  # fmt: skip
        trainer.fit(module, datamodule=recipe)
        (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(notes.tokens))
        return
    resumed = folder.parent / case["resume"] / "saved.ckpt" if "resume" in case else None
    trainer.fit(module, *loaders(ranks, size, seq_len), ckpt_path=resumed)
    alone = trainer_of(folder / "alone", strategy_of(kind, size), [], devices=ranks)
    (validated,) = alone.validate(module, loaders(ranks, size, seq_len)[1], verbose=False)
    if trainer.is_global_zero:
        report = json.loads((folder / "lighthouse.json").read_text())
        result = {
            "losses": notes.losses,
            "norms": notes.norms,
            "shapes": sorted(notes.shapes),
            "validations": [row["loss"] for row in report["validations"]],
            "alone": validated["val/loss"],
            "tokens": sum(phase["tokens"] for phase in report["phases"].values()),
            "routed_calls": {phase: row["routed_calls"] for phase, row in report["phases"].items()},
            "size": report["context_parallel_size"],
        }
        (folder / "result.json").write_text(json.dumps(result))


def main(folder: str, ranks: int, size: int, kind: str, names: list[str]) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    groups = "" if size == ranks else f"by{size}"
    for name in names:
        train(Path(folder) / f"{kind}{ranks}{groups}-{name}", name, ranks, size, kind, CASES[name])


if __name__ == "__main__":
    target, plans = sys.argv[1], sys.argv[2:]
    # each plan: kind:ranks:size:case,case
    for plan in plans:
        kind, ranks, size, names = plan.split(":")
        run_ranks(partial(main, target, int(ranks), int(size), kind, names.split(",")), int(ranks))
