"""`lighthouse.json`: what a run was told, what each phase cost, and every dense validation, for a script to read.

`version` is raised when a key changes its meaning or goes; new keys may come at any time. Seconds are training time,
validation and checkpoints left out. A number that is not finite is null. `docs/use/switch.md` lists the keys.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_lighthouse.checks import LighthouseWarning
from lightning_lighthouse.phases.ledger import Ledger, PhaseTotals
from lightning_lighthouse.phases.phase import Phase
from lightning_lighthouse.phases.plan import PhasePlan
from lightning_lighthouse.phases.schedule import DENSE, LIGHTHOUSE
from lightning_lighthouse.runs.saving import save_text

if TYPE_CHECKING:
    from pathlib import Path

    from lightning.pytorch import Callback, Trainer

REPORT = "lighthouse.json"
REPORT_VERSION = 1


def tell_summary(trainer: Trainer, plan: PhasePlan | None, ledger: Ledger) -> None:
    """Print the totals, and warn of a run that ended before its switch."""
    rank_zero_info("\n".join(f"Lighthouse: {line}" for line in ledger.summary(trainer.global_step)))
    switch = plan.switch if plan is not None else None
    if switch is not None and not switch.switched:
        rank_zero_warn(
            f"Lighthouse: the training ended at step {trainer.global_step}, before the switch to dense attention at "
            f"step {switch.switch_step}: the model has not recovered from Lighthouse",
            category=LighthouseWarning,
        )


def describe_spike(trainer: Trainer, ledger: Ledger) -> str:
    """The losses around the switch in a line, if the newest validation is the first after it; else nothing."""
    before, after = ledger.before_switch, ledger.after_switch
    if before is None or after is None or after is not ledger.last_validation:
        return ""
    line = (
        f"dense validation loss after the switch: {after.loss:.4f} (step {after.step}), "
        f"{after.loss - before.loss:+.4f} against the last before it (step {before.step})"
    )
    if probes := _probes(trainer):
        line += (
            f"; the probe's text at step {probes[-1]['step']}: {probes[-1]['lighthouse_loss']:.4f} in Lighthouse mode, "
            f"{probes[-1]['dense_loss']:.4f} dense"
        )
    return line


def write_report(
    trainer: Trainer,
    callback: Callback,
    plan: PhasePlan | None,
    phases: Sequence[Phase],
    ledger: Ledger,
    folder: str | Path,
    is_validated: bool = True,
) -> str:
    """Write `folder/lighthouse.json` on rank 0; it appears whole or not at all.

    Args:
        trainer: Its steps, ranks and device.
        callback: Its settings.
        plan: None for a dense baseline.
        phases: Those before the dense one, as the model's layers attended in them.
        ledger: Totals and validations of the whole run, resumed parts included.
        folder: Made if missing; an address too.
        is_validated: Whether a validation at the last step is of the weights that were left.
    """
    path = os.path.join(folder, REPORT)
    if trainer.is_global_zero:
        total = trainer.estimated_stepping_batches
        content = {
            "version": REPORT_VERSION,
            "settings": settings(callback),
            "steps": trainer.global_step,
            "total_steps": int(total) if math.isfinite(total) and total >= 0 else None,
            "switch": plan.switch.state_dict() if plan else None,
            "plan": _plan(plan, phases) if plan else [],
            "phases": {phase: _phase(ledger.totals(phase)) for phase in _names(plan, ledger)},
            "validations": [validation._asdict() for validation in ledger.validations],
            "final": _final(trainer, ledger, is_validated),
            "spike": _spike(ledger),
            "probes": _probes(trainer),
            "world_size": trainer.world_size,
            # ranks that share a sequence; of the strategy that has it
            "context_parallel_size": getattr(trainer.strategy, "context_parallel_size", 1),
            "device": _device(trainer.strategy.root_device),
            "versions": _versions(),
        }
        save_text(json.dumps(plain(content), indent=2, allow_nan=False) + "\n", path)
    return path


def settings(callback: Callback) -> dict[str, Any]:
    """The arguments that the callback was made with."""
    names = list(inspect.signature(type(callback).__init__).parameters)[1:]
    return plain({name: getattr(callback, name) for name in names})


def shown_settings(callback: Callback, plan: PhasePlan | None) -> dict[str, Any]:
    """The settings for TensorBoard's HPARAMS tab, with the switch step; a dense baseline has none but `enabled`."""
    values = settings(callback)
    if plan is None:
        return {"lighthouse/enabled": False}
    names = ("enabled", "switch_at", "return_steps", "rewarm_steps")
    shown = {name: values[name] for name in names} | {"switch_step": plan.switch.switch_step} | values["attention"]
    if plan.names != [LIGHTHOUSE, DENSE]:
        shown["phases"] = ", ".join(f"{phase.name} until {phase.until}" for phase in plan.phases)
    shown |= {f"plateau_{name}": value for name, value in (values["plateau"] or {}).items()}
    return {f"lighthouse/{name}": value for name, value in shown.items()}


def plain(value: Any) -> Any:
    """A value as JSON holds it."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _names(plan: PhasePlan | None, ledger: Ledger) -> list[str]:
    """The phases of the run in their order, those too that it had before its settings were changed."""
    planned = plan.names if plan else [LIGHTHOUSE, DENSE]
    return [*(name for name in ledger.phases if name not in planned), *planned]


def _plan(plan: PhasePlan, phases: Sequence[Phase]) -> list[dict[str, Any]]:
    """What each phase was told, and where it began."""
    told = [
        {"name": name, "first_step": plan.first_step(number), **asdict(phase)}
        for number, (name, phase) in enumerate(zip(plan.names, phases, strict=False))
    ]
    return [*told, {"name": DENSE, "first_step": plan.switch.switch_step}]


def _phase(totals: PhaseTotals) -> dict[str, Any]:
    return {
        "steps": totals.steps,
        "seconds": totals.seconds,
        "tokens": totals.tokens,
        "tokens_per_second": totals.tokens_per_second,
        "waiting_share": totals.waiting_share,
        "routed_calls": totals.routed_calls,
        "dense_calls": totals.dense_calls,
    }


def _final(trainer: Trainer, ledger: Ledger, is_validated: bool) -> dict[str, Any] | None:
    """The newest dense validation, and whether it is of the weights in `final.pt`."""
    last = ledger.last_validation
    if last is None:
        return None
    is_final = is_validated and last.step == trainer.global_step
    return {"step": last.step, "loss": last.loss, "is_of_final_weights": is_final}


def _spike(ledger: Ledger) -> dict[str, Any] | None:
    """The dense validation losses around the switch, and the second minus the first."""
    before, after = ledger.before_switch, ledger.after_switch
    if before is None or after is None:
        return None
    return {"before": before._asdict(), "after": after._asdict(), "jump": after.loss - before.loss}


def _probes(trainer: Trainer) -> list[dict[str, Any]]:
    """Results of the FutureLeakProbe of this Trainer, found by its key: it stands above this module."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [asdict(result) for probe in callbacks if probe.state_key == "FutureLeakProbe" for result in probe.results]


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": device.type, "peak_memory_mib": None, "peak_reserved_mib": None}
    return {
        "name": torch.cuda.get_device_name(device),
        "peak_memory_mib": torch.cuda.max_memory_allocated(device) / 2**20,
        "peak_reserved_mib": torch.cuda.max_memory_reserved(device) / 2**20,
    }


def _versions() -> dict[str, str | None]:
    """None of a package that is not there, which may have changed what ran: without liger-kernel another loss does."""
    packages = ("lightning_lighthouse", "lightning", "triton", "transformers", "liger-kernel")
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    return versions | {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
