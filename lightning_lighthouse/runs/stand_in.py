"""What stands for a method of an object while a fit runs, and in no copy of the object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class StandIn:
    """Stands for a method in an object's own `vars`; whoever copies or pickles the object gets the method.

    Args:
        method: As it was before.
        call: Is called in its place.
    """

    def __init__(self, method: Callable[..., Any], call: Callable[..., Any]) -> None:
        self._method, self._call = method, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What is called in the method's place."""
        return self._call(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self._method,)


def _itself(method: Any) -> Any:
    return method
