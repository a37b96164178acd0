"""Lightning's finders: their trials attend as the training, which is that of a run without a finder."""

from __future__ import annotations

import pytest
import torch
from all_lighthouse import all_lighthouse
from fitting import CONFIG, fit, trainer
from foreign import ForeignModule, SelfAttention, loader
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder

from lightning_lighthouse import LighthouseCallback


class Searched(ForeignModule):
    """Has a learning rate to be found; keeps whether each step was routed."""

    def __init__(self):
        super().__init__()
        self.lr, self.routed = 0.1, []

    def training_step(self, batch, batch_idx):
        layer = next(part for part in self.modules() if isinstance(part, SelfAttention))
        scope = vars(layer).get("_lighthouse_scope")
        self.routed.append(scope is not None and scope.is_on)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.lr)


def run(tmp_path, ours, is_first):
    torch.manual_seed(0)
    model, finder = Searched(), LearningRateFinder(num_training_steps=5, update_attr=False)
    callbacks = [ours, finder] if is_first else [finder, ours]
    trainer(tmp_path, callbacks, max_steps=6).fit(model, loader())
    assert "lr_find" not in vars(finder)
    assert not any("forward" in vars(part) for part in model.modules())
    return model


@pytest.mark.parametrize("is_first", [True, False], ids=["ours first", "theirs first"])
def test_the_trials_are_routed_and_the_training_is_that_of_no_finder(tmp_path, is_first):
    model = run(tmp_path, all_lighthouse(3, CONFIG), is_first)
    assert model.routed[:-6] == [True] * (len(model.routed) - 6)
    assert len(model.routed) > 6
    assert model.routed[-6:] == [True] * 3 + [False] * 3
    torch.manual_seed(0)
    plain, _ = fit(tmp_path / "plain", [all_lighthouse(3, CONFIG)], Searched(), data=loader(), max_steps=6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_a_dense_baseline_searches_densely(tmp_path):
    model = run(tmp_path, LighthouseCallback(3, CONFIG, enabled=False), is_first=True)
    assert not any(model.routed)


def test_a_batch_is_tried_where_the_training_needs_the_most_memory(tmp_path):
    class Sized(Searched):
        batch_size = 2
        # or Lightning asks for its data
        validation_step = None

        def train_dataloader(self):
            return loader(batch_size=self.batch_size)

    torch.manual_seed(0)
    model, finder = Sized(), BatchSizeFinder(steps_per_trial=1, max_trials=3)
    trainer(tmp_path, [finder, all_lighthouse(1, CONFIG)], max_steps=2).fit(model)
    assert model.routed == [False] * 3 + [True, False]
    assert "scale_batch_size" not in vars(finder)
