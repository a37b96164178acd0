"""Print the tables of `equal_time.py` and draw them; needs matplotlib.

    python experiments/study/equal_time_table.py experiments/extension.csv --learning_rate 3e-4 --output docs/numbers

A table and plots for each length and time, trainings with needles in their text apart. Beside `PART.csv` lies
`PART_measures.csv`. A copy is the share of a passage's loss that is gone the second time, 1 for a perfect one; passkeys
and lookups are shares that were found, 0.1 by chance; losses are nats a token, dense.
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# column, heading, digits
COLUMNS = (
    ("seconds", "s", 0),
    ("steps", "steps", 0),
    ("tokens", "M tokens", 1),
    ("pflop", "PFLOP", 0),
    ("val_loss", "validation", 4),
    ("loss_0_8k", "to 8K", 4),
    ("loss_8k_32k", "8K-32K", 4),
    ("loss_32k_up", "from 32K", 4),
    ("gain_longest", "gain", 3),
    ("copy_1024", "copy 1K", 2),
    ("copy_16384", "16K", 2),
    ("copy_32768", "32K", 2),
    ("copy_65536", "64K", 2),
    ("passkey_8k", "passkey 8K", 2),
    ("passkey_32k", "32K", 2),
    ("passkey_up", "up", 2),
    ("lookups_8k", "lookups 8K", 2),
    ("lookups_32k", "32K", 2),
    ("lookups_up", "up", 2),
)
AT_SWITCH = tuple(name for name, _, _ in COLUMNS[5:])
# what a label says of one
SEED = re.compile(r", seed \d+")
Line = Mapping[str, str]


def read(path: Path) -> list[dict[str, str]]:
    """The lines of a table."""
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def cell(text: str | None, digits: int, unit: float = 1.0) -> str:
    """A number of a table, or a dash."""
    return f"{float(text) / unit:,.{digits}f}" if text else "-"


def print_table(lines: Iterable[Line]) -> None:
    """The lines of one length and time, each at its end and, under it, at its switch."""
    heads = ["arm", "seed", "rate", *(heading for _, heading, _ in COLUMNS)]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for line in lines:
        cells = [cell(line[name], digits, 1e6 if name == "tokens" else 1.0) for name, _, digits in COLUMNS]
        print(f"| {' | '.join([line['arm'], line['seed'], line['learning_rate'], *cells])} |")
        if any(line[f"switch_{name}"] for name in AT_SWITCH):
            before = {f"switch_{name}": line[f"switch_{name}"] for name in AT_SWITCH}
            before |= {"switch_val_loss": line["val_loss_before_switch"], "switch_seconds": line["cheap_seconds"]}
            before |= {"switch_steps": line["cheap_steps"]}
            cells = [cell(before.get(f"switch_{name}"), digits) for name, _, digits in COLUMNS]
            print(f"| {' | '.join(['at the switch', '', '', *cells])} |")


def label(line: Line, lines: Iterable[Line]) -> str:
    """What tells a line from the others: its arm, and its seed and rate where there are several of these."""
    same = [other for other in lines if other["arm"] == line["arm"]]
    words = [line["arm"]]
    for name, word in (("learning_rate", "rate"), ("seed", "seed")):
        if len({other[name] for other in same}) > 1:
            words.append(f"{word} {line[name]}")
    return ", ".join(words)


def draw(path: Path, curves: Mapping[str, list[tuple[float, float]]], **axes_settings: Any) -> None:
    """A line each, to a file; seeds of the same training in one colour."""
    figure, axes = plt.subplots(figsize=(10, 5))
    palette = plt.get_cmap("tab20").colors
    colors: dict[str, Any] = {}
    for name, points in curves.items():
        arm = name.partition(",")[0]
        style = {"dense": "--", "untrained": ":"}.get(arm.partition("-own")[0], "-")
        group = SEED.sub("", name)
        shown = None if group in colors else group
        color = colors.setdefault(group, palette[len(colors) % len(palette)])
        axes.plot(*zip(*sorted(points), strict=True), style, marker=".", color=color, label=shown)
    axes.set(**axes_settings)
    if axes_settings.get("xscale"):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda tokens, place: f"{tokens:,.0f}")
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.01, 1))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(path)


def curves_of(
    lines: list[Line],
    points: Mapping[str, list[Line]],
    measure: str,
    x: Callable[[Line], float],
    is_wanted: Callable[[Line], bool] = lambda point: True,
) -> dict[str, list[tuple[float, float]]]:
    """Means of a measure over `x`, by line."""
    curves = {}
    for line in lines:
        found: dict[float, list[float]] = defaultdict(list)
        own = [point for point in points[line["row"]] if point["measure"] == measure and point["value"]]
        # of the weights that the training ended with
        last = max((int(point["step"]) for point in own), default=0)
        for point in own:
            if is_wanted(point) and (measure == "validation" or int(point["step"]) == last):
                found[x(point)].append(float(point["value"]))
        if found:
            curves[label(line, lines)] = [(place, sum(values) / len(values)) for place, values in found.items()]
    return curves


def main() -> int:
    """Print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--learning_rate", type=float, help="of the trainings to show (default: all)")
    parser.add_argument("--output", type=Path, default=Path(), help="folder of the plots (default: the current one)")
    arguments = parser.parse_args()
    points: dict[str, list[Line]] = defaultdict(list)
    for point in read(arguments.table.with_name(f"{arguments.table.stem}_measures.csv")):
        points[point["row"]].append(point)
    groups: dict[tuple[str, str, bool], list[Line]] = defaultdict(list)
    lines = read(arguments.table)
    untrained = [line for line in lines if line["steps"] == "1"]
    for line in lines:
        if line not in untrained and arguments.learning_rate in (None, float(line["learning_rate"])):
            groups[line["seq_len"], line["budget"], line["needles"] == "True"].append(line)
    # beside all that was made of them
    for line in untrained:
        for seq_len, budget, has_needles in [key for key in groups if key[0] == line["seq_len"]]:
            groups[seq_len, budget, has_needles].append(line)
    for (seq_len, budget, has_needles), lines in groups.items():
        title = f"{int(seq_len):,} tokens, {float(budget):g} s{', needles in the text' if has_needles else ''}"
        print(f"\n{title}\n")
        print_table(sorted(lines, key=lambda line: float(line["val_loss"] or "inf")))
        name = f"{arguments.table.stem}-{seq_len}-{float(budget):g}s{'-needles' if has_needles else ''}"
        loss = "loss, nats per token"
        positions = curves_of(lines, points, "loss_by_position", lambda point: float(point["until"]))
        if positions:
            wanted = {key: [point for point in curve if point[0] >= 1024] or curve for key, curve in positions.items()}
            where = arguments.output / f"{name}-positions.png"
            draw(where, wanted, xlabel="position, tokens", ylabel=loss, title=title, xscale="log")
        for measure in ("passkey", "lookups"):
            found = curves_of(lines, points, measure, lambda point: float(point["length"]))
            if found:
                where = arguments.output / f"{name}-{measure}.png"
                draw(where, found, xlabel="tokens", ylabel=f"{measure} found", title=title, xscale="log")
        losses = curves_of(lines, points, "validation", lambda point: float(point["seconds"]))
        if losses:
            where = arguments.output / f"{name}-losses.png"
            draw(where, losses, xlabel="seconds of training", ylabel=f"dense validation {loss}", title=title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
