"""The study's runner on small trainings: rows are run once, and one that failed or was killed costs no other."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

FLAGS = (
    "-c recipes/books-32k-1gpu.yaml --data.seq_len 256 --data.batch_size 1 --model.preset toy --model.compile false "
    "--trainer.accelerator cpu --trainer.precision 32-true --trainer.limit_val_batches 1 --trainer.max_steps 4 "
    "--trainer.val_check_interval 2 --trainer.enable_checkpointing false --trainer.enable_progress_bar false "
    "--lighthouse.switch_at 2 --lighthouse.attention.top_k 8"
)
ROWS = """\
groups:
  - minutes: 1
    flags: {flags} --data.output_dir {folder}/data
    rows:
      - name: silent
        flags: --trainer.fast_dev_run 2
      - name: wrong
        flags: --trainer.max_steps many
      - name: seeds
        seeds: [1, 2]
"""


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.slow
def test_rows_are_run_once_and_a_failure_costs_no_other(tmp_path):
    text = "a rose is a rose is a rose, and a study is what it says it is. " * 200
    (tmp_path / "text.jsonl").write_text('{"text": "%s"}\n' % text * 4)  # noqa: UP031, braces are JSON's
    (tmp_path / "rows.yaml").write_text(ROWS.format(flags=FLAGS, folder=tmp_path))
    validations = tmp_path / "validations.csv"
    # of a training that was killed before its row was written
    validations.write_text("name,seed,step,seconds,phase,loss\nseeds,2,2,0.1,lighthouse,9.9\nother,2,2,0.1,dense,1.0\n")
    command = [
        sys.executable,
        "experiments/study/run.py",
        "--rows",
        tmp_path / "rows.yaml",
        "--runs",
        tmp_path / "runs",
    ]
    command += ["--source", tmp_path / "text.jsonl", "--validation_source", tmp_path / "text.jsonl", "--out", tmp_path]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

    first = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert first.returncode == 1
    # one trained without a report, the other did not train
    assert "silent-seed42: status 0" in first.stdout
    assert "silent-seed42: FileNotFoundError" in first.stdout
    assert "wrong-seed42: status 2" in first.stdout
    rows = read(tmp_path / "rows.csv")
    assert [(row["name"], row["seed"], row["lighthouse_steps"], row["dense_steps"]) for row in rows] == [
        ("seeds", "1", "2", "2"),
        ("seeds", "2", "2", "2"),
    ]
    assert all(row["command"].startswith("lighthouse fit -c recipes/books-32k-1gpu.yaml") for row in rows)
    lines = [(line["name"], line["seed"], line["step"]) for line in read(validations)]
    assert lines == [("other", "2", "2"), *[("seeds", seed, step) for seed in "12" for step in "24"]]
    assert float(rows[1]["final_loss"]) == float(read(validations)[-1]["loss"]) < 9

    only = subprocess.run(
        [*map(str, command), "--only", "s*s"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (only.returncode, only.stdout) == (0, "")
    assert read(tmp_path / "rows.csv") == rows

    # the row of a training that ended is written from its logs, and only that
    lines = (tmp_path / "rows.csv").read_text().splitlines(keepends=True)
    (tmp_path / "rows.csv").write_text("".join(lines[:2]))
    collect = [*map(str, command), "--collect", "--only", "s*"]
    collected = subprocess.run(collect, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert collected.returncode == 1
    assert "silent-seed42: no training of it has ended" in collected.stdout
    assert read(tmp_path / "rows.csv") == rows
    assert len(read(validations)) == 5
