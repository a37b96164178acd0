"""What a checkpoint keeps of a run beside the model: the phases, the ledger, the settings that TensorBoard shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_lighthouse.phases.ledger import Ledger
from lightning_lighthouse.phases.plan import PhasePlan, PlannedPhase
from lightning_lighthouse.phases.schedule import LIGHTHOUSE, SwitchState

VERSION = 1


@dataclass
class RunState:
    """State of a run that goes on over resumes.

    Args:
        plan: None for a dense baseline, and before the first fit.
        ledger: Totals and validations.
        shown: Returned by `PhaseCurves.hyperparameters`.
    """

    plan: PhasePlan | None = None
    ledger: Ledger = field(default_factory=Ledger)
    shown: dict[str, Any] | None = None

    @property
    def switch(self) -> SwitchState | None:
        """The last switch of the plan, to dense attention."""
        return self.plan.switch if self.plan else None

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {
            "version": VERSION,
            "switch": self.switch.state_dict() if self.switch else None,
            "phases": self.plan.state_dict() if self.plan else None,
            "ledger": self.ledger.state_dict(),
            "shown": self.shown,
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RunState:
        """The state in a checkpoint.

        Raises:
            ValueError: It has another version.
        """
        version = state.get("version")
        if version != VERSION:
            raise ValueError(f"the checkpoint's LighthouseCallback state must have version {VERSION}, got {version}")
        plan = None
        if state["switch"]:
            switch = SwitchState(**state["switch"])
            # version 0.1 had one phase before the dense one
            whole = [{"name": LIGHTHOUSE, "until": switch.switch_at, "end": switch.switch_step}]
            plan = PhasePlan([PlannedPhase(**phase) for phase in state.get("phases") or whole], switch)
        return cls(plan, Ledger.from_state_dict(state["ledger"]), state.get("shown"))
