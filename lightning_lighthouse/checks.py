"""What every room refuses with: the checks of one value, and the errors of settings.

Imports nothing of ours, and no torch.
"""

from __future__ import annotations

from typing import Any, get_args


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise TypeError or ValueError, quoting `value`, if it is not of the annotated type or one of its literals."""
    options = get_args(hint)
    if options and all(isinstance(option, str) for option in options):
        if value not in options:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {value!r}")
        return
    allowed = options or (hint,)
    # bool is an int to Python, never to a reader of a recipe
    if type(value) not in allowed:
        names = " or ".join("None" if option is type(None) else option.__name__ for option in allowed)
        raise TypeError(f"{name} must be {names}, got {value!r}")


class SettingError(ValueError):
    """A setting that only the running Trainer can show to be wrong."""


def check_count(name: str, value: int) -> int:
    """Return `value` if it is a number of steps.

    Raises:
        TypeError: Not an int.
        ValueError: Below 0.
    """
    check_type(name, value, int)
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return value


class ResumeError(ValueError):
    """The settings contradict what the resumed run has done."""
