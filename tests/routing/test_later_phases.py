"""A layer that is dense at first is judged by the first batch in which it is routed, in whatever phase that is."""

from __future__ import annotations

import warnings

import pytest
import torch
from fitting import fit
from foreign import GPT, ForeignModule, GroupedAttention
from patching import CONFIG, run, tokens

from lightning_lighthouse import LighthouseCallback, Phase, patch_attention

LINE = r"2 of 4 attention layers .*blocks.1.attn, .*blocks.3.attn: dropout_p is not 0"


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


def with_dropout(model=None):
    """A model whose second and fourth layer cannot be routed."""
    model = model or GPT()
    for block in model.blocks[1::2]:
        block.attn = GroupedAttention(16, 2, 1, dropout=0.1)
    return model


def window_of(layer_types):
    return 8 if "window" in layer_types else None


def patched(layer_types, model=None):
    patch = patch_attention(model or with_dropout(), CONFIG, layer_types=layer_types, window=window_of(layer_types))
    patch.on()
    return patch


@pytest.mark.parametrize("turned_on", ["again", "still"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("first", [["dense"], ["window", "dense"]], ids=["dense", "partly dense"])
def test_layers_that_are_dense_at_first_are_judged_when_they_are_routed(first, compiled, turned_on):
    patch = patched(first)
    if compiled:
        for block in patch.model.blocks:
            block.compile(backend="aot_eager")
    run(patch.model, tokens())
    patch.check()
    assert not patch.is_audited
    if turned_on == "again":
        patch.off()
    patch.attend(["lighthouse"])
    if turned_on == "again":
        patch.on()
    else:
        # nothing ran that it could judge by
        patch.check()
    run(patch.model, tokens())
    with pytest.raises(RuntimeError, match="blocks.3.attn: .*dropout_p is not 0" if compiled else LINE):
        patch.check()
    patch.restore()


def test_frames_that_other_layers_left_are_no_reason_to_miss_a_layer():
    patch = patched(["window", "dense"], GPT())
    for block in patch.model.blocks:
        block.compile(backend="aot_eager")
    for layer_types in (["window", "dense"], ["window"], ["lighthouse", "window"], ["lighthouse"]):
        patch.attend(layer_types, window=window_of(layer_types))
        patch.on()
        run(patch.model, tokens())
        patch.check()
    assert patch.unrouted() == {}
    patch.restore()


def test_a_check_that_comes_late_judges_each_phase_by_its_own_batches():
    patch = patched(["window", "dense"])
    run(patch.model, tokens())
    patch.attend(["lighthouse"])
    patch.check()
    run(patch.model, tokens())
    with pytest.raises(RuntimeError, match=LINE):
        patch.check()
    patch.restore()

    patch = patched(["dense", "window"])
    run(patch.model, tokens())
    patch.attend(["lighthouse"])
    # before the others ran
    with pytest.raises(RuntimeError, match=LINE):
        patch.check()
    patch.restore()


def test_leaving_the_context_judges_the_last_phase():
    patch = patched(["dense"])
    with patch:
        run(patch.model, tokens())
        patch.attend(["lighthouse"])
    assert not patch.is_patched

    patch = patched(["dense"])
    run(patch.model, tokens())
    patch.attend(["lighthouse"])
    with pytest.raises(RuntimeError, match=LINE), patch:
        run(patch.model, tokens())
    assert not patch.is_patched


def test_layers_that_were_handed_back_are_judged_when_they_come_again():
    patch = patched(["lighthouse"])
    patch.hand_back(["blocks.1.attn", "blocks.3.attn"])
    run(patch.model, tokens())
    patch.check()
    patch.hand_back(())
    run(patch.model, tokens())
    with pytest.raises(RuntimeError, match=LINE):
        patch.check()
    patch.restore()


def test_each_layer_is_judged_once():
    patch = patched(["dense", "window"])
    run(patch.model, tokens())
    with pytest.warns(UserWarning, match=LINE):
        patch.check("warn")
    patch.attend(["lighthouse"])
    assert patch.is_audited
    run(patch.model, tokens())
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*attention layers")
        patch.check("warn")
        for layer_types in (["window"], ["dense"], ["lighthouse"]):
            patch.attend(layer_types, window=window_of(layer_types))
            patch.on()
            assert not patch.is_audited
            run(patch.model, tokens())
            patch.check()
    assert set(patch.unrouted()) == {"blocks.1.attn", "blocks.3.attn"}
    patch.restore()


def test_what_trains_nothing_is_told_once():
    model = GPT()
    model.blocks[:2].requires_grad_(False)
    for part in (model.embed, model.position):
        part.requires_grad_(False)
    patch = patched(["window", "dense"], model)
    told = []
    for layer_types in (["window", "dense"], ["lighthouse"]):
        patch.attend(layer_types, window=window_of(layer_types))
        run(model, tokens())
        with pytest.warns(UserWarning, match="frozen") as lines:
            patch.check()
        told.append([name for name in ("blocks.0.attn", "blocks.1.attn") if name in str(lines[0].message)])
    assert told == [["blocks.0.attn"], ["blocks.1.attn"]]
    patch.restore()


@pytest.mark.parametrize("on_unroutable", ["raise", "warn"])
@pytest.mark.parametrize("first", [["dense"], ["window", "dense"]], ids=["dense", "partly dense"])
def test_a_fit_is_told_of_layers_that_a_later_phase_cannot_route(tmp_path, first, on_unroutable):
    module = ForeignModule()
    with_dropout(module.model)
    phases = [
        Phase(until=2, layer_types=first, window=window_of(first)),
        Phase(until=6, layer_types=["lighthouse"]),
    ]
    callback = LighthouseCallback(phases=phases, attention=CONFIG, on_unroutable=on_unroutable)
    if on_unroutable == "raise":
        with pytest.raises(RuntimeError, match=LINE):
            fit(tmp_path, [callback], module)
    else:
        with pytest.warns(UserWarning, match=LINE) as told:
            fit(tmp_path, [callback], module)
        assert len([line for line in told if "dropout_p" in str(line.message)]) == 1
