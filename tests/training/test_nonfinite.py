"""A step on a loss or gradient that is not finite never happens, and the message says where it began."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from all_lighthouse import all_lighthouse
from faulty import Spoil
from foreign import ForeignModule, SelfAttention, loader
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, SpikeDetection
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from places import HELPERS
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_lighthouse import LighthouseCallback, LighthouseConfig
from lightning_lighthouse.training.nonfinite import NonFiniteError

CONFIG = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=8)
SWITCH = 4


class Norms(Callback):
    """The weights after each step, as one number."""

    def __init__(self):
        self.sums = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.sums.append(sum(p.detach().double().abs().sum().item() for p in pl_module.parameters()))


def fit(tmp_path, *callbacks, module=None, guarded=True, **settings):
    torch.manual_seed(0)
    model = module or ForeignModule()
    settings = {"logger": False, "enable_checkpointing": False, "max_steps": 8} | settings
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[all_lighthouse(SWITCH, CONFIG, stop_on_nonfinite=guarded), *callbacks],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **settings,
    )
    trainer.fit(model, loader())
    return model, trainer


def stopped(tmp_path, *callbacks, module=None, **settings):
    """The message of a fit that stops, checked for what all of them promise."""
    norms, model = Norms(), module or ForeignModule()
    with pytest.raises(NonFiniteError) as caught:
        fit(tmp_path, *callbacks, norms, module=model, **settings)
    after = sum(p.detach().double().abs().sum().item() for p in model.parameters())
    assert after == norms.sums[-1], "the weights are those of the step before"
    assert math.isfinite(after)
    assert not list(tmp_path.rglob("final.pt"))
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("step", "phase"), [(2, "lighthouse"), (5, "dense")])
def test_a_spoilt_query_stops_the_run_and_names_step_rank_phase_and_layer(tmp_path, step, phase, value):
    message = stopped(tmp_path, Spoil(step, "forward", value))
    assert message == (
        f"the loss is nan at step {step}, {phase} phase, rank 0 of 1: first in the output of model.blocks.2.attn.qkv; "
        "stopped before the optimizer step, nothing is saved (stop_on_nonfinite=false turns the check off)"
    )


class BadAttention(SelfAttention):
    """Not a number comes from its own code, and no module inside it."""

    def forward(self, x):
        return self.out(super().forward(x) * math.nan)


def test_a_layer_is_named_and_not_what_it_hands_bad_values_to(tmp_path):
    torch.manual_seed(0)
    model = ForeignModule()
    model.model.blocks[1].attn.__class__ = BadAttention
    with pytest.raises(NonFiniteError, match=r"at step 0, .* first in the output of model\.blocks\.1\.attn;"):
        fit(tmp_path, module=model)


def test_a_gradient_alone_stops_the_run(tmp_path):
    message = stopped(tmp_path, Spoil(3, "backward"))
    assert message.startswith(
        "the largest gradient is nan at step 3, lighthouse phase, rank 0 of 1: first in the gradient of "
        "model.blocks.2.attn.qkv.bias;"
    )


def test_an_infinite_gradient_of_one_parameter_stops_the_run(tmp_path):
    message = stopped(tmp_path, Spoil(3, "parameter", math.inf))
    assert "at step 3" in message
    assert "first in the gradient of model.blocks.2.attn.qkv.weight;" in message


class FaultyLoss(ForeignModule):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return {"loss": loss * math.inf if batch_idx == 2 else loss}


def test_a_loss_alone_stops_the_run(tmp_path):
    message = stopped(tmp_path, module=FaultyLoss())
    assert "the loss is inf at step 2" in message
    assert "in the loss itself, all modules returned finite values;" in message


def test_a_fault_that_does_not_come_again_is_told_without_a_layer(tmp_path):
    # batches 3, 4 and 5 make step 1; the layer is well again after batch 3
    message = stopped(tmp_path, Spoil(3, "forward"), accumulate_grad_batches=3, max_steps=3)
    assert "the loss is nan at step 1, lighthouse phase" in message
    assert "the layer is unknown: the same batch, run again, was finite" in message


class BadToken(ForeignModule):
    """Batch 3 alone holds a token whose embedding is not a number."""

    def on_train_batch_start(self, batch, batch_idx):
        batch[batch == 7] = 8
        if batch_idx == 3:
            batch[:, 5] = 7
            with torch.no_grad():
                self.model.embed.weight[7] = math.nan


def test_the_bad_batch_of_an_accumulated_step_is_the_one_repeated(tmp_path):
    # batches 3, 4 and 5 make step 1
    with pytest.raises(NonFiniteError, match=r"the loss is nan at step 1, .*: first in the output of model\.embed;"):
        fit(tmp_path, module=BadToken(), accumulate_grad_batches=3, max_steps=3)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_hides_nothing(tmp_path, algorithm):
    settings = {"gradient_clip_val": 1.0, "gradient_clip_algorithm": algorithm}
    assert "largest gradient is inf" in stopped(tmp_path, Spoil(3, "parameter", math.inf), **settings)


def test_low_precision_is_watched(tmp_path):
    message = stopped(tmp_path, Spoil(5, "forward"), precision="bf16-mixed")
    assert "step 5, dense phase, rank 0 of 1: first in the output of model.blocks.2.attn.qkv;" in message


@pytest.fixture
def _nothing_compiled():
    yield
    # another model of the same code would take over what was traced for this one
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("_nothing_compiled")
def test_the_layer_of_a_compiled_model_is_named(tmp_path):
    torch.manual_seed(0)
    model = ForeignModule()
    for block in model.model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    message = stopped(tmp_path, Spoil(2, "forward"), module=model)
    assert "step 2, lighthouse phase, rank 0 of 1: first in the output of model.blocks.2.attn.qkv;" in message


def test_what_a_loss_scaler_skips_is_no_fault(tmp_path):
    # a scale that overflows float16 in the first steps; each overflow halves it
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    scales = []

    class Scale(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            scales.append(scaler.get_scale())

    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    model, trainer = fit(tmp_path, Scale(), plugins=[plugin])
    assert trainer.global_step == 8
    assert scales[0] < 2.0**24, "nothing overflowed"
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_with_a_loss_scaler_a_bad_loss_and_a_hopeless_scale_are_faults(tmp_path):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))
    assert "loss is nan at step 2" in stopped(tmp_path, Spoil(2, "forward"), plugins=[plugin])

    class Always(Spoil):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.is_armed = True

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    # 4, 2, 1, then 0.5: no gradient is that large
    message = stopped(tmp_path, Always(0, "parameter", math.inf), plugins=[plugin])
    assert "largest gradient is inf at step 3" in message


def test_turned_off_it_lets_a_run_spoil_its_weights(tmp_path):
    model, trainer = fit(tmp_path, Spoil(3, "forward"), guarded=False)
    assert trainer.global_step == 8
    assert not all(torch.isfinite(p).all() for p in model.parameters())


class Manual(ForeignModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_manual_optimization_is_watched(tmp_path):
    message = stopped(tmp_path, Spoil(3, "forward"), module=Manual())
    assert "the loss is nan at step 3, lighthouse phase, rank 0 of 1: in the gradient of model.embed.weight" in message


def test_the_dense_baseline_is_watched(tmp_path):
    model = ForeignModule()
    trainer = Trainer(
        accelerator="cpu", max_steps=4, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[LighthouseCallback(enabled=False), Spoil(1, "forward")],
        default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(NonFiniteError, match="at step 1, dense phase"):
        trainer.fit(model, loader())


@pytest.mark.parametrize("logging", [True, False])
def test_a_stopped_run_saves_nothing_more(tmp_path, logging):
    saving = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2, save_top_k=-1)
    settings = {"logger": TensorBoardLogger(tmp_path), "log_every_n_steps": 1} if logging else {}
    stopped(tmp_path, Spoil(5, "forward"), saving, enable_checkpointing=True, **settings)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt"]


def test_a_run_watched_is_the_run_unwatched(tmp_path):
    assert fit(tmp_path)[0].losses == fit(tmp_path, guarded=False)[0].losses


class Jump(ForeignModule):
    """Its loss is ten times as high from the switch on."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (10.0 if self.trainer.global_step >= SWITCH else 1.0)


def test_a_jump_of_the_loss_at_the_switch_is_no_spike(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    _, trainer = fit(tmp_path, SpikeDetection(rtol=2.0), module=Jump(), logger=logger)
    assert trainer.global_step == 8
    events = EventAccumulator(f"{trainer.log_dir}/dense")
    events.Reload()
    texts = [event.tensor_proto.string_val[0] for event in events.Tensors("phase/text_summary")]
    assert any(b"SpikeDetection" in text for text in texts)


def test_a_spike_elsewhere_is_still_one(tmp_path):
    class Late(Jump):
        def training_step(self, batch, batch_idx):
            loss = ForeignModule.training_step(self, batch, batch_idx)
            return loss * (10.0 if self.trainer.global_step == SWITCH + 2 else 1.0)

    with pytest.raises(RuntimeError, match="spike detected in batch 6"):
        fit(tmp_path, SpikeDetection(rtol=2.0), module=Late())


SCRIPT = HELPERS / "guard_run.py"


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_every_rank_stops_and_names_the_one_that_began(strategy, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, str(SCRIPT), strategy, str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    assert first == second
    assert all(case["finite"] and case["unchanged"] for case in first.values())
    layer = r"model\.blocks\.2\.attn\.qkv"
    for case, pattern in {
        "forward": rf"loss is nan at step 2, lighthouse phase, rank 1 of 2: first in the output of {layer};",
        "dense": rf"loss is nan at step 5, dense phase, rank 1 of 2: first in the output of {layer};",
        "backward": rf"largest gradient is nan at step 2, .*rank 1 of 2: first in the (gradient|backward).* of {layer}",
    }.items():
        assert re.search(pattern, first[case]["message"]), first[case]["message"]


def test_a_jump_of_the_loss_when_layers_return_is_no_spike(tmp_path):
    class Returning(ForeignModule):
        def training_step(self, batch, batch_idx):
            # a layer returns at step 6, the other at the switch
            return super().training_step(batch, batch_idx) * 5.0 ** sum(self.trainer.global_step >= s for s in (6, 10))

    for detects in (True, False):
        model = Returning()
        trainer = Trainer(
            accelerator="cpu", max_steps=12, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
            callbacks=[
                all_lighthouse(10, CONFIG, [0, -1], return_steps=4 if detects else 0), SpikeDetection(rtol=2.0),
            ],
        )  # fmt: skip
        if detects:
            trainer.fit(model, loader(30))
            assert trainer.global_step == 12
        else:
            with pytest.raises(RuntimeError, match="spike detected in batch 6"):
                trainer.fit(model, loader(30))


def test_a_return_within_an_accumulated_step_restarts_spike_detection_once(tmp_path, monkeypatch):
    restarts = []
    monkeypatch.setattr(
        "lightning_lighthouse.training.phased_fit.restart_spike_detection", lambda _: restarts.append(1) or False
    )
    trainer = Trainer(
        accelerator="cpu", max_steps=6, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, accumulate_grad_batches=2,
        callbacks=[all_lighthouse(4, CONFIG, [0, -1], return_steps=2)],
    )  # fmt: skip
    trainer.fit(ForeignModule(), loader(40))
    # one of the two layers before the switch, and the switch
    assert (trainer.global_step, len(restarts)) == (6, 2)
