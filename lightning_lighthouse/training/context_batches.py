"""Each batch on its way to a step: the same on all ranks of a sequence, cut to the slice of this one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.context.collectives import all_gather
from lightning_lighthouse.context.group import Context
from lightning_lighthouse.context.slices import mark_of, num_inputs, slice_batch
from lightning_lighthouse.notices import log_once
from lightning_lighthouse.routing.packing import PackingCheck, said_of_documents
from lightning_lighthouse.training.context_check import check_positions
from lightning_lighthouse.training.stopwatch import count_tokens

OWN_SLICES = "slice_context"


class DifferentBatchesError(RuntimeError):
    """The ranks that share a sequence were given different ones."""


class ContextBatches:
    """Cuts the batches of one run.

    Args:
        trainer: Whose strategy hands the batches here.
        module: May cut batches of its own form in a method `slice_context(batch, context)`.
        context: The ranks that share a sequence.
        layers: The attention modules by name.
        checks_positions: Whether the first batch shows that positions are those of the whole sequence.
    """

    def __init__(
        self,
        trainer: Trainer,
        module: LightningModule,
        context: Context,
        layers: dict[str, nn.Module],
        checks_positions: bool,
    ) -> None:
        self._trainer, self._module, self._context, self._layers = trainer, module, context, layers
        self._is_unchecked = checks_positions
        self._packing = PackingCheck()
        # whether the batch before differed within the group, on the device; None before there was one
        self._differed: Tensor | None = None
        # of the newest batch, before it was cut
        self.num_tokens: int | None = None

    def slice(self, batch: Any) -> Any:
        """This rank's part of a batch.

        Raises:
            SettingError: The batch has another form than is known, or cannot be cut evenly; with the first one, see
                `check_positions`.
            DifferentBatchesError: The ranks of the group hold different batches, of this step or the one before.
            PackedBatchError: It packs documents, and nobody said what to do about it.
        """
        self._compare(batch)
        # a document that begins where a slice does shows in no slice
        if said_of_documents(self._module) is False:
            self._packing.look(batch)
        self.num_tokens = count_tokens(batch)
        own = getattr(self._module, OWN_SLICES, None)
        if own is not None:
            self._context.num_tokens = None
            owner = type(self._module).__name__
            log_once("context slices", f"{owner} cuts its batches itself: its positions are not checked")
            return own(batch, self._context)
        num_tokens = num_inputs(batch)
        if num_tokens is None:
            raise SettingError(
                f"{self._context.size} ranks cannot share a batch that is {_described(batch)}: give "
                "{'tokens': [batch, N + 1]}, {'input_ids': [batch, N]}, or the tokens alone, or let "
                f"{type(self._module).__name__} define {OWN_SLICES}(batch, context)"
            )
        sliced = slice_batch(batch, self._context)
        if self._is_unchecked:
            self._is_unchecked = False
            check_positions(self._trainer, self._module, batch, self._context, self._layers)
        self._context.num_tokens = num_tokens // self._context.size
        return sliced

    def _compare(self, batch: Any) -> None:
        """Look at the first batch at once, and at others when the next one comes: the host need not wait for them."""
        context, device = self._context, self._trainer.strategy.root_device
        mark = mark_of(batch, device)
        before, self._differed = self._differed, (all_gather(mark, context.size, context.group) != mark).any()
        is_awaited = before is None or device.type == "cpu"
        if bool(self._differed) if is_awaited else bool(before):
            raise DifferentBatchesError(
                "the ranks that share a sequence were given different batches; share data out by "
                "trainer.distributed_sampler_kwargs, as Lightning and LighthouseRecipe do"
            )


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"a mapping of {', '.join(map(repr, batch)) or 'nothing'}"
    if isinstance(batch, Tensor):
        return f"a tensor {list(batch.shape)} of {batch.dtype}"
    return f"a {type(batch).__name__}"
