"""The types of layers: what goes together, the pattern over the layers, and its words."""

from __future__ import annotations

import pytest

from lightning_lighthouse.attention.layer_types import check_layer_types, in_words, spread_over


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ((["window"], None, 0), "window must be given with layer_types 'window': how many tokens it sees"),
        ((["dense", "chunk"], None, 0), "window must be given with layer_types 'chunk': how many tokens it sees"),
        ((["lighthouse"], 8, 0), "window is for layer_types 'window' and 'chunk', got 8 with ['lighthouse']"),
        ((["chunk"], 8, 2), "sink_tokens is for layer_types 'window', got 2 with ['chunk']"),
        ((["window"], 0, 0), "window must be at least 1, got 0"),
        ((["window"], 8, -1), "sink_tokens must be at least 0, got -1"),
        (([], None, 0), "layer_types must be a list of 'lighthouse', 'window', 'chunk', 'dense', got []"),
        ((["wind"], 8, 0), "layer_types must be a list of 'lighthouse', 'window', 'chunk', 'dense', got 'wind'"),
    ],
)
def test_what_does_not_go_together_is_one_line(given, line):
    with pytest.raises(ValueError, match=r"^(layer_types|window|sink)") as error:
        check_layer_types(*given)
    assert str(error.value) == line


@pytest.mark.parametrize("given", [("window", 8, 0), (["window"], 8.0, 0), (["window"], 8, True), (3, 8, 0)])
def test_a_wrong_type_is_a_type_error(given):
    with pytest.raises(TypeError):
        check_layer_types(*given)


def test_a_pattern_is_repeated_as_far_as_it_goes():
    assert spread_over(["window", "lighthouse"], 5) == ("window", "lighthouse", "window", "lighthouse", "window")
    assert spread_over(["dense"], 3) == ("dense",) * 3
    with pytest.raises(ValueError, match="layer_types names 3 layers, the model has 2 attention layers"):
        spread_over(["dense"] * 3, 2)


@pytest.mark.parametrize(
    ("layer_types", "window", "sinks", "words"),
    [
        (["lighthouse"] * 12, None, 0, "lighthouse"),
        (["window"] * 3 + ["lighthouse"], 512, 0, "window 512 \u00d73 + lighthouse"),
        ((["window"] * 3 + ["lighthouse"]) * 7, 512, 0, "window 512 \u00d73 + lighthouse"),
        (["window", "dense"], 64, 4, "window 64 (4 sinks) + dense"),
        (["dense", "chunk", "chunk", "dense"], 64, 0, "dense + chunk 64 \u00d72 + dense"),
        (["window", "dense", "window", "window"] * 2, 64, 0, "window 64 + dense + window 64 \u00d72"),
    ],
)
def test_the_words_name_the_shortest_pattern(layer_types, window, sinks, words):
    assert in_words(layer_types, window, sinks) == words


def test_patterns_that_go_on_otherwise_have_other_words():
    assert in_words(["window", "dense", "window"], 64) != in_words(["window", "dense", "window", "window"], 64)
