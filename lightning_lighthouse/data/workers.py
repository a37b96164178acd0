"""Worker processes that are sure to begin, and that end when their parent says so.

Schedulers, `timeout` and a terminal's Ctrl-C send a signal to every process of a run, and the workers would be gone
before the step that the run finishes: `shield_workers` leaves the signal to the parent.

Before Python 3.11.10 a forked process may wait for ever: if another thread held the lock over Python's list of threads
at that moment, the child takes it a second time (python/cpython#112275). The threads of a process group do so now and
then, so that a run on several ranks would hang, without a word, where its loaders start workers. There a child that
does not begin is killed and forked again. To be removed with support for Python 3.11.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import wait
from multiprocessing.context import BaseContext, ForkContext, ForkProcess
from multiprocessing.popen_fork import Popen
from multiprocessing.util import register_after_fork
from typing import Any

from lightning_lighthouse.checks import warn

FIRST_SOUND_PYTHON = (3, 11, 10)
# Patience with one child: far more than a busy machine takes to let it begin, which is all it has to do.
SECONDS_TO_BEGIN = 20.0
ATTEMPTS = 5
# How long a worker may outlive its parent.
SECONDS_ALONE = 1.0

_shielded: int | None = None


def shield_workers(owner: object) -> None:
    """Shield all workers that are forked from this process while `owner` lives, whoever starts them."""
    register_after_fork(owner, shield_from_group)


def shield_from_group(_: Any = None) -> None:
    """In a worker: leave SIGINT and SIGTERM to the parent, end where that sends SIGTERM, and soon after its end.

    It is also a `worker_init_fn`, for workers that are not forked. Where the system cannot say who sent a signal, as on
    macOS, nothing changes.
    """
    global _shielded
    process, parent = multiprocessing.current_process(), multiprocessing.parent_process()
    # one that is no daemon is not ended by its parent; it may be anything
    if _shielded == os.getpid() or parent is None or not process.daemon or not hasattr(signal, "sigtimedwait"):
        return
    _shielded = os.getpid()
    leave_signals_to(parent.pid)


def leave_signals_to(parent: int | None) -> None:
    """In a worker: hear of SIGINT and SIGTERM no more, but end where `parent`, a process id, sends SIGTERM or ends.

    Where the system cannot say who sent a signal, as on macOS, nothing changes.
    """
    if not hasattr(signal, "sigtimedwait"):
        return
    # torch sets a handler after this: it never hears of a signal that is blocked
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    threading.Thread(target=_end_with, args=(parent,), name="end-with-parent", daemon=True).start()


def _end_with(parent: int | None) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGINT, signal.SIGTERM}, SECONDS_ALONE)
        if received is not None and received.si_signo == signal.SIGTERM and received.si_pid == parent:
            break
    # as torch's own handler does, so that its parent takes it for no fault
    os._exit(0)


def worker_context() -> BaseContext | None:
    """How workers are to be started, as `multiprocessing_context`; None: in the ordinary way."""
    is_sound = sys.version_info >= FIRST_SOUND_PYTHON or multiprocessing.get_start_method() != "fork"
    return None if is_sound else PatientForkContext()


class _Announced:
    """A process that says that it runs, before it does anything else."""

    def __init__(self, process: Any, pipe: int) -> None:
        self._process = process
        self._pipe = pipe

    def _bootstrap(self, *args: Any, **kwargs: Any) -> int:
        os.close(self._pipe)
        code: int = self._process._bootstrap(*args, **kwargs)
        return code


class PatientPopen(Popen):
    """A fork that is made again if the child does not begin."""

    pid: int
    finalizer: Any

    def _launch(self, process_obj: Any) -> None:
        for _ in range(ATTEMPTS):
            begun, pipe = os.pipe()
            # typeshed does not know it
            super()._launch(_Announced(process_obj, pipe))  # type: ignore[misc]
            os.close(pipe)
            # the child's end is closed once it runs, and also if it dies
            has_begun = bool(wait([begun], SECONDS_TO_BEGIN))
            os.close(begun)
            if has_begun:
                return
            warn(f"worker process {self.pid} did not begin within {SECONDS_TO_BEGIN:g} s; starting another")
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.finalizer()
        raise RuntimeError(
            f"a worker process did not begin within {SECONDS_TO_BEGIN:g} s, {ATTEMPTS} times: update Python to "
            f"{'.'.join(map(str, FIRST_SOUND_PYTHON))} or newer, or set num_workers to 0"
        )


class PatientForkProcess(ForkProcess):
    """A process started by `PatientPopen`."""

    @staticmethod
    def _Popen(process_obj: Any) -> PatientPopen:  # noqa: N802, the name that multiprocessing calls
        return PatientPopen(process_obj)


class PatientForkContext(ForkContext):
    """multiprocessing's "fork", with processes that are sure to begin."""

    Process = PatientForkProcess
