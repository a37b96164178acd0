"""A Trainer with the callback, and the callback alone, are copied and pickled as a plain Trainer is."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from fitting import CONFIG, fit, trainer
from foreign import ForeignModule, ResumableLoader, loader
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_lighthouse import Documents, LighthouseCallback, PlateauRule

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda original: pickle.loads(pickle.dumps(original))}
copies = pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)


def callback(**settings):
    return LighthouseCallback(3, CONFIG, dense_layers=[], **settings)


class Told(ForeignModule):
    """Says what documents a batch has."""

    def documents(self, batch):
        return Documents([[100, 28]] * len(batch))


def losses(tmp_path, used):
    torch.manual_seed(0)
    model, _ = fit(tmp_path, [used], Told(), max_steps=5, val_check_interval=2, validation=loader(4))
    return model.losses, model.validation_losses


@copies
def test_a_copy_of_a_used_callback_trains_as_a_fresh_one(made, tmp_path):
    used = callback()
    fresh = losses(tmp_path, used)
    assert losses(tmp_path, made(used)) == fresh


@copies
def test_a_copied_trainer_goes_on_with_its_run(made, tmp_path):
    def goes_on(folder, copied):
        model, run = fit(folder, [callback()], max_steps=4, val_check_interval=2, validation=loader(4))
        run = copied(run)
        run.fit_loop.epoch_loop.max_steps = 7
        run.fit(model, ResumableLoader(), loader(4))
        report = json.loads((folder / "lighthouse.json").read_text())
        return model.losses, {name: (phase["steps"], phase["tokens"]) for name, phase in report["phases"].items()}

    original = goes_on(tmp_path / "original", lambda run: run)
    assert goes_on(tmp_path / "copy", made) == original
    assert [steps for steps, _ in original[1].values()] == [3, 4]


HOOKS = (
    "on_fit_start",
    "on_train_start",
    "on_train_batch_start",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_end",
    "on_train_end",
    "on_fit_end",
)


class Copies(Callback):
    """Copies the Trainer and the callback in every hook."""

    def __init__(self, made, used):
        self.made, self.used, self.found = made, used, {}
        for hook in HOOKS:
            setattr(self, hook, lambda trainer, *_, name=hook: self.copy(trainer, name))

    def copy(self, trainer, hook):
        trainer.callbacks.remove(self)
        self.made(trainer)
        trainer.callbacks.insert(0, self)
        self.found.setdefault(hook, self.made(self.used))


@copies
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rewarm_steps": 2, "return_steps": 2, "plateau": PlateauRule(), "documents": "ignore"},
        pytest.param({"documents": True}, marks=pytest.mark.slow),
        pytest.param({"enabled": False}, marks=pytest.mark.slow),
    ],
    ids=["default", "all", "documents", "dense"],
)
def test_a_copy_that_is_made_during_a_fit_has_nothing_of_it(made, settings, tmp_path):
    used = callback(**settings)
    probe = Copies(made, used)
    run = trainer(
        tmp_path,
        [probe, used, LearningRateFinder(num_training_steps=2, update_attr=False)],
        max_steps=5,
        val_check_interval=2,
        enable_progress_bar=True,
        logger=TensorBoardLogger(tmp_path),
    )
    run.fit(Told(), loader(), loader(4))
    assert set(probe.found) == set(HOOKS)
    for one in probe.found.values():
        assert one.phase_at(0) == "dense", "it belongs to no fit"
    fresh = losses(tmp_path, callback(**settings))
    assert losses(tmp_path, probe.found["on_train_batch_end"]) == fresh
