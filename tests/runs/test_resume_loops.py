"""A resumed Trainer counts as an unbroken one does, wherever the checkpoint was written, also when resumed again."""

from __future__ import annotations

import copy

import pytest
import torch
from foreign import ForeignModule, ResumableLoader, loader
from lightning.pytorch import Callback, Trainer

from lightning_lighthouse import LighthouseCallback, LighthouseConfig

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)


class Loader(ResumableLoader):
    """Five batches an epoch, for any number of epochs: a position at the end means the next beginning."""

    def __iter__(self):
        self.done %= len(self.batches)
        yield from super().__iter__()


class Module(ForeignModule):
    """Asks for the number of steps where schedules do."""

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=self.steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def steps(self):
        return int(self.trainer.estimated_stepping_batches)


class Log(Callback):
    """Each batch with all that counts it, and the epochs' hooks."""

    def __init__(self):
        self.batches, self.epochs = [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        total = trainer.fit_loop.epoch_loop.total_batch_idx
        counts = (total, batch_idx, trainer.current_epoch, trainer.global_step)
        self.batches.append((*counts, batch.sum().item(), pl_module.losses[-1]))

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append(("start", trainer.current_epoch, trainer.global_step))

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(("end", trainer.current_epoch, trainer.global_step))


class Save(Callback):
    """Keeps what would be written at each hook that checkpoints are written at, by hook and batch."""

    def __init__(self):
        self.kept = {}

    def keep(self, trainer, hook):
        if not trainer.fit_loop._should_accumulate():
            state = trainer._checkpoint_connector.dump_checkpoint()
            self.kept[hook, trainer.fit_loop.epoch_loop.total_batch_idx] = copy.deepcopy(state)

    def on_train_batch_end(self, trainer, *_):
        self.keep(trainer, "batch")

    def on_validation_end(self, trainer, *_):
        self.keep(trainer, "validation")

    def on_train_epoch_end(self, trainer, *_):
        self.keep(trainer, "epoch")


def fit(tmp_path, settings, kept=None):
    """A run, resumed from what was kept."""
    path = None
    if kept is not None:
        path = tmp_path / "kept.ckpt"
        torch.save(kept, path)
    log, save = Log(), Save()
    torch.manual_seed(0)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[log, LighthouseCallback(6, CONFIG, dense_layers=[]), save],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=2,
        default_root_dir=tmp_path,
        **settings,
    )
    trainer.fit(Module(layers=1), Loader(10, 2), loader(2), ckpt_path=path, weights_only=True)
    return log, save.kept


MODES = {
    "steps": {"max_steps": 12, "max_epochs": -1},
    "epochs": {"max_epochs": 3},
    "accumulated": {"max_steps": 8, "max_epochs": -1, "accumulate_grad_batches": 2},
}


@pytest.mark.parametrize("settings", MODES.values(), ids=MODES)
@pytest.mark.parametrize(
    "where",
    [
        [("epoch", 4), ("batch", 7)],
        [("batch", 3), ("epoch", 4)],
        pytest.param(None, marks=pytest.mark.slow),
    ],
    ids=lambda where: "everywhere" if where is None else " then ".join(f"{hook} {batch}" for hook, batch in where),
)
def test_counts_and_losses_are_those_of_an_unbroken_run(tmp_path, settings, where):
    whole, kept = fit(tmp_path, settings)

    def compare(kept, at):
        log, again = fit(tmp_path, settings, kept)
        assert log.batches == [line for line in whole.batches if line[0] > at[1]], at
        assert log.epochs == whole.epochs[len(whole.epochs) - len(log.epochs) :], at
        return again

    if where is not None:
        for at in where:
            if at not in kept:
                # inside an accumulation nothing is written
                at = next(other for other in kept if other[1] > at[1])
            kept = compare(kept[at], at)
        return
    for at, state in list(kept.items()):
        for second, later in list(compare(state, at).items())[:2]:
            compare(later, second)
