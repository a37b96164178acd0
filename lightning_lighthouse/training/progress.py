"""What the user sees of a running fit: the Trainer's progress bar, or a line now and then where no terminal shows one.

Lightning's bar is that of an epoch, and it takes all batches to be as slow as those so far; the dense phase is slower.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

from lightning_lighthouse.bars import EVERY_SECONDS, is_terminal
from lightning_lighthouse.checks import is_named
from lightning_lighthouse.phases.events import BatchEnd
from lightning_lighthouse.phases.pace import TimeLeft, spans_left, time_left
from lightning_lighthouse.phases.schedule import DENSE
from lightning_lighthouse.runs.layout import LOSS, TOKENS_PER_SECOND
from lightning_lighthouse.runs.stand_in import StandIn

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from lightning_lighthouse.phases.plan import PhasePlan
    from lightning_lighthouse.phases.run_state import RunState

BARS = ("TQDMProgressBar", "RichProgressBar")
# tqdm's own estimate, and Rich's, is that of the epoch at its mean speed
TQDM_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
RICH_ESTIMATE = "CustomTimeColumn"


class Progress:
    """Tells how far a fit is.

    Args:
        trainer: Its step and its number of steps.
        run: Plan and totals.
        plan: Given what the run follows now; None for a dense baseline.
        newest: Given the values of the newest point.
        costs: Given the work of a step by phase, None where it is not known.
    """

    def __init__(
        self,
        trainer: Trainer,
        run: RunState,
        plan: Callable[[], PhasePlan | None],
        newest: Callable[[], dict[str, float]],
        costs: Callable[[], dict[str, float] | None],
    ) -> None:
        self._trainer, self._run, self._plan, self._newest, self._costs = trainer, run, plan, newest, costs
        total = trainer.estimated_stepping_batches
        # unknown, inf or -1, of an iterable without an end
        self._total = int(total) if 0 < total < float("inf") else None
        self._told_at: float | None = None

    def items(self) -> dict[str, str]:
        """For a bar: phase, steps to the next switch, loss, tokens a second, and the time left; what is known of it."""
        step, plan = self._trainer.global_step, self._plan()
        phase = plan.name(step) if plan is not None else DENSE
        items = {"phase": phase}
        if plan is not None and (number := plan.number(step)) < len(plan.phases):
            items["switch_in"] = f"{plan.first_step(number + 1) - step:,}"
        newest = self._newest()
        if LOSS in newest:
            items["loss"] = f"{newest[LOSS]:.3f}"
        rate = newest.get(TOKENS_PER_SECOND) or self._run.ledger.totals(phase).tokens_per_second
        if rate:
            items["tokens/s"] = f"{rate:,.0f}"
        left = self.left()
        if left is not None:
            items["left"] = str(left)
        return items

    def left(self) -> TimeLeft | None:
        """The time to the end."""
        if self._total is None:
            return None
        spans = spans_left(self._plan(), self._trainer.global_step, self._total)
        return time_left(spans, self._run.ledger.phases, self._costs())

    def line(self) -> str:
        """The same in words."""
        step, items = self._trainer.global_step, self.items()
        of_all = f" of {self._total:,}" if self._total is not None else ""
        words = [f"step {step:,}{of_all}", items["phase"]]
        words += [f"{items['switch_in']} steps to the switch"] if "switch_in" in items else []
        words += [f"loss {items['loss']}"] if "loss" in items else []
        words += [f"{items['tokens/s']} tokens/s"] if "tokens/s" in items else []
        words += [f"{items['left']} left"] if "left" in items else []
        return ", ".join(words)

    def tell(self, event: BatchEnd) -> None:
        """At the end of a batch, log the line, unless the last one is still new; every rank calls it."""
        now = time.monotonic()
        if self._told_at is None or now - self._told_at >= EVERY_SECONDS:
            self._told_at = now
            rank_zero_info(f"Lighthouse: {self.line()}")


@contextmanager
def shown_progress(trainer: Trainer, items: Callable[[], dict[str, str]]) -> Iterator[bool]:
    """Add items to the Trainer's progress bar, inside; turn off one of Lightning's own that no terminal shows.

    Args:
        trainer: With or without a bar.
        items: By name.

    Returns:
        Whether lines are to be logged instead: not where the user wants no bar at all.
    """
    bar: Any = trainer.progress_bar_callback
    if bar is None:
        yield False
        return
    package = type(bar).__module__.split(".")[0]
    # what somebody made of one shows what it likes where it likes
    is_lightnings = type(bar).__name__ in BARS and package in ("lightning", "pytorch_lightning")
    logs_lines = is_lightnings and bar.is_enabled and not is_terminal(sys.stdout)
    get_metrics = bar.get_metrics

    def with_ours(*args: Any, **kwargs: Any) -> dict[str, Any]:
        theirs = get_metrics(*args, **kwargs)
        # Lightning's number of the run's folder takes the room, and says nothing of the training
        return {**items(), **{name: value for name, value in theirs.items() if name != "v_num"}}

    changed: dict[str, Any] = {"get_metrics": StandIn(get_metrics, with_ours)}
    if is_named(bar, BARS[0]):
        changed["init_train_tqdm"] = _without_estimate(bar.init_train_tqdm)
    elif is_named(bar, BARS[1]):
        columns = bar.configure_columns
        without = lambda of: [c for c in columns(of) if type(c).__name__ != RICH_ESTIMATE]  # noqa: E731
        changed["configure_columns"] = StandIn(columns, without)
    own = {name: value for name, value in vars(bar).items() if name in changed}
    vars(bar).update(changed)
    if logs_lines:
        bar.disable()
    try:
        yield logs_lines
    finally:
        for name, value in changed.items():
            if vars(bar).get(name) is value:
                del vars(bar)[name]
        vars(bar).update(own)
        if logs_lines:
            bar.enable()


def _without_estimate(make: Callable[[], Any]) -> Callable[[], Any]:
    def init_train_tqdm() -> Any:
        bar = make()
        bar.bar_format = TQDM_FORMAT
        return bar

    return StandIn(make, init_train_tqdm)
