"""A short CPU run whose losses are written bit for bit, unbroken and resumed: a refactor must not move them.

    OMP_NUM_THREADS=1 python experiments/recorded_run.py losses.json

Run it before and after on one machine, and compare the files. Another CPU may round differently.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from lightning_lighthouse.cli import main

STEPS, SWITCH, STOP = 200, 0.7, 120
RECIPE = {
    "seed_everything": 7,
    "model": {
        "class_path": "lightning_lighthouse.model.Decoder",
        "init_args": {"num_layers": 4, "dim": 32, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 48, "schedule": "wsd"},
    },
    "data": {
        "class_path": "lightning_lighthouse.LighthouseRecipe",
        "init_args": {"seq_len": 512, "batch_size": 2, "source": "text.jsonl", "output_dir": "data", "num_workers": 0},
    },
    "trainer": {
        "accelerator": "cpu",
        "max_steps": STEPS,
        "max_epochs": -1,
        "val_check_interval": 20,
        "check_val_every_n_epoch": None,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "deterministic": True,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": "kept", "every_n_train_steps": STOP, "save_top_k": -1},
            }
        ],
        "logger": {
            "class_path": "lightning.pytorch.loggers.CSVLogger",
            "init_args": {"save_dir": "logs", "name": "run"},
        },
    },
    "lighthouse": {
        "switch_at": SWITCH,
        "dense_layers": [0],
        "attention": {"num_levels": 3, "pooling_factor": 2, "top_k": 96},
    },
}


def write_text(path: Path) -> None:
    """Documents of drawn words, the same each time."""
    draw = random.Random(11)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randrange(2, 9))) for _ in range(300)]
    with path.open("w") as file:
        for _ in range(400):
            file.write(json.dumps({"text": " ".join(draw.choices(words, k=draw.randrange(80, 300)))}) + "\n")


def losses(version: int) -> dict[str, list[tuple[int, str]]]:
    """Step and loss of a run, a float as its bits."""
    found: dict[str, list[tuple[int, str]]] = {}
    with Path(f"logs/run/version_{version}/metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            for name in ("train/loss", "val/loss"):
                if row.get(name):
                    found.setdefault(name, []).append((int(row["step"]), float(row[name]).hex()))
    return found


def run(output: Path) -> None:
    """Train, train again from the middle, and write both."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_text(Path("text.jsonl"))
        Path("recipe.yaml").write_text(yaml.safe_dump(RECIPE))
        assert main(["fit", "-c", "recipe.yaml"]) == 0
        middle = next(Path("kept").glob(f"*step={STOP}.ckpt"))
        assert main(["fit", "-c", "recipe.yaml", "--ckpt_path", str(middle)]) == 0
        unbroken, resumed = losses(0), losses(1)
    tail = {name: [pair for pair in pairs if pair[0] >= STOP] for name, pairs in unbroken.items()}
    assert resumed == tail, "the resumed run differs from the unbroken one"
    output.write_text(json.dumps({"unbroken": unbroken, "resumed": resumed}, indent=1) + "\n")
    print(hashlib.sha256(output.read_bytes()).hexdigest(), output)


if __name__ == "__main__":
    run(Path(sys.argv[1]).absolute())
