"""Lightning's strategies with each sequence shared by several ranks: context parallelism.

Neighbouring ranks share a sequence; the data is shared out by such groups, and gradients are averaged over all ranks.
"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import timedelta
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_lighthouse.checks import SettingError, check_type
from lightning_lighthouse.context.group import Context
from lightning_lighthouse.routing.context_parallel import shared_sequences
from lightning_lighthouse.training.context_batches import ContextBatches
from lightning_lighthouse.training.context_check import attention_layers, check_fits


class _ContextParallel:
    """Beside a strategy of Lightning: the groups, their shares of the data, and their slices of each batch."""

    def _share_sequences(self, size: int, check_positions: bool) -> None:
        check_type("context_parallel_size", size, int)
        check_type("check_positions", check_positions, bool)
        self.context_parallel_size, self._checks_positions = size, check_positions
        self._context_mesh: DeviceMesh | None = None
        self._batches: ContextBatches | None = None
        self._contexts = ExitStack()

    def setup_environment(self) -> None:
        """Check the sizes, then make the groups; neighbours share a sequence, on one node where it has room."""
        size, strategy = self.context_parallel_size, self._lightnings
        ranks = strategy.num_nodes * strategy.num_processes
        if size < 1 or ranks % size:
            raise SettingError(f"context_parallel_size must divide the {ranks} ranks, got {size}")
        super().setup_environment()  # type: ignore[misc]
        if size > 1 and self._context_mesh is None:
            device = strategy.root_device.type
            self._context_mesh = init_device_mesh(device, (ranks // size, size), mesh_dim_names=("replica", "context"))

    def setup(self, trainer: Trainer) -> None:
        """Share the sequences from here on, in fit, validate, test and predict, with a callback or without."""
        super().setup(trainer)  # type: ignore[misc]
        if self._context_mesh is None:
            return
        module = self._lightnings.lightning_module
        context = Context.of(self._context_mesh["context"].get_group())
        layers = attention_layers(trainer, module)
        check_fits(trainer, module, context)
        self._contexts.enter_context(shared_sequences(context, layers.values()))
        self._batches = ContextBatches(trainer, module, context, layers, self._checks_positions)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move the batch, and keep this rank's slice of it."""
        batch = super().batch_to_device(batch, device, dataloader_idx)  # type: ignore[misc]
        return batch if self._batches is None else self._batches.slice(batch)

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Of how many groups that read different sequences this rank is in which."""
        if self._context_mesh is None:
            return super().distributed_sampler_kwargs  # type: ignore[misc]
        replicas = self._context_mesh["replica"]
        return {"num_replicas": replicas.size(), "rank": replicas.get_local_rank()}

    @property
    def tokens_before_slicing(self) -> int | None:
        """Tokens of the newest batch, before this rank's slice was cut from it; None where no sequence is shared."""
        return None if self._batches is None else self._batches.num_tokens

    def lowest_of_sequence(self, number: int) -> int:
        """The lowest number of the ranks that share a sequence with this one; each of them calls it."""
        if self._context_mesh is None:
            return number
        lowest = torch.tensor(number, device=self._lightnings.root_device)
        group = self._context_mesh["context"].get_group()
        torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN, group=group)
        return int(lowest)

    def teardown(self) -> None:
        """Sequences are whole again."""
        self._batches = None
        self._contexts.close()
        super().teardown()  # type: ignore[misc]

    @property
    def _lightnings(self) -> Any:
        # the other parent of each class below, which a mixin cannot name
        return self


class ContextParallelStrategy(_ContextParallel, ModelParallelStrategy):
    """FSDP2 with each sequence shared by `context_parallel_size` ranks (docs/use/context-parallel.md).

        Trainer(strategy=ContextParallelStrategy(context_parallel_size=8), callbacks=[LighthouseCallback()])

    A rank holds one part of each sequence, and all but attention works on that alone; there heads are exchanged for
    tokens, and queries are shared out where heads do not go round, so that attention is what it is in one process.
    Losses, gradients and weights are those of fewer ranks. The module shards itself in `configure_model` over
    `self.device_mesh["data_parallel"]`, which is all ranks.

    Args:
        context_parallel_size: Ranks that share a sequence. It must divide the ranks and the tokens of a sequence; where
            it does not divide the key/value heads of a layer, its queries are shared out too, which takes more memory.
        check_positions: Before the first batch, run the module's step twice on the first tokens, without gradients, and
            refuse a module whose queries and keys differ when the sequence is shared, as with positions that each rank
            counts from 0.
        save_distributed_checkpoint: As in ModelParallelStrategy.
        process_group_backend: As there.
        timeout: As there.

    Raises:
        TypeError: A value has the wrong type.
        SettingError: Once a fit or another run begins: it does not divide what it must, or the Trainer has what cannot
            run on parts of sequences.
    """

    def __init__(
        self,
        context_parallel_size: int,
        check_positions: bool = True,
        save_distributed_checkpoint: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=save_distributed_checkpoint,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self._share_sequences(context_parallel_size, check_positions)

    def setup_environment(self) -> None:
        """All ranks are FSDP2's, whichever sequence they see."""
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()


class ContextParallelDDPStrategy(_ContextParallel, DDPStrategy):
    """DDP with each sequence shared by `context_parallel_size` ranks; for any module, whole on each of them.

        Trainer(strategy=ContextParallelDDPStrategy(context_parallel_size=2), callbacks=[LighthouseCallback()])

    Args:
        context_parallel_size: As in `ContextParallelStrategy`.
        check_positions: As there.
        process_group_backend: As in DDPStrategy.
        timeout: As there.
        start_method: As there.
        options: Those of torch's DistributedDataParallel.

    Raises:
        TypeError: As in `ContextParallelStrategy`.
        SettingError: As there.
    """

    def __init__(
        self,
        context_parallel_size: int,
        check_positions: bool = True,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        **options: Any,
    ) -> None:
        super().__init__(
            process_group_backend=process_group_backend, timeout=timeout, start_method=start_method, **options
        )
        self._share_sequences(context_parallel_size, check_positions)
