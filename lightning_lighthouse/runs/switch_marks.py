"""The switches as TensorBoard shows them: a vertical line on every chart, in a run of its own for each switch."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

RUN = "switch to "
# TensorBoard smooths every line, by 0.6 unless told otherwise: behind so many equal points it has come to them
POINTS = 6
# what the first tenth of a curve shows is often so high that TensorBoard leaves it out of its scale
SETTLED = 0.1
# a line grows by so much of its height or more, so that no curve makes it grow at each point
GROWTH = 0.1


class SwitchMarks:
    """Draws a line at each switch, as high as the curves that it crosses; it grows with them.

    A line is points at one step, from the lowest to the highest value that a chart has shown. The scalars of a run
    share a colour, so a switch has its own on all charts, and can be hidden with its run.

    Args:
        writer: Gives the writer of a run by its name.
    """

    def __init__(self, writer: Callable[[str], SummaryWriter]) -> None:
        self._writer = writer
        # every value so far, by tag
        self._values: dict[str, list[float]] = defaultdict(list)
        # the marks so far: run and step, and by tag where the line ends
        self._marks: dict[tuple[str, int], dict[str, tuple[float, float]]] = {}

    def note(self, tag: str, value: float) -> None:
        """A chart got a point."""
        if not math.isfinite(value):
            return
        self._values[tag].append(value)
        for (run, step), ends in self._marks.items():
            low, high = ends.get(tag, (value, value))
            room = GROWTH * (high - low)
            if value < low - room or value > high + room:
                ends[tag] = min(low, value), max(high, value)
                self._draw(run, step, tag, [value] * POINTS)

    def mark(self, phase: str, step: int) -> None:
        """The phase of that name begins at an optimizer step: mark it on every chart that there is."""
        ends = self._marks[RUN + phase, step] = {}
        for tag in sorted(self._values):
            values = self._values[tag]
            settled = values[int(SETTLED * len(values)) :]
            low, high = min(settled), max(settled)
            if low == high:
                # a curve that stays where it is has no height of its own
                low, high = min(0.0, low), max(0.0, high)
            ends[tag] = low, high
            self._draw(RUN + phase, step, tag, [low, *[high] * POINTS])

    def _draw(self, run: str, step: int, tag: str, values: list[float]) -> None:
        for value in values:
            self._writer(run).add_scalar(tag, value, step)
