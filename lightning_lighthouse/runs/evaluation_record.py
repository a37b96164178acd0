"""`evaluation.json`: what a model can do with long context, step by step; beside the `lighthouse.json` of its run.

`version` is raised when a key changes its meaning or goes; new keys may come at any time. A number that is not finite
is null. docs/use/evaluation.md lists the keys.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_lighthouse.runs.record import plain
from lightning_lighthouse.runs.saving import is_remote, save_text

EVALUATION = "evaluation.json"
EVALUATION_VERSION = 1
# numbers with others of these are of other samples, or of other weights
SAMPLED = ("seed", "num_samples", "dtype")


def write_evaluations(folder: str | Path, steps: Sequence[dict[str, Any]]) -> str:
    """Write `folder/evaluation.json`, whole or not at all; returns its path.

    Args:
        folder: Made if missing; an address too.
        steps: An evaluation each, in the order of their steps.
    """
    path = os.path.join(folder, EVALUATION)
    content = {"version": EVALUATION_VERSION, "steps": list(steps)}
    save_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n", path)
    return path


def read_evaluations(folder: str | Path) -> list[dict[str, Any]]:
    """The evaluations in the order of their steps; none where there is no file.

    Args:
        folder: That holds `evaluation.json`, or the file.

    Raises:
        ValueError: It is no such file, or of another version.
    """
    if is_remote(folder):
        return []
    path = Path(folder) / EVALUATION if Path(folder).is_dir() else Path(folder)
    if not path.is_file():
        return []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version, steps = content["version"], [dict(step) for step in content["steps"]]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a file of LongContextEvaluation") from None
    if version != EVALUATION_VERSION:
        raise ValueError(f"{path}: its version must be {EVALUATION_VERSION}, got {version}")
    return steps


def model_name(path: str | Path) -> str:
    """What an evaluation calls its model.

    That is a path from the root, for `last.ckpt` alone is that of any run; a name of transformers as it is.
    """
    path = Path(path)
    if not path.exists():
        return str(path)
    # a link to a folder, as `latest`, may be another run's tomorrow; one to a file, as in a cache, has the telling name
    return str(path.resolve() if path.is_dir() else path.parent.resolve() / path.name)


def merged(
    steps: Sequence[dict[str, Any]], new: dict[str, Any], folder: str | Path | None = None
) -> list[dict[str, Any]]:
    """The evaluations with a new one: what it measured takes the place of the same of an older one.

    That is one of the same step, attention, model, seed, samples and dtype; any other stays as it is.

    Args:
        steps: The older ones.
        new: The new one.
        folder: Theirs; the one of the run whose own evaluations name no model.
    """
    of_same = [number for number, one in enumerate(steps) if _is_of_same(one, new, folder)]
    if not of_same:
        return _in_order([*steps, new])
    last = of_same[-1]
    others = [one for number, one in enumerate(steps) if number != last]
    return _in_order([*others, {**steps[last], **new}])


def last_of(steps: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The last evaluation, and what others of its step, model and attention measured, by other samples; {} of none."""
    found: dict[str, Any] = {}
    for one in steps:
        if _place(one) == _place(steps[-1]) and _may_be_same_model(one, steps[-1]):
            found |= one
    return found


def _in_order(steps: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(steps, key=lambda one: (one["step"] is not None, one["step"] or 0))


def _place(one: dict[str, Any]) -> tuple[Any, ...]:
    return one["step"], one.get("attention") or "dense"


def _may_be_same_model(one: dict[str, Any], other: dict[str, Any]) -> bool:
    names = [model_name(each["model"]) for each in (one, other) if each.get("model") is not None]
    return len(set(names)) < 2


def _is_of_same(one: dict[str, Any], new: dict[str, Any], folder: str | Path | None) -> bool:
    if _place(one) != _place(new) or not _may_be_same_model(one, new):
        return False
    names = [each["model"] for each in (one, new) if each.get("model") is not None]
    if len(names) == 1:
        # one of them is a run's own: no other model's, even of the same step
        if one["step"] is None:
            return False
        path = Path(model_name(names[0]))
        if folder is not None and Path(folder).resolve() not in (path, path.parent, path.parent.parent):
            return False
    return all(one[key] == new[key] for key in SAMPLED if key in one and key in new)


def sum_up(evaluation: dict[str, Any]) -> dict[str, float | None]:
    """One number a measure: the means over all places of passkey and lookups; of copies the longest distance; of the
    gain from context the shortest text. None for what was not measured."""

    def mean(name: str) -> float | None:
        values = [row["value"] for row in evaluation.get(name) or [] if row["value"] is not None]
        return sum(values) / len(values) if values else None

    copies, gains = evaluation.get("copies") or [], evaluation.get("context_gain") or []
    return {
        "passkey": mean("passkey"),
        "lookups": mean("lookups"),
        "copies": max(copies, key=lambda row: row["distance"])["value"] if copies else None,
        "context_gain": min(gains, key=lambda row: row["length"])["value"] if gains else None,
    }


def in_words(evaluation: dict[str, Any]) -> str:
    """The same in a line."""
    numbers = sum_up(evaluation)
    parts = [f"{name} {numbers[name]:.2f}" for name in ("passkey", "lookups") if numbers[name] is not None]
    if numbers["copies"] is not None:
        distance = max(row["distance"] for row in evaluation["copies"])
        parts.append(f"copies {numbers['copies']:+.2f} nats over {distance:,} tokens")
    if numbers["context_gain"] is not None:
        length = min(row["length"] for row in evaluation["context_gain"])
        parts.append(f"whole context {numbers['context_gain']:+.3f} nats against the last {length:,} tokens")
    for row in evaluation.get("own_tasks") or []:
        match = row.get("exact_match")
        parts.append(f"{row['task']} {row['value']:.3f} nats" + ("" if match is None else f", {match:.2f} exact"))
    losses = evaluation.get("loss_by_position") or []
    if losses:
        parts.append(f"loss {losses[-1]['value']:.4f} at tokens {losses[-1]['position']:,}-{losses[-1]['until']:,}")
    return "; ".join(parts)
