"""Draw what a run reaches in its time, with Lighthouse layers and with what else there is.

    python experiments/rivals.py docs/numbers/rivals.png

From `experiments/benchmarks/phases.csv`: the trainings of 200 steps of docs/numbers/benchmarks.md. Needs matplotlib.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib.pyplot as plt

ROWS = Path(__file__).parent / "benchmarks" / "phases.csv"
STEPS, TOKENS = 200, 32_768
NAMES = {
    "dense": "dense all along",
    "lighthouse": "Lighthouse in all layers, then dense",
    "mixed": "3 windows of 512 and 1 Lighthouse layer, then dense",
    "window": "windows of 512, then dense",
    "sinks": "windows of 512 with 4 sinks, then dense",
    "chunk": "chunks of 4,096, then dense",
}


def main(path: Path) -> None:
    """Draw it."""
    figure, axes = plt.subplots(figsize=(9, 3.4), layout="constrained")
    with ROWS.open() as file:
        for row in csv.DictReader(file):
            steps = int(row["lighthouse_steps"]), int(row["dense_steps"])
            if sum(steps) != STEPS or row["run"] not in NAMES:
                continue
            speeds = row["lighthouse_tokens_per_second"], row["dense_tokens_per_second"]
            # by the tokens/s, which leave compilation out
            seconds = sum(count * TOKENS / float(speed) for count, speed in zip(steps, speeds, strict=True) if count)
            axes.plot(seconds, float(row["final_loss"]), "o", label=NAMES[row["run"]])
    axes.set_xlabel("seconds of 200 steps, compilation left out")
    axes.set_ylabel("dense validation loss, nats a byte")
    axes.set_title("41M parameters, 32,768 tokens, one H100, one seed", fontsize=10)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
