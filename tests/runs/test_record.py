"""`lighthouse.json`: its keys, its sums, and that a resumed run's file tells of the whole run."""

from __future__ import annotations

import json
import math
import re
from importlib.util import find_spec

import pytest
import torch
import yaml
from all_lighthouse import all_lighthouse
from foreign import ForeignModule, ResumableLoader, loader
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from places import DOCS

from lightning_lighthouse import FutureLeakProbe, LighthouseCallback, LighthouseConfig, PlateauRule
from lightning_lighthouse.phases.ledger import Ledger, PhaseTotals, Validation
from lightning_lighthouse.runs.record import plain, settings
from lightning_lighthouse.training.stopwatch import Stopwatch

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)
TOKENS_OF_A_BATCH = 2 * 129


class WithLogits(ForeignModule):
    def forward(self, inputs):
        return self.model(inputs)


def fit(folder, callbacks, ckpt_path=None, **settings):
    torch.manual_seed(0)
    settings = {
        "max_steps": 10,
        "max_epochs": -1,
        "val_check_interval": 2,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    } | settings
    model = WithLogits()
    trainer = Trainer(default_root_dir=folder, callbacks=callbacks, **settings)
    trainer.fit(model, ResumableLoader(), loader(4, seed=1), ckpt_path=ckpt_path, weights_only=True)
    return model, trainer


def read(folder):
    def refuse(name):
        raise ValueError(f"{name} is no JSON")

    return json.loads((folder / "lighthouse.json").read_text(), parse_constant=refuse)


def test_the_report_of_a_run(tmp_path):
    model, _ = fit(tmp_path, [all_lighthouse(0.6, CONFIG)], logger=TensorBoardLogger(tmp_path))
    assert not list(tmp_path.rglob("*.partial"))
    report = json.loads(next(tmp_path.rglob("lighthouse.json")).read_text())
    assert next(tmp_path.rglob("lighthouse.json")).parent == next(tmp_path.rglob("final.pt")).parent
    assert report["version"] == 1
    assert report["settings"]["switch_at"] == 0.6
    assert report["settings"]["attention"]["top_k"] == 8
    assert report["settings"]["plateau"] is None
    assert (report["steps"], report["total_steps"], report["world_size"]) == (10, 10, 1)
    assert (report["switch"]["switch_step"], report["switch"]["switched"]) == (6, True)
    phases = report["phases"]
    assert [phases[phase]["steps"] for phase in ("lighthouse", "dense")] == [6, 4]
    assert [phases[phase]["tokens"] for phase in ("lighthouse", "dense")] == [
        6 * TOKENS_OF_A_BATCH,
        4 * TOKENS_OF_A_BATCH,
    ]
    assert all(phase["tokens_per_second"] > 0 for phase in phases.values())

    validations = report["validations"]
    assert [(v["step"], v["phase"]) for v in validations] == [
        (2, "lighthouse"),
        (4, "lighthouse"),
        (6, "lighthouse"),
        (8, "dense"),
        (10, "dense"),
    ]
    means = [sum(model.validation_losses[2 * i : 2 * i + 2]) / 2 for i in range(5)]
    assert [v["loss"] for v in validations] == pytest.approx(means, rel=1e-5)
    seconds = [v["seconds"] for v in validations]
    assert seconds == sorted(seconds)
    assert seconds[2] == pytest.approx(phases["lighthouse"]["seconds"])
    assert seconds[-1] == pytest.approx(sum(phase["seconds"] for phase in phases.values()))
    spike = report["spike"]
    assert spike == {"before": validations[2], "after": validations[3], "jump": spike["jump"]}
    assert spike["jump"] == pytest.approx(validations[3]["loss"] - validations[2]["loss"])
    assert report["device"] == {"name": "cpu", "peak_memory_mib": None, "peak_reserved_mib": None}
    assert report["versions"]["torch"] == torch.__version__
    # also of what is not there: without it something else ran
    for package in ("transformers", "liger-kernel"):
        is_there = find_spec(package.replace("-", "_")) is not None
        assert (report["versions"][package] is not None) is is_there


def test_the_report_of_the_baseline(tmp_path):
    fit(tmp_path, [LighthouseCallback(0.6, CONFIG, enabled=False)])
    report = read(tmp_path)
    assert report["switch"] is None
    assert report["spike"] is None
    assert report["probes"] == []
    assert [report["phases"][phase]["steps"] for phase in ("lighthouse", "dense")] == [0, 10]
    assert {v["phase"] for v in report["validations"]} == {"dense"}


@pytest.mark.parametrize("stop", [pytest.param(n, marks=() if n == 6 else pytest.mark.slow) for n in (4, 6, 8)])
def test_a_resumed_run_reports_the_whole_run(tmp_path, stop):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    # after validation: a run resumed from right before one goes on without it
    saving = ModelCheckpoint(parts, save_top_k=-1, save_on_train_epoch_end=False)
    fit(whole, [all_lighthouse(0.6, CONFIG), saving])
    fit(parts, [all_lighthouse(0.6, CONFIG)], ckpt_path=next(parts.glob(f"*step={stop}.ckpt")))
    reports = [read(whole), read(parts)]
    for report in reports:
        for phase in report["phases"].values():
            assert phase.pop("seconds") > 0
            phase.pop("tokens_per_second")
            phase.pop("waiting_share")
        for validation in report["validations"]:
            validation.pop("seconds")
        report.pop("spike")
    assert reports[0] == reports[1]


def test_a_dense_run_from_a_lighthouse_checkpoint_has_no_switch(tmp_path):
    rule = PlateauRule(patience=1)
    fit(
        tmp_path,
        [all_lighthouse(6, CONFIG), ModelCheckpoint(tmp_path, save_on_train_epoch_end=False)],
        max_steps=4,
    )
    arguments = {"enabled": False, "plateau": rule, "return_steps": 2, "rewarm_steps": 2}
    fit(tmp_path / "dense", [LighthouseCallback(0.6, CONFIG, **arguments)], ckpt_path=next(tmp_path.glob("*.ckpt")))
    report = read(tmp_path / "dense")
    assert report["switch"] is None
    assert [report["phases"][phase]["steps"] for phase in ("lighthouse", "dense")] == [4, 6]
    assert report["spike"]["before"]["step"] == 4


def keys(value, prefix=""):
    """Every key of a report as the page writes it."""
    if isinstance(value, dict):
        for name, item in value.items():
            inner = "*" if prefix == "phases." and name not in ("lighthouse", "dense") else name
            yield prefix + inner
            if prefix + inner in ("settings", "spike.before", "spike.after", "versions", "probes"):
                continue
            yield from keys(item, "phases.*." if prefix == "phases." else f"{prefix}{inner}.")
    elif isinstance(value, list) and value:
        yield from keys(value[0], prefix.removesuffix(".") + "[].")


def test_the_page_lists_every_key(tmp_path):
    fit(tmp_path, [all_lighthouse(0.6, CONFIG)])
    page = (DOCS / "use" / "switch.md").read_text()
    table = page.partition("## lighthouse.json")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    listed = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(listed) == len(set(listed))
    # groups of keys need no line of their own
    assert set(listed) == set(keys(read(tmp_path))) - {"phases", "device"}


def test_the_page_shows_the_settings_that_there_are():
    page = (DOCS / "use" / "switch.md").read_text()
    shown = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)[0])["lighthouse"]
    callback = LighthouseCallback(**shown | {"plateau": PlateauRule(**shown["plateau"])})
    assert callback.plateau == PlateauRule(earliest=0.5)
    told = settings(LighthouseCallback())
    assert (told["plateau"], told["return_steps"], told["rewarm_steps"]) == (None, 0, 0)


def test_the_jump_at_the_switch_is_told_once(tmp_path, caplog):
    with caplog.at_level("INFO"):
        fit(tmp_path, [all_lighthouse(0.6, CONFIG), FutureLeakProbe(num_batches=1, max_seconds=0.5)])
    report = read(tmp_path)
    probe = report["probes"][-1]
    assert probe["step"] == 6
    jump = report["spike"]["jump"]
    told = [line for line in caplog.messages if "dense validation loss after the switch" in line]
    assert len(told) == 1
    assert f"(step 8), {jump:+.4f} against the last before it (step 6)" in told[0]
    assert f"at step 6: {probe['lighthouse_loss']:.4f} in Lighthouse mode, {probe['dense_loss']:.4f} dense" in told[0]


def test_an_unknown_length_and_a_loss_that_is_not_finite_are_null():
    values = {"loss": math.nan, "rows": [(1, math.inf)], "settings": CONFIG}
    shown = json.loads(json.dumps(plain(values), allow_nan=False))
    assert shown["loss"] is None
    assert shown["rows"] == [[1, None]]
    assert shown["settings"]["num_levels"] == 2


def test_a_fast_dev_run_reports_nothing(tmp_path):
    fit(tmp_path, [all_lighthouse(0.9, CONFIG)], fast_dev_run=True, max_steps=-1)
    assert not list(tmp_path.rglob("*.json"))


def test_the_validations_around_the_switch():
    ledger = Ledger(validations=[Validation(step, 0.0, "lighthouse", 3.0 - step) for step in (1, 2)])
    assert ledger.after_switch is None
    ledger.validations += [Validation(3, 0.0, "dense", 5.0), Validation(4, 0.0, "dense", 1.0)]
    assert (ledger.before_switch.step, ledger.after_switch.step, ledger.last_validation.step) == (2, 3, 4)
    assert [v.step for v in ledger.validations_of_this_phase] == [3, 4]
    # a run that went back to Lighthouse
    ledger.validations.append(Validation(5, 0.0, "lighthouse", 1.0))
    assert [v.step for v in ledger.validations_of_this_phase] == [5]
    assert Ledger.from_state_dict(ledger.state_dict()) == ledger
    assert Ledger.from_state_dict({"lighthouse": {}, "dense": {}}).validations == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_queued_work_is_training_time():
    device = torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    for _ in range(3):
        matrix @ matrix
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    totals, stopwatch = PhaseTotals(), Stopwatch()
    stopwatch.start()
    start.record()
    for _ in range(300):
        matrix @ matrix
    end.record()
    stopwatch.stop(totals, "dense", 1)
    stopwatch.drain(totals, "dense", device)
    assert totals.seconds >= 0.95 * start.elapsed_time(end) / 1000
