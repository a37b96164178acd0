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
from places import HELPERS

SCRIPT = HELPERS / "strategy_run.py"


def launch(name: str, output: Path, modes: list[str]) -> subprocess.CompletedProcess:
    processes = 1 if name == "single" else 2
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *run, str(SCRIPT), name, str(output), *modes]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=500, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def train(name: str, output: Path, modes: list[str]) -> dict[str, list[dict]]:
    """Results of all ranks by mode."""
    done = launch(name, output, modes)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        mode: [json.loads((output / mode / f"rank{rank}.json").read_text()) for rank in range(1 + (name != "single"))]
        for mode in modes
    }


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "single"
    return train("single", folder, ["plain", "accumulate", "phases"]), folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "modes"),
    [
        ("ddp", ["plain", "compile", "checkpoint", "both", "accumulate", "phases", "validated"]),
        ("fsdp2", ["plain", "both", "accumulate", "phases", "validated"]),
        ("fsdp1", ["plain", "checkpoint", "compile", "phases", "validated"]),
    ],
    ids=["ddp", "fsdp2", "fsdp1"],
)
def test_two_processes_train_as_one(strategy, modes, single, tmp_path):
    alone, single_folder = single
    results = train(strategy, tmp_path / strategy, modes)
    for mode, ranks in results.items():
        (reference,) = alone[mode if mode in alone else "plain"]
        for rank in ranks:
            # 8 steps switch at 5; 4 steps of two batches at 3, so after 6 batches
            expected = [True] * 6 + [False] * 2 if mode == "accumulate" else [True] * 5 + [False] * 3
            assert rank["routed"] == reference["routed"] == expected
            assert rank["steps"] == reference["steps"]
            assert rank["switches"] == reference["switches"]
            assert len(rank["switches"]) == (2 if mode == "phases" else 1)
            # FSDP1 has no gradient of its own parameters, and shows no norm
            expected = [] if strategy == "fsdp1" else pytest.approx(reference["norms"], rel=1e-4)
            assert rank["norms"] == expected, mode
        means = [sum(pair) / 2 for pair in zip(*(rank["losses"] for rank in ranks), strict=True)]
        assert means == pytest.approx(reference["losses"], rel=1e-5), mode

    # once each: sharded weights lie otherwise behind a validation than behind the checkpoint that follows
    told = json.loads((tmp_path / strategy / "validated" / "lighthouse.json").read_text())
    assert [validation["step"] for validation in told["validations"]] == [4, 8]
    assert told["final"]["is_of_final_weights"] is True

    # gathered from all ranks, it is the plain module's state dict
    batch = Sequences(4, seed=1).tokens
    losses = []
    for folder in (tmp_path / strategy, single_folder):
        weights = torch.load(folder / "plain" / "final.pt", weights_only=True)
        module = ForeignModule()
        module.load_state_dict(weights, strict=True)
        losses.append(module.loss(batch).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_a_tensor_parallel_group_that_nothing_is_spread_over_is_refused(tmp_path):
    done = launch("fsdp2-without-sizes", tmp_path, ["plain"])
    assert done.returncode != 0
    assert "give data_parallel_size=2 and tensor_parallel_size=1" in done.stderr
    assert not list(tmp_path.rglob("final.pt"))
