"""The time that a training waits for its data, with loaders as slow as the test says."""

from __future__ import annotations

import json
import logging
import time
from collections import namedtuple
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from foreign import ForeignModule, Sequences, loader
from lightning.pytorch import Trainer
from lightning.pytorch.profilers import SimpleProfiler
from torch.utils.data import DataLoader, IterableDataset

from lightning_lighthouse import LighthouseCallback, LighthouseConfig
from lightning_lighthouse.training.stopwatch import count_tokens

NAP = 0.1
CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)


class Slow(Sequences):
    """Sequences that take their time."""

    def __getitem__(self, index):
        time.sleep(NAP)
        return super().__getitem__(index)


class SlowStream(IterableDataset):
    """The same without a length, which Lightning reads one batch ahead."""

    def __iter__(self):
        slow = Slow(12)
        return (slow[index] for index in range(len(slow)))


class Thorough(ForeignModule):
    """A module that takes its time, so that what a busy machine adds to a quick fetch is little beside it."""

    def training_step(self, batch, batch_idx):
        time.sleep(NAP)
        return super().training_step(batch, batch_idx)


def train(folder, data, module=None, **settings):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=10,
        callbacks=[LighthouseCallback(5, CONFIG)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **settings,
    )
    trainer.fit(module or ForeignModule(), data, loader(2, seed=1))
    return trainer, json.loads((folder / "lighthouse.json").read_text())["phases"]


@pytest.mark.parametrize("data", [Slow(12), SlowStream()], ids=["sized", "stream"])
def test_a_slow_loader_shows(tmp_path, caplog, data):
    with caplog.at_level(logging.INFO):
        _, phases = train(tmp_path, DataLoader(data, batch_size=1))
    for phase in phases.values():
        # four of five batches count; a nap ends late, never early
        tokens = phase["tokens"] * 4 / 5
        waited = phase["waiting_share"] * tokens / phase["tokens_per_second"]
        assert 4 * NAP <= waited < 8 * NAP
        assert phase["waiting_share"] < 1
    assert caplog.text.count("% of it waiting for data") == 2


def test_a_fast_loader_hardly_shows(tmp_path):
    _, phases = train(tmp_path, loader(12, seed=1), Thorough())
    assert all(0 < phase["waiting_share"] < 0.2 for phase in phases.values())


def test_the_profiler_of_the_user_goes_on_and_is_left_as_it_was(tmp_path):
    profiler = SimpleProfiler()
    before = set(vars(profiler))
    trainer, _ = train(tmp_path, loader(12, seed=1), profiler=profiler)
    assert trainer.profiler is profiler
    assert set(vars(profiler)) - before <= {"_lightning_module"}
    assert len(profiler.recorded_durations["[_TrainingEpochLoop].train_dataloader_next"]) >= 10


IDS = torch.zeros(2, 1021, dtype=torch.long)


@dataclass(frozen=True)
class Frozen:
    mask: torch.Tensor
    input_ids: torch.Tensor


BATCHES = {
    "a tensor": IDS,
    "a tuple": (IDS,),
    "ids and labels": {"input_ids": IDS, "labels": IDS},
    "positions for each axis": {"input_ids": IDS, "position_ids": torch.zeros(3, 2, 1021, dtype=torch.long)},
    "positions beside nothing that is named": [IDS, torch.zeros(3, 2, 1021, dtype=torch.long)],
    "several targets a token": {"x": IDS, "y": torch.zeros(2, 1021, 4, dtype=torch.long)},
    "a mask of pairs": {"x": IDS, "mask": torch.ones(2, 1, 1021, 1021, dtype=torch.bool)},
    "a mask of tokens": {"x": IDS, "mask": torch.ones(2, 5000, dtype=torch.bool)},
    "images": {"x": IDS, "pixels": torch.zeros(2, 3, 37, 37, dtype=torch.uint8)},
    "bytes": IDS.to(torch.uint8),
    "in a mapping": {"text": {"tokens": IDS}, "weight": torch.ones(2, 9999)},
    "a named tuple": namedtuple("Batch", "ids weight")(IDS, torch.ones(2, 9999)),
    "attributes": SimpleNamespace(input_ids=IDS),
    "a frozen record": Frozen(torch.ones(2, 5000, dtype=torch.long), IDS),
    "several tokens a place, and nothing else": torch.zeros(2, 1021, 1, dtype=torch.long),
}


@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
def test_tokens_are_counted_and_not_what_stands_beside_them(batch):
    assert count_tokens(batch) == 2 * 1021


def test_a_batch_without_tokens_counts_none():
    assert count_tokens({"x": torch.ones(2, 3), "name": "text"}) == 0
    assert count_tokens(None) == 0
