"""Layers handed back group after group before the switch."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from all_lighthouse import all_lighthouse
from foreign import GPT, ForeignModule
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import Callback
from switch_run import CONFIG, Module, Watch, fit, routed_layers, same_weights, saving, stalls
from torch.utils.checkpoint import checkpoint

from lightning_lighthouse import PlateauRule
from lightning_lighthouse.checks import ResumeError, SettingError
from lightning_lighthouse.phases.schedule import RETURN_GROUPS, SwitchState, resume_switch
from lightning_lighthouse.routing.patch import patch_attention


@settings(max_examples=200, deadline=None)
@given(
    switch_step=st.integers(0, 60),
    share=st.floats(0, 1),
    num_layers=st.integers(1, 40),
)
def test_layers_are_handed_back_in_equal_groups(switch_step, share, num_layers):
    switch = SwitchState(0.5, switch_step, return_steps=int(share * switch_step))
    counts = [switch.layers_returned(step, num_layers) for step in range(switch_step + 2)]
    assert counts == sorted(counts)
    assert set(counts[: switch.return_step]) <= {0}
    assert counts[switch_step:] == [num_layers] * 2
    # on the way some are dense, and some are not
    assert all(0 < n < num_layers for n in counts[switch.return_step : switch_step]) or num_layers == 1
    sizes = [b - a for a, b in itertools.pairwise([0, *sorted({*counts} - {0})])]
    assert len(sizes) <= RETURN_GROUPS
    assert max(sizes) - min(sizes) <= 1
    stages = [len(list(stage)) for _, stage in itertools.groupby(counts[switch.return_step : switch_step])]
    assert not stages or max(stages) - min(stages) <= 1


def test_the_last_layers_return_first(tmp_path, caplog):
    watch = Watch()
    with caplog.at_level("INFO"):
        fit(tmp_path, [all_lighthouse(8, CONFIG, "published", return_steps=6), watch], batches=10)
    steps = [[1, 2, 3, 4]] * 2 + [[1, 2, 3]] * 2 + [[1, 2]] * 2 + [[1]] * 2 + [[]] * 2
    assert watch.training == list(enumerate(steps))
    assert not any(watch.validation)
    assert caplog.text.count("switched from Lighthouse to dense attention at step 8") == 1


@pytest.mark.parametrize("stop", [pytest.param(n, marks=() if n == 4 else pytest.mark.slow) for n in (2, 4, 6, 8)])
def test_resume_on_the_way_back_is_exact(tmp_path, stop):
    def callback():
        return all_lighthouse(8, CONFIG, "published", return_steps=6)

    whole = fit(tmp_path, [callback(), saving(tmp_path)], batches=10)
    watch = Watch()
    part = fit(tmp_path, [callback(), watch], ckpt_path=next(tmp_path.glob(f"*step={stop}.ckpt")), batches=10)
    assert part.losses == whole.losses[stop:]
    assert same_weights(part, whole)
    assert len(watch.training[0][1]) == 4 - stop // 2


def test_the_rule_begins_the_return(tmp_path):
    watch = Watch()
    callback = all_lighthouse(14, CONFIG, "published", plateau=PlateauRule(patience=2), return_steps=3)
    fit(tmp_path, [callback, watch], Module(told=stalls(2)))
    counts = [len(routed) for _, routed in watch.training]
    assert counts == [4] * 6 + [3, 2, 1] + [0] * 7


def test_a_return_on_the_way_stays_unless_asked():
    saved = SwitchState(0.9, 90, return_steps=40)
    # earlier than it began nothing is decided
    assert resume_switch(saved, SwitchState(0.9, 90), 40, False)[1] == "return_steps changes from 40 to 0"
    with pytest.raises(ResumeError, match=r"return_steps was changed from 40 to 0.*hands its layers back from step 50"):
        resume_switch(saved, SwitchState(0.9, 90), 60, False)
    assert resume_switch(saved, SwitchState(0.9, 90), 60, True)[0].layers_returned(60, 4) == 0
    longer = SwitchState(0.9, 180, return_steps=40)
    assert resume_switch(saved, longer, 60, True)[0] == saved
    assert "the training got longer" in resume_switch(saved, longer, 60, True)[1]


def test_a_return_must_fit_before_the_switch(tmp_path):
    with pytest.raises(SettingError, match="return_steps=9 must end at the switch, which is at step 8"):
        fit(tmp_path, [all_lighthouse(8, CONFIG, "published", return_steps=9)])
    fit(tmp_path, [all_lighthouse(8, CONFIG, "published", return_steps=8)], batches=8)
    fit(tmp_path, [all_lighthouse(0.5, CONFIG, "published", return_steps=9)], fast_dev_run=True, max_steps=-1)


@pytest.fixture
def fresh_frames():
    """Frames are cached by their code, which other tests compile too."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(whole):
    torch.manual_seed(0)
    model, graphs = Module(), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for module in [model.model] if whole else model.model.blocks:
        module.compile(backend=backend, fullgraph=True)
    return model, graphs


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_frames")
@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "each block"])
def test_compiled_models_follow_the_return(tmp_path, whole):
    arguments = {"batches": 10, "num_sanity_val_steps": 1}
    eager = fit(tmp_path, [all_lighthouse(8, CONFIG, "published", return_steps=6)], **arguments)
    plain, at_once = compiled(whole)
    fit(tmp_path, [all_lighthouse(8, CONFIG, "published")], plain, **arguments)
    torch._dynamo.reset()
    model, graphs = compiled(whole)
    fit(tmp_path, [all_lighthouse(8, CONFIG, "published", return_steps=6)], model, **arguments)
    torch.testing.assert_close(model.losses, eager.losses, rtol=1e-4, atol=0)
    # a frame of the whole model once for each group but the last, a block's frame once for all of them
    assert len(graphs) - len(at_once) == (3 if whole else 1)


def test_a_return_has_room_to_recompile(tmp_path):
    limits = [torch._dynamo.config.recompile_limit]

    class Limit(Callback):
        def on_train_start(self, trainer, pl_module):
            limits.append(torch._dynamo.config.recompile_limit)

    for return_steps in (0, 2):
        fit(tmp_path, [all_lighthouse(2, CONFIG, "published", return_steps=return_steps), Limit()], batches=3)
        limits.append(torch._dynamo.config.recompile_limit)
    assert limits == [limits[0], limits[0], limits[0], limits[0] + RETURN_GROUPS, limits[0]]


def test_a_copy_follows_the_return():
    model = ForeignModule(model=GPT(6))
    patch = patch_attention(model, CONFIG, dense_layers="published")
    other = copy.deepcopy(model)
    with patch:
        patch.hand_back(list(patch.targets)[2:])
        assert routed_layers(model.train()) == routed_layers(other.train()) == [1, 2]


class Checkpointed(torch.nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_frames")
@pytest.mark.parametrize("whole", [True, False], ids=["whole model", "each block"])
def test_checkpointed_blocks_recompute_as_they_ran(whole):
    tokens = torch.randint(31, (2, 128), generator=torch.Generator().manual_seed(0))
    found = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = GPT(5)
        patch = patch_attention(model, CONFIG, dense_layers="published")
        if compiles:
            model.blocks = torch.nn.ModuleList(Checkpointed(block) for block in model.blocks)
            for module in [model] if whole else model.blocks:
                module.compile(backend="aot_eager", fullgraph=True)
        patch.on()
        losses = []
        for count in (0, 2):
            patch.hand_back(list(patch.targets)[3 - count :])
            model.zero_grad()
            loss = model(tokens).square().mean()
            loss.backward()
            losses.append([loss.item(), *(p.grad.norm().item() for p in model.parameters())])
        patch.restore()
        found.append(losses)
    assert found[0][0] != found[0][1]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
