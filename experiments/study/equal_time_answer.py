"""Draw the answer of the study: how each way of training ends from nothing, and what it finds far away in an extended
model; needs matplotlib.

    python experiments/study/equal_time_answer.py docs/numbers/study.png

A dot is a training, its seed beside the others of the same way; ways are ordered by their mean loss.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

EXPERIMENTS = Path(__file__).parents[1]
# as the page and the README call them
WORDS = {
    "dense": "dense all along",
    "dense-4k": "chunks of 4,096",
    "dense-8k": "chunks of 8,192",
    "window-512": "windows of 512",
    "window-2048": "windows of 2,048",
    "window-4096": "windows of 4,096",
    "growing": "growing chunks",
    "mixed-lighthouse": "3 windows, 1 Lighthouse",
    "mixed-dense": "3 windows, 1 dense",
    "mixed-chunk-8k": "3 chunks, 1 Lighthouse",
    "mixed-chunk-8k-dense": "3 chunks, 1 dense",
    "dense-8k-more-dense": "chunks, more dense steps",
    "alternating": "windows and Lighthouse in turn",
    "lighthouse": "Lighthouse in all layers",
}


def by_arm(lines: Sequence[Mapping[str, str]], column: str) -> dict[str, list[float]]:
    """What each way of training came to, a value a seed, the lowest mean first."""
    found: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        if line["arm"] in WORDS and line[column]:
            found[line["arm"]].append(float(line[column]))
    return dict(sorted(found.items(), key=lambda item: sum(item[1]) / len(item[1])))


def rows(path: Path, **wanted: float) -> list[dict[str, str]]:
    """The lines of a table that were trained without needles, and with these values."""
    with path.open(newline="") as stream:
        lines = [line for line in csv.DictReader(stream) if line["needles"] == "False"]
    return [line for line in lines if all(float(line[name]) == value for name, value in wanted.items())]


def dots(axes: Any, found: Mapping[str, Sequence[float]], **style: Any) -> None:
    """A row for each way, the first on top."""
    # one order for all dots of a panel
    axes.set_yticks(range(len(found)), [WORDS[arm] for arm in found])
    for place, values in enumerate(found.values()):
        label = style.get("label") if not place else None
        axes.plot(values, [place] * len(values), "o", alpha=0.7, **style | {"label": label})
    axes.set_ylim(len(found) - 0.5, -0.5)
    axes.grid(alpha=0.3)


def main() -> int:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--from_nothing", type=Path, default=EXPERIMENTS / "from_nothing.csv")
    parser.add_argument("--extension", type=Path, default=EXPERIMENTS / "extension.csv")
    parser.add_argument("--rate", type=float, default=3e-4, help="of the extension (default: 3e-4)")
    arguments = parser.parse_args()
    nothing = rows(arguments.from_nothing, seq_len=98304, budget=115)
    extension = rows(arguments.extension, seq_len=65536, budget=80, learning_rate=arguments.rate)

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(16, 4.2), width_ratios=(1.2, 1, 1), layout="constrained"
    )
    dots(left, by_arm(nothing, "val_loss"), color="tab:blue")
    left.set(xlabel="dense validation loss, nats per byte", title="From nothing: 41M, 98,304 tokens, 115 s")
    losses = by_arm(extension, "val_loss")
    dots(middle, losses, color="tab:blue")
    middle.set(xlabel="dense validation loss, nats per token", title="SmolLM2-135M, 8,192 to 65,536 tokens, 80 s")
    for column, length, style in (
        ("passkey_32k", "32,768", {"color": "tab:blue"}),
        ("passkey_up", "65,536", {"color": "tab:orange", "fillstyle": "none"}),
    ):
        found = by_arm(extension, column)
        dots(right, {arm: found.get(arm, []) for arm in losses}, label=f"at {length} tokens", **style)
    right.set(xlabel="passkeys found", title="the same models", xlim=(0, 1.02), yticklabels=[])
    right.legend(fontsize=8, loc="lower left")
    figure.savefig(arguments.picture, dpi=120)
    print(arguments.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
