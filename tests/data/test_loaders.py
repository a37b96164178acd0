"""Loaders that Lightning makes anew within a run: for options of Trainer, for finders, for strategies."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from recorded import Recorder, fit, name_of, trainer
from warned import own_warnings

from lightning_lighthouse import LighthouseRecipe
from lightning_lighthouse.data.preparing.prepare import prepare

SEQ_LEN = 127


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of many lengths, no two sequences alike."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rng = np.random.default_rng(42)
    documents = (bytes(rng.integers(32, 127, size=rng.integers(1, 500), dtype=np.uint8)).decode() for _ in range(97))
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


@pytest.fixture(scope="module")
def prepared(text: Path) -> str:
    """The same, prepared."""
    prepare(str(text.parent / "prepared"), seq_len=SEQ_LEN, source=str(text), validation_fraction=0.2)
    return str(text.parent / "prepared")


def recipe(source: str, **options: Any) -> LighthouseRecipe:
    return LighthouseRecipe(**{"seq_len": SEQ_LEN, "source": source, "num_workers": 0, "batch_size": 3, **options})


@pytest.mark.parametrize("every", [1, 2])
def test_loaders_made_anew_change_no_batch(prepared: str, tmp_path: Path, every: int) -> None:
    plain = fit(recipe(prepared), max_epochs=4)
    options = {"reload_dataloaders_every_n_epochs": every, "max_epochs": 4}
    reloaded = fit(recipe(prepared), tmp_path / "steps", **options)
    assert reloaded.seen == plain.seen
    batches = len(plain.seen) // 4
    for step in (1, batches - 1, batches, batches + 1, 2 * batches, 3 * batches - 1):
        resumed = fit(recipe(prepared), resume=tmp_path / "steps" / f"step={step}.ckpt", **options)
        assert resumed.seen == plain.seen[step:], f"resumed at step {step} of {batches} an epoch"


def test_a_second_fit_goes_on_with_the_next_epoch(prepared: str) -> None:
    plain = fit(recipe(prepared), max_epochs=3)
    model, data, one = Recorder(), recipe(prepared), trainer(max_epochs=1)
    one.fit(model, datamodule=data)
    one.fit_loop.max_epochs = 3
    one.fit(model, datamodule=data)
    assert model.seen == plain.seen


@pytest.mark.parametrize("num_batches", [2, 0.25])
def test_overfitting_shows_the_same_batches_in_each_epoch(prepared: str, num_batches: int | float) -> None:
    data = recipe(prepared)
    model = fit(data, overfit_batches=num_batches)
    count = num_batches if isinstance(num_batches, int) else int(data._sequences("train") // 3 * num_batches)
    # the first ones, in the order in which they are stored
    stored = [name_of(batch["tokens"]) for _, batch in zip(range(count), data._loader("train"), strict=False)]
    assert model.seen == stored * 3
    assert model.validated > 0


def test_a_dry_run_takes_one_batch_of_each(prepared: str) -> None:
    model = fit(recipe(prepared), fast_dev_run=True)
    assert (len(model.seen), model.validated) == (1, 3)
    assert fit(recipe(prepared), limit_val_batches=0, max_epochs=1).validated == 0


@pytest.mark.parametrize("mode", ["power", pytest.param("binsearch", marks=pytest.mark.slow)])
def test_a_finder_of_batch_sizes_stops_at_the_data(prepared: str, tmp_path: Path, mode: str) -> None:
    data = recipe(prepared)
    most = data._sequences("validation")
    finder = BatchSizeFinder(mode=mode, steps_per_trial=1, max_trials=6, margin=0)
    one = trainer(max_epochs=1, default_root_dir=tmp_path)
    one.callbacks.append(finder)
    model = Recorder()
    with own_warnings() as lines:
        one.fit(model, datamodule=data)
    # it is no resume
    assert not [line for line in lines if "resumed with" in line]
    assert 2 < most < data._sequences("train")
    assert data.batch_size == most
    assert one.global_step == data._sequences("train") // most
    assert not list(tmp_path.iterdir())
    # what was found can be asked for
    recipe(prepared, batch_size=most).setup("fit")


def test_a_finder_of_rates_changes_no_batch(prepared: str, tmp_path: Path) -> None:
    plain = fit(recipe(prepared), max_epochs=2)
    model = Recorder()
    model.lr = 1e-3
    one = trainer(max_epochs=2, default_root_dir=tmp_path)
    one.callbacks.append(LearningRateFinder(num_training_steps=len(plain.seen) // 2 + 3, early_stop_threshold=None))
    one.fit(model, datamodule=recipe(prepared))
    assert model.seen[-len(plain.seen) :] == plain.seen


@pytest.mark.parametrize("num_workers", [0, 2])
def test_processes_that_share_a_model_read_the_same(prepared: str, monkeypatch: Any, num_workers: int) -> None:
    """Four processes, two of each model, as a strategy says it: each pair reads the same half, also when resumed."""

    def loader(rank: int) -> Any:
        monkeypatch.setenv("GLOBAL_RANK", str(rank))
        data = recipe(prepared, batch_size=2, num_workers=num_workers)
        data.trainer = trainer()
        monkeypatch.setattr(
            type(data.trainer), "distributed_sampler_kwargs", {"num_replicas": 2, "rank": rank // 2}, raising=True
        )
        data.setup("fit")
        return data.train_dataloader()

    # litdata reads these to find out its rank
    monkeypatch.setenv("WORLD_SIZE", "4")
    seen = [[name_of(batch["tokens"]) for batch in loader(rank)] for rank in range(4)]
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]
    assert not set(seen[0]) & set(seen[2])
    first = loader(0)
    begun = iter(first)
    assert [name_of(next(begun)["tokens"]) for _ in range(3)] == seen[0][:3]
    state = first.state_dict()
    assert state["dataset"]["world_size"] == 2
    for rank in range(4):
        # rank 0's position serves all
        resumed = loader(rank)
        resumed.load_state_dict(copy.deepcopy(state))
        assert [name_of(batch["tokens"]) for batch in resumed] == seen[rank][3:]
