"""Trainings that cross the switch, with what the tests of its rules ask of them."""

from __future__ import annotations

import torch
from foreign import ForeignModule, ResumableLoader, SelfAttention, loader
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_lighthouse import LighthouseConfig

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)


def routed_layers(module):
    """Indices of the blocks whose attention is not dense now."""
    x = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))
    found = []
    with torch.no_grad():
        for index, block in enumerate(module.model.blocks):
            plain = SelfAttention(16, 2)
            plain.load_state_dict(block.attn.state_dict())
            if not torch.allclose(block.attn(x), plain(x), atol=1e-5):
                found.append(index)
    return found


class Watch(Callback):
    """Which layers are routed in each training batch, by step; and in each validation."""

    def __init__(self):
        self.training, self.validation = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.training.append((trainer.global_step, routed_layers(pl_module)))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.validation.append(routed_layers(pl_module))

    @property
    def phases(self):
        return "".join("L" if routed else "d" for _, routed in self.training)


class Rates(torch.optim.SGD):
    """Keeps the rates that each update uses, and those that anybody else sees."""

    def __init__(self, groups, **arguments):
        super().__init__(groups, **arguments)
        self.used, self.seen = [], []

    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        self.used.append([group["lr"] for group in self.param_groups])
        # closes over nothing of ours: the update itself
        return super().step()


class Module(ForeignModule):
    """Two parameter groups and a schedule that multiplies; validation losses as told, by step."""

    def __init__(self, layers=6, told=None, rate=0.1):
        super().__init__(layers)
        self.told, self.rate = told, rate
        self.rates = []

    def validation_step(self, batch, batch_idx):
        if self.told is None:
            return super().validation_step(batch, batch_idx)
        return self.log("val/loss", self.told(self.global_step))

    def training_step(self, batch, batch_idx):
        self.rates.append([group["lr"] for group in self.trainer.optimizers[0].param_groups])
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        parameters = list(self.parameters())
        groups = [{"params": parameters[::2]}, {"params": parameters[1::2], "lr": self.rate / 2}]
        self.optimizer = Rates(groups, lr=self.rate, momentum=0.9)
        schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(folder, callbacks, model=None, ckpt_path=None, validation=True, batches=16, **settings):
    torch.manual_seed(0)
    settings = {
        "max_steps": batches,
        "max_epochs": -1,
        "val_check_interval": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    } | settings
    model = model or Module()
    run = Trainer(default_root_dir=folder, callbacks=callbacks, **settings)
    data = ResumableLoader(2 * batches)
    run.fit(model, data, loader(2, seed=1) if validation else None, ckpt_path=ckpt_path, weights_only=True)
    return model


def saving(folder, **arguments):
    """A checkpoint after each validation, step by step."""
    return ModelCheckpoint(folder, save_top_k=-1, save_on_train_epoch_end=False, **arguments)


def same_weights(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def stalls(at):
    """Losses that fall until step `at`, and then stay."""
    return lambda step: 9.0 - min(step, at)
