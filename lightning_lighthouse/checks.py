"""What every room refuses or warns with: the checks of one value, the errors of settings, the category of warnings.

Imports nothing of ours, and no torch.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, get_args

# How the checkpoints begin that Lightning's finders of batch sizes and rates write for themselves
FINDERS = (".scale_batch_size_", ".lr_find_")


def check_type(name: str, value: Any, hint: Any) -> None:
    """Raise TypeError or ValueError, quoting `value`, if it is not of the annotated type or one of its literals."""
    options = get_args(hint)
    if options and all(isinstance(option, str) for option in options):
        if value not in options:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, options))}, got {quoted(value)}")
        return
    allowed = options or (hint,)
    # bool is an int to Python, never to a reader of a recipe
    if type(value) not in allowed:
        names = " or ".join("None" if option is type(None) else option.__name__ for option in allowed)
        raise TypeError(f"{name} must be {names}, got {quoted(value)}")


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


def shown(value: Any, length: int = 120) -> str:
    """A value as a message quotes it: text as it is, all else as Python writes it, cut where it is long.

    Args:
        value: From a file or a user, of any size.
        length: Characters that are kept.
    """
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= length else f"{text[:length]}... ({len(text):,} characters)"


def quoted(value: Any) -> str:
    """A value as Python writes it, cut where it is long."""
    return shown(repr(value))


class ResumeError(ValueError):
    """The settings contradict what the resumed run has done."""


def is_of_finder(ckpt_path: Any) -> bool:
    """Whether a Trainer's `ckpt_path` is what a finder of Lightning's puts back behind its trials, and no resume."""
    return Path(str(ckpt_path or "")).name.startswith(FINDERS)


def is_named(value: Any, name: str) -> bool:
    """Whether `value` is of a class of that name, or of one that inherits from it.

    `lightning.pytorch` and `pytorch_lightning` have the same classes twice, and `isinstance` knows one of them.
    """
    return any(base.__name__ == name for base in type(value).__mro__)


class LighthouseWarning(UserWarning):
    """The category of all warnings of this package, so that they can be filtered.

    warnings.filterwarnings("ignore", category=LighthouseWarning)
    """


def warn(message: str, stacklevel: int = 1) -> None:
    """Warn of something in the category LighthouseWarning, as said by the caller, or by whom called that."""
    warnings.warn(message, LighthouseWarning, stacklevel=stacklevel + 1)
