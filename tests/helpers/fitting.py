"""Short fits of a LightningModule that does not know the callback."""

from __future__ import annotations

import torch
from foreign import ForeignModule, ResumableLoader
from lightning.pytorch import Trainer

from lightning_lighthouse import LighthouseConfig

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)


def trainer(tmp_path, callbacks, max_steps=10, **settings):
    settings = {
        "max_steps": max_steps,
        "max_epochs": -1,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    } | settings
    return Trainer(default_root_dir=tmp_path, callbacks=callbacks, **settings)


def module(**arguments):
    torch.manual_seed(0)
    return ForeignModule(**arguments)


def fit(tmp_path, callbacks, model=None, ckpt_path=None, data=None, validation=None, **settings):
    model = model or module()
    run = trainer(tmp_path, callbacks, **settings)
    run.fit(model, ResumableLoader() if data is None else data, validation, ckpt_path=ckpt_path, weights_only=True)
    return model, run
