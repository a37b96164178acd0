"""What the tests of FutureLeakProbe share: a module, its data, a short training."""

from __future__ import annotations

import time

import torch
from all_lighthouse import all_lighthouse
from foreign import ForeignModule, Sequences
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_lighthouse import FutureLeakProbe, LighthouseCallback, LighthouseConfig

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8, selection="published")
CAUSAL = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8, selection="causal")
# the Lighthouse phase has 6 steps; there are validations after 2, 4, 6, 8 and 10
SWITCH = 6
TOKENS = 64


class Module(ForeignModule):
    """The module of the other tests, with logits to ask for, which draw a random number each time."""

    def __init__(self, delay: float = 0.0, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.delay = delay
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens):
        time.sleep(self.delay)
        torch.rand(1)
        return self.dropout(self.model(tokens))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * self.dropout(torch.ones(4)).mean()


def loader(count: int = 40, seed: int = 0, tokens: int = TOKENS) -> DataLoader:
    return DataLoader(Sequences(count, tokens, seed), batch_size=2)


def fit(folder, callbacks, module=None, max_steps=10, train=None, validation=None, ckpt_path=None, **settings):
    module = module or Module()
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "val_check_interval": 2,
        "check_val_every_n_epoch": None,
    } | settings
    trainer = Trainer(default_root_dir=folder, callbacks=callbacks, max_steps=max_steps, max_epochs=-1, **settings)
    train = loader(40) if train is None else train
    trainer.fit(module, train, loader(8, seed=1) if validation is None else validation, ckpt_path=ckpt_path)
    return module


def steps(probe: FutureLeakProbe) -> list[int]:
    return [result.step for result in probe.results]


def lighthouse(config: LighthouseConfig = CONFIG, **settings) -> LighthouseCallback:
    return all_lighthouse(SWITCH, config, **settings)


class Tokens(LightningDataModule):
    """Sequences for the decoder, without files."""

    def __init__(self, count: int = 16) -> None:
        super().__init__()
        self.count = count

    def train_dataloader(self) -> DataLoader:
        return loader(self.count)

    def val_dataloader(self) -> DataLoader:
        return loader(4, seed=1)
