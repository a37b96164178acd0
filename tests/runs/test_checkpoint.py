"""What else can strike a run: a kill inside a save, a full disk, planted code, NaN, settings that contradict."""

from __future__ import annotations

import re
import signal

import pytest
import torch
from resume_callbacks import Planted
from resuming import RANKS, batches_done, copy, last, steps


@pytest.mark.slow
@pytest.mark.parametrize("how", ["kill in the file", "kill before the rename"])
def test_a_kill_inside_a_save_leaves_the_file_of_before(how, server, prepared, tmp_path):
    folder = copy(prepared, tmp_path / "run")
    status, _ = server.run(folder, fault={"kind": how, "batch": 4, "hook": "", "ranks": []})
    assert status == -signal.SIGKILL
    assert batches_done(last(folder)) == 4
    names = {path.name for path in last(folder).parent.iterdir()}
    assert names <= {"best.ckpt", "last.ckpt", "best.ckpt.partial", "last.ckpt.partial"}
    status, err = server.run(folder, "--ckpt_path", "last", "--trainer.max_steps", "9")
    assert status == 0, err
    assert batches_done(last(folder)) == 9


@pytest.mark.slow
def test_a_full_disk_stops_the_run_with_the_size_that_is_needed(server, prepared, tmp_path):
    folder = copy(prepared, tmp_path / "run")
    status, err = server.run(folder, fault={"kind": "disk full", "batch": 4, "hook": "", "ranks": []})
    assert status == 1
    assert "Traceback" not in err
    assert re.search(
        r"^lighthouse: runs/recipe/version_0/checkpoints/\w+\.ckpt could not be written: File too large \([\d,]+ bytes "
        r"are needed, [\d,]+ are free in .*\); the file of before is kept$",
        err,
        re.MULTILINE,
    ), err
    assert batches_done(last(folder)) == 4
    assert not list(folder.rglob("*.partial"))


@pytest.mark.parametrize("command", [pytest.param("fit", marks=pytest.mark.slow), "validate"])
def test_code_planted_in_a_checkpoint_never_runs(command, server, prepared, tmp_path, monkeypatch):
    folder = copy(prepared, tmp_path / "run")
    torch.save({"state_dict": {}, "planted": Planted()}, folder / "planted.ckpt")
    flags = ["--ckpt_path", "planted.ckpt"]
    status, err = server.run(folder, *flags, command=command, environment={"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"})
    assert status == 1
    line = next(line for line in err.splitlines() if line.startswith("lighthouse: "))
    assert line == (
        "lighthouse: checkpoint planted.ckpt holds more than tensors and plain values (posix.mkdir): loading it could "
        "run code, and is refused; no setting allows it"
    )
    assert not (folder / "planted").exists()
    # as code it would have run
    monkeypatch.chdir(folder)
    torch.load("planted.ckpt", weights_only=False)
    assert (folder / "planted").exists()


def test_a_nan_stops_the_run_with_one_line_and_saves_nothing(server, prepared, tmp_path):
    folder = copy(prepared, tmp_path / "run")
    status, err = server.run(folder, fault={"kind": "nan", "batch": 11, "hook": "start", "ranks": [0]})
    assert status == 1
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("lighthouse: ")]
    assert (
        "the loss is nan at step 11, dense phase, rank 0 of 1: first in the output of blocks.1.attention.qkv;" in line
    )
    # the save of step 10
    assert batches_done(last(folder)) == 10
    assert not list(folder.rglob("final.pt"))


@pytest.mark.slow
def test_a_nan_on_one_rank_is_one_line_of_both(server, prepared, tmp_path):
    folder = copy(prepared, tmp_path / "run")
    status, err = server.run(folder, *RANKS, fault={"kind": "nan", "batch": 5, "hook": "start", "ranks": [1]})
    assert status == 1
    assert "Traceback" not in err
    (line,) = [line for line in err.splitlines() if line.startswith("lighthouse: ")]
    assert "at step 5, lighthouse phase, rank 1 of 2: first in the output of blocks.1.attention.qkv;" in line
    assert batches_done(last(folder)) == 4


def test_saving_on_exceptions_is_refused(server, prepared, tmp_path):
    folder = copy(prepared, tmp_path / "run")
    status, err = server.run(folder, "--checkpoint.save_on_exception", "true")
    assert status == 2
    assert err.startswith("lighthouse: checkpoint.save_on_exception must be false, got True: after an exception")


CHANGES = {
    "seed": (["--data.source", "data", "--data.seed", "7"], "seed is 7, the checkpoint was written with 42"),
    "sequence length": (["--data.seq_len", "32", "--data.output_dir", "other"], "is not the data of the checkpoint"),
    "switch passed": (["--lighthouse.switch_at", "15"], "switch_at was changed from 9 to 15"),
}


@pytest.mark.slow
def test_what_a_checkpoint_contradicts_is_refused_before_the_first_step(server, prepared, tmp_path):
    folder = copy(prepared, tmp_path / "run")
    assert server.run(folder, "--trainer.max_steps", "12")[0] == 0
    before = last(folder).read_bytes()
    for flags, words in CHANGES.values():
        done = len(steps(folder))
        status, err = server.run(folder, "--ckpt_path", "last", *flags)
        assert (status, "Traceback" in err) == (1, False), err
        (line,) = [line for line in err.splitlines() if line.startswith("lighthouse: ")]
        assert words in line
        assert len(steps(folder)) == done
        assert last(folder).read_bytes() == before
