"""The HPARAMS tab, asked of TensorBoard's own backend: settings, the validation loss, and what a resume changed."""

from __future__ import annotations

import pytest
import torch
from all_lighthouse import all_lighthouse
from foreign import ForeignModule, ResumableLoader, loader
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

from lightning_lighthouse import LighthouseCallback, LighthouseConfig

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)


def rows(folder):
    """The table of the tab: run -> (settings, metrics)."""
    multiplexer = EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    backend = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    asked, request = RequestContext(), api_pb2.ListSessionGroupsRequest(slice_size=100)
    request.allowed_statuses.extend([api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_RUNNING, api_pb2.STATUS_SUCCESS])
    experiment = get_experiment.Handler(asked, backend, "", api_pb2.GetExperimentRequest()).run()
    assert [info.name.tag for info in experiment.metric_infos] == ["val_hparams/val/loss"]
    groups = list_session_groups.Handler(asked, backend, "", request).run()
    found = {}
    for group in groups.session_groups:
        settings = {
            name: value.WhichOneof("kind") and getattr(value, value.WhichOneof("kind"))
            for name, value in group.hparams.items()
        }
        metrics = {value.name.tag: (value.training_step, value.value) for value in group.metric_values}
        found[group.sessions[0].name] = settings, metrics
    return found


def fit(folder, callbacks, ckpt_path=None, **settings):
    torch.manual_seed(0)
    model = ForeignModule()
    trainer = Trainer(
        default_root_dir=folder,
        callbacks=callbacks,
        max_steps=10,
        max_epochs=-1,
        val_check_interval=2,
        accelerator="cpu",
        logger=TensorBoardLogger(folder, name="", version="one"),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **settings,
    )
    trainer.fit(model, ResumableLoader(), loader(4, seed=1), ckpt_path=ckpt_path, weights_only=True)
    return model


def test_a_run_is_a_row_with_its_validation_loss(tmp_path):
    model = fit(tmp_path, [all_lighthouse(0.6, CONFIG)])
    table = rows(tmp_path)
    assert list(table) == ["one/dense"]
    settings, metrics = table["one/dense"]
    assert settings["lighthouse/switch_at"] == 0.6
    assert settings["lighthouse/switch_step"] == 6
    assert settings["lighthouse/top_k"] == 8
    assert settings["lighthouse/enabled"] is True
    step, loss = metrics["val_hparams/val/loss"]
    assert step == 10
    assert loss == pytest.approx(sum(model.validation_losses[-2:]) / 2, rel=1e-5)


def test_the_baseline_is_a_row_too(tmp_path):
    fit(tmp_path, [LighthouseCallback(0.6, CONFIG, enabled=False)])
    settings, metrics = rows(tmp_path)["one/dense"]
    assert settings == {"lighthouse/enabled": False}
    assert "val_hparams/val/loss" in metrics


@pytest.mark.filterwarnings("ignore:Lighthouse. the switch to dense")
def test_a_changed_switch_is_a_new_row(tmp_path):
    saving = ModelCheckpoint(tmp_path, save_top_k=-1, save_on_train_epoch_end=False)
    fit(tmp_path, [all_lighthouse(0.6, CONFIG), saving])
    path = next(tmp_path.glob("*step=4.ckpt"))
    # as it was: one row
    saving = ModelCheckpoint(tmp_path / "again", save_top_k=-1, save_on_train_epoch_end=False)
    fit(tmp_path, [all_lighthouse(0.6, CONFIG), saving], ckpt_path=path)
    assert list(rows(tmp_path)) == ["one/dense"]
    # changed: a second row, which stays the one of later resumes
    changed = ModelCheckpoint(tmp_path / "changed", save_top_k=-1, save_on_train_epoch_end=False)
    fit(tmp_path, [all_lighthouse(8, CONFIG), changed], ckpt_path=path)
    fit(tmp_path, [all_lighthouse(8, CONFIG)], ckpt_path=next((tmp_path / "changed").glob("*step=6.ckpt")))
    table = rows(tmp_path)
    assert sorted(table) == ["one/dense", "one/dense/from_step_4"]
    old, new = (table[name] for name in sorted(table))
    assert (old[0]["lighthouse/switch_step"], new[0]["lighthouse/switch_step"]) == (6, 8)
    assert new[1]["val_hparams/val/loss"][0] == 10
    # one file of events from each of the two fits
    assert len(list((tmp_path / "one/dense/from_step_4").iterdir())) == 2
