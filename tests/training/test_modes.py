"""Ways to train that a Lightning user may combine with the callback: averages, several optimizers, low precision."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from foreign import ForeignModule, ResumableLoader
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_lighthouse import LighthouseCallback, LighthouseConfig
from lightning_lighthouse.attention.sdpa import stock_sdpa
from lightning_lighthouse.routing.scope import scopes

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    yield
    assert F.scaled_dot_product_attention is stock_sdpa


class Phases(Callback):
    """Of every batch: the step before it, and whether it is routed."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append((trainer.global_step, any(scope.is_on for scope in scopes)))


def fit(tmp_path, module, callbacks, **settings):
    settings = {"max_steps": 8, "max_epochs": -1} | settings
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=callbacks,
        **settings,
    )
    trainer.fit(module, ResumableLoader())
    return trainer


def foreign(kind=ForeignModule):
    torch.manual_seed(0)
    return kind()


class TwoOptimizers(ForeignModule):
    """Steps two optimizers by hand on every batch, or on every second one."""

    every = 1

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch) / self.every
        self.manual_backward(loss)
        if (batch_idx + 1) % self.every == 0:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
        self.losses.append(loss.item())

    def configure_optimizers(self):
        head = list(self.model.head.parameters())
        rest = [p for name, p in self.model.named_parameters() if not name.startswith("head.")]
        return [torch.optim.AdamW(rest, lr=1e-2), torch.optim.SGD(head, lr=1e-2)]


class EverySecondBatch(TwoOptimizers):
    every = 2


def test_two_optimizers_make_two_steps_a_batch(tmp_path):
    phases = Phases()
    with pytest.warns(UserWarning, match="optimizers"):
        fit(tmp_path, foreign(TwoOptimizers), [LighthouseCallback(4, CONFIG), phases])
    assert phases.seen == [(0, True), (2, True), (4, False), (6, False)]


def test_manual_accumulation_switches_between_steps(tmp_path):
    phases = Phases()
    with pytest.warns(UserWarning, match="optimizers"):
        fit(tmp_path, foreign(EverySecondBatch), [LighthouseCallback(4, CONFIG), phases])
    assert phases.seen[:5] == [(0, True), (0, True), (2, True), (2, True), (4, False)]


def test_averaged_weights_are_those_of_the_losses_seen(tmp_path):
    # the callback of Lightning keeps a deep copy of the module and swaps it in for validation and at the end
    plain = foreign()
    fit(tmp_path / "plain", plain, [LighthouseCallback(4, CONFIG)])

    averages = []

    class ByHand(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            now = copy.deepcopy(pl_module.state_dict())
            last = averages[-1] if averages else now
            averages.append({name: 0.5 * last[name] + 0.5 * value for name, value in now.items()})

    module = foreign()
    average = EMAWeightAveraging(decay=0.5)
    fit(tmp_path / "averaged", module, [LighthouseCallback(4, CONFIG), average, ByHand()])
    assert module.losses == plain.losses
    final = torch.load(tmp_path / "averaged" / "final.pt", weights_only=True)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(value, averages[-1][name], rtol=1e-4, atol=1e-5)
        assert torch.equal(final[name], value)
    x = torch.zeros(1, 64, dtype=torch.long)
    assert torch.equal(average._average_model.module.model(x), module.model(x))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_low_precision_and_accumulation_together(tmp_path, precision):
    module, phases = foreign(), Phases()
    settings = {"max_steps": 4, "precision": precision, "accumulate_grad_batches": 2}
    fit(tmp_path, module, [LighthouseCallback(2, CONFIG), phases], **settings)
    assert [routed for _, routed in phases.seen] == [True] * 4 + [False] * 4
    assert all(loss == loss and loss < 10 for loss in module.losses)
    assert module.model.head.weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
