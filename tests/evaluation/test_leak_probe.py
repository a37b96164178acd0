"""FutureLeakProbe in a real Trainer: what it measures, when, at which price, and that it leaves no trace."""

from __future__ import annotations

import csv
import json

import pytest
import torch
import torch.nn.functional as F
from all_lighthouse import all_lighthouse
from foreign import ForeignModule, SelfAttention, Sequences
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from probing import CAUSAL, CONFIG, SWITCH, TOKENS, Module, fit, lighthouse, loader, steps
from resumable import ResumableBatches
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from lightning_lighthouse import FutureLeakProbe, LighthouseCallback, Phase, patch_attention
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.phases.plateau import PlateauRule


def test_without_a_leak_the_difference_is_zero_bit_for_bit_and_with_one_it_is_not(tmp_path):
    found = {}
    for config in (CAUSAL, CONFIG):
        probe = FutureLeakProbe(many_positions=False, max_stderr=1e-9, max_seconds=60, max_total_seconds=999)
        fit(tmp_path, [lighthouse(config), probe], validation=loader(4, seed=1, tokens=40))
        assert steps(probe) == [2, 4, 6]
        # 4 sequences of 20 windows, whose last tokens are not tested
        assert {result.num_positions for result in probe.results} == ({32} if config is CAUSAL else {80})
        found[config.selection] = {(result.leak_nats, result.leak_stderr) for result in probe.results}
    assert found["causal"] == {(0.0, 0.0)}
    assert all(stderr > 0 for _, stderr in found["published"])


def test_many_positions_of_a_sequence_read_zero_within_noise_without_a_leak(tmp_path):
    probe = FutureLeakProbe(max_stderr=1e-9)
    fit(tmp_path, [lighthouse(CAUSAL), probe])
    for result in probe.results:
        # earlier stretches of other text remain as noise
        assert 0 < result.leak_stderr < 0.05
        assert abs(result.leak_nats) < 4 * result.leak_stderr


def test_the_losses_are_those_of_the_two_phases_on_the_validation_text(tmp_path):
    class Check(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == SWITCH:
                clone = Module().eval()
                clone.load_state_dict(pl_module.state_dict())
                text = Sequences(8, TOKENS, seed=1).tokens
                with torch.no_grad():
                    self.dense = clone.loss(text).item()
                    patch = patch_attention(clone, CONFIG)
                    patch.on(inference=True)
                    self.lighthouse = clone.loss(text).item()
                    patch.restore()

    probe, check = FutureLeakProbe(), Check()
    module = fit(tmp_path, [lighthouse(), probe, check], Module(dropout=0.5))
    last = probe.results[-1]
    assert last.step == SWITCH
    assert last.dense_loss == pytest.approx(check.dense, rel=1e-6)
    assert last.lighthouse_loss == pytest.approx(check.lighthouse, rel=1e-6)
    assert last.lighthouse_loss != pytest.approx(last.dense_loss, rel=1e-5)
    assert last.spike_nats == pytest.approx(last.dense_loss - last.lighthouse_loss)
    # what the Trainer's own dense validation found there
    assert last.dense_loss == pytest.approx(sum(module.validation_losses[2 + 2 * 4 :][:4]) / 4, rel=1e-6)


@pytest.mark.parametrize("first", [True, False], ids=["probe first", "probe last"])
def test_training_and_validation_do_not_notice(tmp_path, first):
    # dropout draws random numbers, in training alone
    alone = fit(tmp_path, [lighthouse()], Module(dropout=0.5))
    callbacks = [lighthouse(), FutureLeakProbe(every_n_steps=1)]
    probed = fit(tmp_path, callbacks[::-1] if first else callbacks, Module(dropout=0.5))
    assert callbacks[1].results
    assert probed.losses == alone.losses
    assert probed.validation_losses == alone.validation_losses
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), probed.parameters(), strict=True))
    assert probed.training
    assert all(part.training for part in probed.modules())


class DroppingAttention(SelfAttention):
    """Routed in evaluation alone: Lighthouse has no dropout."""

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        rate = 0.1 if self.training else 0.0
        return self.out(F.scaled_dot_product_attention(q, k, v, None, rate, True).transpose(1, 2).flatten(2))


def test_what_a_probe_routes_does_not_hide_a_training_batch_that_stayed_dense(tmp_path):
    module = Module()
    for block in module.model.blocks:
        block.attn = DroppingAttention(16, 2)
    # the probe's hook comes before the one that looks at the first batch
    with pytest.raises(RuntimeError, match="4 of 4 attention layers that should be routed"):
        fit(tmp_path, [FutureLeakProbe(every_n_steps=1), lighthouse()], module)


@pytest.mark.parametrize(
    ("settings", "run", "expected"),
    [
        ({}, {"val_check_interval": 4}, [4, 6]),
        pytest.param({"every_n_steps": 4}, {}, [4, 6], marks=pytest.mark.slow),
        pytest.param({"every_n_steps": 0}, {}, [6], marks=pytest.mark.slow),
        # two batches a step
        ({"every_n_steps": 2}, {"accumulate_grad_batches": 2, "val_check_interval": 4}, [2, 4, 6]),
    ],
)
def test_when(tmp_path, settings, run, expected):
    for first in (True, False):
        probe = FutureLeakProbe(**settings)
        fit(tmp_path, [probe, lighthouse()] if first else [lighthouse(), probe], max_steps=7, **run)
        assert steps(probe) == expected


@pytest.mark.parametrize("first", [True, False], ids=["probe first", "probe last"])
def test_a_switch_that_a_rule_decides_is_probed_too(tmp_path, first):
    # no validation can gain a million nats a second
    callback = all_lighthouse(1.0, CONFIG, plateau=PlateauRule(patience=1, min_gain_per_second=1e6, earliest=3))
    probe = FutureLeakProbe(every_n_steps=0)
    fit(tmp_path, [probe, callback] if first else [callback, probe])
    assert steps(probe) == [4]


def test_nothing_is_measured_in_a_dense_baseline_or_after_the_switch(tmp_path):
    for callback in (lighthouse(enabled=False), all_lighthouse(0, CONFIG)):
        probe = FutureLeakProbe(every_n_steps=1)
        fit(tmp_path, [callback, probe])
        assert not probe.results
        assert not (tmp_path / "probe.csv").exists()


def test_without_text_nothing_is_measured_and_one_line_says_so(tmp_path, caplog, recwarn):
    probe = FutureLeakProbe(every_n_steps=1)
    fit(tmp_path, [lighthouse(), probe], validation=[], limit_val_batches=0)
    assert not probe.results
    lines = [str(warning.message) for warning in recwarn if "probe" in str(warning.message)]
    assert sum("without validation there is no text" in line for line in lines) == 1
    assert sum("no validation text was seen" in line for line in lines) == 1


def test_its_time_is_bounded_printed_and_not_training_time(tmp_path, caplog):
    callback, probe = lighthouse(), FutureLeakProbe(max_stderr=1e-9, max_seconds=0.5, every_n_steps=3)
    with caplog.at_level("INFO"):
        fit(tmp_path, [callback, probe], Module(delay=0.1))
    for result in probe.results:
        # all trials would take 5 s
        assert 0.5 < result.seconds < 4.0
        assert f"{result.seconds:.1f} s" in caplog.text
        assert f"leak {result.leak_nats:.3f} +- {result.leak_stderr:.3f} nats" in caplog.text
    report = json.loads((tmp_path / "lighthouse.json").read_text())
    assert report["phases"]["lighthouse"]["seconds"] < sum(result.seconds for result in probe.results)


def test_the_time_of_all_probes_is_bounded_and_the_one_before_the_switch_is_kept(tmp_path):
    probe = FutureLeakProbe(every_n_steps=1, max_stderr=1e-9, max_seconds=0.3, max_total_seconds=1.2)
    fit(tmp_path, [lighthouse(), probe], Module(delay=0.05))
    *early, last = probe.results
    assert last.step == SWITCH
    assert 1 <= len(early) < SWITCH - 1
    assert sum(result.seconds for result in early[:-1]) + 2 * 0.3 <= 1.2


def test_results_are_written_where_people_and_scripts_look(tmp_path):
    probe = FutureLeakProbe()
    fit(tmp_path, [lighthouse(), probe], logger=TensorBoardLogger(tmp_path, "run", "v"))
    folder = tmp_path / "run" / "v"
    rows = list(csv.DictReader((folder / "probe.csv").read_text().splitlines()))
    assert [{name: float(value) for name, value in row.items()} for row in rows] == [vars(r) for r in probe.results]
    events = EventAccumulator(str(folder)).Reload()
    names = ("leak_nats", "leak_stderr", "lighthouse_loss", "dense_loss", "spike_nats")
    for name in names:
        points = [(event.step, event.value) for event in events.Scalars(f"probe/{name}")]
        assert points == [(r.step, pytest.approx(getattr(r, name), rel=1e-6)) for r in probe.results]
    assert not list(folder.glob("*.partial"))


def test_a_resumed_run_has_the_results_of_an_unbroken_one(tmp_path):
    whole = FutureLeakProbe()
    fit(tmp_path / "whole", [lighthouse(), whole], train=ResumableBatches(loader()))
    saved = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    first = FutureLeakProbe()
    fit(
        tmp_path, [lighthouse(), first, saved], train=ResumableBatches(loader()), max_steps=4, enable_checkpointing=True
    )
    resumed = FutureLeakProbe()
    # its own earlier results are not those of the run
    resumed.results = [*first.results, *first.results]
    train = ResumableBatches(loader())
    fit(tmp_path, [lighthouse(), resumed], train=train, ckpt_path=tmp_path / "step=3.ckpt")

    def measured(probe):
        return [tuple(vars(result).values())[:-1] for result in probe.results]

    assert measured(resumed) == measured(whole)
    assert steps(whole) == [2, 4, 6]
    # a new run with the same callback starts anew
    fit(tmp_path, [lighthouse(), resumed], max_steps=2)
    assert steps(resumed) == [2]


def test_a_validation_with_a_checkpoint_leaves_the_results_alone(tmp_path):
    saved, probe = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3), FutureLeakProbe()
    fit(tmp_path, [lighthouse(), probe, saved], enable_checkpointing=True)
    before = list(probe.results)
    checker = Trainer(accelerator="cpu", logger=False, callbacks=[lighthouse(), probe], enable_progress_bar=False)
    checker.validate(Module(), loader(8, seed=1), ckpt_path=next(tmp_path.glob("*.ckpt")), verbose=False)
    assert probe.results == before
    with pytest.raises(ValueError, match="state must have version 1, got 7"):
        FutureLeakProbe().load_state_dict({"version": 7})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"every_n_steps": -1}, ValueError, "every_n_steps must be at least 0, got -1"),
        ({"every_n_steps": 1.5}, TypeError, "every_n_steps must be int or None, got 1.5"),
        ({"num_batches": 0}, ValueError, "num_batches must be at least 1, got 0"),
        ({"max_stderr": 0}, ValueError, "max_stderr must be greater than 0, got 0"),
        ({"max_seconds": "4"}, TypeError, "max_seconds must be int or float, got '4'"),
        ({"max_total_seconds": float("nan")}, ValueError, "max_total_seconds must be greater than 0, got nan"),
        ({"max_seconds": 20.5}, ValueError, "max_total_seconds must be at least twice max_seconds=20.5, got 36.0"),
        ({"many_positions": 1}, TypeError, "many_positions must be bool, got 1"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(settings, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        FutureLeakProbe(**settings)


def test_what_cannot_be_measured_is_refused_before_training(tmp_path):
    with pytest.raises(SettingError, match="add one to the Trainer"):
        fit(tmp_path, [FutureLeakProbe()])
    with pytest.raises(SettingError, match=r"give ForeignModule a method token_losses\(inputs, targets\)"):
        fit(tmp_path, [FutureLeakProbe(), lighthouse()], ForeignModule())
    padded = {"input_ids": torch.ones(2, 64).long(), "attention_mask": torch.zeros(2, 64)}
    with pytest.raises(ValueError, match="needs validation batches without padding"):
        fit(tmp_path, [FutureLeakProbe(), lighthouse()], validation=DataLoader([padded], batch_size=None))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # nothing said of the layers: three of windows and one of Lighthouse
        ({"switch_at": SWITCH}, [2, 4, 6]),
        ({"phases": [Phase(3), Phase(SWITCH, attention=CAUSAL)]}, [2, 3, 4, 6]),
        # windows alone tell nothing of the future
        ({"switch_at": SWITCH, "layer_types": ["window"], "window": 8}, []),
    ],
)
def test_a_phase_with_lighthouse_layers_is_probed_whatever_its_name(tmp_path, settings, expected):
    probe = FutureLeakProbe()
    fit(tmp_path, [LighthouseCallback(attention=CONFIG, **settings), probe])
    assert steps(probe) == expected
    assert all(result.spike_nats for result in probe.results)
