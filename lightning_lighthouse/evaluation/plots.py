"""Pictures of evaluations, with matplotlib, which is optional: the extra `plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_lighthouse.evaluation.charts import passkey_table
from lightning_lighthouse.runs.pictures import new_figure, save_figure

# of a run with many evaluations, as many lines as can be told apart
MOST_LINES = 5


def plot(evaluations: Sequence[Mapping[str, Any]], path: Path, caption: str = "") -> None:
    """Draw the loss by position, the copies, the passkeys and what else was measured; the file appears whole.

    Args:
        evaluations: In the order of their steps; of many, some between the first and the last. The passkey map is that
            of the last.
        path: A file whose ending matplotlib knows, as .png.
        caption: Above all.

    Raises:
        ModuleNotFoundError: matplotlib is absent.
        ValueError: There is nothing to draw, or the ending is none that it knows.
    """
    figure = new_figure(path, 9.6, 6.4)
    shown = _chosen(evaluations)
    if not shown:
        raise ValueError(f"{path}: there is no evaluation to draw")
    axes = figure.subplots(2, 2)
    _lines(axes[0][0], shown, "loss_by_position", "until", "loss by position", "nats per token")
    _lines(axes[0][1], shown, "copies", "distance", "a passage of text, second time minus first", "nats per token")
    _passkeys(figure, axes[1][0], shown[-1])
    _lines(
        axes[1][1],
        shown,
        "lookups",
        "length",
        "found: one of 8 numbers (lookups), passkey (dashed)",
        "share found",
        beside="passkey",
    )
    _passkey_means(axes[1][1], shown)
    figure.suptitle(caption, fontsize=10)
    save_figure(figure, path)


def _chosen(evaluations: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if len(evaluations) <= MOST_LINES:
        return list(evaluations)
    last = len(evaluations) - 1
    return [evaluations[round(i * last / (MOST_LINES - 1))] for i in range(MOST_LINES)]


def _label(evaluation: Mapping[str, Any]) -> str | None:
    return None if evaluation.get("step") is None else f"step {evaluation['step']:,}"


def _lines(
    axis: Any,
    shown: Sequence[Mapping[str, Any]],
    measure: str,
    place: str,
    title: str,
    unit: str,
    beside: str | None = None,
) -> None:
    axis.set_title(title, fontsize=9)
    if not any(evaluation.get(name) for evaluation in shown for name in (measure, beside or measure)):
        axis.set_axis_off()
        return
    axis.set_ylabel(unit, fontsize=8)
    axis.set_xlabel("tokens" if measure != "copies" else "tokens from one to the other", fontsize=8)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda value, place: f"{value:,.0f}")
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)
    for number, evaluation in enumerate(shown):
        rows = [row for row in evaluation.get(measure) or [] if row["value"] is not None]
        errors = [row["standard_error"] or 0.0 for row in rows]
        x, y = [row[place] for row in rows], [row["value"] for row in rows]
        axis.errorbar(x, y, errors, marker="o", markersize=3, capsize=2, color=f"C{number}", label=_label(evaluation))
        beyond = [row[place] for row in rows if row["beyond_training"]]
        if beyond and evaluation is shown[-1]:
            axis.axvspan(min(beyond) * 0.9, max(beyond) * 1.1, color="0.9", zorder=0, label="beyond training")
    if measure == "loss_by_position" and any(_label(evaluation) for evaluation in shown):
        axis.legend(fontsize=7)


def _passkeys(figure: Any, axis: Any, evaluation: Mapping[str, Any]) -> None:
    axis.set_title("passkey: share found", fontsize=9)
    rows = evaluation.get("passkey") or []
    if not rows:
        axis.set_axis_off()
        return
    lengths, depths, values = passkey_table(rows)
    image = axis.imshow(list(zip(*values, strict=True)), vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8)
    axis.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths], fontsize=8)
    axis.set_xlabel("tokens", fontsize=8)
    axis.set_ylabel("depth", fontsize=8)
    figure.colorbar(image, ax=axis)


def _passkey_means(axis: Any, shown: Sequence[Mapping[str, Any]]) -> None:
    if not axis.axison:
        return
    axis.set_ylim(-0.05, 1.05)
    axis.axhline(0.1, color="0.5", linewidth=0.8)
    axis.annotate("chance", (1.0, 0.12), xycoords=("axes fraction", "data"), ha="right", fontsize=7, color="0.4")
    for number, evaluation in enumerate(shown):
        lengths, _, values = passkey_table(evaluation.get("passkey") or [])
        axis.plot(lengths, [sum(row) / len(row) for row in values], "--", marker="s", markersize=3, color=f"C{number}")
