"""The process that watches ranks, beside a parent that never looks after its children."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="what it reads is Linux's")

# prints the children's process ids, and then what the test says
PARENT = """\
import os, subprocess, sys, time
from types import SimpleNamespace
from lightning_lighthouse.training.rank_watch import watched_ranks
endings = {endings}
quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
ranks = [subprocess.Popen([sys.executable, "-c", "import os, signal, time; " + ending], **quiet) for ending in endings]
ranks[0].wait()
print(*(rank.pid for rank in ranks), flush=True)
with watched_ranks(SimpleNamespace(procs=ranks)):
    {then}
"""
DIES, SUCCEEDS, RUNS = "os.kill(os.getpid(), signal.SIGKILL)", "pass", "time.sleep(60)"


def start(endings: list[str], then: str) -> tuple[subprocess.Popen, list[int]]:
    code = PARENT.format(endings=endings, then=then)
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert parent.stdout
    return parent, [int(pid) for pid in parent.stdout.readline().split()]


def is_running(process: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def watchers_of(parent: int) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_text().split("\0")
        except OSError:
            continue
        if str(parent) in words and any(word.endswith("watch.py") for word in words):
            found.append(process.parent.name)
    return found


@pytest.mark.slow
def test_a_rank_that_died_ends_the_others_and_the_parent():
    # the first is reaped: its number may be anybody's
    parent, ranks = start([SUCCEEDS, SUCCEEDS, DIES, RUNS], "time.sleep(60)")
    _, err = parent.communicate(timeout=50)
    assert parent.returncode == -9
    assert f"the rank with process id {ranks[2]} ended with -9" in err
    assert not is_running(ranks[3])
    assert not watchers_of(parent.pid)


@pytest.mark.slow
def test_ranks_that_end_well_end_nobody():
    parent, ranks = start([SUCCEEDS, SUCCEEDS, RUNS], "time.sleep(20)")
    _, err = parent.communicate(timeout=50)
    assert (parent.returncode, err) == (0, "")
    assert is_running(ranks[2])
    subprocess.run(["kill", str(ranks[2])], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["pass", "os._exit(3)", "os.kill(os.getpid(), 9)"])
def test_the_watcher_ends_with_its_parent(end):
    parent, _ = start([SUCCEEDS], end)
    parent.communicate(timeout=50)
    deadline = time.monotonic() + 20
    while watchers_of(parent.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not watchers_of(parent.pid)
