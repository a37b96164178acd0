"""What this package warns of."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from lightning_lighthouse import LighthouseWarning


@contextmanager
def own_warnings() -> Iterator[list[str]]:
    """The texts of the warnings given inside, filled at the end, each as often as it was given; others are dropped."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(warning.message) for warning in caught if issubclass(warning.category, LighthouseWarning)]
