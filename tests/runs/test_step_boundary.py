"""A checkpoint that is written inside a step resumes as one behind the step before, or is refused."""

from __future__ import annotations

import json

import pytest
import torch
from fitting import CONFIG, trainer
from foreign import ForeignModule, ResumableLoader, loader
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint

from lightning_lighthouse import LighthouseCallback
from lightning_lighthouse.runs import step_boundary
from lightning_lighthouse.runs.checkpoint import Checkpoint
from lightning_lighthouse.runs.saving import SavingError


class Module(ForeignModule):
    """Notes every batch that it trains, with the step."""

    def __init__(self):
        super().__init__(layers=1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.seen.append((self.global_step, batch.sum().item(), loss.item()))
        return loss

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Loader(ResumableLoader):
    """Five batches an epoch: a position at the end means the next beginning."""

    def __iter__(self):
        self.done %= len(self.batches)
        yield from super().__iter__()


class PlannedError(Exception):
    """The fault of the test."""


class Fail(Callback):
    """Raises at the first call of a hook when so many batches have begun."""

    def __init__(self, hook, batch):
        setattr(self, hook, self.strike)
        self.batch = batch

    def strike(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch and not trainer.sanity_checking:
            raise PlannedError


def run(tmp_path, *callbacks, ckpt_path=None, **settings):
    torch.manual_seed(0)
    model = Module()
    settings = {"max_steps": 8, "val_check_interval": 4, "enable_checkpointing": True} | settings
    one = trainer(tmp_path, [*callbacks, LighthouseCallback(5, CONFIG, dense_layers=[])], **settings)
    error = None
    try:
        one.fit(model, Loader(10), loader(2), ckpt_path=ckpt_path, weights_only=True)
    except PlannedError as planned:
        error = planned
    return model.seen, error


WRITERS = {
    "OnExceptionCheckpoint": lambda folder: OnExceptionCheckpoint(folder, "saved"),
    "save_on_exception": lambda folder: ModelCheckpoint(folder, save_on_exception=True, every_n_epochs=100),
}


def saved(folder):
    return max(folder.glob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)


def compare(tmp_path, fail, writer, **settings):
    """Break a run, resume it from what the exception wrote, and compare every batch that trained."""
    whole, _ = run(tmp_path / "whole", **settings)
    first, error = run(tmp_path / "a", fail, WRITERS[writer](tmp_path / "saved"), **settings)
    assert error is not None
    second, error = run(tmp_path / "a", ckpt_path=saved(tmp_path / "saved"), **settings)
    assert error is None
    return whole, first, second


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("hook", "batch"),
    [
        ("on_train_batch_start", 3),
        pytest.param("on_before_backward", 2, marks=pytest.mark.slow),
        # the first of an epoch, and behind a validation
        ("on_before_backward", 5),
        ("on_after_backward", 7),
        ("on_train_batch_end", 3),
        pytest.param("on_train_batch_end", 4, marks=pytest.mark.slow),
        pytest.param("on_validation_batch_start", 3, marks=pytest.mark.slow),
        ("on_validation_end", 3),
        pytest.param("on_train_epoch_start", 4, marks=pytest.mark.slow),
    ],
)
def test_the_batch_of_an_exception_is_trained_when_the_run_goes_on(writer, hook, batch, tmp_path):
    whole, first, second = compare(tmp_path, Fail(hook, batch), writer)
    # what the broken step has begun is begun anew
    assert second == whole[len(whole) - len(second) :]
    assert first[: len(whole) - len(second)] + second == whole


@pytest.mark.parametrize("batch", [2, 3, 4, 6])
@pytest.mark.parametrize("hook", ["on_before_backward", "on_train_batch_end"])
def test_so_are_all_batches_of_an_accumulated_step(hook, batch, tmp_path):
    settings = {"accumulate_grad_batches": 2, "max_steps": 6}
    whole, _, second = compare(tmp_path, Fail(hook, batch), "OnExceptionCheckpoint", **settings)
    assert second == whole[len(whole) - len(second) :]
    steps = [step for step, *_ in second]
    # it begins with the first batch of a step
    assert steps.count(steps[0]) == [step for step, *_ in whole].count(steps[0])


def test_the_best_of_a_validation_inside_a_step_can_be_resumed(tmp_path):
    settings = {"accumulate_grad_batches": 3, "max_steps": 4, "val_check_interval": 2}
    best = ModelCheckpoint(
        tmp_path / "saved", monitor="val/loss", save_top_k=-1, filename="{step}", save_on_train_epoch_end=False
    )
    whole, _ = run(tmp_path / "a", best, **settings)
    files = list((tmp_path / "saved").glob("*.ckpt"))
    # an epoch is a step of three batches and one of two, and is validated behind its second and fourth batch
    assert {file.name for file in files} == {f"step={step}.ckpt" for step in (1, 2, 3, 4)}
    for file in files:
        again, _ = run(tmp_path / "b", ckpt_path=file, **settings)
        assert again == whole[len(whole) - len(again) :], file


def test_a_fetched_batch_that_never_reaches_the_device_is_not_lost(tmp_path):
    class Transfer(Callback):
        def setup(self, trainer, pl_module, stage):
            move = trainer.strategy.batch_to_device

            def fail(batch, *args, **kwargs):
                if trainer.training and trainer.global_step == 3:
                    raise PlannedError
                return move(batch, *args, **kwargs)

            trainer.strategy.batch_to_device = fail

    whole, first, second = compare(tmp_path, Transfer(), "OnExceptionCheckpoint")
    assert first + second == whole


def test_nor_is_the_first_batch_of_a_run(tmp_path):
    # save_on_exception writes nothing before the first step
    whole, _, second = compare(tmp_path, Fail("on_before_backward", 0), "OnExceptionCheckpoint")
    assert second == whole


class Broken(Module):
    """Whose optimizer dies in its third update, when some weights are changed and others are not."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        if self.global_step == 3:
            optimizer.register_step_post_hook(self.fail)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    def fail(self, *_):
        raise PlannedError


def test_weights_in_the_middle_of_an_update_are_not_saved(tmp_path):
    callbacks = [OnExceptionCheckpoint(tmp_path), LighthouseCallback(5, CONFIG, dense_layers=[])]
    one = trainer(tmp_path, callbacks, enable_checkpointing=True)
    with pytest.raises(SavingError, match="the weights are in the middle of an update"):
        one.fit(Broken(), Loader(10))
    assert not list(tmp_path.glob("*.ckpt"))


class Saves(Callback):
    """Saves by hand where it should not."""

    def __init__(self, path, **options):
        self.path, self.options = path, options

    def on_before_backward(self, trainer, *_):
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path, **self.options)


def test_a_save_by_hand_inside_a_step_is_refused_with_a_way_out(tmp_path):
    with pytest.raises(SavingError, match="save in on_train_batch_end or later, or give save_checkpoint weights_only"):
        run(tmp_path, Saves(tmp_path / "a.ckpt"))
    assert not (tmp_path / "a.ckpt").exists()
    run(tmp_path, Saves(tmp_path / "b.ckpt", weights_only=True))
    assert (tmp_path / "b.ckpt").exists()


class Stop(Callback):
    """Ends the training between the batches of a step."""

    def on_train_batch_end(self, trainer, *_):
        # the third one of the second epoch
        if trainer.fit_loop.epoch_loop.total_batch_idx == 7:
            trainer.should_stop = True


def test_a_training_that_ends_inside_a_step_is_saved_behind_the_step_before(tmp_path):
    settings = {"accumulate_grad_batches": 2, "max_steps": 5, "val_check_interval": 1.0}
    whole, _ = run(tmp_path / "whole", **settings)
    last = Checkpoint(dirpath=tmp_path / "saved", save_last=True, save_top_k=0, every_n_train_steps=100)
    run(tmp_path / "a", Stop(), last, **settings, min_epochs=0)
    file = tmp_path / "saved" / "last.ckpt"
    assert torch.load(file, weights_only=True)["global_step"] == 4
    second, _ = run(tmp_path / "a", ckpt_path=file, **settings)
    assert second == [batch for batch in whole if batch[0] >= 4]


class Requeue(Callback):
    """Saves where a signal strikes, as Lightning does under SLURM."""

    def __init__(self, path):
        self.path = path

    def on_before_backward(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.total_batch_idx == 3:
            trainer.save_checkpoint(self.path, weights_only=False)


def test_a_job_that_is_requeued_goes_on_behind_the_step_before(tmp_path, monkeypatch):
    monkeypatch.setattr(step_boundary, "_is_requeued", lambda trainer: True)
    whole, _ = run(tmp_path / "whole", Requeue(tmp_path / "requeued.ckpt"))
    second, _ = run(tmp_path / "a", ckpt_path=tmp_path / "requeued.ckpt")
    assert second == [batch for batch in whole if batch[0] >= 3]


class SaveEarly(Callback):
    """Saves when a whole step is about to be taken, so many batches into the training."""

    def __init__(self, path, batch):
        self.path, self.batch = path, batch

    def on_before_optimizer_step(self, trainer, *_):
        if trainer.fit_loop.epoch_loop.total_batch_idx == self.batch:
            trainer.save_checkpoint(self.path, weights_only=False)


def report(folder):
    """What each phase counted, and the validations, of the report that a run leaves."""
    whole = json.loads((folder / "lighthouse.json").read_text())
    names = ("steps", "tokens", "routed_calls", "dense_calls")
    counts = {phase: [totals[name] for name in names] for phase, totals in whole["phases"].items()}
    return counts, [(one["step"], one["phase"], one["loss"]) for one in whole["validations"]]


# steps of three batches and of two, and a validation behind every second batch
@pytest.mark.parametrize("batch", [4, 7, 9])
def test_what_was_counted_inside_a_step_counts_once(batch, tmp_path):
    settings = {"accumulate_grad_batches": 3, "max_steps": 4, "val_check_interval": 2}
    save = SaveEarly(tmp_path / "saved.ckpt", batch)
    whole, _ = run(tmp_path / "whole", save, **settings)
    second, _ = run(tmp_path / "a", ckpt_path=save.path, **settings)
    assert second == whole[len(whole) - len(second) :]
    assert report(tmp_path / "a") == report(tmp_path / "whole")


def test_averaged_weights_at_the_end_are_not_those_that_a_run_goes_on_from(tmp_path):
    """The last step is behind the last validation, so that one more comes when the average is in the model."""
    last = Checkpoint(dirpath=tmp_path / "saved", save_last=True, save_top_k=0, every_n_train_steps=100)
    run(tmp_path / "a", EMAWeightAveraging(decay=0.9), last, max_steps=7)
    content = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)
    assert content["global_step"] == 7
    average, own = content["state_dict"], content["current_model_state"]
    assert any(not torch.equal(average[name], own[name]) for name in average)
