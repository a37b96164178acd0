"""The dense validation loss of a run over training time and over tokens, from the `lighthouse.json` that it left."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_lighthouse.phases.schedule import DENSE
from lightning_lighthouse.runs.pictures import new_figure, save_figure
from lightning_lighthouse.runs.whole_file import whole_file


class Point(NamedTuple):
    """One dense validation.

    Args:
        step: Optimizer steps done.
        seconds: Training time until then.
        tokens: Trained on until then, all ranks; None where the report does not say it.
        phase: Of the last training batch.
        loss: In nats per token.
    """

    step: int
    seconds: float
    tokens: float | None
    phase: str
    loss: float


def loss_curve(report: Mapping[str, Any]) -> list[Point]:
    """The points of a run in their order; losses that are not finite are left out.

    A report counts the tokens of each phase, and a step of a phase is taken to be as long as any other of it.

    Args:
        report: From `read_report`, of any version.

    Raises:
        ValueError: It is not such a report.
    """
    try:
        phases = [totals for totals in report["phases"].values() if totals["steps"]]
        return [
            Point(row["step"], row["seconds"], _tokens(phases, row["step"]), row["phase"], row["loss"])
            for row in report["validations"]
            if row["loss"] is not None
        ]
    except (KeyError, TypeError, AttributeError):
        raise ValueError("its phases or validations are not those of LighthouseCallback") from None


def _tokens(phases: Sequence[Mapping[str, Any]], step: int) -> float | None:
    """Tokens of the first `step` steps of phases that followed each other; None where one does not tell them."""
    total = 0.0
    for totals in phases:
        steps = min(step, totals["steps"])
        if steps and not totals.get("tokens"):
            return None
        total += steps * (totals.get("tokens") or 0) / totals["steps"]
        step -= steps
    return total


def write_curves(curves: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Write a table with a row for each point of each run, by its name; the file appears whole."""
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *Point._fields])
        for run, points in curves.items():
            writer.writerows([run, *point] for point in points)


def plot_curves(curves: Mapping[str, Sequence[Point]], path: Path) -> None:
    """Draw the losses over seconds and over tokens; a run is dashed before its dense phase, which begins with a dot.

    Args:
        curves: By the name of the run.
        path: A file whose ending matplotlib knows, as .png.

    Raises:
        ModuleNotFoundError: matplotlib is absent.
        ValueError: No run has a validation, or the ending is none that it knows.
    """
    figure = new_figure(path, 12.0, 4.8)
    if not any(curves.values()):
        raise ValueError("--plot needs runs with validations, and none of these has any")
    from matplotlib.ticker import EngFormatter

    sides = figure.subplots(1, 2, sharey=True)
    for axes, name in zip(sides, ("seconds", "tokens"), strict=True):
        for number, (run, points) in enumerate(curves.items()):
            known = [(getattr(point, name), point) for point in points]
            _line(axes, [(place, point) for place, point in known if place is not None], run, f"C{number % 10}")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(visible=True, alpha=0.3)
        axes.set_xlabel("seconds of training" if name == "seconds" else "tokens")
    sides[0].set_ylabel("dense validation loss, nats per token")
    sides[0].legend(fontsize=8)
    figure.suptitle("dashed: before the dense phase; dot: the first validation in it", fontsize=9)
    save_figure(figure, path)


def _line(axes: Any, points: Sequence[tuple[float, Point]], run: str, colour: str) -> None:
    dense = next((index for index, (_, point) in enumerate(points) if point.phase == DENSE), len(points))
    # the dashed part ends where the other begins
    before, after = points[: dense + 1], points[dense:]
    for part, style in ((before, "--"), (after, "-")):
        # one of the two names the run
        label = run if (style == "-") == bool(after) else None
        places, losses = [place for place, _ in part], [point.loss for _, point in part]
        axes.plot(places, losses, style, color=colour, label=label)
    if 0 < dense < len(points):
        axes.plot(points[dense][0], points[dense][1].loss, "o", color=colour)
