"""What strategies need: ranks whose copies of a model cannot differ in silence; what share of the data a rank reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning_lighthouse.checks import SettingError, is_named
from lightning_lighthouse.training.stopwatch import count_tokens

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def check_tensor_parallel(trainer: Trainer, module: LightningModule) -> None:
    """Refuse a tensor-parallel group that no parameter is spread over.

    ModelParallelStrategy puts all ranks of a node into one such group unless it is told the sizes. A model that only
    FSDP2 shards then has one copy on each rank, and nothing keeps them equal.

    Args:
        trainer: At fit start, when the model is sharded.
        module: The model.

    Raises:
        SettingError: The group has several ranks, and every parameter is whole on each of them.
    """
    # Any: its class is known by name alone
    strategy: Any = trainer.strategy
    if not is_named(strategy, "ModelParallelStrategy"):
        return
    from torch.distributed.tensor import DTensor

    sizes = {name: strategy.device_mesh[name].size() for name in ("data_parallel", "tensor_parallel")}
    meshes = [parameter.device_mesh for parameter in module.parameters() if isinstance(parameter, DTensor)]
    is_used = any("tensor_parallel" in (mesh.mesh_dim_names or ()) for mesh in meshes)
    if sizes["tensor_parallel"] > 1 and not is_used:
        raise SettingError(
            f"ModelParallelStrategy has data_parallel_size={sizes['data_parallel']} and tensor_parallel_size="
            f"{sizes['tensor_parallel']}, but no parameter is spread over the tensor-parallel ranks: each would train "
            f"a copy of its own; give data_parallel_size={trainer.world_size} and tensor_parallel_size=1"
        )


def free_gradients(trainer: Trainer) -> None:
    """Free the gradients under FSDP1, which cannot recompile while they are kept; the step before has used them."""
    if is_named(trainer.strategy, "FSDPStrategy"):
        for optimizer in trainer.optimizers:
            optimizer.zero_grad(set_to_none=True)


def tokens_of_ranks(trainer: Trainer, batch: Any) -> int:
    """Tokens of a batch over all shares of the data; ranks that split a model or a sequence read the same one."""
    shares = trainer.distributed_sampler_kwargs
    # what neighbours of a sequence both hold counts once
    whole = getattr(trainer.strategy, "tokens_before_slicing", None)
    return (count_tokens(batch) if whole is None else whole) * (int(shares["num_replicas"]) if shares else 1)


def first_of_sequence(trainer: Trainer, index: int) -> int:
    """The lowest `index` among the ranks that share a sequence with this one: they must do the same."""
    lowest = getattr(trainer.strategy, "lowest_of_sequence", None)
    return index if lowest is None else lowest(index)
