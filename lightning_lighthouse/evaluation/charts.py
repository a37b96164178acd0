"""An evaluation in TensorBoard: scalars, a layout that puts those of a measure on one chart, the passkey map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from lightning_lighthouse.runs.layout import EVALUATION, long_context_layout

# pixels of a field of the map, and between two
FIELD, GAP = 24, 2
# the colours of none found and of all found
LOW, HIGH = (0.13, 0.10, 0.35), (0.98, 0.85, 0.25)


def show(trainer: Trainer, result: Mapping[str, Any]) -> None:
    """The scalars to every logger of a Trainer, the layout and the picture to TensorBoard; every rank calls it."""
    values = scalars(result)
    if "own_mode" in result:
        values |= scalars(result["own_mode"], f"{EVALUATION}_own_mode")
    # LighthouseCallback writes the whole layout of its run, and a second one would take its place
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    phased = any(callback.state_key == "LighthouseCallback" for callback in callbacks)
    is_laid_out = phased and trainer.state.fn == "fit"
    for logger in trainer.loggers:
        logger.log_metrics(values, result["step"])
        if trainer.is_global_zero and isinstance(logger, TensorBoardLogger):
            if not is_laid_out:
                # TensorBoard shows the newest
                logger.experiment.add_custom_scalars(long_context_layout())
            if result.get("passkey"):
                logger.experiment.add_image(f"{EVALUATION}/passkey", passkey_image(result["passkey"]), result["step"])


def scalars(evaluation: Mapping[str, Any], prefix: str = EVALUATION) -> dict[str, float]:
    """One number for each place, by tag; of the passkey one a length, the mean over the depths."""
    found = {}
    for row in evaluation.get("loss_by_position") or []:
        found[f"{prefix}/loss_by_position/{row['position']:07d}-{row['until']:07d}"] = row["value"]
    for name, place in (("copies", "distance"), ("context_gain", "length"), ("lookups", "length")):
        for row in evaluation.get(name) or []:
            found[f"{prefix}/{name}/{row[place]:07d}"] = row["value"]
    lengths, _, values = passkey_table(evaluation.get("passkey") or [])
    for length, row in zip(lengths, values, strict=True):
        found[f"{prefix}/passkey/{length:07d}"] = sum(row) / len(row)
    for row in evaluation.get("own_tasks") or []:
        found[f"{prefix}/own_tasks/{row['task']}"] = row["value"]
        if row.get("exact_match") is not None:
            found[f"{prefix}/own_tasks/{row['task']}/exact_match"] = row["exact_match"]
    return found


def passkey_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int], list[list[float]]]:
    """The lengths, the depths, and the share found by length and depth."""
    lengths = sorted({row["length"] for row in rows})
    depths = sorted({row["depth"] for row in rows})
    by_place = {(row["length"], row["depth"]): row["value"] for row in rows}
    return lengths, depths, [[by_place[length, depth] for depth in depths] for length in lengths]


def passkey_image(rows: Sequence[Mapping[str, Any]]) -> Tensor:
    """The map as a picture, `[3, height, width]` float32 from 0 to 1.

    A field for each length, from left to right, and depth, from the top down; dark where nothing is found, bright where
    all is.
    """
    _, _, values = passkey_table(rows)
    share = torch.tensor(values, dtype=torch.float32).T.clamp(0, 1)
    low, high = (torch.tensor(colour).view(3, 1, 1) for colour in (LOW, HIGH))
    fields = low + (high - low) * share
    whole = fields.repeat_interleave(FIELD, dim=1).repeat_interleave(FIELD, dim=2)
    # a white line between two fields
    for axis in (1, 2):
        line = torch.arange(whole.shape[axis]) % FIELD < GAP
        whole.movedim(axis, 0)[line] = 1.0
    return whole
