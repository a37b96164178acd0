"""A model, data and a recipe that are not ours, and what the tests of the command line ask of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from foreign import loader
from lightning.pytorch import LightningDataModule, LightningModule
from places import HELPERS, ROOT
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_lighthouse.cli import commands as cli


class Model(LightningModule):
    """Any LightningModule: nothing of it is ours."""

    def __init__(self, width: int = 3, num_heads: int = 1, fault: str | None = None, at_step: int = 2) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be at least 1, got {width}")
        self.save_hyperparameters()
        self.width, self.fault, self.at_step = width, fault, at_step
        self.layer = nn.Linear(width, width)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if self.fault is not None and self.global_step == self.at_step and self.global_rank == 0:
            if self.fault.startswith("SIG"):
                os.kill(os.getpid(), getattr(signal, self.fault))
            else:
                raise RuntimeError(self.fault)
        return self.layer(batch).square().mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        # the first validation is the best
        self.log("val/loss", float(self.global_step))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Scorer(Model):
    """Says what it was shown."""

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.log("test/mean", batch["tokens"].float().mean())


class Weighed(Model):
    """Shows what its weights give, so that others show in the metrics."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, batch_idx))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test/loss", self.training_step(batch, batch_idx))


class Data(LightningDataModule):
    """Any LightningDataModule, with one required value."""

    def __init__(self, num_batches: int, width: int = 3) -> None:
        super().__init__()
        self.num_batches, self.width = num_batches, width

    def train_dataloader(self) -> DataLoader:
        return DataLoader(list(torch.ones(self.num_batches, self.width)), batch_size=None)

    val_dataloader = test_dataloader = train_dataloader


class Alike(Model):
    """Has an argument that Decoder has too."""

    def __init__(self, learning_rate: float = 7.0) -> None:
        super().__init__()


class AlikeData(Data):
    """Has an argument that LighthouseRecipe has too."""

    def __init__(self, seq_len: int = 7) -> None:
        super().__init__(4)


class Sentences(LightningDataModule):
    """Sequences that the foreign module learns."""

    seq_len = 128

    def train_dataloader(self) -> DataLoader:
        return loader()


class Unready(LightningDataModule):
    """Data that turn out to be wrong when they are looked at, after the loggers were opened."""

    def setup(self, stage: str) -> None:
        raise ValueError("the data are damaged")

    def train_dataloader(self) -> DataLoader:
        raise AssertionError("asked for batches of data that were refused")


# no attention in Model: nothing to patch
RECIPE = """\
model:
  class_path: cli_parts.Model
data:
  class_path: cli_parts.Data
  init_args:
    num_batches: 4
trainer:
  accelerator: cpu
  max_steps: 4
  enable_progress_bar: false
lighthouse:
  enabled: false
"""


def refusal(capsys, *argv: str) -> str:
    """The one line on stderr of a command that ends with status 2 and leaves nothing behind."""
    before = sorted(Path.cwd().rglob("*"))
    status = cli.main(argv)
    out, err = capsys.readouterr()
    assert (status, out) == (2, ""), err
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert sorted(Path.cwd().rglob("*")) == before
    return err.removeprefix("lighthouse: ").rstrip("\n")


def config(capsys, *argv: str) -> dict:
    capsys.readouterr()
    assert cli.main(["fit", *argv, "--print_config"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def steps(checkpoint: str | Path) -> int:
    return torch.load(checkpoint, weights_only=True)["global_step"]


def run(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = [str(Path.cwd()), str(HELPERS), str(ROOT)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "lightning_lighthouse.cli", *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
