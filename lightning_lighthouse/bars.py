"""How far long work is: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

# seconds from one line of progress to the next
EVERY_SECONDS = 30.0


def is_terminal(stream: Any) -> bool:
    """Whether what goes to a stream is seen as it is written: in a terminal, or in a notebook."""
    return stream.isatty() or "ipykernel" in sys.modules


def progress_bar(description: str, total: int | None = None, unit: str = "B") -> Any:
    """A context whose `update(n)` tells that `n` more units are done; `total` may be set later.

    It is tqdm's bar, and goes when it is closed; where the standard error is no terminal, a line every half minute.

    Args:
        description: What is done, as in "Preparing".
        total: Units of the whole; None where they are not known yet.
        unit: "B" for bytes; others with a space before them.
    """
    if not is_terminal(sys.stderr):
        return ProgressLines(description, total, unit)
    from tqdm import tqdm  # type: ignore[import-untyped]

    return tqdm(total=total, desc=description, unit=unit, unit_scale=unit == "B", leave=False, dynamic_ncols=True)


class ProgressLines:
    """The same as lines, for a log file; nothing of what is done before the first is due."""

    def __init__(self, description: str, total: int | None, unit: str) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.done = 0
        self._start = self._told = time.monotonic()

    def update(self, units: int = 1) -> None:
        """So many more are done."""
        self.done += units
        now = time.monotonic()
        if now - self._told >= EVERY_SECONDS:
            self._told = now
            print(self.line(now - self._start), file=sys.stderr, flush=True)

    def line(self, seconds: float) -> str:
        """As in "Preparing: 1,200 of 5,000 MB, 24%, 95 s left"."""
        scale, unit = (10**6, " MB") if self.unit == "B" else (1, self.unit)
        count = f"{self.done / scale:,.0f}"
        if not self.total or not self.done:
            return f"{self.description}: {count}{unit}"
        left = seconds * (self.total - self.done) / self.done
        of_all = f"{count} of {self.total / scale:,.0f}{unit}, {self.done / self.total:.0%}"
        return f"{self.description}: {of_all}, {max(0.0, left):,.0f} s left"

    def __enter__(self) -> ProgressLines:
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing is left to say."""
