"""Several phases in a Trainer: who attends how at which step, and that nothing is lost where a run goes on."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from all_lighthouse import all_lighthouse
from fitting import CONFIG, fit, module
from foreign import ForeignModule, SelfAttention, loader
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_lighthouse import LighthouseCallback, LighthouseConfig, Phase, PlateauRule
from lightning_lighthouse.checks import ResumeError, SettingError
from lightning_lighthouse.phases import BatchStart, Switch, phase_events

PHASES = [
    Phase(until=0.2, layer_types=["chunk"], window=32),
    Phase(until=7, layer_types=["window", "lighthouse"], window=8, sink_tokens=1),
]
MIXED = "window 8 (1 sinks) + lighthouse"
TYPES = [["chunk"] * 4] * 2 + [["window", "lighthouse"] * 2] * 5 + [["stock"] * 4] * 3


class Watch(Callback):
    """The types of the layers in each training batch, and in each validation; the switches."""

    def __init__(self):
        self.training, self.validation, self.switches = [], [], []

    def setup(self, trainer, pl_module, stage):
        events = phase_events(trainer)
        events.subscribe(BatchStart, lambda event: self.training.append((event.step, types_of(pl_module))))
        events.subscribe(Switch, lambda event: self.switches.append((event.step, event.before, event.phase)))

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.validation.append(types_of(pl_module))


def types_of(model):
    """How each attention layer attends now."""
    layers = [part for part in model.modules() if isinstance(part, SelfAttention)]
    is_on = layers[0]._lighthouse_scope.is_on
    return [layer._lighthouse_route.layer_type if is_on else "stock" for layer in layers]


def same_weights(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def report(tmp_path):
    return json.loads(next(tmp_path.rglob("lighthouse.json")).read_text())


def test_every_phase_attends_as_it_says_from_its_step_on(tmp_path):
    watch = Watch()
    callback = LighthouseCallback(phases=PHASES, attention=CONFIG)
    fit(tmp_path, [callback, watch], validation=loader(4, seed=1), val_check_interval=3)
    assert watch.training == list(enumerate(TYPES))
    assert watch.validation
    assert all(types == ["stock"] * 4 for types in watch.validation)
    assert watch.switches == [(2, "chunk 32", MIXED), (7, MIXED, "dense")]
    told = report(tmp_path)
    plan = [(phase["name"], phase["first_step"]) for phase in told["plan"]]
    assert plan == [("chunk 32", 0), (MIXED, 2), ("dense", 7)]
    assert {name: phase["steps"] for name, phase in told["phases"].items()} == {"chunk 32": 2, MIXED: 5, "dense": 3}
    assert {name: phase["routed_calls"] for name, phase in told["phases"].items()} == {
        "chunk 32": 8,
        MIXED: 20,
        "dense": 0,
    }
    # the last is of what the training ends with
    assert [v["phase"] for v in told["validations"]] == [MIXED, MIXED, "dense", "dense"]


def test_the_short_form_is_one_phase(tmp_path):
    watches = [Watch(), Watch()]
    short = LighthouseCallback(0.5, CONFIG, layer_types=["window", "dense"], window=8)
    long = LighthouseCallback(phases=[Phase(0.5, ["window", "dense"], window=8)], attention=CONFIG)
    first, second = (fit(tmp_path / str(n), [callback, watches[n]])[0] for n, callback in enumerate((short, long)))
    assert watches[0].training == watches[1].training
    assert watches[0].training[4] == (4, ["window", "dense"] * 2)
    assert same_weights(first, second)


def test_dense_may_come_first_and_settings_of_lighthouse_may_change(tmp_path):
    small = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=4)
    phases = [Phase(2, ["dense"]), Phase(4, attention=small), Phase(6)]
    configs, watch = [], Watch()

    class Configs(Callback):
        def setup(self, trainer, pl_module, stage):
            layer = pl_module.model.blocks[0].attn
            record = lambda event: configs.append(layer._lighthouse_scope.settings.config.top_k)  # noqa: E731
            phase_events(trainer).subscribe(BatchStart, record)

    fit(tmp_path, [LighthouseCallback(phases=phases, attention=CONFIG), watch, Configs()])
    assert [types[0] for _, types in watch.training] == ["dense"] * 2 + ["lighthouse"] * 4 + ["stock"] * 4
    assert configs[2:6] == [4, 4, 8, 8]
    assert list(report(tmp_path)["phases"]) == [
        "dense (phase 1)",
        "lighthouse (phase 2)",
        "lighthouse (phase 3)",
        "dense",
    ]


@pytest.mark.parametrize("step", [1, 2, 3, 6, 7, 8])
def test_a_run_goes_on_in_any_phase_bit_for_bit(tmp_path, step):
    def callback():
        return LighthouseCallback(phases=PHASES, attention=CONFIG)

    saving = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, every_n_train_steps=1)
    watch = Watch()
    whole, _ = fit(tmp_path, [callback(), saving, watch], enable_checkpointing=True)
    path = next((tmp_path / "kept").glob(f"*step={step}.ckpt"))
    again = Watch()
    resumed, _ = fit(tmp_path / "again", [callback(), again], ckpt_path=path)
    assert again.training == watch.training[step:]
    assert again.switches == [switch for switch in watch.switches if switch[0] >= step]
    assert same_weights(whole, resumed)
    told = report(tmp_path / "again")
    assert {name: phase["steps"] for name, phase in told["phases"].items()} == {"chunk 32": 2, MIXED: 5, "dense": 3}


def test_a_phase_that_was_left_is_not_returned_to(tmp_path):
    saving = ModelCheckpoint(tmp_path / "kept", save_top_k=-1, every_n_train_steps=4)
    fit(tmp_path, [LighthouseCallback(phases=PHASES, attention=CONFIG), saving], enable_checkpointing=True)
    path = next((tmp_path / "kept").glob("*step=4.ckpt"))
    longer = [Phase(6, ["chunk"], window=32), PHASES[1]]
    with pytest.raises(ResumeError, match="would go back to 'chunk 32'"):
        fit(tmp_path / "again", [LighthouseCallback(phases=longer, attention=CONFIG)], ckpt_path=path)
    watch = Watch()
    callback = LighthouseCallback(phases=longer, attention=CONFIG, allow_return=True)
    with pytest.warns(UserWarning, match="the phases were changed, from step 4 on"):
        fit(tmp_path / "once-more", [callback, watch], ckpt_path=path)
    assert [types[0] for _, types in watch.training] == ["chunk"] * 2 + ["window"] + ["stock"] * 3


def test_the_plateau_rule_and_the_return_belong_to_the_last_switch(tmp_path):
    class Flat(ForeignModule):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", 1.0)

    watch = Watch()
    callback = LighthouseCallback(phases=PHASES, attention=CONFIG, plateau=PlateauRule(patience=2), return_steps=1)
    fit(tmp_path, [callback, watch], Flat(), validation=loader(1), val_check_interval=1)
    # two validations without a gain after the first one of this phase; the chunks end when they should
    assert [types[0] for _, types in watch.training][:2] == ["chunk"] * 2
    assert watch.switches == [(2, "chunk 32", MIXED), (6, MIXED, "dense")]
    assert watch.training[5] == (5, ["window", "lighthouse", "dense", "dense"])


def test_a_return_must_fit_into_the_last_phase(tmp_path):
    with pytest.raises(
        SettingError, match="return_steps=6 must end at the switch, which is at step 7; its phase begins"
    ):
        fit(tmp_path, [LighthouseCallback(phases=PHASES, attention=CONFIG, return_steps=6)])


def test_a_run_without_a_dense_end_says_so_once(tmp_path):
    phases = [Phase(1.0, ["window"], window=8)]
    with pytest.warns(UserWarning, match="10 steps end before the switch at step 10"):
        fit(tmp_path, [LighthouseCallback(phases=phases)])


def test_an_accumulated_step_is_never_split(tmp_path):
    watch = Watch()
    fit(tmp_path, [LighthouseCallback(phases=PHASES, attention=CONFIG), watch], accumulate_grad_batches=2)
    assert watch.training == [(step, types) for step, types in enumerate(TYPES) for _ in range(2)]
    assert len(watch.switches) == 2


def test_compiled_blocks_take_one_frame_a_type_and_stay_one_graph(tmp_path):
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    model = module()
    for block in model.model.blocks:
        block.compile(backend=backend, fullgraph=True, dynamic=False)
    eager, _ = fit(tmp_path, [LighthouseCallback(phases=PHASES, attention=CONFIG)])
    whole, _ = fit(tmp_path, [LighthouseCallback(phases=PHASES, attention=CONFIG)], model)
    torch._dynamo.reset()
    assert len(compiled) == 4
    for ours, theirs in zip(whole.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_each_phase_has_a_curve_of_its_own_and_they_meet(tmp_path):
    board = TensorBoardLogger(tmp_path)
    fit(tmp_path, [LighthouseCallback(phases=PHASES, attention=CONFIG)], logger=board, log_every_n_steps=1)
    steps = {}
    for name in ("chunk 32", MIXED, "dense"):
        events = EventAccumulator(f"{board.log_dir}/{name}").Reload()
        steps[name] = [event.step for event in events.Scalars("train/loss")]
    assert steps == {"chunk 32": [0, 1, 2], MIXED: [2, 3, 4, 5, 6, 7], "dense": [7, 8, 9]}
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("phase/text_summary")]
    assert f"switched from chunk 32 to {MIXED} at step 2" in texts


def test_other_loggers_count_the_phases_down(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(tmp_path, [LighthouseCallback(phases=PHASES, attention=CONFIG)], logger=logger, log_every_n_steps=1)
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    column = lines[0].split(",").index("phase")
    phases = [line.split(",")[column] for line in lines[1:] if line.split(",")[column]]
    # where all phases share a curve, a step is a point
    assert phases == ["2.0"] * 2 + ["1.0"] * 5 + ["0.0"] * 3


class Masks(ForeignModule):
    """Hands a mask to its attention from the third batch on."""

    def training_step(self, batch, batch_idx):
        wide = torch.nn.functional.scaled_dot_product_attention
        if batch_idx >= 2:
            size = batch.shape[1] - 1
            mask = torch.ones(size, size, dtype=torch.bool).tril()
            masked = lambda q, k, v, **_: wide(q, k, v, attn_mask=mask)  # noqa: E731
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.nn.functional, "scaled_dot_product_attention", masked)
                return super().training_step(batch, batch_idx)
        return super().training_step(batch, batch_idx)


def test_calls_that_become_dense_later_are_told_once_and_counted(tmp_path, caplog):
    line = "attention calls stay dense in step 2, the first to do so: attn_mask"
    with pytest.warns(UserWarning, match=line) as told, caplog.at_level(logging.INFO):
        fit(tmp_path, [all_lighthouse(0.5, CONFIG)], Masks())
    assert len([warning for warning in told if "stay dense" in str(warning.message)]) == 1
    phase = report(tmp_path)["phases"]["lighthouse"]
    assert (phase["routed_calls"], phase["dense_calls"]) == (8, 12)
    assert "60.0% of the attention calls stayed dense" in caplog.text
