"""`lighthouse compare`: runs side by side, from the `lighthouse.json` that each left behind."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from lightning_lighthouse.arguments import Parser
from lightning_lighthouse.config import LighthouseConfig
from lightning_lighthouse.report import REPORT, REPORT_VERSION
from lightning_lighthouse.schedule import DENSE, LIGHTHOUSE

DESCRIPTION = (
    "Compare runs: steps, training seconds, speed, dense validation losses, and the seconds that each needed to reach "
    "the final loss of one of them."
)


@dataclass(frozen=True)
class Run:
    """What one run cost and reached. Seconds are training time, losses dense validation losses, in nats per token.

    Args:
        run: Its folder.
        attention: What was not at its default, or "dense".
        world_size: Processes.
        lighthouse_steps: Optimizer steps of the Lighthouse phase.
        dense_steps: Those of the dense phase.
        lighthouse_seconds: Time of the Lighthouse phase.
        dense_seconds: Time of the dense phase.
        lighthouse_tokens_per_second: All processes together, compilation left out.
        dense_tokens_per_second: The same of the dense phase.
        loss_at_switch: The last loss of the Lighthouse phase.
        loss_after_switch: The first of the dense phase.
        final_loss: The last of all.
        seconds_to_reference: Training time at which the loss first was as low as the reference's last one, on the
            line between two validations; None if it never was.
        peak_gib: Most memory allocated on the first GPU.
        device: Its name.
        lighthouse_waiting_share: Share of the Lighthouse phase's time that rank 0 waited for data; None if unknown.
        dense_waiting_share: The same of the dense phase.
    """

    run: str
    attention: str
    world_size: int
    lighthouse_steps: int
    dense_steps: int
    lighthouse_seconds: float
    dense_seconds: float
    lighthouse_tokens_per_second: float | None
    dense_tokens_per_second: float | None
    loss_at_switch: float | None
    loss_after_switch: float | None
    final_loss: float | None
    seconds_to_reference: float | None
    peak_gib: float | None
    device: str
    lighthouse_waiting_share: float | None
    dense_waiting_share: float | None


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


def summarize(name: str, report: dict[str, Any], reference_loss: float | None = None) -> Run:
    """One line of the comparison.

    Args:
        name: Of the run.
        report: From `read_report`.
        reference_loss: The loss to be reached.
    """
    lighthouse, dense = report["phases"][LIGHTHOUSE], report["phases"][DENSE]
    validations = report["validations"]
    by_phase = {phase: [v["loss"] for v in validations if v["phase"] == phase] for phase in (LIGHTHOUSE, DENSE)}
    curve = [(v["seconds"], v["loss"]) for v in validations if v["loss"] is not None]
    switched = report["switch"] is not None
    peak = report["device"]["peak_memory_mib"]
    return Run(
        run=name,
        attention=_describe(report["settings"]),
        world_size=report["world_size"],
        lighthouse_steps=lighthouse["steps"],
        dense_steps=dense["steps"],
        lighthouse_seconds=lighthouse["seconds"],
        dense_seconds=dense["seconds"],
        lighthouse_tokens_per_second=lighthouse["tokens_per_second"],
        dense_tokens_per_second=dense["tokens_per_second"],
        loss_at_switch=by_phase[LIGHTHOUSE][-1] if by_phase[LIGHTHOUSE] else None,
        loss_after_switch=by_phase[DENSE][0] if switched and by_phase[DENSE] else None,
        final_loss=validations[-1]["loss"] if validations else None,
        seconds_to_reference=None if reference_loss is None else seconds_to(reference_loss, curve),
        peak_gib=None if peak is None else peak / 1024,
        device=report["device"]["name"],
        # reports of before had none
        lighthouse_waiting_share=lighthouse.get("waiting_share"),
        dense_waiting_share=dense.get("waiting_share"),
    )


def _describe(settings: dict[str, Any]) -> str:
    """The settings of the attention that are not the defaults."""
    if not settings["enabled"]:
        return "dense"
    defaults = asdict(LighthouseConfig())
    changed = [f"{key}={value}" for key, value in settings["attention"].items() if value != defaults.get(key)]
    changed += [f"dense_layers={settings['dense_layers']}"] if settings["dense_layers"] else []
    return " ".join([f"switch_at={settings['switch_at']}", *changed])


def seconds_to(loss: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """When a curve of (seconds, loss) is first as low as `loss`, on the line between two points; None if never."""
    if curve and curve[0][1] <= loss:
        return curve[0][0]
    for (second_before, before), (second, here) in pairwise(curve):
        if here <= loss:
            return second_before + (before - loss) / (before - here) * (second - second_before)
    return None


def table(runs: Sequence[Run]) -> str:
    """The runs as lines of text, a column each for what differs between readers' questions: cost, speed, loss."""
    head = [
        "run",
        "attention",
        "ranks",
        "steps",
        "seconds",
        "tokens/s",
        "waiting",
        "at switch",
        "after",
        "final",
        "to ref. s",
        "GiB",
    ]
    rows = [head]
    for run in runs:
        both = run.lighthouse_steps and run.dense_steps
        speeds = [run.lighthouse_tokens_per_second, run.dense_tokens_per_second]
        waiting = [run.lighthouse_waiting_share, run.dense_waiting_share]
        rows.append(
            [
                run.run,
                run.attention,
                str(run.world_size),
                f"{run.lighthouse_steps} + {run.dense_steps}" if both else str(run.lighthouse_steps + run.dense_steps),
                f"{run.lighthouse_seconds:.1f} + {run.dense_seconds:.1f}"
                if both
                else f"{run.lighthouse_seconds + run.dense_seconds:.1f}",
                ", ".join(f"{speed:,.0f}" for speed in speeds if speed is not None) or "-",
                ", ".join(f"{share:.1%}" for share in waiting if share is not None) or "-",
                _shown(run.loss_at_switch, ".4f"),
                _shown(run.loss_after_switch, ".4f"),
                _shown(run.final_loss, ".4f"),
                _shown(run.seconds_to_reference, ".1f"),
                _shown(run.peak_gib, ".1f"),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main(argv: Sequence[str]) -> int:
    """Run `lighthouse compare`; returns the exit status."""
    parser = Parser(prog="lighthouse compare", description=DESCRIPTION)
    parser.add_argument("runs", nargs="+", help=f"log folders of runs, or their {REPORT}")
    parser.add_argument("--reference", help="the run whose final loss is to be reached (default: the first)")
    parser.add_argument("--csv", action="store_true", help="print comma-separated values instead of a table")
    arguments = parser.parse_args(argv)

    reference = read_report(Path(arguments.reference or arguments.runs[0]))["validations"]
    loss = reference[-1]["loss"] if reference else None
    runs = [summarize(str(run), read_report(Path(run)), loss) for run in arguments.runs]
    if not arguments.csv:
        print(table(runs))
        return 0
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(Run)])
    writer.writeheader()
    writer.writerows(asdict(run) for run in runs)
    sys.stdout.write(text.getvalue())
    return 0
