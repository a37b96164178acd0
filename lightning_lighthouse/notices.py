"""One line to the user, once a process, from code that may be traced by torch.compile."""

from __future__ import annotations

import logging

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
