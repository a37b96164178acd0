"""A worker that hangs where it is forked is forked again; one that is shielded outlives its group's signals."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from lightning_lighthouse.data import workers
from lightning_lighthouse.data.workers import PatientForkContext, shield_workers, worker_context

# how many of the children forked next hang before they run any Python of multiprocessing's
_stuck = multiprocessing.Value("i", 0)


def _hang_now_and_then() -> None:
    with _stuck.get_lock():
        hangs = _stuck.value > 0
        _stuck.value -= hangs
    while hangs:
        time.sleep(60)


os.register_at_fork(after_in_child=_hang_now_and_then)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "SECONDS_TO_BEGIN", 0.3)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def children() -> list[str]:
    return Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()


@pytest.mark.parametrize("stuck", [0, 1, 3])
def test_a_child_that_does_not_begin_is_forked_again(impatient: None, stuck: int) -> None:
    context = PatientForkContext()
    queue = context.SimpleQueue()
    before, files = children(), open_files()
    _stuck.value = stuck
    process = context.Process(target=queue.put, args=(7,))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert queue.get() == 7
    process.close()
    # nothing that hung is left, and no pipe of its
    assert children() == before
    assert open_files() == files


def test_a_child_that_never_begins_is_an_error(impatient: None) -> None:
    before = children()
    _stuck.value = workers.ATTEMPTS
    with pytest.raises(RuntimeError, match=r"did not begin within .* update Python to 3\.11\.10"):
        PatientForkContext().Process(target=print).start()
    assert _stuck.value == 0
    assert children() == before


def test_a_pool_of_such_processes_works(impatient: None) -> None:
    _stuck.value = 1
    with ProcessPoolExecutor(2, mp_context=PatientForkContext()) as executor:
        assert list(executor.map(abs, range(-5, 0))) == [5, 4, 3, 2, 1]
    assert _stuck.value == 0


@pytest.mark.parametrize(
    ("version", "method", "is_patient"),
    [
        ((3, 11, 9), "fork", True),
        ((3, 11, 10), "fork", False),
        ((3, 12, 0), "fork", False),
        ((3, 11, 9), "spawn", False),
    ],
)
def test_only_where_fork_may_hang(
    monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int], method: str, is_patient: bool
) -> None:
    monkeypatch.setattr(workers.sys, "version_info", version)
    monkeypatch.setattr(workers.multiprocessing, "get_start_method", lambda: method)
    assert isinstance(worker_context(), PatientForkContext) == is_patient


class Owner:
    """Whose life is that of a shield."""


def sleeping() -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
    process.start()
    return process


def is_shielded(process: multiprocessing.Process) -> bool:
    """Whether it has both signals blocked, within seconds."""
    wanted = 1 << (signal.SIGINT - 1) | 1 << (signal.SIGTERM - 1)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        status = Path(f"/proc/{process.pid}/status").read_text()
        blocked = int(status.partition("SigBlk:")[2].split()[0], 16)
        if blocked & wanted == wanted:
            return True
        time.sleep(0.01)
    return False


def test_a_shielded_worker_ends_by_its_parent_alone() -> None:
    owner = Owner()
    shield_workers(owner)
    process = sleeping()
    assert is_shielded(process)
    for name in ("INT", "TERM"):
        # by a process that is not its parent
        subprocess.run(["/bin/sh", "-c", f"kill -{name} {process.pid}"], check=True)
    process.join(1.5)
    assert process.is_alive()
    process.terminate()
    process.join(10)
    assert process.exitcode == 0


ABANDONED = """\
import multiprocessing, os, signal, time
from lightning_lighthouse.data.workers import shield_workers
class Owner: pass
owner = Owner()
shield_workers(owner)
del owner
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
worker.start()
os.system(f"kill -TERM {worker.pid}")
worker.join(20)
print(worker.exitcode)
"""


def test_without_the_owner_workers_are_as_ever() -> None:
    # in a process of its own: what ran before in this one may still own a shield
    done = subprocess.run([sys.executable, "-c", ABANDONED], stdout=subprocess.PIPE, text=True, check=True)
    assert int(done.stdout) == -signal.SIGTERM


ORPHAN = """\
import multiprocessing, os, time
from lightning_lighthouse.data.workers import shield_workers
shield_workers(multiprocessing.current_process())
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
worker.start()
print(worker.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def test_a_shielded_worker_ends_soon_after_its_parent() -> None:
    done = subprocess.run([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True, check=False)
    worker = Path(f"/proc/{int(done.stdout)}/stat")
    deadline = time.monotonic() + 10
    while worker.exists() and ") Z" not in worker.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not worker.exists() or ") Z" in worker.read_text()
