"""What a training of `equal_time.py` left behind, as a line of its part's table and the measures behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from equal_time_rows import DENSE, Row

from lightning_lighthouse.runs.comparison import read_report
from lightning_lighthouse.runs.evaluation_record import read_evaluations

# loss, passkey and lookups are told apart by the tokens before, and copies by their distance
SPANS = {"0_8k": (0, 8192), "8k_32k": (8192, 32768), "32k_up": (32768, 1 << 62)}
PASSKEYS = {"8k": (0, 8192), "32k": (8192, 32768), "up": (32768, 1 << 62)}
DISTANCES = (1024, 4096, 16384, 32768, 65536)


def step_seconds(report: Mapping[str, Any], phase: str) -> float | None:
    """Seconds of a step of a phase, without the first one, which compiles; None where none was timed."""
    found = report["phases"].get(phase) or {}
    if not found.get("steps") or not found.get("tokens_per_second"):
        return None
    return float(found["tokens"] / found["steps"] / found["tokens_per_second"])


def phase_seconds(report: Mapping[str, Any]) -> dict[str, float]:
    """Training seconds of each phase that had steps; a step that was not timed counts as much as those that were."""
    phases = {name: found for name, found in report["phases"].items() if found["steps"]}
    paces = {name: step_seconds(report, name) for name in phases}
    return {name: found["steps"] * (paces[name] or found["seconds"]) for name, found in phases.items()}


def seconds_until(report: Mapping[str, Any], step: int) -> float:
    """Training seconds of the first steps, counted as `phase_seconds` does."""
    passed, seconds = 0, 0.0
    for name, own in phase_seconds(report).items():
        steps = report["phases"][name]["steps"]
        seconds += own * min(max(step - passed, 0), steps) / steps
        passed += steps
    return seconds


def timed_steps(folder: Path, modes: Sequence[str]) -> tuple[dict[str, float], str]:
    """Seconds of a step of each mode that a training timed, in the order of its phases, and the name of the device.

    Raises:
        FileNotFoundError: It left no report.
        ValueError: It had other phases.
    """
    report = read_report(folder)
    names = [name for name, found in report["phases"].items() if found["steps"]]
    if len(names) != len(modes):
        raise ValueError(f"{folder}: {len(modes)} phases must have been trained, got {', '.join(names)}")
    paces = {mode: step_seconds(report, name) for mode, name in zip(modes, names, strict=True)}
    return {mode: pace for mode, pace in paces.items() if pace is not None}, device_of(report)


def device_of(report: Mapping[str, Any]) -> str:
    """The name of the GPU."""
    return str(report["device"]["name"])


def summary(row: Row, folder: Path) -> dict[str, Any]:
    """What a training cost and reached: the columns of its table, but for FLOPs, commit and command.

    Args:
        row: What was trained.
        folder: Of its logs.
    """
    report = read_report(folder)
    phases = report["phases"]
    seconds = phase_seconds(report)
    cheap = [name for name in seconds if name != DENSE]
    validations = [one["loss"] for one in report["validations"]]
    before = [one["loss"] for one in report["validations"] if one["phase"] != DENSE]
    after = [one["loss"] for one in report["validations"] if one["phase"] == DENSE]
    evaluations = read_evaluations(folder)
    *earlier, end = evaluations or [{}]
    switch = earlier[-1] if earlier else {}
    types = {"+".join(phase["layer_types"]): phase.get("window") for phase in row.arm.phases}
    return {
        "row": row.name,
        "arm": row.arm.name,
        "seed": row.seed,
        "seq_len": row.seq_len,
        "budget": row.seconds,
        "learning_rate": row.learning_rate,
        "needles": row.needles > 0,
        "seconds": sum(seconds.values()),
        "cheap_seconds": sum(seconds[name] for name in cheap),
        "steps": report["steps"],
        "cheap_steps": sum(phases[name]["steps"] for name in cheap),
        "tokens": sum(phases[name]["tokens"] for name in seconds),
        "layer_types": " ".join(types) or DENSE,
        "window": " ".join(str(phase["window"]) for phase in row.arm.phases if phase.get("window")),
        "val_loss": validations[-1] if validations else None,
        "val_loss_before_switch": before[-1] if before else None,
        "val_loss_after_switch": after[0] if before and after else None,
        **_columns(end),
        **{f"switch_{name}": value for name, value in _columns(switch).items()},
        "gpu": device_of(report),
        "peak_gib": (report["device"]["peak_memory_mib"] or 0) / 1024 or None,
        "torch": report["versions"]["torch"],
    }


def _columns(evaluation: Mapping[str, Any]) -> dict[str, float | None]:
    """One evaluation in numbers; a copy is the share of the passage's loss that is gone the second time."""
    losses = evaluation.get("loss_by_position") or []
    gains = sorted(evaluation.get("context_gain") or [], key=lambda one: one["length"])
    copies = {one["distance"]: one["score"] for one in evaluation.get("copies") or []}
    found = {f"loss_{name}": _mean_loss(losses, *span) for name, span in SPANS.items()}
    # of all text against the last 1,024 tokens, and against the longest part that was measured
    found["gain_shortest"] = gains[0]["value"] if gains else None
    found["gain_longest"] = gains[-1]["value"] if gains else None
    found |= {f"copy_{distance}": copies.get(distance) for distance in DISTANCES}
    for measure in ("passkey", "lookups"):
        rows = evaluation.get(measure) or []
        for name, (start, until) in PASSKEYS.items():
            found[f"{measure}_{name}"] = _mean(one["value"] for one in rows if start < one["length"] <= until)
    return found


def _mean(values: Any) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _mean_loss(rows: Sequence[Mapping[str, Any]], start: int, until: int) -> float | None:
    """The mean over all tokens of a span."""
    inside = [row for row in rows if start <= row["position"] < until and row["value"] is not None]
    tokens = sum(row["until"] - row["position"] for row in inside)
    return sum(row["value"] * (row["until"] - row["position"]) for row in inside) / tokens if tokens else None


def measures(row: Row, folder: Path) -> list[dict[str, Any]]:
    """A line for each validation and for each place of each evaluation."""
    key = {"row": row.name, "arm": row.arm.name, "seed": row.seed}
    places = ("length", "depth", "distance", "position", "until")
    values = ("value", "standard_error", "count", "first", "second", "score")
    lines: list[dict[str, Any]] = []
    report = read_report(folder)
    for one in report["validations"]:
        found = {"step": one["step"], "phase": one["phase"], "measure": "validation"}
        found |= {"seconds": seconds_until(report, one["step"])}
        lines.append({**key, **found, **dict.fromkeys(places), **dict.fromkeys(values), "value": one["loss"]})
    for evaluation in read_evaluations(folder):
        found = {"step": evaluation["step"], "phase": evaluation["phase"], "seconds": None}
        for measure, rows in evaluation.items():
            if not isinstance(rows, list) or not all(isinstance(one, dict) for one in rows):
                continue
            for one in rows:
                told = {name: one.get(name) for name in (*places, *values)}
                lines.append({**key, **found, "measure": measure, **told})
    return lines
