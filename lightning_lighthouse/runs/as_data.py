"""Files of others read as data: nothing that is planted in them runs, and what is broken is a line that names it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch


def load_as_data(path: Path) -> Any:
    """What a file of `torch.save` holds, on the CPU; the tensors stay on the disk until they are used.

    Args:
        path: Of the file.

    Raises:
        UnpicklingError: It holds more than tensors and plain values.
        ValueError: It cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise
    # whatever torch raises on the archives of others, none of which names the file
    except Exception as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: BaseException) -> ValueError:
    """The error that names a file, or a folder, that could not be read."""
    return ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:200] or type(error).__name__}")
