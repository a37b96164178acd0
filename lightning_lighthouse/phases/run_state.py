"""What a checkpoint keeps of a run beside the model: the switch, the ledger, the settings that TensorBoard shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lightning_lighthouse.phases.ledger import Ledger
from lightning_lighthouse.phases.schedule import SwitchState

VERSION = 1


@dataclass
class RunState:
    """State of a run that goes on over resumes.

    Args:
        switch: None for a dense baseline, and before the first fit.
        ledger: Totals and validations.
        shown: Returned by `PhaseCurves.hyperparameters`.
    """

    switch: SwitchState | None = None
    ledger: Ledger = field(default_factory=Ledger)
    shown: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        switch = self.switch.state_dict() if self.switch else None
        return {"version": VERSION, "switch": switch, "ledger": self.ledger.state_dict(), "shown": self.shown}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> RunState:
        """The state in a checkpoint.

        Raises:
            ValueError: It has another version.
        """
        version = state.get("version")
        if version != VERSION:
            raise ValueError(f"the checkpoint's LighthouseCallback state must have version {VERSION}, got {version}")
        switch = SwitchState(**state["switch"]) if state["switch"] else None
        return cls(switch, Ledger.from_state_dict(state["ledger"]), state.get("shown"))
