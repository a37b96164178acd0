"""The files that a fit leaves in its run's folder: the report, and the final weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lighthouse.checks import LighthouseWarning
from lightning_lighthouse.runs.ending import where_things_are
from lightning_lighthouse.runs.final_weights import is_sharded, write_final
from lightning_lighthouse.runs.record import write_report
from lightning_lighthouse.runs.run_folder import run_folder
from lightning_lighthouse.runs.saving import check_writable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning.pytorch import Callback, LightningModule, Trainer

    from lightning_lighthouse.phases.ledger import Ledger
    from lightning_lighthouse.phases.phase import Phase
    from lightning_lighthouse.phases.plan import PhasePlan
    from lightning_lighthouse.training.last_validation import LastValidation


class LeftFiles:
    """What one fit writes at its end. Every rank calls every method.

    Args:
        callback: Its settings go into the report.
        trainer: At fit start.
        module: In training.

    Raises:
        SavingError: Nothing could be written there; days before it would be.
    """

    def __init__(self, callback: Callback, trainer: Trainer, module: LightningModule) -> None:
        self._callback, self._trainer, self._module = callback, trainer, module
        # where the final weights go, once the training has ended, and what the report there is made of
        self._folder: str | None = None
        self._told: tuple[PhasePlan | None, Sequence[Phase], Ledger] | None = None
        folder = run_folder(trainer)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            check_writable(folder)

    def report(self, plan: PhasePlan | None, phases: Sequence[Phase], ledger: Ledger) -> None:
        """Write the report when a training has ended, and sharded weights, while the ranks still work together."""
        folder = self._report(plan, phases, ledger)
        wrapped = self._trainer.strategy.model
        if wrapped is not None and is_sharded(wrapped):
            write_final(self._trainer, wrapped, folder)
            self._say_where(folder)
        else:
            self._folder = folder

    def report_untrained(self, plan: PhasePlan | None, phases: Sequence[Phase], ledger: Ledger) -> None:
        """The same for a run that went on from its last step: killed before its end, or started once more."""
        if is_sharded(self._module):
            line = "nothing was left to train, and sharded weights cannot be gathered now: there is no final.pt"
            rank_zero_warn(f"Lighthouse: {line}", category=LighthouseWarning)
        else:
            self._folder = self._report(plan, phases, ledger)

    def write_weights(self, validation: LastValidation) -> None:
        """Write the final weights after the hooks that may change them last: averages, the module's own."""
        if self._folder is not None:
            if validation.is_outdated() and self._told is not None:
                write_report(self._trainer, self._callback, *self._told, self._folder, is_validated=False)
                line = "the weights have changed behind the last validation, whose loss is not that of final.pt"
                rank_zero_warn(f"Lighthouse: {line}", category=LighthouseWarning)
            write_final(self._trainer, self._module, self._folder)
            self._say_where(self._folder)

    def _say_where(self, folder: str) -> None:
        lines = where_things_are(self._trainer, folder)
        rank_zero_info("\n".join(f"Lighthouse: {line}" for line in lines))

    def _report(self, plan: PhasePlan | None, phases: Sequence[Phase], ledger: Ledger) -> str:
        folder = run_folder(self._trainer)
        self._told = plan, phases, ledger
        write_report(self._trainer, self._callback, *self._told, folder)
        return folder
