"""What the user is told: a line once a process, also from traced code; and less of what Lightning says."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

logger = logging.getLogger("lightning_lighthouse")

_given: set[str] = set()


@torch.compiler.assume_constant_result
def notice_once(key: str, message: str) -> None:
    """Log `message` as a warning unless this process logged one under `key`. While compiling it runs at trace time."""
    if key not in _given:
        _given.add(key)
        logger.warning(message)


@torch.compiler.assume_constant_result
def log_once(key: str, message: str) -> None:
    """Log `message` at level INFO unless this process logged one under `key`. While compiling it runs at trace time."""
    if key not in _given:
        _given.add(key)
        logger.info(message)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without what Lightning says below the level WARNING; its level returns at the end."""
    with ExitStack() as levels:
        for name in ("lightning.pytorch", "lightning.fabric"):
            lightning = logging.getLogger(name)
            levels.callback(lightning.setLevel, lightning.level)
            lightning.setLevel(logging.WARNING)
        yield
