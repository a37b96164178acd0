"""When a run trains how, and what each phase cost; pure Python."""

from lightning_lighthouse.phases.ledger import Ledger, PhaseTotals, Validation
from lightning_lighthouse.phases.plateau import PlateauRule
from lightning_lighthouse.phases.schedule import DENSE, LIGHTHOUSE, SwitchState

__all__ = ["DENSE", "LIGHTHOUSE", "Ledger", "PhaseTotals", "PlateauRule", "SwitchState", "Validation"]
