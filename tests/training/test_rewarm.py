"""The learning rate re-warmed after the switch, for the update alone."""

from __future__ import annotations

import json
import math

import pytest
import torch
from all_lighthouse import all_lighthouse
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from switch_run import CONFIG, Module, Rates, Watch, fit, same_weights, saving
from torch.distributed.optim import ZeroRedundancyOptimizer

from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.phases.schedule import DENSE, SwitchState, resume_switch
from lightning_lighthouse.training.rewarm import Rewarm


@settings(max_examples=100, deadline=None)
@given(step=st.integers(0, 100), switch_step=st.integers(0, 60), rewarm_steps=st.integers(0, 40))
def test_the_factor(step, switch_step, rewarm_steps):
    switch = SwitchState(0.5, switch_step, rewarm_steps=rewarm_steps)
    factor = switch.rate_factor(step)
    assert 0 < factor <= 1
    if not switch_step <= step < switch_step + rewarm_steps or switch_step == 0:
        assert factor == 1
    else:
        assert factor == pytest.approx((step - switch_step + 1) / (rewarm_steps + 1))
        assert factor < 1


def test_only_the_update_sees_the_scaled_rate(tmp_path):
    class Saved(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            # what a checkpoint of this step would hold
            state = trainer.optimizers[0].state_dict()
            saved.append([group["lr"] for group in state["param_groups"]])

    saved = []
    plain = fit(tmp_path, [all_lighthouse(8, CONFIG)], batches=14)
    model = fit(tmp_path, [all_lighthouse(8, CONFIG, rewarm_steps=4), Saved()], batches=14)
    factors = [1.0] * 8 + [0.2, 0.4, 0.6, 0.8] + [1.0] * 2
    scheduled = [[0.1 * 0.9**step, 0.05 * 0.9**step] for step in range(15)]
    for step, factor in enumerate(factors):
        assert model.optimizer.used[step] == pytest.approx([rate * factor for rate in scheduled[step]])
        assert saved[step] == pytest.approx(scheduled[step + 1])
    # neither the module nor the schedule sees it
    assert model.rates == plain.rates
    assert [group["lr"] for group in model.optimizer.param_groups] == [
        group["lr"] for group in plain.optimizer.param_groups
    ]
    assert model.losses[:9] == plain.losses[:9]
    assert model.losses[9:] != plain.losses[9:]


@pytest.mark.parametrize("stop", [pytest.param(n, marks=() if n == 10 else pytest.mark.slow) for n in (6, 8, 10, 12)])
def test_resume_within_the_rewarm_is_exact(tmp_path, stop):
    def callback():
        return all_lighthouse(8, CONFIG, rewarm_steps=3)

    whole = fit(tmp_path, [callback(), saving(tmp_path)])
    part = fit(tmp_path, [callback()], ckpt_path=next(tmp_path.glob(f"*step={stop}.ckpt")))
    assert part.optimizer.used == whole.optimizer.used[stop:]
    assert part.losses == whole.losses[stop:]
    assert same_weights(part, whole)


def test_a_switch_that_a_resume_asks_for_too_late_is_rewarmed_whole(tmp_path):
    fit(tmp_path, [all_lighthouse(12, CONFIG), saving(tmp_path)], batches=8)
    model = fit(tmp_path, [all_lighthouse(2, CONFIG, rewarm_steps=3)], ckpt_path=next(tmp_path.glob("*step=6.ckpt")))
    factors = [0.25, 0.5, 0.75, 1.0]
    assert [used[0] for used in model.optimizer.used[:4]] == pytest.approx(
        [0.1 * 0.9 ** (6 + n) * factor for n, factor in enumerate(factors)]
    )
    report = json.loads((tmp_path / "lighthouse.json").read_text())
    assert report["switch"]["switch_step"] == report["plan"][-1]["first_step"] == 6
    assert report["phases"]["lighthouse"]["steps"] == 6


def test_an_accumulated_step_has_one_factor(tmp_path):
    arguments = {"accumulate_grad_batches": 2, "max_steps": 8}
    model = fit(tmp_path, [all_lighthouse(4, CONFIG, rewarm_steps=1)], **arguments)
    factors = [used[0] / (0.1 * 0.9**step) for step, used in enumerate(model.optimizer.used)]
    assert factors == pytest.approx([1.0] * 4 + [0.5] + [1.0] * 3)


class Manual(Module):
    def __init__(self, optimizers=1):
        super().__init__()
        self.automatic_optimization = False
        self.count = optimizers

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        self.losses.append(loss.item())
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            # nanoGPT's way
            for group in optimizer.param_groups:
                group["lr"] = self.rate
            optimizer.step()

    def configure_optimizers(self):
        parameters = list(self.parameters())
        return [Rates(parameters[n :: self.count], lr=self.rate) for n in range(self.count)]


def test_manual_optimization_that_sets_its_own_rate(tmp_path):
    model = fit(tmp_path, [all_lighthouse(4, CONFIG, rewarm_steps=3)], Manual(), batches=10)
    optimizer = model.trainer.optimizers[0]
    assert [rates[0] for rates in optimizer.used] == pytest.approx([0.1] * 4 + [0.025, 0.05, 0.075] + [0.1] * 3)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_several_optimizers_are_told_how_steps_are_counted(tmp_path):
    watch = Watch()
    with pytest.warns(UserWarning, match="steps of all 2 optimizers.*switch_at=9 comes after 5 batches"):
        model = fit(tmp_path, [all_lighthouse(9, CONFIG, rewarm_steps=3), watch], Manual(2))
    assert watch.phases == "L" * 5 + "d" * 3
    # both optimizers of a batch have one factor
    first, second = (optimizer.used for optimizer in model.trainer.optimizers)
    assert first == second
    assert [rates[0] for rates in first] == pytest.approx([0.1] * 5 + [0.05] + [0.1] * 2)


def test_a_step_that_the_loss_scaler_skips_leaves_the_rate():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    rewarm = Rewarm([optimizer])
    # the first gradient overflows, the second is 1
    for gradient, moved in [(math.inf, 0.0), (1.0, 0.5 * 0.25)]:
        before = parameter.detach().clone()
        rewarm.start_batch(0.25)
        optimizer.zero_grad()
        scaler.scale(parameter.sum() * gradient).backward()
        scaler.unscale_(optimizer)
        rewarm.on_closure_end(optimizer)
        assert optimizer.param_groups[0]["lr"] == 0.5
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.param_groups[0]["lr"] == 0.5
        torch.testing.assert_close(before - parameter.detach(), torch.full((3,), moved))
    rewarm.remove()
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_a_rate_that_is_a_tensor_is_put_back_itself():
    rate = torch.tensor(0.5)
    parameters = [torch.nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": rate} for parameter in parameters], lr=rate)
    rewarm = Rewarm([optimizer])

    def closure():
        sum(parameters).backward()
        rewarm.on_closure_end(optimizer)

    rewarm.start_batch(0.25)
    optimizer.step(closure)
    # both groups share the tensor, and each is scaled once
    assert [parameter.item() for parameter in parameters] == [1 - 0.5 * 0.25] * 2
    assert all(group["lr"] is rate for group in optimizer.param_groups)
    assert rate == 0.5


def test_an_exception_in_the_update_leaves_the_rate(tmp_path):
    class Fails(torch.optim.SGD):
        def __init__(self, parameters, **arguments):
            super().__init__(parameters, **arguments)
            self.used = []

        def step(self, closure=None):
            with torch.enable_grad():
                closure()
            self.used.append(self.param_groups[0]["lr"])
            if len(self.used) == 10:
                raise RuntimeError("in the update")

    class Failing(Module):
        def configure_optimizers(self):
            self.optimizer = Fails(self.parameters(), lr=0.1)
            return self.optimizer

    model = Failing()
    with pytest.raises(RuntimeError, match="in the update"):
        fit(tmp_path, [all_lighthouse(8, CONFIG, rewarm_steps=4)], model)
    assert model.optimizer.used[-1] == pytest.approx(0.04)
    assert model.optimizer.param_groups[0]["lr"] == 0.1


def test_another_kind_of_optimizer_is_refused():
    # torch's copies the rate to the optimizer that updates, before it runs the closure
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        parameters = [torch.nn.Parameter(torch.ones(1))]
        sharded = ZeroRedundancyOptimizer(parameters, optimizer_class=torch.optim.SGD, lr=1.0)
    finally:
        torch.distributed.destroy_process_group()
    for optimizer in (object(), sharded):
        name = type(optimizer).__name__
        with pytest.raises(SettingError, match=rf"rewarm_steps needs optimizers of torch\.optim, got {name}"):
            Rewarm([optimizer])


def test_rewarm_changed_on_resume_is_told():
    saved = SwitchState(0.5, 50, switched=True, rewarm_steps=10)
    switch, line = resume_switch(saved, SwitchState(0.5, 50, rewarm_steps=20), 55, False)
    assert line == "rewarm_steps changes from 10 to 20"
    assert switch.rate_factor(55) == pytest.approx(6 / 21)
    assert switch.phase(0) == DENSE
