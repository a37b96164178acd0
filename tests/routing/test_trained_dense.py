"""A model that was trained dense is told once that combine="sum" throws it off; one trained from nothing is not."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fitting import fit
from foreign import GPT
from patching import CONFIG, run, tokens
from warned import own_warnings

from lightning_lighthouse import LighthouseCallback, Phase, patch_attention

REMEDY = "and combine='sum' adds what several levels say: such a model begins far off; set combine='mean'"
MEAN = replace(CONFIG, combine="mean")


def lines_of(model, x, config=CONFIG):
    with own_warnings() as lines, patch_attention(model, config) as patch:
        for _ in range(2):
            model(x)
            patch.on()
    return lines


def test_weights_that_were_loaded_are_told_of_once_and_fresh_ones_are_not(tmp_path):
    pytest.importorskip("transformers")
    from pretrained import draw_tokens, load_model, save_model

    x = draw_tokens()
    folder = save_model(tmp_path / "model")
    model = load_model(folder)
    assert lines_of(model, x) == [f"weights that come from '{folder}' were trained dense, {REMEDY}"]
    assert lines_of(model, x, MEAN) == []
    # of a configuration that was not read from anywhere
    model.config.name_or_path = ""
    assert lines_of(type(model)._from_config(model.config, attn_implementation="sdpa"), x) == []
    assert lines_of(GPT(), tokens()) == []


def test_an_evaluation_says_nothing(tmp_path):
    model = GPT()
    with own_warnings() as lines, patch_attention(model, CONFIG) as patch:
        patch.dense()
        patch.on(inference=True)
        run(model, tokens())
    assert lines == []


def test_phases_that_begin_dense_are_told_once(tmp_path):
    def lines(*phases, config=CONFIG):
        callback = LighthouseCallback(phases=list(phases), attention=config)
        with own_warnings() as found:
            fit(tmp_path / str(len(list(tmp_path.iterdir()))), [callback], max_steps=6)
        return [line for line in found if "combine" in line]

    routed = Phase(5, ["lighthouse"])
    assert lines(Phase(2, ["dense"]), routed) == [f"the model was trained dense before, {REMEDY}"]
    assert lines(Phase(2, ["dense"]), routed, config=MEAN) == []
    assert lines(Phase(2, ["window"], window=8), routed) == []
