"""The trained model as a plain file: the bare state dict of the LightningModule, dense and free of this package."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from lightning_lighthouse.runs.saving import save_whole

if TYPE_CHECKING:
    from pathlib import Path

    from lightning.pytorch import Trainer

FINAL = "final.pt"


def write_final(trainer: Trainer, module: nn.Module, folder: str | Path) -> str:
    """Gather the weights of `module` and write `folder/final.pt`. Every rank calls it, rank 0 writes.

    The file loads with `torch.load(path, weights_only=True)` into the same LightningModule. It appears whole or not at
    all.
    """
    path = os.path.join(folder, FINAL)
    weights = _gather_weights(module)
    if trainer.is_global_zero:
        save_whole(weights, path)
    return path


def _gather_weights(module: nn.Module) -> dict[str, Any]:
    if not is_sharded(module):
        state = module.state_dict().items()
        # an extra state may be anything
        return {name: value.detach().cpu() if isinstance(value, Tensor) else value for name, value in state}
    # all ranks take part in the gathering, whoever writes
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(module, options=options)


def is_sharded(module: nn.Module) -> bool:
    """Whether the weights are spread over the ranks, by FSDP or FSDP2."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in module.parameters()) or any(
        isinstance(child, FullyShardedDataParallel) for child in module.modules()
    )
