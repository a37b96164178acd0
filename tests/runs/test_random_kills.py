"""A run that is killed at random moments, while it writes files too, ends as one that nothing broke, bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time

import pytest
import torch
from resuming import copy, steps, still_left_over

KILLS = 30
# what a run writes, with how often it does; a prepared chunk and the folder's manifest come before the training
FILES = {
    "chunk-0-0.bin": 2,
    "index.json": 2,
    "manifest.json": 1,
    "last.ckpt": 12,
    "best.ckpt": 6,
    "config.yaml": 1,
    "lighthouse.json": 2,
    "final.pt": 2,
}


def draw_kill(draw, longest):
    """One kill in three at any moment, the others around a write."""
    if draw.random() < 1 / 3:
        return {"after": draw.uniform(0, longest)}
    name = draw.choice(list(FILES))
    count = draw.randint(1, FILES[name])
    return {"kind": "kill while writing", "file": name, "count": count, "delay": draw.choice([0, 0, 0.0005, 0.003])}


def run_until_killed(server, folder, kill):
    """Whether the run was killed, and did not end before. {} kills nothing."""
    run = server.start(folder, "--ckpt_path", "auto", fault=kill)
    if "after" in kill:
        time.sleep(kill["after"])
        # it may not have come so far as to have a group of its own
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run, signal.SIGKILL)
    status, err = server.end(), (folder / "err").read_text()
    assert status in (0, -signal.SIGKILL if kill else 0), err
    assert "Traceback" not in err
    return status != 0


def check_same(folder, whole, context):
    lines = {line["batch"]: line for line in steps(whole)}
    seen = steps(folder)
    assert seen == [lines[line["batch"]] for line in seen], context
    assert {line["batch"] for line in seen} == set(lines), context
    weights = [torch.load(next(run.rglob("final.pt")), weights_only=True) for run in (folder, whole)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items()), context
    reports = [json.loads(next(run.rglob("lighthouse.json")).read_text()) for run in (folder, whole)]
    for key in ("steps", "total_steps", "switch", "settings"):
        assert reports[0][key] == reports[1][key], context
    losses = [{v["step"]: v["loss"] for v in report["validations"]} for report in reports]
    # a validation that a kill has cut short may be left out
    assert losses[0].items() <= losses[1].items(), context


@pytest.mark.slow
@pytest.mark.parametrize("seed", [int(seed) for seed in os.environ.get("RESUME_SEEDS", "0").split()])
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(seed, server, prepared, tmp_path):
    print(f"seed {seed}")
    draw = random.Random(seed)
    whole = copy(prepared, tmp_path / "whole")
    began = time.monotonic()
    status, err = server.run(whole)
    assert status == 0, err
    longest = time.monotonic() - began
    kills = 0
    while kills < KILLS:
        folder, history = copy(prepared, tmp_path / f"run-{kills}-{len(list(tmp_path.iterdir()))}"), []
        # up to five kills, unless one comes too late
        while len(history) < 5 and run_until_killed(server, folder, kill := draw_kill(draw, longest)):
            history.append(kill)
        assert not run_until_killed(server, folder, {})
        print(*history, sep="\n", end="\n\n")
        check_same(folder, whole, history)
        assert not still_left_over(folder)
        kills += len(history)
