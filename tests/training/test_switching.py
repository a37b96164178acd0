"""The plateau rule, alone and beside what else eases the switch."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
from all_lighthouse import all_lighthouse
from hypothesis import given, settings
from hypothesis import strategies as st
from places import HELPERS
from switch_run import CONFIG, Module, Watch, fit, same_weights, saving, stalls

from lightning_lighthouse import LighthouseCallback, PlateauRule
from lightning_lighthouse.checks import ResumeError, SettingError
from lightning_lighthouse.phases.ledger import Validation
from lightning_lighthouse.phases.schedule import LIGHTHOUSE, SwitchState, resume_switch


def history(*losses, seconds=1.0):
    return [Validation(step, step * seconds, LIGHTHOUSE, loss) for step, loss in enumerate(losses, 1)]


@pytest.mark.parametrize(
    ("rule", "losses", "reached"),
    [
        (PlateauRule(patience=2), (5, 4, 4), False),
        (PlateauRule(patience=2), (5, 4, 4, 4), True),
        # the better one counts, not the last one
        (PlateauRule(patience=2), (5, 3, 4, 3.5), True),
        (PlateauRule(patience=2), (5, 4, 4, 3.9, 4), False),
        # 0.1 a second is asked for: too little since the second, then enough after three seconds
        (PlateauRule(patience=3, min_gain_per_second=0.1), (5, 4, 3.95, 3.9, 3.5), False),
        (PlateauRule(patience=3, min_gain_per_second=0.1), (5, 4, 3.95, 3.9, 3.8), True),
        (PlateauRule(patience=1), (math.nan,), True),
        (PlateauRule(patience=1), (math.nan, 2), False),
        (PlateauRule(patience=1), (), False),
    ],
)
def test_what_a_gain_is(rule, losses, reached):
    assert rule.is_reached(history(*losses)) is reached


@settings(max_examples=50, deadline=None)
@given(
    losses=st.lists(st.floats(0.1, 10), min_size=1, max_size=12),
    patience=st.integers(1, 4),
    rate=st.floats(0, 1),
    seconds=st.floats(0.1, 100),
)
def test_more_patience_and_a_lower_rate_wait_longer(losses, patience, rate, seconds):
    validations = history(*losses, seconds=seconds)
    if PlateauRule(patience + 1, rate).is_reached(validations):
        assert any(PlateauRule(patience, rate).is_reached(validations[:n]) for n in range(1, len(losses) + 1))
    if PlateauRule(patience, 0.0).is_reached(validations):
        # a rate asks for more than no rate: what gains with it gains without it
        assert any(PlateauRule(patience, rate).is_reached(validations[:n]) for n in range(1, len(losses) + 1))
    falling = sorted(set(losses), reverse=True)
    assert not PlateauRule(patience).is_reached(history(*falling))


def test_the_rule_switches_at_the_next_step(tmp_path, caplog):
    watch = Watch()
    with caplog.at_level("INFO"):
        callback = all_lighthouse(0.9, CONFIG, plateau=PlateauRule(patience=2))
        fit(tmp_path, [callback, watch], Module(told=stalls(4)))
    # the validations after 6 and 8 steps do not gain
    assert watch.phases == "L" * 8 + "d" * 8
    assert not any(watch.validation)
    assert caplog.text.count("switched from Lighthouse to dense attention") == 1
    assert "at step 8 by the plateau rule" in caplog.text
    assert "switch to dense at step 15 at the latest of 16" in caplog.text


@pytest.mark.parametrize(
    ("rule", "told", "phases"),
    [
        pytest.param(PlateauRule(patience=2), stalls(100), "L" * 12 + "d" * 4, marks=pytest.mark.slow),
        (PlateauRule(patience=2, earliest=10), stalls(4), "L" * 10 + "d" * 6),
        pytest.param(PlateauRule(patience=2, earliest=0.7), stalls(4), "L" * 12 + "d" * 4, marks=pytest.mark.slow),
        (PlateauRule(patience=1), lambda step: math.nan, "L" * 2 + "d" * 14),
    ],
    ids=["gains to the end", "earliest step", "earliest fraction", "nan"],
)
def test_switch_at_is_the_latest_and_earliest_the_first(tmp_path, rule, told, phases):
    watch = Watch()
    fit(tmp_path, [all_lighthouse(12, CONFIG, plateau=rule), watch], Module(told=told))
    assert watch.phases == phases


@pytest.mark.slow
def test_the_rule_never_splits_an_accumulation(tmp_path):
    watch = Watch()
    callback = all_lighthouse(5, CONFIG, plateau=PlateauRule(patience=1))
    # the validation after 3 of 4 batches falls into the second step
    arguments = {"accumulate_grad_batches": 2, "val_check_interval": 3, "max_steps": 8}
    fit(tmp_path, [callback, watch], Module(told=lambda step: 1.0), **arguments)
    # after 3 batches a first loss, after 6 no gain: at a boundary
    assert watch.phases == "L" * 6 + "d" * 10
    watch = Watch()
    arguments["val_check_interval"] = 5
    callback = all_lighthouse(7, CONFIG, plateau=PlateauRule(patience=1))
    fit(tmp_path, [callback, watch], Module(told=lambda step: 1.0 if step < 7 else math.nan), **arguments)
    assert watch.phases == "L" * 10 + "d" * 6
    watch = Watch()
    callback = all_lighthouse(7, CONFIG, plateau=PlateauRule(patience=1))
    fit(tmp_path, [callback, watch], Module(told=lambda step: math.nan), **arguments)
    # after 5 batches, in the middle of the third step
    assert watch.phases == "L" * 6 + "d" * 10


@pytest.mark.parametrize(
    "stop",
    [pytest.param(n, marks=() if n == 8 else pytest.mark.slow) for n in (4, 6, 8, 10)],
    ids=["before", "one before", "when decided", "after"],
)
def test_a_resumed_run_keeps_what_the_rule_decided(tmp_path, stop):
    def callback():
        return all_lighthouse(0.9, CONFIG, plateau=PlateauRule(patience=2))

    told = stalls(4)
    whole = fit(tmp_path, [callback(), saving(tmp_path)], Module(told=told))
    watch = Watch()
    path = next(tmp_path.glob(f"*step={stop}.ckpt"))
    part = fit(tmp_path, [callback(), watch], Module(told=told), ckpt_path=path)
    assert watch.phases == ("L" * 8 + "d" * 8)[stop:]
    assert part.losses == whole.losses[stop:]
    assert same_weights(part, whole)


def test_a_rule_needs_a_validation_and_a_known_length(tmp_path):
    rule = PlateauRule()
    with pytest.raises(SettingError, match="needs a validation"):
        fit(tmp_path, [all_lighthouse(0.9, CONFIG, plateau=rule)], validation=False)
    callback = all_lighthouse(9, CONFIG, plateau=PlateauRule(earliest=0.5))
    with pytest.raises(SettingError, match=r"plateau\.earliest=0\.5 is a fraction.*give plateau\.earliest as a step"):
        fit(tmp_path, [callback], max_steps=-1, max_time={"seconds": 5})


def test_a_rule_without_its_metric_waits_for_switch_at(tmp_path):
    watch = Watch()
    callback = all_lighthouse(0.5, CONFIG, plateau=PlateauRule(patience=1), validation_metric="loss")
    with pytest.warns(UserWarning, match="validation_metric='loss' was not logged"):
        fit(tmp_path, [callback, watch], Module(told=stalls(2)))
    assert watch.phases == "L" * 8 + "d" * 8


def test_going_back_from_a_plateau_needs_to_be_asked_for():
    saved = SwitchState(0.9, 40, switched=True, by_plateau=True)
    kept, line = resume_switch(saved, SwitchState(0.9, 90), 50, False, has_rule=True)
    assert (kept, line) == (saved, "")
    # a longer training, the settings as they were
    assert resume_switch(saved, SwitchState(0.9, 180), 50, True, has_rule=True)[0] == saved
    for asked, has_rule, words in [
        (SwitchState(0.9, 90), False, "the plateau rule was taken away"),
        (SwitchState(0.8, 80), True, r"switch_at was changed from 0\.9 to 0\.8"),
    ]:
        with pytest.raises(ResumeError, match=f"{words}.*switched to dense attention at step 40.*allow_return"):
            resume_switch(saved, asked, 50, False, has_rule)
        switch, line = resume_switch(saved, asked, 50, True, has_rule)
        assert switch.phase(50) == LIGHTHOUSE
        assert "returning" in line
    # decided, and not yet at its step
    pending = SwitchState(0.9, 41, by_plateau=True)
    assert resume_switch(pending, SwitchState(0.9, 90), 40, False, has_rule=True)[0] == pending
    with pytest.raises(ResumeError, match=r"taken away.*this run is to switch to dense attention at step 41"):
        resume_switch(pending, SwitchState(0.9, 90), 40, False, has_rule=False)


def test_all_of_them_leave_plain_training(tmp_path):
    rule = PlateauRule(patience=2)
    callback = all_lighthouse(0.9, CONFIG, [0, -1], plateau=rule, return_steps=2, rewarm_steps=2)
    watch = Watch()
    model = fit(tmp_path, [callback, watch], Module(told=stalls(4)))
    assert [len(routed) for _, routed in watch.training] == [4] * 8 + [3, 2] + [0] * 6
    assert "forward" not in vars(model.model.blocks[1].attn)
    assert "_lighthouse_route" not in vars(model.model.blocks[1].attn)
    # and a baseline heeds none of them
    dense = fit(tmp_path, [LighthouseCallback(0.9, CONFIG, enabled=False, rewarm_steps=2, return_steps=2)])
    assert dense.losses == fit(tmp_path, []).losses


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"return_steps": -1}, "return_steps must be at least 0, got -1"),
        ({"rewarm_steps": 2.0}, "rewarm_steps must be int, got 2.0"),
        ({"rewarm_steps": True}, "rewarm_steps must be int, got True"),
        ({"plateau": 3}, "plateau must be PlateauRule or None, got 3"),
    ],
)
def test_wrong_settings_are_quoted(arguments, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        LighthouseCallback(**arguments)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"patience": 0}, "patience must be at least 1, got 0"),
        ({"patience": 1.5}, "patience must be int, got 1.5"),
        ({"min_gain_per_second": -0.1}, "min_gain_per_second must be finite and at least 0, got -0.1"),
        ({"min_gain_per_second": math.nan}, "min_gain_per_second must be finite and at least 0, got nan"),
        ({"min_gain_per_second": "1"}, "min_gain_per_second must be int or float, got '1'"),
        ({"earliest": -1}, "earliest must be a step"),
        ({"earliest": 1.5}, "earliest must be a step"),
    ],
)
def test_a_wrong_rule_is_quoted(arguments, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        PlateauRule(**arguments)
    assert words in str(caught.value)


def two_ranks(output, *arguments):
    """Results of both ranks."""
    output.mkdir()
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launch, str(HELPERS / "plateau_run.py"), str(output), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((output / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_rank_0_decides_for_all(tmp_path):
    whole = two_ranks(tmp_path / "whole")
    for rank in whole:
        # two validations without a gain at step 8, two steps on the way back
        assert rank["phases"] == "L" * 10 + "d" * 6
        assert (rank["switch"]["switch_step"], rank["switch"]["by_plateau"]) == (10, True)
    # decided, and not yet switched
    path = next((tmp_path / "whole").glob("*step=8.ckpt"))
    for rank, part in zip(whole, two_ranks(tmp_path / "part", str(path)), strict=True):
        assert part["phases"] == rank["phases"][8:]
        assert part["losses"] == rank["losses"][8:]
        assert part["switch"] == rank["switch"]
