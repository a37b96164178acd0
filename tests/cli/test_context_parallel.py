"""`lighthouse fit` and `validate` with sequences that two ranks share, by flags alone."""

from __future__ import annotations

import json

import pytest
from resuming import SEQ_LEN, STEPS, copy, steps

SHARED = [
    *("--trainer.devices", "2"),
    *("--trainer.strategy", "lightning_lighthouse.ContextParallelStrategy"),
    *("--trainer.strategy.process_group_backend", "gloo"),
]
SIZE = "--trainer.strategy.context_parallel_size"


@pytest.mark.slow
def test_two_ranks_share_sequences_by_flags(prepared, server, unbroken, tmp_path):
    folder = copy(prepared, tmp_path / "run")
    status, err = server.run(folder, *SHARED, SIZE, "2")
    assert status == 0, err
    (alone,) = unbroken()
    shared = zip(steps(folder), steps(folder, 1), strict=True)
    means = [sum(float.fromhex(line["loss"]) for line in pair) / 2 for pair in shared]
    assert means == pytest.approx([float.fromhex(line["loss"]) for line in alone.values()], rel=1e-4)

    (run,) = folder.glob("runs/recipe/*")
    report = json.loads((run / "lighthouse.json").read_text())
    assert report["context_parallel_size"] == report["world_size"] == 2
    assert sum(phase["tokens"] for phase in report["phases"].values()) == STEPS * 2 * (SEQ_LEN + 1)
    assert (run / "final.pt").exists()

    # sharded checkpoints and all, from the last one, by ranks that only validate
    status, err = server.run(folder, *SHARED, SIZE, "2", "--ckpt_path", "last", command="validate")
    assert status == 0, err

    status, err = server.run(folder, *SHARED, SIZE, "3")
    assert status == 2
    assert "lighthouse: context_parallel_size must divide the 2 ranks, got 3" in err.splitlines()
