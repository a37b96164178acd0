"""Lightning's LearningRateFinder beside the callback: its trials attend as the training that follows begins."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any


@contextmanager
def routed_searches(callbacks: list[Any], trial: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Let every LearningRateFinder among `callbacks` search inside `trial`.

    Lightning takes all callbacks out of the Trainer while it searches, so that no hook of ours is called then, and the
    rate would be that of dense attention.

    Args:
        callbacks: The Trainer's, before any of them begins.
        trial: Entered around each search.
    """
    finders = [callback for callback in callbacks if _is_finder(callback)]
    for finder in finders:
        finder.__dict__["lr_find"] = _inside(trial, finder.lr_find)
    try:
        yield
    finally:
        for finder in finders:
            del finder.__dict__["lr_find"]


def _is_finder(callback: Any) -> bool:
    # pytorch_lightning has one of its own
    return any(kind.__name__ == "LearningRateFinder" for kind in type(callback).__mro__)


def _inside(trial: Callable[[], AbstractContextManager[None]], search: Callable[..., None]) -> Callable[..., None]:
    def lr_find(*args: Any, **kwargs: Any) -> None:
        with trial():
            search(*args, **kwargs)

    return lr_find
