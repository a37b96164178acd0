"""What belongs to a run lies in its own folder, with every logger, and at an address as well as on a disk."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import fsspec
import pytest
import torch
from fitting import CONFIG, fit
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import Logger

from lightning_lighthouse import LighthouseCallback
from lightning_lighthouse.runs.checkpoint import Checkpoint
from lightning_lighthouse.runs.saving import SavingError, check_writable, is_remote, local_path

OURS = {"final.pt", "lighthouse.json"}


class Service(Logger):
    """As the loggers of W&B, MLflow and Comet: a name, a version, a folder of all runs, and no log_dir."""

    def __init__(self, save_dir, version):
        super().__init__()
        self.folder, self.number = save_dir, version

    @property
    def name(self):
        return "project"

    @property
    def version(self):
        return self.number

    @property
    def save_dir(self):
        return self.folder

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


def train(tmp_path, logger, **settings):
    callbacks = [LighthouseCallback(2, CONFIG), Checkpoint(save_last=True)]
    return fit(tmp_path, callbacks, logger=logger, enable_checkpointing=True, max_steps=3, **settings)


def written(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.name in {*OURS, "last.ckpt"}}


def test_two_runs_of_a_logger_with_one_folder_write_over_nothing(tmp_path):
    for version in ("a1", 7, None):
        train(tmp_path, Service(str(tmp_path / "runs"), version))
    versions = ("a1", "version_7", "version_None")
    expected = {f"project/{version}/{name}" for version in versions for name in (*OURS, "checkpoints/last.ckpt")}
    assert written(tmp_path / "runs") == expected


def test_a_service_without_a_folder_writes_below_the_root(tmp_path):
    train(tmp_path, Service(None, "a1"))
    assert written(tmp_path) == {f"project/a1/{name}" for name in (*OURS, "checkpoints/last.ckpt")}


@pytest.mark.parametrize("make", [TensorBoardLogger, CSVLogger])
def test_the_folder_of_lightnings_own_loggers_is_theirs(make, tmp_path):
    train(tmp_path, [make(str(tmp_path), name="runs", version="a1"), Service(str(tmp_path), "b")])
    assert written(tmp_path) == {f"runs/a1/{name}" for name in (*OURS, "checkpoints/last.ckpt")}


def test_without_a_logger_it_is_the_root(tmp_path):
    train(tmp_path, False)
    assert written(tmp_path) == {*OURS, "checkpoints/last.ckpt"}


@pytest.mark.parametrize("make", ["root", "service", "board"])
def test_an_address_is_written_through_fsspec(make, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    address = f"memory://{make}/runs"
    logger = {"root": False, "service": Service(address, "a1"), "board": None}[make]
    if make == "board":
        logger = TensorBoardLogger(address, name="project", version="a1")
    folder = address if make == "root" else f"{address}/project/a1"
    model, _ = train(address, logger)
    storage = fsspec.filesystem("memory")
    final = torch.load(io.BytesIO(storage.cat(f"{folder}/final.pt")), weights_only=True)
    assert all(torch.equal(final[name], value) for name, value in model.state_dict().items())
    assert json.loads(storage.cat(f"{folder}/lighthouse.json"))["steps"] == 3
    assert torch.load(io.BytesIO(storage.cat(f"{folder}/checkpoints/last.ckpt")), weights_only=True)["global_step"] == 3
    # no local folder named `memory:`
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("gone://bucket/runs", "Protocol not known: gone"),
        ("http://127.0.0.1:9/runs", ""),
        ("/proc/gone", "choose another folder"),
    ],
)
def test_what_cannot_be_written_to_is_refused_before_training(address, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def step(*_):
        raise AssertionError("trained")

    callback = LighthouseCallback(2, CONFIG)
    callback.on_train_batch_start = step
    with pytest.raises(SavingError) as caught:
        fit(tmp_path, [callback], logger=Service(address, "a1"), max_steps=3)
    line = str(caught.value)
    assert line.startswith(f"nothing can be written to {address}/project/a1: ")
    assert words in line
    assert "\n" not in line
    assert list(tmp_path.iterdir()) == []


def test_the_check_leaves_nothing(tmp_path):
    for folder in (tmp_path / "a" / "b", f"file://{tmp_path}/c", "memory://checked/d"):
        check_writable(folder)
    assert list(tmp_path.iterdir()) == []
    assert not fsspec.filesystem("memory").exists("memory://checked/d")


def test_local_paths_and_addresses_are_told_apart(tmp_path):
    assert not any(is_remote(path) for path in ("runs", tmp_path, "file:///runs", "local:///runs", "a:b", "..//x"))
    assert all(is_remote(path) for path in ("s3://bucket/runs", "memory:///runs", "gcs://b", "simplecache::s3://b/c"))
    assert local_path("file:///runs/a") == Path("/runs/a")
    assert local_path(os.path.join("runs", "a")) == Path("runs/a")
