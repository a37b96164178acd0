"""`recipes/scaling.sh`, small and on a CPU: one training by one process and by two, and one with a process killed."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from places import RECIPES

from lightning_lighthouse.runs.comparison import read_report

SCRIPT = RECIPES / "scaling.sh"
SMALL = (
    "--trainer.accelerator cpu --trainer.precision 32-true --trainer.enable_progress_bar false --model.preset toy "
    "--model.compile false --data.seq_len 256 --lighthouse.attention.top_k 8 --lighthouse.dense_layers [0,-1] "
    "--lighthouse.layer_types [lighthouse]"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("scaling")
    words = ["".join(random.Random(word).choices("aeioulnrst", k=5)) for word in range(200)]
    # eight sequences to validate on, which one process and two can share out without a rest
    for name, size in (("train", 48_000), ("validation", 2_100)):
        text = " ".join(random.Random(name).choices(words, k=size // 5))[:size]
        (folder / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
    environment = os.environ | {
        "RUNS": str(folder / "runs"),
        "FLAGS": f"{SMALL} --data.output_dir {folder / 'data'}",
        "KILL": "1",
        "LIGHTHOUSE": f"{sys.executable} -m lightning_lighthouse.cli",
        "OMP_NUM_THREADS": "1",
    }
    command = [str(SCRIPT), str(folder / "train.jsonl"), str(folder / "validation.jsonl"), "1", "2"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "runs", done.stdout


def losses(runs: Path, name: str) -> list[tuple[int, str, float]]:
    validations = read_report(runs / name / "version_0")["validations"]
    return [(validation["step"], validation["phase"], validation["loss"]) for validation in validations]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["ddp-2", "fsdp2-2", "killed"])
def test_two_processes_reach_the_losses_of_one(runs, name):
    one, two = losses(runs[0], "single-1"), losses(runs[0], name)
    assert [entry[:2] for entry in two] == [entry[:2] for entry in one] == [(8, "lighthouse"), (16, "dense")]
    assert [entry[2] for entry in two] == pytest.approx([entry[2] for entry in one], rel=1e-5)
    # a loss that never moved would agree as well
    assert one[1][2] < one[0][2] - 0.05


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_process_ends_the_run_and_the_table_has_all_runs(runs):
    table = runs[1]
    # 1 where the collective that waits for it breaks first, 137 where Lightning ends the run
    assert re.search(r"one of 2 processes killed: the run ended with status (1|137)\n", table)
    assert all(f"{name}/version_0" in table for name in ("single-1", "ddp-2", "fsdp2-2", "killed"))
