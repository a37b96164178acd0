"""SIGTERM and Ctrl-C while data is prepared: the work ends at once, what was begun is removed, one line says so.

A handler raises only inside `StopWish.at_once`, and there not inside an import. Elsewhere, as while a finished folder
takes its place, the wish is noted and granted behind it.
"""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# `timeout` and some shells send a signal to a process and then to its group: both are one wish.
SECONDS_OF_ONE_WISH = 0.1
# From one look at whether an import has ended to the next
SECONDS_OF_A_LOOK = 0.02
# Of the frames of an import
IMPORTING = "<frozen importlib._bootstrap>"
# The handlers that Python begins with; a script's own, or an ignored signal under nohup, stay
REPLACED = (signal.SIG_DFL, signal.default_int_handler)


class _Stop(BaseException):
    """The wish to stop, granted."""


class StopWish:
    """The signals that this process has received while it prepares."""

    def __init__(self) -> None:
        # 0 for none; of two the higher number
        self.received = 0
        self._interrupted_at = 0.0
        self._raises = False
        # of the work that a signal may break off
        self._frame: FrameType | None = None
        self._reminder: threading.Timer | None = None
        self._is_reminded = False
        self._process = os.getpid()

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Work that a signal may break off anywhere."""
        self._raises = True
        # that of the with statement, behind its own and the decorator's
        self._frame = sys._getframe(2)
        try:
            if self.received:
                raise _Stop
            yield
            # a library may have swallowed what the handler raised
            if self.received:
                raise _Stop
        finally:
            self._raises, self._frame = False, None
            if self._reminder is not None:
                self._reminder.cancel()

    def note(self, signum: int, frame: FrameType | None) -> None:
        """The handler."""
        # a forked process has it until it sets its own
        if os.getpid() != self._process:
            return
        is_due = self._is_reminded or not self.received
        if self._is_reminded:
            self._is_reminded = False
        else:
            self.received = max(self.received, signum)
            if signum == signal.SIGINT:
                now = time.monotonic()
                if self._interrupted_at and now - self._interrupted_at > SECONDS_OF_ONE_WISH:
                    raise KeyboardInterrupt
                self._interrupted_at = now
        if is_due and self._raises:
            # a library of C++ that calls Python while it is imported may not survive what is raised there
            if self._is_importing(frame):
                self._reminder = threading.Timer(SECONDS_OF_A_LOOK, self._remind, (signal.Signals(signum),))
                self._reminder.daemon = True
                self._reminder.start()
            else:
                raise _Stop

    def _remind(self, signum: signal.Signals) -> None:
        """Let the main thread run the handler again."""
        self._is_reminded = True
        _thread.interrupt_main(signum)

    def _is_importing(self, frame: FrameType | None) -> bool:
        """Whether an import that the work has begun goes on."""
        while frame is not None and frame is not self._frame:
            if frame.f_code.co_filename == IMPORTING:
                return True
            frame = frame.f_back
        return False


@contextmanager
def stop_on_signals(line: Callable[[], str]) -> Iterator[StopWish]:
    """Turn SIGTERM and SIGINT into a SystemExit of 143 or 130 behind the work inside; a second Ctrl-C is immediate.

    Where the script has handlers of its own, or this is not the main thread, nothing changes.

    Args:
        line: What to tell the user on stderr.

    Yields:
        The wish, whose `at_once` marks the work that may be broken off.
    """
    wish = StopWish()
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGTERM, signal.SIGINT):
                if (handler := signal.getsignal(signum)) in REPLACED:
                    before[signum] = handler
                    signal.signal(signum, wish.note)
        yield wish
    except _Stop:
        pass
    finally:
        for replaced, handler in before.items():
            signal.signal(replaced, handler)
    if wish.received:
        print(f"Lighthouse: stopped {line()}", file=sys.stderr)
        raise SystemExit(128 + wish.received)
