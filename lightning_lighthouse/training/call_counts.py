"""What became of the attention calls of a run: how many were routed, and why others were not."""

from __future__ import annotations

from collections import Counter

from lightning.pytorch.utilities import rank_zero_warn

from lightning_lighthouse.checks import LighthouseWarning
from lightning_lighthouse.phases.ledger import PhaseTotals
from lightning_lighthouse.routing.patch import Patch
from lightning_lighthouse.routing.reasons import REMEDIES, ROUTED


class CallCounts:
    """Counts the calls of each batch, and tells of a reason to stay dense that comes up behind the audit, once.

    A compiled frame that runs again leaves no note: then a batch counts as the last one that left any.
    """

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()
        # what the audit, or a warning, has told
        self._known: set[str] = set()

    def add(self, patch: Patch, totals: PhaseTotals, step: int) -> None:
        """Count what became of the calls of a batch.

        Args:
            patch: Has just run a training batch, and is not audited yet.
            totals: Of the batch's phase.
            step: Optimizer steps done before the batch.
        """
        self._calls = patch.count_calls() or self._calls
        totals.routed_calls += self._calls[ROUTED]
        totals.dense_calls += self._calls.total() - self._calls[ROUTED]
        reasons = set(self._calls) - {ROUTED} - self._known
        self._known |= reasons
        for reason in [] if patch.is_audited else sorted(reasons):
            rank_zero_warn(
                f"Lighthouse: attention calls stay dense in step {step}, the first to do so: {reason} "
                f"({REMEDIES.get(reason, 'see docs/use/models.md')})",
                category=LighthouseWarning,
            )
