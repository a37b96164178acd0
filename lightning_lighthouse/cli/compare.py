"""`lighthouse compare`: runs side by side, from the `lighthouse.json` that each left behind."""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from lightning_lighthouse.cli.parser import Parser
from lightning_lighthouse.runs.comparison import Run, read_last_evaluation, read_report, summarize
from lightning_lighthouse.runs.evaluation_record import sum_up
from lightning_lighthouse.runs.loss_curve import Point, loss_curve, plot_curves, write_curves
from lightning_lighthouse.runs.pictures import check_picture
from lightning_lighthouse.runs.record import REPORT

CSV = ".csv"

DESCRIPTION = (
    "Compare runs: steps, training seconds, speed, dense validation losses, and the seconds that each needed to reach "
    "the final loss of one of them; and what the last evaluation of long context found, where a run has one. A run "
    "without a report is left out, with a line that says so. --plot and --csv OUT.csv have the loss over seconds and "
    "over tokens, with each validation."
)


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
    # of runs that were evaluated: what they find, and how much less a passage costs the second time
    evaluated = {"passkey": "passkey", "lookups": "lookups", "copies": "copy_gain", "context": "context_gain"}
    shown = [(title, name) for title, name in evaluated.items() if any(getattr(run, name) is not None for run in runs)]
    head += [title for title, _ in shown]
    rows = [head]
    for run in runs:
        speeds = [run.lighthouse_tokens_per_second, run.dense_tokens_per_second]
        waiting = [run.lighthouse_waiting_share, run.dense_waiting_share]
        rows.append(
            [
                run.run,
                run.attention or "-",
                _shown(run.world_size, "d"),
                _parts([run.lighthouse_steps, run.dense_steps], "d"),
                _parts([run.lighthouse_seconds, run.dense_seconds], ".1f"),
                ", ".join(f"{speed:,.0f}" for speed in speeds if speed is not None) or "-",
                ", ".join(f"{share:.1%}" for share in waiting if share is not None) or "-",
                _shown(run.loss_at_switch, ".4f"),
                _shown(run.loss_after_switch, ".4f"),
                _shown(run.final_loss, ".4f"),
                _shown(run.seconds_to_reference, ".1f"),
                _shown(run.peak_gib, ".1f"),
                *(_shown(getattr(run, name), "+.3f" if name.endswith("gain") else ".2f") for _, name in shown),
            ]
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _parts(values: Sequence[float | None], form: str) -> str:
    """What both phases took, or the one that ran."""
    return " + ".join(format(value, form) for value in values if value) or _shown(values[0], form)


def _report(path: str) -> dict[str, Any] | None:
    """The report of a run; None, with a line that says why, where it has none that can be read."""
    try:
        report = read_report(Path(path))
        # what it must be like shows when it is summed up
        summarize(path, report)
        return report
    except (OSError, ValueError) as error:
        print(f"lighthouse compare: {path} is left out: {error}", file=sys.stderr)
        return None


def _evaluation(path: str) -> dict[str, Any]:
    """The last evaluation of a run; {}, with a line that says why, where its file cannot be read."""
    try:
        found = read_last_evaluation(Path(path))
        sum_up(found)
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        print(f"lighthouse compare: the evaluation of {path} is left out: {error}", file=sys.stderr)
        return {}


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _curve(path: str, report: dict[str, Any]) -> list[Point]:
    """The losses of a run; none, with a line that says why, where its report does not have them."""
    try:
        points = loss_curve(report)
        if not points:
            raise ValueError("it has no validation")
        return points
    except ValueError as error:
        print(f"lighthouse compare: the curve of {path} is left out: {error}", file=sys.stderr)
        return []


def _draw(arguments: argparse.Namespace, reports: dict[str, dict[str, Any]]) -> None:
    """The files that were asked for."""
    curves = {path: points for path, report in reports.items() if (points := _curve(path, report))}
    if arguments.plot is not None:
        plot_curves(curves, arguments.plot)
    if arguments.csv:
        write_curves(curves, Path(arguments.csv))
    for path in filter(None, [arguments.plot, arguments.csv]):
        # the standard output may be the table as CSV
        print(f"lighthouse compare: {path}", file=sys.stderr)


def main(argv: Sequence[str]) -> int:
    """Run `lighthouse compare`; returns the exit status."""
    parser = Parser(prog="lighthouse compare", description=DESCRIPTION)
    parser.add_argument("runs", nargs="*", help=f"log folders of runs, or their {REPORT}")
    parser.add_argument("--reference", help="the run whose final loss is to be reached (default: the first shown)")
    parser.add_argument(
        "--csv",
        nargs="?",
        const="",
        metavar="OUT.csv",
        help="write every validation's step, seconds, tokens and loss; without a file: print the table that way",
    )
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the losses; needs matplotlib")
    arguments = parser.parse_args(argv)
    prints_csv = arguments.csv is not None and not arguments.csv.endswith(CSV)
    if prints_csv and arguments.csv:
        # a run that stands behind the flag
        arguments.runs, arguments.csv = [arguments.csv, *arguments.runs], ""
    if not arguments.runs:
        parser.error("the following arguments are required: runs")
    if arguments.plot is not None:
        try:
            check_picture(arguments.plot)
        except ValueError as error:
            parser.error(str(error))

    asked = dict.fromkeys([*arguments.runs, *filter(None, [arguments.reference])])
    reports = {path: report for path in asked if (report := _report(path)) is not None}
    shown = [path for path in arguments.runs if path in reports]
    if not shown:
        return 1
    reference = reports.get(arguments.reference or shown[0])
    loss = summarize("", reference).final_loss if reference is not None else None
    runs = [summarize(path, reports[path], loss, _evaluation(path)) for path in shown]
    if not prints_csv:
        print(table(runs))
        _draw(arguments, {path: reports[path] for path in shown})
        return 0
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, [field.name for field in fields(Run)])
    writer.writeheader()
    writer.writerows(asdict(run) for run in runs)
    sys.stdout.write(text.getvalue())
    if arguments.plot is not None:
        _draw(arguments, {path: reports[path] for path in shown})
    return 0
