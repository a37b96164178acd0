"""Lightning's LearningRateFinder and BatchSizeFinder beside the callback: they attend as the training will."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

from lightning_lighthouse.checks import is_named
from lightning_lighthouse.runs.stand_in import StandIn

# Finders, what each searches with, and whether in the dense phase: a rate is that of the beginning, but the batch must
# fit into memory to the end, and dense attention keeps the most
SEARCHES = (("LearningRateFinder", "lr_find", False), ("BatchSizeFinder", "scale_batch_size", True))


@contextmanager
def routed_searches(callbacks: list[Any], trial: Callable[[bool], AbstractContextManager[None]]) -> Iterator[None]:
    """Let every finder among `callbacks` search inside `trial`.

    Lightning takes all callbacks out of the Trainer while it searches, so that no hook of ours is called then, and all
    that is tried would be dense attention that goes across documents.

    Args:
        callbacks: The Trainer's, before any of them begins.
        trial: Entered around each search; told whether it is one in the dense phase, not in the first.
    """
    finders = [(callback, *search) for callback in callbacks for kind, *search in SEARCHES if is_named(callback, kind)]
    for finder, method, is_dense in finders:
        finder.__dict__[method] = _inside(partial(trial, is_dense), getattr(finder, method))
    try:
        yield
    finally:
        for finder, method, _ in finders:
            del finder.__dict__[method]


def _inside(trial: Callable[[], AbstractContextManager[None]], search: Callable[..., None]) -> Callable[..., None]:
    def find(*args: Any, **kwargs: Any) -> None:
        with trial():
            search(*args, **kwargs)

    return StandIn(search, find)
