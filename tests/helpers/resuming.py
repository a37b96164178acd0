"""Runs of `lighthouse` for the tests that break them: a recipe, a server that starts them, what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from places import HELPERS, ROOT

SEQ_LEN = 64
STEPS = 18
SWITCH = 9
# batches of an epoch: 14 sequences, 2 in a batch of all ranks
EPOCH = 7

RECIPE = f"""\
model:
  class_path: lightning_lighthouse.model.Decoder
  init_args: {{num_layers: 2, dim: 16, num_heads: 2, ffn_dim: 16, warmup_steps: 5, schedule: wsd}}
data:
  class_path: lightning_lighthouse.LighthouseRecipe
  init_args: {{seq_len: {SEQ_LEN}, batch_size: 2, source: text.jsonl, output_dir: data, num_workers: 1,
    validation_fraction: 0.3}}
trainer:
  accelerator: cpu
  max_steps: {STEPS}
  max_epochs: -1
  val_check_interval: 3
  check_val_every_n_epoch: null
  num_sanity_val_steps: 1
  log_every_n_steps: 1
  gradient_clip_val: 1.0
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
  - class_path: resume_callbacks.StepLog
  - class_path: resume_callbacks.Fault
lighthouse:
  switch_at: {SWITCH}
  layer_types: [lighthouse]
  dense_layers: []
  attention: {{num_levels: 2, pooling_factor: 2, top_k: 8}}
checkpoint:
  every_n_train_steps: 2
"""
RANKS = ["--trainer.devices", "2", "--data.batch_size", "1"]


def prepare(folder: Path) -> Path:
    """Write text and a recipe."""
    draw = random.Random(1)
    texts = ("".join(draw.choices("abcdefgh ", k=draw.randrange(40, 160))) for _ in range(12))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder


class Server:
    """Starts runs in forks of one process that has imported everything."""

    def __init__(self) -> None:
        paths = [str(HELPERS), str(ROOT)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(HELPERS / "resume_server.py")],
            env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def start(
        self,
        folder: Path,
        *flags: str,
        fault: dict[str, Any] | None = None,
        command: str = "fit",
        environment: dict[str, str] | None = None,
    ) -> int:
        """The process id of a new run."""
        request = {
            "arguments": [command, "-c", "recipe.yaml", *flags],
            "folder": str(folder),
            "environment": {"FAULT": json.dumps(fault or {})} | (environment or {}),
        }
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self._answer())

    def end(self) -> int:
        """The status of the run, once it has ended."""
        return int(self._answer())

    def run(self, folder: Path, *flags: str, **more: Any) -> tuple[int, str]:
        """Its status and what it wrote to stderr."""
        self.start(folder, *flags, **more)
        return self.end(), (folder / "err").read_text()

    def _answer(self) -> str:
        assert self.process.stdout
        answer = self.process.stdout.readline()
        assert answer, "the server ended"
        return answer

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


def steps(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"steps-{rank}.jsonl").read_text().splitlines()]


def last(folder: Path) -> Path | None:
    """The newest; a run that is broken before its first save leaves none."""
    found = folder.glob("runs/recipe/*/checkpoints/last.ckpt")
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def batches_done(checkpoint: Path) -> int:
    progress = torch.load(checkpoint, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    return progress["total"]["ready"]


def copy(prepared: Path, folder: Path) -> Path:
    shutil.copytree(prepared, folder, ignore=shutil.ignore_patterns("runs", "steps-*"))
    return folder


def still_left_over(folder: Path) -> list[str]:
    """Processes of a run that are there although it ended; each notices within seconds."""
    ended = time.monotonic()
    while left_over(folder) and time.monotonic() < ended + 20:
        time.sleep(0.2)
    return left_over(folder)


def left_over(folder: Path) -> list[str]:
    """Processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        # it may end meanwhile
        with contextlib.suppress(OSError):
            if Path(os.readlink(process / "cwd")) == folder and "zombie" not in (process / "status").read_text():
                found.append((process / "cmdline").read_text())
    return found
