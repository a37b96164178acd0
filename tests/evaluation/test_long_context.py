"""LongContextEvaluation in a real Trainer: when, at which price, what it writes, and that it leaves no trace."""

from __future__ import annotations

import json
import re

import pytest
import torch
from all_lighthouse import all_lighthouse
from foreign import ForeignModule
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from long_contexts import Books
from resumable import ResumableBatches
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_lighthouse import LighthouseCallback, LighthouseConfig, LongContextEvaluation
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.evaluation.budget import Budget
from lightning_lighthouse.evaluation.charts import FIELD, HIGH, LOW, passkey_image
from lightning_lighthouse.evaluation.measures import Unit
from lightning_lighthouse.model import Decoder
from lightning_lighthouse.runs.evaluation_record import read_evaluations

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=32)
SWITCH, STEPS = 4, 6
# fast: no passkey, whose seven depths take most of the time
FAST = {"num_samples": 2, "passkey": False, "max_share": None}


class Model(Decoder):
    """Our decoder, small, with dropout; it keeps its losses."""

    def __init__(self, dropout: float = 0.5) -> None:
        torch.manual_seed(0)
        super().__init__(num_layers=2, dim=16, num_heads=2, ffn_dim=16, warmup_steps=1)
        self.dropout = nn.Dropout(dropout)
        self.losses: list[float] = []
        self.validation_losses: list[float] = []

    def hidden(self, tokens, positions=None):
        return self.dropout(super().hidden(tokens, positions))

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, batch_idx):
        self.validation_losses.append(self.loss(batch).item())
        super().validation_step(batch, batch_idx)


def fit(folder, callbacks, module=None, data=None, ckpt_path=None, **settings):
    module = module or Model()
    settings = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_steps": STEPS,
        "max_epochs": -1,
        "val_check_interval": 1,
        "check_val_every_n_epoch": None,
        "limit_val_batches": 4,
    } | settings
    trainer = Trainer(default_root_dir=folder, callbacks=callbacks, **settings)
    trainer.fit(module, datamodule=data or Books(), ckpt_path=ckpt_path)
    return module


def lighthouse(**settings) -> LighthouseCallback:
    return all_lighthouse(SWITCH, CONFIG, **settings)


def steps(evaluation: LongContextEvaluation) -> list[int]:
    return [result["step"] for result in evaluation.results]


@pytest.mark.parametrize(
    ("every", "callbacks", "expected"),
    [
        (4, [], [4, 6]),
        # the switch is before the first dense batch, and the end after the last
        (0, [lighthouse], [4, 6]),
        (5, [lighthouse], [4, 5, 6]),
        (2, [lambda: lighthouse(enabled=False)], [2, 4, 6]),
    ],
)
def test_when(tmp_path, every, callbacks, expected):
    for first in (True, False):
        evaluation = LongContextEvaluation(every, copies=False, lookups=False, context_gain=False, **FAST)
        others = [make() for make in callbacks]
        fit(tmp_path, [evaluation, *others] if first else [*others, evaluation])
        assert steps(evaluation) == expected
    phases = {result["step"]: result["phase"] for result in evaluation.results}
    if callbacks == [lighthouse]:
        assert (phases[4], phases[6]) == ("lighthouse", "dense")


def test_training_and_validation_do_not_notice(tmp_path):
    alone = fit(tmp_path, [lighthouse()])
    evaluation = LongContextEvaluation(1, own_mode=True, **FAST)
    evaluated = fit(tmp_path, [lighthouse(), evaluation])
    assert steps(evaluation) == [1, 2, 3, 4, 5, 6]
    assert evaluated.losses == alone.losses
    assert evaluated.validation_losses == alone.validation_losses
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), evaluated.parameters(), strict=True))
    assert all(part.training for part in evaluated.modules())


def test_the_rows_are_dense_and_those_of_the_phase_stand_beside_them(tmp_path):
    class Check(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 2:
                self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}

    evaluation, check = LongContextEvaluation(2, own_mode=True, **FAST), Check()
    fit(tmp_path, [lighthouse(), evaluation, check])
    early, _, last = evaluation.results
    assert early["own_mode"]["phase"] == "lighthouse"
    assert "own_mode" not in last
    dense, own = (rows["loss_by_position"] for rows in (early, early["own_mode"]))
    assert [row["position"] for row in dense] == [row["position"] for row in own] == [0, 64, 128]
    assert all(abs(a["value"] - b["value"]) > 1e-7 for a, b in zip(dense, own, strict=True))
    # under trainer.validate the same weights get the same dense rows
    model = Model()
    model.load_state_dict(check.weights)
    again = LongContextEvaluation(output=str(tmp_path / "again"), **FAST)
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[again], limit_val_batches=4)
    trainer.validate(model, datamodule=Books(), verbose=False)
    [found] = read_evaluations(tmp_path / "again")
    assert found["loss_by_position"] == early["loss_by_position"]
    assert found["copies"] == early["copies"]


def test_everything_is_written_where_people_and_scripts_look(tmp_path, caplog):
    task = tmp_path / "mine.jsonl"
    task.write_text('{"prompt": "the river ", "answer": "went"}\n')
    evaluation = LongContextEvaluation(
        0, lengths=[256, 1024], num_samples=2, max_share=None, own_tasks=[str(task)], seed=3
    )
    with caplog.at_level("INFO"):
        fit(tmp_path, [evaluation], logger=TensorBoardLogger(tmp_path, "run", "v"), limit_val_batches=12)
    folder = tmp_path / "run" / "v"
    content = json.loads((folder / "evaluation.json").read_text())
    assert content["version"] == 1
    [step] = content["steps"]
    assert (step["step"], step["phase"], step["num_samples"], step["lengths"]) == (STEPS, "dense", 2, [256, 1024])
    places = {"loss_by_position": "position", "context_gain": "length", "copies": "distance", "passkey": "depth"}
    for measure, place in {**places, "lookups": "length", "own_tasks": "task"}.items():
        assert step[measure]
        for row in step[measure]:
            assert {place, "value", "standard_error", "count", "beyond_training"} <= set(row)
    assert {row["length"] for row in step["passkey"]} == {256, 1024}
    # trained on 256 tokens
    for measure in ("passkey", "lookups"):
        assert all(row["beyond_training"] == (row["length"] > 256) for row in step[measure])
    assert [row["beyond_training"] for row in step["loss_by_position"]] == [False, False, False, True, True]
    assert not list(folder.glob("*.partial"))
    assert re.search(r"evaluation: step 6: passkey \d.\d\d; lookups .*; 2 samples, \d+.\d s", caplog.text)

    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    tags = events.Tags()
    scalars = {tag for tag in tags["scalars"] if tag.startswith("evaluation/")}
    assert {"evaluation/loss_by_position/0000512-0001024", "evaluation/copies/0000256"} <= scalars
    assert {"evaluation/passkey/0000256", "evaluation/lookups/0001024", "evaluation/context_gain/0000256"} <= scalars
    [point] = events.Scalars("evaluation/copies/0000256")
    [row] = [row for row in step["copies"] if row["distance"] == 256]
    assert (point.step, point.value) == (STEPS, pytest.approx(row["value"], rel=1e-5))
    [image] = events.Images("evaluation/passkey")
    assert (image.width, image.height) == (2 * FIELD, 7 * FIELD)
    from tensorboard.plugins.custom_scalar import layout_pb2

    [layout] = events.Tensors("custom_scalars__config__")
    parsed = layout_pb2.Layout.FromString(layout.tensor_proto.string_val[0])
    charts = {chart.title: list(chart.multiline.tag) for chart in parsed.category[0].chart}
    for title, measure in (("loss by position", "loss_by_position"), ("copies", "copies")):
        [pattern] = charts[title]
        assert sum(re.fullmatch(pattern, tag) is not None for tag in scalars) == len(step[measure])


def test_the_map_has_a_field_for_each_length_and_depth():
    rows = [{"length": n, "depth": d, "value": float(d == 50 and n == 2048)} for n in (1024, 2048) for d in (0, 50)]
    image = passkey_image(rows)
    assert image.shape == (3, 2 * FIELD, 2 * FIELD)
    middles = image[:, FIELD // 2 :: FIELD, FIELD // 2 :: FIELD]
    # from the top the depths, from the left the lengths
    assert torch.allclose(middles[:, 1, 1], torch.tensor(HIGH))
    assert all(torch.allclose(middles[:, i, j], torch.tensor(LOW)) for i, j in ((0, 0), (0, 1), (1, 0)))


def resumable_books() -> Books:
    return Books(ResumableBatches(Books().train_dataloader()))


def rows_of(results) -> list[dict]:
    return [{key: value for key, value in result.items() if "seconds" not in key} for result in results]


def test_an_evaluation_that_is_killed_loses_nothing(tmp_path):
    class Killed(LongContextEvaluation):
        def _measure(self, trainer, *others):
            if trainer.global_step == 4:
                self.on_sample = self.kill
            return super()._measure(trainer, *others)

        def kill(self, total):
            raise KeyError("killed")

    def made(kind):
        return [lighthouse(), kind(2, context_gain=False, lookups=False, **FAST)]

    whole_callbacks = made(LongContextEvaluation)
    whole = fit(tmp_path / "whole", whole_callbacks, Model(0.0), data=resumable_books())
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    with pytest.raises(KeyError, match="killed"):
        fit(tmp_path, [*made(Killed), saved], Model(0.0), data=resumable_books(), enable_checkpointing=True)
    # what was found before is whole
    assert [step["step"] for step in read_evaluations(tmp_path)] == [2]
    resumed_callbacks = made(LongContextEvaluation)
    checkpoint = tmp_path / "step=3.ckpt"
    # dropout draws numbers whose state is in no checkpoint
    resumed = fit(tmp_path, resumed_callbacks, Model(0.0), data=resumable_books(), ckpt_path=checkpoint)
    assert resumed.losses == whole.losses[3:]
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert rows_of(resumed_callbacks[1].results) == rows_of(whole_callbacks[1].results)
    assert [step["step"] for step in read_evaluations(tmp_path)] == [2, 4, 6]
    # a new run with the same callback starts anew, and a validation leaves its results alone
    fit(tmp_path, resumed_callbacks[1:], max_steps=2)
    assert steps(resumed_callbacks[1]) == [2]
    with pytest.raises(ValueError, match="state must have version 1, got 7"):
        LongContextEvaluation().load_state_dict({"version": 7})


def test_as_many_samples_are_taken_as_the_share_allows():
    budget = Budget(0.03)
    budget.pace = 0.001
    units = [Unit("copies", 500, 500, lambda *_: iter(())), Unit("own_tasks", 100, 100, lambda *_: iter(()), 5)]
    # own tasks take 0.5 s, a sample of the others 0.5 s; 3 % of 100 s are 3 s
    assert budget.affordable(units, 10, 1, 100.0, keeps_room=False) == (5, pytest.approx(3.0))
    # two samples, 1.5 s, are kept for the end
    assert budget.affordable(units, 10, 1, 100.0, keeps_room=True) == (2, pytest.approx(1.5))
    budget.spent = 1.0
    assert budget.affordable(units, 10, 1, 100.0, keeps_room=True)[0] == 0
    assert budget.affordable(units, 10, 1, 1000.0, keeps_room=True)[0] == 10
    # four ranks share the samples
    assert budget.affordable(units, 10, 4, 100.0, keeps_room=False)[0] == 10
    assert Budget(None).affordable(units, 10, 1, 0.0, keeps_room=True)[0] == 10
    later = Budget(0.03)
    later.load_state_dict(budget.state_dict())
    assert later.spent == 1.0
    assert later.elapsed >= budget.state_dict()["elapsed"] - 1


def test_what_costs_too_much_is_put_off_and_the_end_is_measured_all_the_same(tmp_path, caplog):
    evaluation = LongContextEvaluation(1, max_share=1e-6, passkey=False, num_samples=10)
    with caplog.at_level("INFO"):
        fit(tmp_path, [evaluation])
    assert steps(evaluation) == [STEPS]
    assert evaluation.results[0]["num_samples"] == 2
    assert evaluation.results[0]["seconds"] > 0
    assert "10 samples of each place would take more than 0.0% of the run's" in caplog.text
    assert "it is put off" in caplog.text


def test_lengths_that_the_text_does_not_fill_are_left_out_with_a_line(tmp_path):
    evaluation = LongContextEvaluation(0, lengths=[256, 5000], **FAST)
    with pytest.warns(match=r"lengths \[5000\] are left out: there are 1,028 tokens of validation text"):
        fit(tmp_path, [evaluation])
    assert evaluation.results[0]["lengths"] == [256]


@pytest.mark.parametrize(("num_samples", "line"), [(4, ""), (5, "the validation text holds 4 of 5 samples of 256")])
def test_samples_that_overlap_for_want_of_text_are_told_of(num_samples, line, tmp_path, recwarn):
    # four batches of 257 tokens
    evaluation = LongContextEvaluation(2, **FAST | {"num_samples": num_samples, "lookups": False, "copies": False})
    fit(tmp_path, [evaluation])
    told = [str(each.message) for each in recwarn if "samples of" in str(each.message)]
    assert len(told) == bool(line)
    assert not line or line in told[0]


def test_lengths_none_of_which_fits_end_no_training_and_the_one_measured_is_said(tmp_path):
    evaluation = LongContextEvaluation(0, lengths=[4000, 5000], **FAST)
    line = r"lengths \[4000, 5000\] are left out: there are 1,028 tokens of validation text; 1,027 tokens are measured"
    with pytest.warns(match=line):
        module = fit(tmp_path, [evaluation])
    assert len(module.losses) == STEPS
    assert evaluation.results[0]["lengths"] == [1027]


@pytest.mark.parametrize("max_share", [None, 0.5])
def test_lengths_that_hold_nothing_of_what_is_asked_for_do_not_end_the_training(tmp_path, max_share):
    asked = {"lengths": [8], "copies": False, "context_gain": False, "lookups": False, "loss_by_position": False}
    evaluation = LongContextEvaluation(num_samples=2, max_share=max_share, **asked)
    with pytest.warns(match=r"nothing is measured: what was asked for does not fit into lengths \[8\]"):
        module = fit(tmp_path, [evaluation])
    assert len(module.losses) == STEPS
    assert evaluation.results == []


def test_without_a_tokenizer_only_what_needs_one_is_left_out(tmp_path):
    class Numbers(Books):
        load_tokenizer = None

    evaluation = LongContextEvaluation(0, num_samples=2, max_share=None)
    with pytest.warns(match="passkey and lookups are left out: the data module names no tokenizer"):
        fit(tmp_path, [evaluation], data=Numbers())
    assert "passkey" not in evaluation.results[0]
    assert evaluation.results[0]["copies"]
    only = dict.fromkeys(("loss_by_position", "context_gain", "copies", "lookups"), False)
    with pytest.raises(SettingError, match="needs a tokenizer for passkey: set tokenizer"):
        fit(tmp_path, [LongContextEvaluation(**only)], data=Numbers())


def test_what_cannot_be_measured_is_refused_before_training(tmp_path):
    with pytest.raises(SettingError, match=r"give ForeignModule a method token_losses\(inputs, targets\)"):
        fit(tmp_path, [LongContextEvaluation()], ForeignModule())
    with pytest.raises(SettingError, match=r"own_tasks: nowhere\.jsonl cannot be read"):
        fit(tmp_path, [LongContextEvaluation(own_tasks=["nowhere.jsonl"])])
    evaluation = LongContextEvaluation(**FAST)
    with pytest.warns(match="without validation there is no text"):
        fit(tmp_path, [evaluation], limit_val_batches=0)
    assert not evaluation.results


OFF = dict.fromkeys(("loss_by_position", "context_gain", "copies", "passkey", "lookups"), False)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"every_n_validations": -1}, ValueError, "every_n_validations must be at least 0, got -1"),
        ({"lengths": 1024}, TypeError, "lengths must be a list of int or None, got 1024"),
        ({"lengths": [4]}, ValueError, r"lengths must be at least 8 tokens each, and one of them, got \[4\]"),
        ({"num_samples": 0}, ValueError, "num_samples must be at least 1, got 0"),
        ({"max_share": 3}, ValueError, "max_share must be above 0 and at most 1, got 3"),
        ({"passkey": 1}, TypeError, "passkey must be bool, got 1"),
        ({"tokenizer": "bytes"}, TypeError, r"tokenizer must have a method encode\(text\), got 'bytes'"),
        (OFF, ValueError, "one of the measures must be on, or own_tasks given"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        LongContextEvaluation(**settings)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # 12 batches an epoch, of which each has two validations
        ({"val_check_interval": 5, "check_val_every_n_epoch": 1}, [10, 22, 24]),
        # an epoch has none of its own, and the fourth batch is seen thrice
        ({"val_check_interval": 4, "check_val_every_n_epoch": None}, [8, 16, 24]),
        ({"val_check_interval": None, "check_val_every_n_epoch": 1}, [24]),
    ],
)
def test_validations_are_counted_from_the_batches(tmp_path, settings, expected):
    settings = {"max_steps": 24, "max_epochs": 2, **settings}
    off = dict.fromkeys(("context_gain", "copies", "lookups"), False)
    evaluation = LongContextEvaluation(2, **off, **FAST)
    fit(tmp_path, [evaluation], **settings)
    assert steps(evaluation) == expected


@pytest.mark.slow
def test_a_compiled_model_is_not_compiled_for_the_lengths_of_an_evaluation(tmp_path):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    counts = []
    for callbacks in ([], [LongContextEvaluation(**FAST)]):
        torch.compiler.reset()
        compiled.clear()
        module = Model()
        for block in module.blocks:
            block.compile(backend=backend, fullgraph=True, dynamic=False)
        fit(tmp_path, [lighthouse(), *callbacks], module)
        counts.append(len(compiled))
    assert counts[0] == counts[1] > 0
    assert len(callbacks[0].results) == 2
