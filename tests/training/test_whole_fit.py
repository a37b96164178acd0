"""Whole trainings on each kind of hardware: how they end, go on, and what they leave."""

from __future__ import annotations

import json

import pytest
import torch
from documents_run import decoder
from fitting import trainer
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging
from resumable import ResumableBatches
from torch.utils.data import DataLoader

from lightning_lighthouse import LighthouseCallback, LighthouseConfig
from lightning_lighthouse.runs.checkpoint import Checkpoint

TOKENS = 1024
CONFIG = LighthouseConfig(num_levels=2, pooling_factor=4, top_k=16)
# on a GPU Lightning moves weights away behind a training, and what is counted there is counted in another order
ACCELERATORS = [
    "cpu",
    pytest.param(
        "gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    ),
]
pytestmark = pytest.mark.parametrize("accelerator", ACCELERATORS)


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"tokens": torch.randint(31, (2, TOKENS + 1), generator=generator)} for _ in range(count)]


def made():
    return decoder(dim=64, ffn_dim=96, num_layers=4).float()


def train(folder, accelerator, *callbacks, steps=8, ckpt_path=None, **settings):
    """Validated at step 3 and 6, and at the end by the callback."""
    model = made()
    own = LighthouseCallback(4, CONFIG, window=128)
    settings = {"val_check_interval": 3, "devices": 1, "precision": "bf16-mixed"} | settings
    run = trainer(folder, [own, *callbacks], accelerator=accelerator, max_steps=steps, **settings)
    run.fit(
        model,
        ResumableBatches(batches(12)),
        DataLoader(batches(2, seed=1), None),
        ckpt_path=ckpt_path,
        weights_only=True,
    )
    return model, json.loads((folder / "lighthouse.json").read_text())


def loss_of(final):
    """Of the validation text, by hand, in float32 on the CPU."""
    model = made()
    model.load_state_dict(torch.load(final, weights_only=True))
    with torch.no_grad():
        return sum(model.loss(batch).item() for batch in batches(2, seed=1)) / 2


def is_marked(told, recwarn):
    warned = any("whose loss is not that of final.pt" in str(w.message) for w in recwarn)
    assert told["final"]["is_of_final_weights"] is not warned
    return warned


def test_the_final_loss_is_that_of_the_final_weights(accelerator, tmp_path, recwarn):
    _, told = train(tmp_path, accelerator)
    assert not is_marked(told, recwarn)
    assert [each["step"] for each in told["validations"]] == [3, 6, 8]
    assert told["phases"]["dense"]["steps"] == 4
    assert told["final"]["loss"] == pytest.approx(loss_of(tmp_path / "final.pt"), rel=2e-3)


class Halves(Callback):
    """Changes one weight when the training has ended."""

    def on_train_end(self, trainer, pl_module):
        next(pl_module.parameters()).data.view(-1)[0] *= 0.5


@pytest.mark.parametrize("make", [Halves, lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1)])
def test_weights_that_change_behind_it_are_marked(accelerator, make, tmp_path, recwarn):
    _, told = train(tmp_path, accelerator, make(), steps=-1, max_epochs=2, val_check_interval=12)
    assert is_marked(told, recwarn)


def test_a_resumed_training_ends_as_one_that_was_not_stopped(accelerator, tmp_path):
    whole, told = train(tmp_path / "whole", accelerator)
    saving = Checkpoint(tmp_path, save_last=True)
    train(tmp_path / "parts", accelerator, saving, steps=5, enable_checkpointing=True)
    resumed, again = train(tmp_path / "parts", accelerator, ckpt_path=tmp_path / "last.ckpt")
    # a dense backward on a GPU does not repeat bit for bit, and Adam's first steps make much of the smallest gradients
    first, one, other = (
        torch.cat([value.flatten() for value in model.state_dict().values()]) for model in (made(), whole, resumed)
    )
    assert (other - one).norm() < 0.02 * (one - first).norm()
    assert [each["step"] for each in again["validations"]] == [3, 5, 6, 8]
    assert again["final"]["loss"] == pytest.approx(told["final"]["loss"], rel=1e-4)
