"""What one run cost and reached, summed up from the `lighthouse.json` that it left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_lighthouse.attention.config import LighthouseConfig
from lightning_lighthouse.phases.schedule import DENSE, LIGHTHOUSE
from lightning_lighthouse.runs.evaluation_record import last_of, read_evaluations, sum_up
from lightning_lighthouse.runs.record import REPORT, REPORT_VERSION


@dataclass(frozen=True)
class Run:
    """What one run cost and reached. Seconds are training time, losses dense validation losses, in nats per token.

    None stands for what its report does not tell, as one of before may not.

    Args:
        run: Its folder.
        attention: The phases before the dense one, unless Lighthouse in all layers is the only one, and what was not
            at its default; or "dense".
        world_size: Processes.
        lighthouse_steps: Optimizer steps of the phases before the dense one, Lighthouse or others.
        dense_steps: Those of the dense phase.
        lighthouse_seconds: Time of these phases.
        dense_seconds: Time of the dense phase.
        lighthouse_tokens_per_second: All processes together, compilation left out; of several phases the last one's.
        dense_tokens_per_second: The same of the dense phase.
        loss_at_switch: The last loss before the dense phase.
        loss_after_switch: The first of the dense phase.
        final_loss: The last of all.
        seconds_to_reference: Training time at which the loss first was as low as the reference's last one, on the
            line between two validations; None if it never was.
        peak_gib: Most memory allocated on the first GPU.
        device: Its name.
        lighthouse_waiting_share: Share of the last such phase's time that rank 0 waited for data; None if unknown.
        dense_waiting_share: The same of the dense phase.
        passkey: Share of passkeys that the last evaluation found, over all lengths and depths; None without one.
        lookups: The same of key-value lookups.
        copy_gain: Loss of a passage the second time minus the first, at the longest distance, in nats per token.
        context_gain: Loss with the whole context minus with the shortest, in nats per token.
    """

    run: str
    attention: str | None
    world_size: int | None
    lighthouse_steps: int | None
    dense_steps: int | None
    lighthouse_seconds: float | None
    dense_seconds: float | None
    lighthouse_tokens_per_second: float | None
    dense_tokens_per_second: float | None
    loss_at_switch: float | None
    loss_after_switch: float | None
    final_loss: float | None
    seconds_to_reference: float | None
    peak_gib: float | None
    device: str | None
    lighthouse_waiting_share: float | None
    dense_waiting_share: float | None
    passkey: float | None = None
    lookups: float | None = None
    copy_gain: float | None = None
    context_gain: float | None = None


def read_report(path: Path) -> dict[str, Any]:
    """The content of `lighthouse.json`.

    Args:
        path: The file, or the folder that holds it.

    Raises:
        FileNotFoundError: There is none: the training did not end, or was not one with LighthouseCallback.
        ValueError: It is not such a file, or of another version.
    """
    file = path / REPORT if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file; it is written when a training with LighthouseCallback ends")
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        found = report["version"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{file}: not a report of LighthouseCallback") from None
    if found != REPORT_VERSION:
        raise ValueError(f"{file}: its version must be {REPORT_VERSION}, got {found}")
    return dict(report)


def read_last_evaluation(path: Path) -> dict[str, Any]:
    """The last evaluation of a run; {} where it has none.

    Args:
        path: As for `read_report`.

    Raises:
        ValueError: Its `evaluation.json` is none.
    """
    return last_of(read_evaluations(path if path.is_dir() else path.parent))


def summarize(
    name: str,
    report: dict[str, Any],
    reference_loss: float | None = None,
    evaluation: dict[str, Any] | None = None,
) -> Run:
    """One line of the comparison.

    Args:
        name: Of the run.
        report: From `read_report`.
        reference_loss: The loss to be reached.
        evaluation: From `read_last_evaluation`.

    Raises:
        ValueError: What it tells is not of the shape that it should have.
    """
    try:
        found = sum_up(evaluation or {})
        return replace(
            _summarize(name, report, reference_loss),
            passkey=found["passkey"],
            lookups=found["lookups"],
            copy_gain=found["copies"],
            context_gain=found["context_gain"],
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: not a report of LighthouseCallback: {type(error).__name__} {error}") from None


def _summarize(name: str, report: dict[str, Any], reference_loss: float | None) -> Run:
    validations = _look_up(report, "validations") or []
    cheap = [v["loss"] for v in validations if v["phase"] != DENSE]
    full = [v["loss"] for v in validations if v["phase"] == DENSE]
    curve = [(v["seconds"], v["loss"]) for v in validations if v["loss"] is not None]
    switched = _look_up(report, "switch") is not None
    peak = _look_up(report, "device", "peak_memory_mib")
    phases = _look_up(report, "phases") or {}
    before = [name for name in phases if name != DENSE]
    # the last one says how fast
    last = partial(_look_up, phases, next((name for name in reversed(before) if phases[name]["steps"]), LIGHTHOUSE))
    dense = partial(_look_up, phases, DENSE)
    return Run(
        run=name,
        attention=_describe(_look_up(report, "settings") or {}, before),
        world_size=_look_up(report, "world_size"),
        lighthouse_steps=_total(phases, before, "steps"),
        dense_steps=dense("steps"),
        lighthouse_seconds=_total(phases, before, "seconds"),
        dense_seconds=dense("seconds"),
        lighthouse_tokens_per_second=last("tokens_per_second"),
        dense_tokens_per_second=dense("tokens_per_second"),
        loss_at_switch=cheap[-1] if cheap else None,
        loss_after_switch=full[0] if switched and full else None,
        final_loss=validations[-1]["loss"] if validations else None,
        seconds_to_reference=None if reference_loss is None else seconds_to(reference_loss, curve),
        peak_gib=None if peak is None else peak / 1024,
        device=_look_up(report, "device", "name"),
        lighthouse_waiting_share=last("waiting_share"),
        dense_waiting_share=dense("waiting_share"),
    )


def _look_up(report: Any, *keys: str) -> Any:
    """A value by the keys that lead to it; None where one of them is absent."""
    for key in keys:
        report = report.get(key) if isinstance(report, dict) else None
    return report


def _total(phases: dict[str, Any], names: Sequence[str], key: str) -> Any:
    """A sum over phases; None where one of them does not tell it, or there is none."""
    values = [_look_up(phases, name, key) for name in names]
    return None if None in values or not values else sum(values)


def _describe(settings: dict[str, Any], phases: Sequence[str]) -> str | None:
    """The phases, and the settings of the attention that are not the defaults."""
    if not settings.get("enabled"):
        return "dense" if "enabled" in settings else None
    defaults = asdict(LighthouseConfig())
    attention = settings.get("attention") or {}
    changed = [f"{key}={value}" for key, value in attention.items() if value != defaults.get(key)]
    changed += [f"dense_layers={settings['dense_layers']}"] if settings.get("dense_layers") else []
    named = [", ".join(phases)] if list(phases) != [LIGHTHOUSE] else []
    # several phases have no one end
    switch_at = settings.get("switch_at", "?")
    switched = [] if switch_at is None else [f"switch_at={switch_at}"]
    return " ".join([*named, *switched, *changed])


def seconds_to(loss: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """When a curve of (seconds, loss) is first as low as `loss`, on the line between two points; None if never."""
    if curve and curve[0][1] <= loss:
        return curve[0][0]
    for (second_before, before), (second, here) in pairwise(curve):
        if here <= loss:
            return second_before + (before - loss) / (before - here) * (second - second_before)
    return None
