"""What became of the attention calls of a run: how many were routed, and why others were not."""

from __future__ import annotations

from collections import Counter

from lightning_lighthouse.routing.patch import Patch
from lightning_lighthouse.routing.reasons import REMEDIES, ROUTED


class CallCounts:
    """Counts the calls of each batch, and tells of a reason to stay dense that comes up behind the audit, once.

    A compiled frame that runs again leaves no note: then a batch counts as the last one that left any.
    """

    def __init__(self) -> None:
        self._calls: Counter[str] = Counter()
        # what the audit, or a line, has told
        self._known: set[str] = set()

    @property
    def num_routed(self) -> int:
        """Calls of the last batch that were routed."""
        return self._calls[ROUTED]

    @property
    def num_dense(self) -> int:
        """Calls of the last batch that stayed dense."""
        return self._calls.total() - self._calls[ROUTED]

    def add(self, patch: Patch, step: int) -> list[str]:
        """Count what became of the calls of a batch; return a line for each reason to stay dense that is new.

        Args:
            patch: Has just run a training batch, and was not checked after it.
            step: Optimizer steps done before the batch.
        """
        self._calls = patch.count_calls() or self._calls
        reasons = set(self._calls) - {ROUTED} - self._known
        self._known |= reasons
        return [
            f"Lighthouse: attention calls stay dense in step {step}, the first to do so: {reason} "
            f"({REMEDIES.get(reason, 'see docs/use/models.md')})"
            # else the check tells
            for reason in ([] if patch.is_audited else sorted(reasons))
        ]
