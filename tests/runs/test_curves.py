"""What loggers get of a run: names, runs and marks in TensorBoard, columns in CSV, and WandB offline."""

from __future__ import annotations

import csv
import json
import os
from types import SimpleNamespace

import pytest
from all_lighthouse import all_lighthouse
from fitting import CONFIG, fit, module
from foreign import ForeignModule, loader
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_lighthouse import LighthouseCallback
from lightning_lighthouse.evaluation import LongContextEvaluation
from lightning_lighthouse.evaluation.charts import show
from lightning_lighthouse.runs.layout import layout, long_context_layout
from lightning_lighthouse.runs.switch_marks import GROWTH, SwitchMarks

SWITCH = 6
ALWAYS = {"train/loss", "train/grad_norm", "optim/lr", "perf/memory_gib", "selection/routed_share"}
# from the second batch of a phase on
TIMED = {"perf/tokens_per_second", "perf/step_seconds", "perf/data_wait_share", "perf/tflops"}
PYRAMID = {"selection/score_spread", "selection/top_k", "selection/entries_level_0", "selection/entries_level_1"}


class LogsTheSame(ForeignModule):
    """Logs a name of ours itself, as modules do, and validates."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss + 100)
        return loss


def train(folder, loggers, model=None, **settings):
    settings = {"validation": loader(4, seed=1), "val_check_interval": 3, "log_every_n_steps": 1} | settings
    return fit(folder, [all_lighthouse(SWITCH, CONFIG)], model or module(), logger=loggers, **settings)


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """A run with TensorBoard and CSV at once: its folder, and the rows of the CSV file."""
    folder = tmp_path_factory.mktemp("curves")
    loggers = [TensorBoardLogger(folder, name="", version="run"), CSVLogger(folder, name="", version="csv")]
    train(folder, loggers)
    with open(folder / "csv" / "metrics.csv") as file:
        return folder / "run", list(csv.DictReader(file))


def events(folder):
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    found.Reload()
    return found


def points(folder, tag):
    return [(event.step, event.value) for event in events(folder).Scalars(tag)]


def test_each_phase_has_every_curve(board):
    folder, _ = board
    lighthouse, dense = (set(events(folder / name).Tags()["scalars"]) for name in ("lighthouse", "dense"))
    assert lighthouse == ALWAYS | TIMED | PYRAMID
    assert dense == ALWAYS | TIMED | {"val_hparams/val/loss"}


def test_the_learning_rate_and_the_share_are_those_of_the_steps(board):
    folder, _ = board
    assert points(folder / "lighthouse", "optim/lr") == [(step, pytest.approx(1e-2)) for step in range(SWITCH + 1)]
    assert {value for _, value in points(folder / "lighthouse", "selection/routed_share")} == {1.0}
    assert {value for _, value in points(folder / "dense", "selection/routed_share")} == {0.0}


def test_what_joins_at_the_switch_and_what_does_not(board):
    folder, _ = board
    for tag in ("train/loss", "train/grad_norm", "optim/lr"):
        assert points(folder / "lighthouse", tag)[-1] == points(folder / "dense", tag)[0]
    assert points(folder / "lighthouse", "perf/step_seconds")[-1][0] == SWITCH - 1


def test_the_switch_is_a_line_on_every_chart_with_a_step_axis(board):
    folder, _ = board
    mark = events(folder / "switch to dense")
    charts = {tag for name in (".", "lighthouse") for tag in events(folder / name).Tags()["scalars"]}
    assert set(mark.Tags()["scalars"]) == charts
    assert "val/loss" in charts
    for tag in charts:
        values = [event.value for event in mark.Scalars(tag)]
        assert {event.step for event in mark.Scalars(tag)} == {SWITCH}
        assert max(values) > min(values)
    assert "switched from Lighthouse to dense attention" in str(events(folder / "dense").Tensors("phase/text_summary"))


def test_a_line_grows_with_what_comes_after_it_and_not_at_every_point():
    class Points(list):
        def add_scalar(self, tag, value, step):
            self.append((tag, value, step))

    drawn = Points()
    marks = SwitchMarks(lambda run: drawn)
    for value in (50.0, 2.0, 1.0, 2.0, float("nan")):
        marks.note("loss", value)
    marks.note("constant", 3.0)
    marks.mark("dense", 7)
    assert {point for point in drawn if point[0] == "constant"} == {("constant", 0.0, 7), ("constant", 3.0, 7)}
    before = len(drawn)
    marks.note("loss", 1 - GROWTH * 0.5)
    marks.note("new", 1.0)
    assert len(drawn) == before
    marks.note("loss", 70.0)
    assert set(drawn[before:]) == {("loss", 70.0, 7)}


def test_epoch_and_hyperparameters_are_behind_the_curves(board):
    folder, rows = board
    names = {
        tag.split("/")[0] for name in (".", "lighthouse", "dense") for tag in events(folder / name).Tags()["scalars"]
    }
    assert "epoch" not in names
    assert sorted(names) == ["optim", "perf", "selection", "train", "trainer", "val", "val_hparams"]
    # other loggers have it where Lightning puts it
    assert any(row["epoch"] for row in rows)


def test_one_layout_begins_with_the_training(board):
    folder, _ = board
    runs = [path for path in [folder, *folder.iterdir()] if path.is_dir() and path.name != "checkpoints"]
    written = [tensor for run in runs for tensor in layouts(run)]
    assert len(written) == 1
    categories = {category.title: [chart.title for chart in category.chart] for category in written[0].category}
    assert list(categories) == ["Training", "Lighthouse"]
    assert len(categories["Training"]) == 8
    losses = written[0].category[0].chart[0].multiline.tag
    assert list(losses) == ["train/loss$", "val/loss$", "val_loss$"]


def layouts(run):
    found = events(run)
    tags = [tag for tag in found.Tags()["tensors"] if "custom_scalars" in tag]
    tensors = [event.tensor_proto.string_val[0] for tag in tags for event in found.Tensors(tag)]
    return [layout_pb2.Layout.FromString(tensor) for tensor in tensors]


def test_the_layout_has_the_long_context_where_it_is_evaluated():
    trainer = SimpleNamespace(callbacks=[LighthouseCallback(), LongContextEvaluation()])
    assert list(layout(trainer, "val/loss", knows_peak=True)) == ["Training", "Lighthouse", "Long context"]
    assert "MFU" in layout(trainer, "val/loss", knows_peak=True)["Training"]
    assert "MFU" not in layout(trainer, "val/loss", knows_peak=False)["Training"]
    assert list(long_context_layout()) == ["Long context"]


@pytest.mark.parametrize("callbacks", [[LighthouseCallback()], []], ids=["beside the phases", "alone"])
def test_an_evaluation_leaves_the_layout_of_the_phases(tmp_path, callbacks):
    board = TensorBoardLogger(tmp_path, name="", version="run")
    trainer = SimpleNamespace(
        callbacks=callbacks, state=SimpleNamespace(fn="fit"), loggers=[board], is_global_zero=True
    )
    show(trainer, {"step": 1, "lookups": [{"length": 64, "value": 0.5}]})
    board.finalize("success")
    assert points(tmp_path / "run", "evaluation/lookups/0000064") == [(1, 0.5)]
    titles = [[category.title for category in found.category] for found in layouts(tmp_path / "run")]
    assert titles == ([] if callbacks else [["Long context"]])


def test_a_csv_file_has_the_same_names_and_the_phase(board):
    _, rows = board
    ours = [row for row in rows if row["phase"]]
    assert [int(row["step"]) for row in ours] == list(range(10))
    assert [float(row["phase"]) for row in ours] == [1.0] * SWITCH + [0.0] * (10 - SWITCH)
    assert set(rows[0]) >= ALWAYS | TIMED | PYRAMID | {"phase", "val/loss"}
    assert all(row["train/loss"] and row["train/grad_norm"] for row in ours)


def test_a_module_that_logs_our_name_keeps_it(tmp_path):
    loggers = [TensorBoardLogger(tmp_path, name="", version="run"), CSVLogger(tmp_path, name="", version="csv")]
    model, _ = train(tmp_path, loggers, model=LogsTheSame(), validation=None)
    with open(tmp_path / "csv" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["train/loss"]]
    # one value a step, its own
    assert [float(row["train/loss"]) for row in rows] == pytest.approx([loss + 100 for loss in model.losses])
    # TensorBoard has runs of ours for ours
    ours = dict(
        points(tmp_path / "run" / "lighthouse", "train/loss") + points(tmp_path / "run" / "dense", "train/loss")
    )
    assert [ours[step] for step in range(10)] == pytest.approx(model.losses, rel=1e-5)
    assert len(points(tmp_path / "run", "train/loss")) == 10


def test_wandb_offline_gets_the_same_names(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    logger = WandbLogger(save_dir=tmp_path, offline=True, project="curves")
    train(tmp_path, logger)
    summary = dict(logger.experiment.summary)
    wandb.finish()
    assert set(summary) >= ALWAYS | TIMED | {"phase", "val/loss", "trainer/global_step"}
    assert summary["phase"] == 0.0
    assert any(name.endswith(".wandb") for _, _, names in os.walk(tmp_path) for name in names)
    assert json.dumps(summary["train/loss"])
