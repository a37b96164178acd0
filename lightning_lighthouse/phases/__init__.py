"""When a run trains how, what each phase cost, and who is told of it; pure Python."""

from lightning_lighthouse.phases.events import BatchEnd, BatchStart, FitEnd, FitStart, PhaseEvents, Switch, phase_events
from lightning_lighthouse.phases.ledger import Ledger, PhaseTotals, Validation
from lightning_lighthouse.phases.phase import Phase
from lightning_lighthouse.phases.plateau import PlateauRule
from lightning_lighthouse.phases.schedule import DENSE, LIGHTHOUSE, SwitchState

__all__ = [
    "DENSE",
    "LIGHTHOUSE",
    "BatchEnd",
    "BatchStart",
    "FitEnd",
    "FitStart",
    "Ledger",
    "Phase",
    "PhaseEvents",
    "PhaseTotals",
    "PlateauRule",
    "Switch",
    "SwitchState",
    "Validation",
    "phase_events",
]
