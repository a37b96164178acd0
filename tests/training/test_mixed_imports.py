"""`import pytorch_lightning as pl`, as older code has it, beside this package, which imports lightning.pytorch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import HELPERS, ROOT

SCRIPT = """
import warnings
import pytorch_lightning as pl
import torch
from foreign import GPT, Sequences
from torch.nn.functional import cross_entropy
from lightning_lighthouse import LighthouseCallback, LighthouseConfig, LighthouseRecipe, LighthouseWarning

class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = GPT()

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

def fit(*more, **settings):
    callback = LighthouseCallback(0.5, LighthouseConfig(2, 2, 8), layer_types=["lighthouse"])
    quiet = dict(accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    trainer = pl.Trainer(**quiet, **settings, log_every_n_steps=1, callbacks=[callback, *more])
    trainer.fit(Module(), torch.utils.data.DataLoader(Sequences(), 2))

fit(max_steps=6)
try:
    fit(pl.callbacks.GradientAccumulationScheduler({0: 1, 1: 4}), max_epochs=2)
except ValueError as error:
    print("refused:", error)
with warnings.catch_warnings(record=True) as caught:
    LighthouseRecipe()
print("warned:", [str(warning.message) for warning in caught if warning.category is LighthouseWarning])
"""


@pytest.mark.slow
def test_the_callback_works_in_a_trainer_of_either_import(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HELPERS}"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "lightning_logs/version_0"
    for phase in ("lighthouse", "dense"):
        assert list((run / phase).glob("events.out.tfevents.*"))
    refused, warned = (line for line in done.stdout.splitlines() if line.startswith(("refused", "warned")))
    assert "is a fraction, but Lightning's count of steps ignores the GradientAccumulationScheduler" in refused
    assert warned.startswith(
        "warned: ['pytorch_lightning is imported beside lightning: its Trainer takes no Lighthouse"
    )
