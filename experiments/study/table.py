"""Print the tables of `docs/numbers/settings.md` from its two CSV files, and draw its plots; needs matplotlib.

python experiments/study/table.py
"""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from lightning_lighthouse.runs.comparison import seconds_to

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "numbers"
HEAD = (
    "| row | seed | GPU | steps | seconds | at the switch | spike | leak | **final** | seconds to dense's final loss |"
)
# A row belongs to the longest of these that its name begins with, and is held against `CONTEXT-dense`.
CONTEXTS = {"32k": "32,768 tokens, 70 s", "98k": "98,304 tokens, 160 s", "98k-long": "98,304 tokens, 250 s"}


def read(name: str) -> list[dict[str, str]]:
    """The rows of a table."""
    with (HERE / name).open(newline="") as stream:
        return list(csv.DictReader(stream))


def context_of(name: str) -> str:
    """The context that a row belongs to."""
    return max((context for context in CONTEXTS if name.startswith(context)), key=len)


def rounded(text: str, digits: int) -> str:
    """A number of a table, or a dash."""
    return f"{float(text):.{digits}f}" if text else "-"


def main() -> None:
    """Print and draw."""
    rows = read("rows.csv")
    curves = defaultdict(list)
    for point in read("validations.csv"):
        if point["loss"]:
            curves[point["name"], point["seed"]].append((float(point["seconds"]), float(point["loss"])))
    for context, title in CONTEXTS.items():
        here = [row for row in rows if context_of(row["name"]) == context]
        if not here:
            continue
        dense = {row["seed"]: row for row in here if row["name"] == f"{context}-dense"}
        print(f"\n{title}\n\n{HEAD}\n|{'---|' * 10}")
        figure, axes = plt.subplots(figsize=(10, 5))
        axes.set_prop_cycle(color=plt.get_cmap("tab20").colors)
        # a run whose loss is no number has an empty one
        for row in sorted(here, key=lambda row: float(row["final_loss"] or "inf")):
            curve = curves[row["name"], row["seed"]]
            reference = dense.get(row["seed"]) or next(iter(dense.values()), None)
            known = reference is not None and reference["final_loss"]
            reached = seconds_to(float(known), curve) if known else None
            seconds = float(row["lighthouse_seconds"]) + float(row["dense_seconds"])
            leak = f"{rounded(row['leak_nats'], 3)} ± {rounded(row['leak_stderr'], 3)}" if row["leak_nats"] else "-"
            both = row["lighthouse_steps"] != "0"
            steps = f"{row['lighthouse_steps']} + {row['dense_steps']}" if both else row["dense_steps"]
            cells = [row["name"], row["seed"], row["device"].removeprefix("NVIDIA ").split()[0], steps,
                     f"{seconds:.0f}", rounded(row["loss_at_switch"], 3), rounded(row["spike_nats"], 3), leak,
                     f"**{rounded(row['final_loss'], 3)}**", "-" if reached is None else f"{reached:.0f}"]  # fmt: skip
            print(f"| {' | '.join(cells)} |")
            if curve:
                style = "--" if row["attention"] == "dense" else "-"
                axes.plot(*zip(*curve, strict=True), style, label=f"{row['name']}, seed {row['seed']}", linewidth=1.2)
        axes.set(xlabel="seconds of training", ylabel="dense validation loss, nats per byte", title=title)
        axes.set_ylim(top=min(3.5, axes.get_ylim()[1]))
        axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
        axes.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(DOCS / f"settings-{context}.png", dpi=120)


if __name__ == "__main__":
    main()
