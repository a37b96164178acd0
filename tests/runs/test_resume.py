"""Real runs of `lighthouse fit` are killed anywhere and go on bit for bit: every batch, every loss, on every rank."""

from __future__ import annotations

import os
import random
import signal
from typing import Any

import pytest
from resuming import EPOCH, RANKS, SWITCH, batches_done, copy, last, steps, still_left_over

HOOKS = ["start", "backward", "end"]
EXPECTED = {
    ("SIGKILL", 1): [-signal.SIGKILL],
    ("SIGTERM", 1): [143],
    ("exception", 1): [1],
    # one rank's end is the other's: killed by Lightning, or by the loss of its connection
    ("SIGKILL", 2): [-signal.SIGKILL, 1],
    ("SIGTERM", 2): [143],
    ("exception", 2): [-signal.SIGKILL, 1],
}


def break_and_resume(server, folder, unbroken, faults, *flags):
    """Run until a fault, resume from the last checkpoint until the next, and at last to the end; compare every line."""
    ranks = len(unbroken)
    for fault in [*faults, None]:
        seen = [len(steps(folder, rank)) if (folder / f"steps-{rank}.jsonl").exists() else 0 for rank in range(ranks)]
        status, err = server.run(folder, "--ckpt_path", "auto", *flags, fault=fault)
        lines = [steps(folder, rank)[seen[rank] :] for rank in range(ranks)]
        for rank in range(ranks):
            assert lines[rank] == [unbroken[rank][line["batch"]] for line in lines[rank]], (fault, rank)
            batches = [line["batch"] for line in lines[rank]]
            assert not batches or batches == list(range(batches[0], batches[-1] + 1)), "nothing is left out"
        if fault is None:
            assert status == 0, err
            # unless the fault came behind the last save, something was left to do
            assert not lines[0] or lines[0][-1]["batch"] == max(unbroken[0])
            continue
        assert status in EXPECTED[fault["kind"], ranks], (fault, err)
        saved = batches_done(last(folder)) if last(folder) else 0
        if fault["kind"] == "SIGTERM":
            # the step is finished and saved, and no further one begun
            assert saved == lines[0][-1]["batch"] + 1, fault
        assert not list(folder.rglob("*.partial")) or fault["kind"] == "SIGKILL"
    for rank in range(ranks):
        assert {line["batch"] for line in steps(folder, rank)} == set(unbroken[rank])


def faults_at(batches: list[int], seed: int) -> list[dict[str, Any]]:
    """One fault at each of these batches, kinds in turn, the hook drawn."""
    draw = random.Random(seed)
    kinds = ["SIGKILL", "SIGTERM", "exception"]
    return [
        {"kind": kinds[(seed + n) % 3], "batch": batch, "hook": draw.choice(HOOKS), "ranks": [0]}
        for n, batch in enumerate(batches)
    ]


def positions(seed: int) -> list[int]:
    """Before the switch, across an epoch's end, around the switch, and behind it, across an epoch's end."""
    draw = random.Random(seed)
    early, late = draw.randrange(1, EPOCH - 1), draw.randrange(SWITCH + 2, 2 * EPOCH - 1)
    return [early, EPOCH - 1, EPOCH, SWITCH - 1, SWITCH, SWITCH + 1, late, 2 * EPOCH - 1, 2 * EPOCH]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [int(seed) for seed in os.environ.get("RESUME_SEEDS", "0 1").split()])
def test_a_run_broken_anywhere_goes_on_bit_for_bit(seed, server, prepared, unbroken, tmp_path):
    folder = copy(prepared, tmp_path / "run")
    break_and_resume(server, folder, unbroken(), faults_at(positions(seed), seed))


VARIANTS = {
    # by epochs Lightning ends an epoch in another way than by steps
    "epochs": (["--trainer.max_steps", "-1", "--trainer.max_epochs", "3"], [3, 6, 7, 13, 14]),
    # an epoch is three steps of two batches, and one of one
    "accumulated": (
        ["--trainer.max_steps", "9", "--trainer.accumulate_grad_batches", "2", "--lighthouse.switch_at", "4",
         "--checkpoint.every_n_train_steps", "1"],
        [2, 5, 6, 8, 11, 13],
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "batches"), VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("seed", [int(seed) for seed in os.environ.get("RESUME_SEEDS", "1").split()])
def test_so_does_one_by_epochs_or_with_accumulated_gradients(
    flags, batches, seed, server, prepared, unbroken, tmp_path
):
    folder = copy(prepared, tmp_path / "run")
    break_and_resume(server, folder, unbroken(*flags), faults_at(batches, seed), *flags)


@pytest.mark.slow
def test_two_ranks_go_on_bit_for_bit_and_leave_no_process(server, prepared, unbroken, tmp_path):
    folder = copy(prepared, tmp_path / "run")
    struck = [
        ("SIGKILL", 3, [1]),
        ("SIGTERM", 6, [1]),
        ("exception", 8, [0]),
        ("SIGKILL", 9, [0]),
        ("SIGKILL", 14, [0, 1]),
    ]
    for kind, batch, ranks in struck:
        # one that does not wait for rank 0 would not notice that it is gone
        busy = (kind, ranks) == ("SIGKILL", [0])
        fault = {"kind": kind, "batch": batch, "hook": "backward", "ranks": ranks, "busy": busy}
        status, err = server.run(folder, "--ckpt_path", "auto", *RANKS, fault=fault)
        assert status in EXPECTED[kind, 2], (fault, err)
        assert not still_left_over(folder), fault
    status, err = server.run(folder, "--ckpt_path", "auto", *RANKS)
    assert status == 0, err
    for rank, whole in enumerate(unbroken(*RANKS, ranks=2)):
        lines = steps(folder, rank)
        assert lines == [whole[line["batch"]] for line in lines]
        assert {line["batch"] for line in lines} == set(whole)
    # one rank sees the sequences that the other does not
    first, second = unbroken(*RANKS, ranks=2)
    assert not {line["sha"] for line in first.values()} & {line["sha"] for line in second.values()}


@pytest.mark.slow
def test_a_killed_rank_ends_a_run_whose_rank_0_is_frozen(server, prepared, tmp_path):
    folder = copy(prepared, tmp_path / "run")
    fault = {"kind": "SIGKILL", "batch": 5, "hook": "backward", "ranks": [1], "frozen": True}
    status, err = server.run(folder, *RANKS, fault=fault)
    assert status == -signal.SIGKILL
    assert "ended with -9, and rank 0 waits for it without noticing" in err
    assert not still_left_over(folder)
    assert last(folder) is not None


def test_a_killed_run_goes_on_bit_for_bit(server, prepared, unbroken, tmp_path):
    folder = copy(prepared, tmp_path / "run")
    fault = {"kind": "SIGKILL", "batch": 11, "hook": "backward", "ranks": [0]}
    break_and_resume(server, folder, unbroken(), [fault])
