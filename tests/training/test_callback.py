"""The callback in a real Trainer, on a LightningModule that does not know it."""

from __future__ import annotations

import copy
import csv
import logging
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from all_lighthouse import all_lighthouse
from fitting import CONFIG, fit, module
from foreign import GPT, ForeignModule, SelfAttention, Sequences, loader
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, IterableDataset

from lightning_lighthouse import LighthouseCallback, LighthouseConfig, notices
from lightning_lighthouse.attention.sdpa import stock_sdpa
from lightning_lighthouse.checks import ResumeError, SettingError


class Watch(Callback):
    """Keeps, per training batch, the step and whether a routed layer was on; and the same for validation."""

    def __init__(self):
        self.training, self.validation = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.training.append((trainer.global_step, _is_routed(pl_module)))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.validation.append(_is_routed(pl_module))

    @property
    def phases(self):
        return [routed for _, routed in self.training]


def _is_routed(module):
    x = torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(0))
    attention = module.model.blocks[1].attn
    with torch.no_grad():
        plain = SelfAttention(16, 2)
        plain.load_state_dict(attention.state_dict())
        return not torch.allclose(attention(x), plain(x), atol=1e-5)


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    yield
    assert F.scaled_dot_product_attention is stock_sdpa


def test_lighthouse_until_the_switch_then_dense(tmp_path):
    watch = Watch()
    model, _ = fit(tmp_path, [all_lighthouse(0.6, CONFIG), watch], validation=loader(4, seed=1), val_check_interval=2)
    assert watch.phases == [True] * 6 + [False] * 4
    assert watch.validation
    assert not any(watch.validation)
    assert "forward" not in vars(model.model.blocks[1].attn)


def test_the_dense_phase_is_plain_training(tmp_path):
    # weights and optimizer at the switch, then five dense steps by hand
    model = module()
    states = []

    class Snapshot(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                states.append(copy.deepcopy((pl_module.state_dict(), trainer.optimizers[0].state_dict())))

    fit(tmp_path, [all_lighthouse(5, CONFIG), Snapshot()], model)
    by_hand = module()
    by_hand.load_state_dict(states[0][0])
    optimizer = by_hand.configure_optimizers()
    optimizer.load_state_dict(states[0][1])
    for batch in list(loader())[5:]:
        optimizer.zero_grad()
        by_hand.training_step(batch, 0).backward()
        optimizer.step()
    assert by_hand.losses == model.losses[5:]
    assert all(torch.equal(a, b) for a, b in zip(by_hand.parameters(), model.parameters(), strict=True))


def test_state_dict_keys_never_change(tmp_path):
    model = module()
    keys = [list(model.state_dict())]

    class Keys(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            keys.append(list(pl_module.state_dict()))

    fit(tmp_path, [all_lighthouse(0.5, CONFIG), Keys()], model)
    keys.append(list(model.state_dict()))
    assert all(these == keys[0] for these in keys)


def test_disabled_is_the_dense_baseline(tmp_path):
    watch = Watch()
    with_callback, _ = fit(tmp_path, [LighthouseCallback(0.6, CONFIG, enabled=False), watch])
    without, _ = fit(tmp_path, [])
    assert not any(watch.phases)
    assert with_callback.losses == without.losses


def test_the_switch_never_splits_an_accumulation(tmp_path):
    watch = Watch()
    fit(tmp_path, [all_lighthouse(0.5, CONFIG), watch], max_steps=-1, max_epochs=1, accumulate_grad_batches=2)
    # 10 batches are 5 steps; half of them, rounded up, is 3
    assert watch.phases == [True] * 6 + [False] * 4


@pytest.mark.parametrize("stop", [3, 6, 8], ids=["before the switch", "at the switch", "after the switch"])
def test_resume_is_exact(tmp_path, stop):
    whole, _ = fit(tmp_path, [all_lighthouse(0.6, CONFIG)])

    def halves():
        return [all_lighthouse(0.6, CONFIG), ModelCheckpoint(tmp_path, every_n_train_steps=stop, save_top_k=-1)]

    first, _ = fit(tmp_path, halves(), enable_checkpointing=True)
    path = next(tmp_path.glob(f"*step={stop}.ckpt"))
    watch = Watch()
    second, _ = fit(tmp_path, [all_lighthouse(0.6, CONFIG), watch], ckpt_path=path)
    assert first.losses == whole.losses
    assert second.losses == whole.losses[stop:]
    assert watch.training == [(step, step < 6) for step in range(stop, 10)]


def checkpointed(tmp_path, switch_at, stop=6, max_steps=10, **arguments):
    callbacks = [
        all_lighthouse(switch_at, CONFIG, **arguments),
        ModelCheckpoint(tmp_path, every_n_train_steps=stop),
    ]
    fit(tmp_path, callbacks, enable_checkpointing=True, max_steps=max_steps)
    return next(tmp_path.glob(f"*step={stop}.ckpt"))


def test_a_longer_run_stays_dense_after_its_switch(tmp_path):
    path = checkpointed(tmp_path, 0.5)
    watch = Watch()
    with pytest.warns(UserWarning, match="the training got longer.*stays dense"):
        fit(tmp_path, [all_lighthouse(0.5, CONFIG), watch], ckpt_path=path, max_steps=20)
    assert not any(watch.phases)


def test_a_later_switch_after_the_switch_is_refused_unless_asked_for(tmp_path):
    path = checkpointed(tmp_path, 0.5)
    with pytest.raises(ResumeError, match="set allow_return to true"):
        fit(tmp_path, [all_lighthouse(0.9, CONFIG)], ckpt_path=path)
    watch = Watch()
    with pytest.warns(UserWarning, match="returning to Lighthouse"):
        fit(tmp_path, [all_lighthouse(0.9, CONFIG, allow_return=True), watch], ckpt_path=path)
    assert watch.phases == [True] * 3 + [False]


def test_a_switch_still_ahead_moves_with_a_warning(tmp_path):
    path = checkpointed(tmp_path, 0.9)
    watch = Watch()
    with pytest.warns(UserWarning, match="from step 9 to step 8"):
        fit(tmp_path, [all_lighthouse(8, CONFIG), watch], ckpt_path=path)
    assert watch.phases == [True, True, False, False]


def test_a_checkpoint_without_our_state_follows_its_step(tmp_path):
    path = checkpointed(tmp_path, 0.5)
    content = torch.load(path, weights_only=True)
    del content["callbacks"]["LighthouseCallback"]
    torch.save(content, path)
    watch = Watch()
    with pytest.warns(UserWarning, match="without Lighthouse state"):
        fit(tmp_path, [all_lighthouse(0.5, CONFIG), watch], ckpt_path=path)
    assert not any(watch.phases)


def test_a_second_fit_of_the_same_trainer_stays_dense(tmp_path):
    watch = Watch()
    callback = all_lighthouse(5, CONFIG)
    model, run = fit(tmp_path, [callback, watch])
    run.fit_loop.epoch_loop.max_steps = 15
    run.fit(model, loader())
    assert watch.phases == [True] * 5 + [False] * 10
    # a new Trainer begins anew, also with the same callback
    again = Watch()
    fit(tmp_path, [callback, again])
    assert again.phases == watch.phases[:10]


class BoomError(Exception):
    pass


@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt])
def test_the_model_is_restored_after_an_exception(tmp_path, error):
    model = module()
    dense = copy.deepcopy(model)

    class Fail(Callback):
        def on_before_backward(self, trainer, pl_module, loss):
            if trainer.global_step == 2:
                raise error

    with pytest.raises((error, SystemExit)):
        fit(tmp_path, [all_lighthouse(0.5, CONFIG), Fail()], model)
    assert F.scaled_dot_product_attention is stock_sdpa
    dense.load_state_dict(model.state_dict())
    batch = next(iter(loader()))
    assert torch.equal(model.loss(batch), dense.loss(batch))


def test_an_unroutable_layer_is_named(tmp_path):
    class WithMask(SelfAttention):
        def forward(self, x):
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    model = module()
    model.model.blocks[2].attn.__class__ = WithMask
    with pytest.raises(RuntimeError, match=r"1 of 4 .* model\.blocks\.2\.attn: attn_mask was given"):
        fit(tmp_path, [all_lighthouse(0.5, CONFIG)], model)
    with pytest.warns(UserWarning, match="attn_mask was given"):
        fit(tmp_path, [all_lighthouse(0.5, CONFIG, on_unroutable="warn")], model)


@pytest.mark.parametrize("passed_over", [1, 3])
def test_a_batch_that_training_step_passes_over_is_not_judged(tmp_path, passed_over):
    class PassesOver(ForeignModule):
        def training_step(self, batch, batch_idx):
            return None if batch_idx < passed_over else super().training_step(batch, batch_idx)

    model = PassesOver()
    # also where no other batch comes before the switch
    fit(tmp_path, [all_lighthouse(3, CONFIG)], model)
    assert len(model.losses) > 3


class Gaps:
    """A loader that has no batch in the first place and in the third."""

    def __init__(self, batches):
        self.batches = [None, batches[0], None, *batches[1:]]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def test_a_batch_that_is_none_counts_for_nothing(tmp_path):
    callback = all_lighthouse(2, CONFIG, dense_layers=[])
    fit(tmp_path, [callback], ForeignModule(), data=Gaps(list(loader(8))), max_epochs=1, max_steps=4)
    phases = callback.state_dict()["ledger"]["phases"]
    assert {name: phases[name]["steps"] for name in ("lighthouse", "dense")} == {"lighthouse": 2, "dense": 2}


def test_what_a_checkpoint_said_is_in_one_that_is_written_before_training_begins():
    ran, resumed = (all_lighthouse(2, CONFIG) for _ in range(2))
    ran._run.ledger.add_validation(3, "dense", 1.5)
    resumed.load_state_dict(ran.state_dict())
    assert resumed.state_dict() == ran.state_dict()


class Endless(IterableDataset):
    def __iter__(self):
        yield from Sequences().tokens


@pytest.mark.parametrize(
    ("callbacks", "settings", "words"),
    [
        ([], {"max_steps": -1, "max_time": {"seconds": 5}, "max_epochs": -1}, "number of steps is unknown"),
        ([], {"max_steps": -1, "max_epochs": 1, "data": DataLoader(Endless(), 2)}, "number of steps is unknown"),
        ([GradientAccumulationScheduler({0: 5})], {"max_steps": -1, "max_epochs": 2}, "GradientAccumulationScheduler"),
    ],
)
def test_a_fraction_of_an_unknown_length_is_refused(tmp_path, callbacks, settings, words):
    with pytest.raises(SettingError, match=words):
        fit(tmp_path, [all_lighthouse(0.9, CONFIG), *callbacks], **settings)


def test_a_step_needs_no_length(tmp_path):
    watch = Watch()
    fit(tmp_path, [all_lighthouse(4, CONFIG), watch], max_steps=-1, max_epochs=1, data=DataLoader(Endless(), 2))
    assert watch.phases == [True] * 4 + [False] * 6


def test_a_run_that_ends_before_its_switch_says_so(tmp_path):
    with pytest.warns(UserWarning, match="before the switch to dense attention at step 50"):
        fit(tmp_path, [all_lighthouse(50, CONFIG)])


def test_a_compiled_model_switches(tmp_path):
    eager, _ = fit(tmp_path, [all_lighthouse(0.5, CONFIG)])
    model = module()
    for block in model.model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    watch = Watch()
    fit(tmp_path, [all_lighthouse(0.5, CONFIG), watch], model)
    torch.testing.assert_close(model.losses, eager.losses, rtol=1e-4, atol=0)


def test_low_precision_trains(tmp_path):
    model, _ = fit(tmp_path, [all_lighthouse(0.5, CONFIG)], precision="bf16-mixed")
    assert model.losses[-1] < model.losses[0]


def test_the_final_weights_load_into_a_plain_model(tmp_path):
    model, run = fit(tmp_path, [all_lighthouse(0.5, CONFIG)], logger=TensorBoardLogger(tmp_path))
    weights = torch.load(f"{run.log_dir}/final.pt", weights_only=True)
    plain = ForeignModule()
    plain.load_state_dict(weights, strict=True)
    batch = next(iter(loader()))
    assert torch.equal(plain.loss(batch), model.loss(batch))
    assert not list(tmp_path.rglob("*.partial"))


class AddOne(Callback):
    """Changes the weights at the very end, as averaging of weights does."""

    def on_train_end(self, trainer, pl_module):
        with torch.no_grad():
            pl_module.model.head.bias += 1


@pytest.mark.parametrize("first", [True, False])
def test_the_final_weights_are_those_the_fit_ends_with(tmp_path, first):
    callbacks = [all_lighthouse(0.5, CONFIG), AddOne()]
    model, _ = fit(tmp_path, callbacks if first else callbacks[::-1])
    weights = torch.load(tmp_path / "final.pt", weights_only=True)
    assert torch.equal(weights["model.head.bias"], model.model.head.bias)


def test_a_fit_that_has_nothing_left_to_do_writes_into_its_folder_alone(tmp_path, monkeypatch):
    path = checkpointed(tmp_path, 0.5, stop=10)
    (tmp_path / "final.pt").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    fit(tmp_path, [all_lighthouse(0.5, CONFIG)], ckpt_path=path)
    assert list(tmp_path.rglob("final.pt")) == [tmp_path / "final.pt"]


class ExtraState(ForeignModule):
    def get_extra_state(self):
        return {"seen": 3}

    def set_extra_state(self, state):
        self.seen = state["seen"]


def test_an_extra_state_is_written_as_it_is(tmp_path):
    torch.manual_seed(0)
    fit(tmp_path, [all_lighthouse(0.5, CONFIG)], ExtraState())
    plain = ExtraState()
    plain.load_state_dict(torch.load(tmp_path / "final.pt", weights_only=True), strict=True)
    assert plain.seen == 3


def test_a_validation_with_a_checkpoint_leaves_the_run_alone(tmp_path):
    callback, watch = all_lighthouse(5, CONFIG), Watch()
    saving = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    model, run = fit(tmp_path, [callback, watch, saving], enable_checkpointing=True, validation=loader(4, seed=1))
    before = callback.state_dict()
    run.validate(model, loader(4, seed=1), ckpt_path=tmp_path / "epoch=0-step=2.ckpt", weights_only=True, verbose=False)
    assert callback.state_dict() == before
    run.fit_loop.epoch_loop.max_steps = 15
    run.fit(model, loader())
    assert watch.phases == [True] * 5 + [False] * 10


def test_another_fit_of_the_same_callback_does_not_leak(tmp_path):
    path = checkpointed(tmp_path, 5)
    content = torch.load(path, weights_only=True)
    del content["callbacks"]["LighthouseCallback"]
    torch.save(content, path)
    callback, watch = all_lighthouse(2, CONFIG), Watch()
    fit(tmp_path, [callback])
    callback.switch_at = 8
    with pytest.warns(UserWarning, match="without Lighthouse state"):
        fit(tmp_path, [callback, watch], ckpt_path=path)
    assert watch.training == [(6, True), (7, True), (8, False), (9, False)]


def test_no_logging_at_all_is_possible(tmp_path):
    _, run = fit(tmp_path, [all_lighthouse(0.5, CONFIG)], logger=TensorBoardLogger(tmp_path), log_every_n_steps=0)
    # only the points that frame the switch
    assert list(scalars(f"{run.log_dir}/lighthouse")) == [4, 5]


def test_a_metric_of_another_name_is_asked_for_once(tmp_path):
    callback = all_lighthouse(0.5, CONFIG, validation_metric="val_loss")
    with pytest.warns(UserWarning, match=r"validation_metric='val_loss' was not logged.*logged: val/loss"):
        fit(tmp_path, [callback], validation=loader(4, seed=1), val_check_interval=5)


def test_the_time_of_checkpoints_and_validations_is_not_training_time(tmp_path):
    class Slow(ModelCheckpoint):
        def _save_checkpoint(self, trainer, filepath):
            super()._save_checkpoint(trainer, filepath)
            time.sleep(0.3)

    callback = all_lighthouse(0.5, CONFIG)
    fit(tmp_path, [callback, Slow(tmp_path, every_n_train_steps=1)], enable_checkpointing=True)
    assert callback._run.ledger.seconds < 10 * 0.3


def test_fast_dev_run_writes_nothing_and_says_that_it_never_switches(tmp_path):
    with pytest.warns(UserWarning, match="1 steps end before the switch at step 1"):
        fit(tmp_path, [all_lighthouse(0.9, CONFIG)], fast_dev_run=True, max_steps=-1)
    assert not list(tmp_path.rglob("*"))


def events_of(folder):
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def scalars(folder, tag="train/loss"):
    events = events_of(folder)
    return {event.step: event.value for event in events.Scalars(tag)} if tag in events.Tags()["scalars"] else {}


def test_each_phase_has_its_run_and_the_curves_meet(tmp_path):
    callbacks = [all_lighthouse(0.6, CONFIG)]
    model, run = fit(
        tmp_path,
        callbacks,
        logger=TensorBoardLogger(tmp_path),
        log_every_n_steps=2,
        validation=loader(4, seed=1),
        val_check_interval=2,
    )
    lighthouse, dense = scalars(f"{run.log_dir}/lighthouse"), scalars(f"{run.log_dir}/dense")
    # every second step, the last before the switch, and the switch itself in both
    assert list(lighthouse) == [0, 2, 4, 5, 6]
    assert list(dense) == [6, 8]
    assert lighthouse[6] == dense[6]
    for step, value in (lighthouse | dense).items():
        assert value == pytest.approx(model.losses[step], rel=1e-5)
    assert list(scalars(run.log_dir, "val/loss")) == [1, 3, 5, 7, 9]
    rates = scalars(f"{run.log_dir}/lighthouse", "perf/tokens_per_second")
    assert all(rate > 0 for rate in rates.values())
    events = events_of(f"{run.log_dir}/dense")
    texts = [tensor for tag in events.Tags()["tensors"] if "phase" in tag for tensor in events.Tensors(tag)]
    assert any(b"switched from Lighthouse to dense attention at step 6" in t.tensor_proto.string_val[0] for t in texts)
    assert any("custom_scalars" in tag for tag in events_of(run.log_dir).Tags()["tensors"])
    assert b"lighthouse/switch_step" in b"".join(path.read_bytes() for path in Path(run.log_dir, "dense").iterdir())


def test_an_accumulated_loss_is_the_mean_of_its_batches(tmp_path):
    model, run = fit(
        tmp_path,
        [all_lighthouse(2, CONFIG)],
        logger=TensorBoardLogger(tmp_path),
        log_every_n_steps=1,
        accumulate_grad_batches=2,
        max_steps=5,
    )
    curves = scalars(f"{run.log_dir}/lighthouse") | scalars(f"{run.log_dir}/dense")
    for step in range(5):
        assert curves[step] == pytest.approx(sum(model.losses[2 * step : 2 * step + 2]) / 2, rel=1e-5)


def test_a_resumed_run_continues_its_curves(tmp_path):
    logger = {"logger": TensorBoardLogger(tmp_path, version="one"), "log_every_n_steps": 1}
    logger |= {"validation": loader(4, seed=1), "val_check_interval": 2}
    callbacks = [all_lighthouse(0.6, CONFIG), ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1)]
    _, run = fit(tmp_path, callbacks, enable_checkpointing=True, **logger)
    before = scalars(f"{run.log_dir}/lighthouse") | scalars(f"{run.log_dir}/dense")
    logger["logger"] = TensorBoardLogger(tmp_path, version="one")
    # files are read in the order of their names: of the second, and within it of a counter without leading zeros
    time.sleep(1.1)
    fit(tmp_path, [all_lighthouse(0.6, CONFIG)], ckpt_path=next(tmp_path.glob("*step=4.ckpt")), **logger)
    after = scalars(f"{run.log_dir}/lighthouse") | scalars(f"{run.log_dir}/dense")
    assert after == before
    assert sorted(after) == list(range(10))
    steps = [event.step for event in events_of(run.log_dir).Scalars("val/loss")]
    assert steps == sorted(set(steps))


def test_other_loggers_get_the_phase_as_a_scalar(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(tmp_path, [all_lighthouse(0.6, CONFIG)], logger=logger, log_every_n_steps=1)
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row.get("phase")]
    assert [float(row["phase"]) for row in rows][:6] == [1.0] * 6
    assert float(rows[-1]["phase"]) == 0.0


def test_the_summary_frames_the_switch(tmp_path, caplog):
    callback = all_lighthouse(0.6, CONFIG)
    with caplog.at_level("INFO"):
        fit(
            tmp_path,
            [callback],
            validation=loader(4, seed=1),
            val_check_interval=3,
            check_val_every_n_epoch=None,
            max_steps=12,
        )
    ledger = callback._run.ledger
    assert tuple(ledger.totals(phase).steps for phase in ("lighthouse", "dense")) == (8, 4)
    assert (ledger.before_switch[0], ledger.after_switch[0], ledger.last_validation[0]) == (6, 9, 12)
    for words in ("(8 steps, ", "before the switch (step 6)", "after it (step 9)", "at the end (step 12)", "final.pt"):
        assert words in caplog.text


def test_wrong_arguments_are_quoted():
    for arguments, words in [
        ({"switch_at": 1.9}, "got 1.9"),
        ({"attention": {"top_k": 3}}, "LighthouseConfig"),
        ({"enabled": "no"}, "enabled must be bool, got 'no'"),
        ({"allow_return": 1}, "allow_return must be bool, got 1"),
        ({"select": 3}, "select must be str or None, got 3"),
        ({"dense_layers": "a"}, "list of integers, 'published' or None, got 'a'"),
        ({"on_unroutable": "ignore"}, "one of 'raise', 'warn', got 'ignore'"),
    ]:
        with pytest.raises((TypeError, ValueError)) as caught:
            LighthouseCallback(**arguments)
        assert words in str(caught.value)


def test_a_model_with_no_gain_at_its_length_trains_dense(tmp_path):
    watch = Watch()
    fit(tmp_path, [all_lighthouse(0.5, LighthouseConfig()), watch], model=ForeignModule(model=GPT()))
    assert not any(watch.phases)


def test_everything_is_restored_though_a_writer_fails(tmp_path, monkeypatch):
    order = torch._C._get_sdp_priority_order()

    class Fails:
        def __init__(self, *_, **__):
            raise OSError(28, "No space left on device")

    class BreaksTheWriters(Callback):
        def on_train_batch_end(self, trainer, *_):
            monkeypatch.setattr("tensorboard.summary.writer.event_file_writer.EventFileWriter.close", Fails)

    model = ForeignModule()
    trainer = Trainer(
        accelerator="cpu", max_steps=2, logger=TensorBoardLogger(tmp_path), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[all_lighthouse(1, LighthouseConfig(top_k=8, sdpa="math")), BreaksTheWriters()],
    )  # fmt: skip
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(model, loader())
    assert torch._C._get_sdp_priority_order() == order
    assert F.scaled_dot_product_attention is stock_sdpa
    assert not any("_lighthouse_patch" in vars(module) for module in model.modules())
    assert "start" not in vars(trainer.profiler)


def test_the_backend_is_told_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(notices, "_given", set())
    for _ in range(2):
        fit(tmp_path, [all_lighthouse(2, CONFIG)], max_steps=4)
    assert caplog.text.count("backend='auto' runs 'reference' on cpu") == 1
    assert notices.logger.level == logging.NOTSET


def test_what_is_told_is_told_by_lightning_where_nobody_listens(tmp_path, monkeypatch, caplog):
    class Teller(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            notices.log_once("teller", "a line of ours")

    monkeypatch.setattr(notices, "_given", set())
    monkeypatch.setattr(notices.logger, "propagate", False)
    # its records reach the root, where pytest listens
    lightning = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(lightning, "handlers", [])
    monkeypatch.setattr(lightning, "propagate", True)
    fit(tmp_path, [all_lighthouse(2, CONFIG), Teller()], max_steps=4)
    assert caplog.text.count("; backend='auto' runs 'reference' on cpu") == 1
    assert caplog.text.count("Lighthouse: a line of ours") == 1
    assert not notices.logger.handlers
