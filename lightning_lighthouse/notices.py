"""What the user is told: a line once a process, also from traced code; less of Lightning's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch

from lightning_lighthouse.checks import warn

logger = logging.getLogger("lightning_lighthouse")

_given: set[str] = set()
# of the fits that have not begun, the innermost last
_held: list[list[str]] = []


@torch.compiler.assume_constant_result
def notice_once(key: str, message: str) -> None:
    """Warn of `message` unless this process did so under `key`. While compiling it runs at trace time."""
    if key not in _given:
        _given.add(key)
        warn(message, stacklevel=2)


@torch.compiler.assume_constant_result
def log_once(key: str, message: str) -> None:
    """Log `message` at level INFO unless this process logged one under `key`. While compiling it runs at trace time."""
    if key not in _given:
        _given.add(key)
        say(message)


def say(message: str) -> None:
    """Log `message` at level INFO, or keep it for the line that is to come."""
    if _held:
        _held[-1].append(message)
    else:
        logger.info(message)


@contextmanager
def held_notices() -> Iterator[Callable[[], list[str]]]:
    """Keep back what is to be said at level INFO until the function that is given is called, and hands it out.

    So a training begins with one line. What was not asked for is logged at the end.
    """
    lines: list[str] = []
    _held.append(lines)

    def release() -> list[str]:
        # by identity: another fit may hold as many lines
        _held[:] = [held for held in _held if held is not lines]
        said, lines[:] = lines[:], []
        return said

    try:
        yield release
    finally:
        for line in release():
            logger.info(line)


class _Forwarder(logging.Handler):
    """Hands records to Lightning's logger, which shows them; those below WARNING on rank 0 alone."""

    def emit(self, record: logging.LogRecord) -> None:
        """Hand on `record`."""
        # Lightning takes seconds to import, and attention alone does not need it
        from lightning.pytorch.utilities import rank_zero_only

        if record.levelno >= logging.WARNING or getattr(rank_zero_only, "rank", 0) == 0:
            line = f"Lighthouse: {record.getMessage().removeprefix('Lighthouse: ')}"
            record = logging.makeLogRecord(vars(record) | {"msg": line, "args": None})
            logging.getLogger("lightning.pytorch").handle(record)


@contextmanager
def shown_notices() -> Iterator[None]:
    """Show what is logged at level INFO, as Lightning shows its own lines, unless the user has set a level."""
    if logger.level != logging.NOTSET:
        yield
        return
    handler = _Forwarder()
    logger.setLevel(logging.INFO)
    # a handler of the user's gets the records by itself
    if not logger.hasHandlers():
        logger.addHandler(handler)
    try:
        yield
    finally:
        logger.setLevel(logging.NOTSET)
        logger.removeHandler(handler)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Without what Lightning says below the level WARNING; its level returns at the end."""
    with ExitStack() as levels:
        for name in ("lightning.pytorch", "lightning.fabric"):
            lightning = logging.getLogger(name)
            levels.callback(lightning.setLevel, lightning.level)
            lightning.setLevel(logging.WARNING)
        yield
