"""Several processes train as one does: same losses, and the switch at the same step on every rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from foreign import ForeignModule, Sequences

SCRIPT = Path(__file__).parent / "strategy_run.py"


def train(name: str, output: Path) -> list[dict]:
    """Results of all ranks."""
    output.mkdir()
    processes = 1 if name == "single" else 2
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launch, str(SCRIPT), name, str(output)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(processes)]


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "single"
    return train("single", folder)[0], folder


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(strategy, single, tmp_path):
    alone, single_folder = single
    ranks = train(strategy, tmp_path / strategy)
    for rank in ranks:
        assert rank["routed"] == alone["routed"] == [True] * 5 + [False] * 3
    means = [sum(pair) / 2 for pair in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert means == pytest.approx(alone["losses"], rel=1e-5)

    # gathered from all ranks, it is the plain module's state dict
    batch = Sequences(4, seed=1).tokens
    final = [torch.load(folder / "final.pt", weights_only=True) for folder in (tmp_path / strategy, single_folder)]
    losses = []
    for weights in final:
        module = ForeignModule()
        module.load_state_dict(weights, strict=True)
        losses.append(module.loss(batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
