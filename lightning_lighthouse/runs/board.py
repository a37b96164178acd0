"""What goes to a run's TensorBoard by others, seen on its way: the module's scalars, the evaluation's, Lightning's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from lightning_lighthouse.runs.layout import EPOCH, EPOCH_AT_THE_END
from lightning_lighthouse.runs.stand_in import StandIn

WRITE = "log_metrics"


@contextmanager
def watched_board(board: Any, note: Callable[[str, float], None]) -> Iterator[None]:
    """Note every scalar that is logged to a TensorBoardLogger, inside; `epoch` goes behind the groups of the curves.

    TensorBoard sorts by name, so that Lightning's `epoch` would be the first chart of all.

    Args:
        board: The logger.
        note: Given the name and the value of each.
    """
    write = getattr(board, WRITE)

    def log_metrics(metrics: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        renamed = {EPOCH_AT_THE_END if name == EPOCH else name: value for name, value in metrics.items()}
        write(renamed, *args, **kwargs)
        for name, value in renamed.items():
            if isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
                note(name, float(value))

    own = vars(board).get(WRITE)
    vars(board)[WRITE] = listener = StandIn(write, log_metrics)
    try:
        yield
    finally:
        # another one's wrapper around this is theirs
        if vars(board).get(WRITE) is listener:
            del vars(board)[WRITE]
            if own is not None:
                vars(board)[WRITE] = own
