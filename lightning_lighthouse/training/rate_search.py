"""Lightning's LearningRateFinder and BatchSizeFinder beside the callback: they try what the training begins with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lightning_lighthouse.checks import is_named

# Finders, and what each searches with
SEARCHES = (("LearningRateFinder", "lr_find"), ("BatchSizeFinder", "scale_batch_size"))


@contextmanager
def routed_searches(callbacks: list[Any], trial: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Let every finder among `callbacks` search inside `trial`.

    Lightning takes all callbacks out of the Trainer while it searches, so that no hook of ours is called then, and the
    rate and the memory would be those of dense attention, which goes across documents.

    Args:
        callbacks: The Trainer's, before any of them begins.
        trial: Entered around each search.
    """
    finders = [(callback, method) for callback in callbacks for kind, method in SEARCHES if is_named(callback, kind)]
    for finder, method in finders:
        finder.__dict__[method] = _inside(trial, getattr(finder, method))
    try:
        yield
    finally:
        for finder, method in finders:
            del finder.__dict__[method]


def _inside(trial: Callable[[], AbstractContextManager[None]], search: Callable[..., None]) -> Callable[..., None]:
    def find(*args: Any, **kwargs: Any) -> None:
        with trial():
            search(*args, **kwargs)

    return find
