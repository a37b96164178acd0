"""A signal that every process of a run gets ends it behind a step, saved, with the status that a shell shows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from places import HELPERS, ROOT
from resuming import RANKS, batches_done, copy, last, steps, still_left_over

STATUS = {"SIGTERM": 143, "SIGINT": 130}
# before the first validation, which comes behind batch 2, and in the second
MOMENTS = {"a step": (1, "backward", 2), "a validation": (5, "validation batch", 6)}

pytestmark = pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN, reason="started where SIGINT is ignored, as nohup and & do"
)


def check_stopped(folder, status, err, kind, done):
    assert status == STATUS[kind], err
    assert "Traceback" not in err
    assert "exited unexpectedly" not in err
    path = last(folder).relative_to(folder)
    assert f"Lighthouse: stopped at step {done}; go on with --ckpt_path {path}\n" in err
    assert (batches_done(last(folder)), len(steps(folder))) == (done, done)
    assert not still_left_over(folder)


def check_resumed(server, folder, unbroken, *flags):
    status, err = server.run(folder, "--ckpt_path", "last", *flags)
    assert status == 0, err
    for rank, whole in enumerate(unbroken):
        lines = steps(folder, rank)
        assert lines == [whole[line["batch"]] for line in lines]
        assert len(lines) == len(whole)


CASES = [
    ("SIGTERM", 0, "a step"),
    ("SIGTERM", 4, "a validation"),
    ("SIGINT", 4, "a step"),
    ("SIGINT", 0, "a validation"),
]


@pytest.mark.parametrize(
    ("kind", "workers", "moment"),
    [("SIGTERM", 1, "a step"), *CASES],
)
@pytest.mark.slow
def test_a_signal_for_all_processes_saves_the_step(kind, workers, moment, server, prepared, unbroken, tmp_path):
    folder = copy(prepared, tmp_path / "run")
    batch, hook, done = MOMENTS[moment]
    flags = ["--data.num_workers", str(workers)]
    fault = {"kind": kind, "batch": batch, "hook": hook, "ranks": [0], "group": True}
    status, err = server.run(folder, *flags, fault=fault)
    check_stopped(folder, status, err, kind, done)
    check_resumed(server, folder, unbroken(*flags), *flags)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "moment"), [("SIGTERM", "a step"), ("SIGINT", "a validation")])
def test_so_does_one_for_two_ranks(kind, moment, server, prepared, unbroken, tmp_path):
    folder = copy(prepared, tmp_path / "run")
    batch, hook, done = MOMENTS[moment]
    fault = {"kind": kind, "batch": batch, "hook": hook, "ranks": [1], "group": True}
    status, err = server.run(folder, *RANKS, fault=fault)
    check_stopped(folder, status, err, kind, done)
    check_resumed(server, folder, unbroken(*RANKS, ranks=2), *RANKS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", STATUS)
def test_so_does_one_for_torchrun(kind, prepared, tmp_path):
    folder = copy(prepared, tmp_path / "run")
    environment = os.environ | {"PYTHONPATH": f"{HELPERS}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [str(HELPERS / "rank_statuses.py"), "fit", "-c", "recipe.yaml", "--trainer.max_steps", "5000"]
    with open(folder / "err", "w") as err:
        run = subprocess.Popen(
            [*torchrun, *command, *RANKS], cwd=folder, env=environment, stderr=err, start_new_session=True
        )
    while not (folder / "steps-0.jsonl").exists() or len(steps(folder)) < 4:
        assert run.poll() is None, (folder / "err").read_text()
        time.sleep(0.05)
    os.killpg(run.pid, getattr(signal, kind))
    run.wait(60)
    assert [(folder / f"status-{rank}").read_text() for rank in (0, 1)] == [str(STATUS[kind])] * 2
    done = len(steps(folder))
    # torchrun itself says where the signal reached it, and its status is its own
    assert f"stopped at step {done}; go on with" in (folder / "err").read_text()
    assert len(steps(folder, rank=1)) == batches_done(last(folder)) == done
    assert not still_left_over(folder)


def test_a_second_ctrl_c_stops_at_once(server, prepared, tmp_path):
    folder = copy(prepared, tmp_path / "run")
    fault = {"kind": "Ctrl-C twice", "batch": 5, "hook": "backward", "ranks": [0]}
    began = time.monotonic()
    status, err = server.run(folder, fault=fault)
    assert (status, "Traceback" in err) == (130, False), err
    assert time.monotonic() - began < 30
    assert err.count("Ctrl-C again stops at once") == 1
    # the save of step 4
    assert batches_done(last(folder)) == 4
    assert not still_left_over(folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", STATUS)
def test_a_script_of_ones_own_ends_with_the_status_too(kind, tmp_path):
    environment = os.environ | {"PYTHONPATH": f"{HELPERS}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(HELPERS / "stopped_script.py"), kind]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (STATUS[kind], False), done.stderr
    assert "stopped at step 4; go on with --ckpt_path " in done.stderr
    assert (tmp_path / "saved" / "last.ckpt").exists()
