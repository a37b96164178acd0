"""What a file of `--ckpt_path` holds; and final weights, brought into the model that is evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from lightning_lighthouse.runs.as_data import load_as_data
from lightning_lighthouse.runs.final_weights import is_sharded
from lightning_lighthouse.runs.sharded import CONTENTS, check_contents, is_sharded_checkpoint, load_weights, step_of

# what every checkpoint of Lightning has
VERSION, STATE, OPTIMIZERS = "pytorch-lightning_version", "state_dict", "optimizer_states"


class Contents(NamedTuple):
    """What a file holds.

    Args:
        words: In words.
        is_checkpoint: Whether Lightning can load it.
        can_go_on: Whether a training can go on from it.
        step: Optimizer steps, where it says so.
    """

    words: str
    is_checkpoint: bool
    can_go_on: bool
    step: int | None = None


def look_into(path: Path) -> Contents:
    """Say what a complete file holds, or a folder; the tensors stay on the disk.

    Raises:
        UnpicklingError: More than tensors and plain values.
        ValueError: Neither a checkpoint nor weights, or nothing that torch reads.
    """
    if is_sharded_checkpoint(path):
        # only the strategies that write such folders load them in Lightning
        check_contents(path)
        return Contents("a sharded checkpoint", is_checkpoint=False, can_go_on=True, step=step_of(path))
    if path.is_dir():
        raise ValueError(f"{path} is a folder and no sharded checkpoint, which has a file {CONTENTS}; give a file")
    content = load_as_data(path)
    if isinstance(content, Mapping) and VERSION in content and STATE in content:
        told = content.get("global_step", "unknown")
        step = told if isinstance(told, int) else None
        if OPTIMIZERS in content:
            return Contents(f"a checkpoint of step {told}", is_checkpoint=True, can_go_on=True, step=step)
        return Contents(f"a checkpoint of the weights alone, of step {told}", True, can_go_on=False, step=step)
    if isinstance(content, Mapping) and any(isinstance(value, Tensor) for value in content.values()):
        number = sum(value.numel() for value in content.values() if isinstance(value, Tensor))
        return Contents(f"final weights, {number:,} numbers", is_checkpoint=False, can_go_on=False)
    held = ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
    raise ValueError(
        f"{path} holds neither a checkpoint of Lightning nor the weights of a LightningModule, but {held or 'nothing'}"
    )


class LoadWeights(Callback):
    """Brings weights into the model before it is evaluated, once it is built, wrapped and sharded.

    Args:
        path: A file like `final.pt`: the state dict of the LightningModule; or a sharded checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load them."""
        wrapped = trainer.strategy.model
        is_shared = wrapped is not None and is_sharded(wrapped)
        model = wrapped if wrapped is not None and is_shared else pl_module
        if is_sharded_checkpoint(self.path):
            load_weights(self.path, model)
            return
        weights = load_as_data(self.path)
        if is_shared:
            # every rank has read all of them, and keeps its part
            options = StateDictOptions(full_state_dict=True, strict=pl_module.strict_loading)
            set_model_state_dict(model, weights, options=options)
        else:
            pl_module.load_state_dict(weights, strict=pl_module.strict_loading)

    on_test_start = on_validation_start
