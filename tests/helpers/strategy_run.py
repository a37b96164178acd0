"""Trainings over several processes, started by torchrun: `strategy_run.py STRATEGY OUTPUT MODE...`.

Every rank writes `OUTPUT/MODE/rank<r>.json`: its losses, whether each batch was routed, the step before each, and the
gradient norms that the curves show.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from all_lighthouse import all_lighthouse
from foreign import Block, ForeignModule, Sequences
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.utils.data import DataLoader

from lightning_lighthouse import LighthouseCallback, LighthouseConfig, Phase
from lightning_lighthouse.phases import Switch, phase_events
from lightning_lighthouse.routing.scope import scopes
from lightning_lighthouse.runs.checkpoint import Checkpoint

STEPS = 8
SWITCH = 0.6
GLOBAL_BATCH = 4
CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)
PHASES = [Phase(0.25, ["chunk"], window=32), Phase(SWITCH, ["window", "lighthouse"], window=8, sink_tokens=1)]


class Moded(ForeignModule):
    """The module of the other tests in a mode: plain, compile, checkpoint, both, accumulate, phases or validated."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.mode, self.is_ready = mode, False

    def shard(self) -> None:
        """Nothing to shard."""

    def configure_model(self) -> None:
        if self.is_ready:
            return
        self.is_ready = True
        blocks = list(self.model.blocks)
        if self.mode in ("checkpoint", "both", "phases"):
            apply_activation_checkpointing(self.model, check_fn=lambda module: module in blocks)
        self.shard()
        if self.mode in ("compile", "both", "phases"):
            for block in self.model.blocks:
                block.compile(backend="aot_eager")


class Sharded(Moded):
    """Sharded by FSDP2."""

    def shard(self) -> None:
        from torch.distributed.fsdp import fully_shard

        for block in self.model.blocks:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])
        fully_shard(self.model, mesh=self.device_mesh["data_parallel"])


class Wrapped(Moded):
    """Sharded by FSDP1, which must be told that it runs on a CPU."""

    def shard(self) -> None:
        policy, device = ModuleWrapPolicy({Block}), torch.device("cpu")
        self.model = FullyShardedDataParallel(
            self.model, auto_wrap_policy=policy, device_id=device, use_orig_params=True
        )


class CPUFSDPStrategy(FSDPStrategy):
    """FSDP1 on a CPU, which Lightning refuses to its own class."""


class Phases(Callback):
    """Whether each batch is routed, and its step; the switches; the newest gradient norm behind each batch."""

    def __init__(self, callback: LighthouseCallback) -> None:
        self.callback = callback
        self.norms: list[float | None] = []
        self.routed: list[bool] = []
        self.steps: list[int] = []
        self.switches: list[int] = []

    def setup(self, trainer, pl_module, stage):
        phase_events(trainer).subscribe(Switch, lambda event: self.switches.append(event.step))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.routed.append(any(scope.is_on for scope in scopes))
        self.steps.append(trainer.global_step)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.norms.append(self.callback._running._steps.newest.get("train/grad_norm"))


def strategies(name: str) -> tuple[Strategy | str, type[Moded]]:
    if name == "ddp":
        return DDPStrategy(process_group_backend="gloo"), Moded
    if name == "fsdp1":
        return CPUFSDPStrategy(process_group_backend="gloo"), Wrapped
    if name == "fsdp2":
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
        return strategy, Sharded
    if name == "fsdp2-without-sizes":
        return ModelParallelStrategy(process_group_backend="gloo"), Sharded
    return "auto", Moded


def main(name: str, output: Path, mode: str) -> None:
    strategy, kind = strategies(name)
    processes = 1 if name == "single" else 2
    torch.manual_seed(0)
    module = kind(mode)
    accumulate = 2 if mode == "accumulate" else 1
    several = mode == "phases"
    callback = LighthouseCallback(attention=CONFIG, phases=PHASES) if several else all_lighthouse(SWITCH, CONFIG)
    phases = Phases(callback)
    callbacks: list[Callback] = [callback, phases]
    settings: dict[str, Any] = {"enable_checkpointing": False}
    if mode == "validated":
        # the last validation falls on the last step, and a checkpoint behind it
        settings = {"val_check_interval": STEPS // 2, "check_val_every_n_epoch": None}
        callbacks.append(Checkpoint(output / mode, save_last=True))
    trainer = Trainer(
        accelerator="cpu",
        devices=processes,
        log_every_n_steps=1,
        strategy=strategy,
        use_distributed_sampler=False,
        max_steps=STEPS // accumulate,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=output / mode,
        **settings,
    )
    # each rank takes its part of every global batch, so that one process would see the same
    tokens = Sequences(GLOBAL_BATCH * STEPS).tokens[int(os.environ["RANK"]) :: processes]
    validation = DataLoader(Sequences(4, seed=1).tokens, 2) if mode == "validated" else None
    trainer.fit(module, DataLoader(tokens, GLOBAL_BATCH // processes), validation)
    result = {"losses": module.losses, "routed": phases.routed, "steps": phases.steps, "switches": phases.switches}
    # there is none before the first optimizer step
    result["norms"] = [norm for norm in phases.norms if norm is not None]
    (output / mode).mkdir(parents=True, exist_ok=True)
    (output / mode / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    for each in sys.argv[3:]:
        torch._dynamo.reset()
        main(sys.argv[1], Path(sys.argv[2]), each)
