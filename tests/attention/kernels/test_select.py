"""The kernels of the selections beside the published one: against the reference, and against the future."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from selecting import BLIND, CASES, moved, small_tiles
from twins import DEVICE, LAYOUTS, assert_same_selection, assert_twins, draw, flat_scores, level_scores, random_scores

from lightning_lighthouse import LighthouseConfig, lighthouse_attention, select_entries
from lightning_lighthouse.attention import kernels, reference

# a layer's heads 4, and 5 and 6
PARTS = (slice(0, 1), 4), (slice(1, 3), 5)
TILES_MODULE = import_module("lightning_lighthouse.attention.kernels.tiles")
pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("selection", BLIND)
def test_kernels_equal_their_twins(selection):
    with small_tiles(2):
        assert_twins(2, 1, 2, 43, 5, LighthouseConfig(3, 2, 4, selection=selection, seed=7))


def test_tiles_of_one_winner_equal_their_twins():
    with small_tiles(1):
        assert_twins(1, 2, 1, 41, 3, LighthouseConfig(2, 3, 3, selection="causal"))


SCORES = {
    "tokens": st.integers(1, 200),
    "levels": st.integers(2, 4),
    "p": st.integers(2, 5),
    "top_k": st.integers(1, 40),
    "tile_winners": st.integers(2, 9),
    "cover_prefix": st.booleans(),
    "tied": st.booleans(),
    "seed": st.integers(0, 2**32 - 1),
    "step": st.one_of(st.none(), st.integers(0, 10**6)),
}


def assert_selected_alike(
    selection, tokens, levels, p, top_k, tile_winners, cover_prefix, tied, seed, step, heads=(1, 2)
):
    config = LighthouseConfig(levels, p, top_k, selection=selection, cover_prefix=cover_prefix, seed=seed)
    with small_tiles(tile_winners):
        shape = config.pyramid(tokens)
    step = None if step is None else torch.tensor(step)
    assert_same_selection(random_scores(*heads, shape, tied, seed), shape, config, step)


@pytest.mark.parametrize("selection", ["random", pytest.param("causal", marks=pytest.mark.slow)])
def test_heads_split_over_two_calls_are_those_of_one(selection):
    config = LighthouseConfig(3, 2, 8, selection=selection)
    shape = config.pyramid(131)
    scores = random_scores(2, 3, shape, tied=False, seed=1)
    whole = kernels.select(scores, shape, config, None, 4)
    one, others = (kernels.select(scores[:, :, part], shape, config, None, first) for part, first in PARTS)
    assert torch.equal(torch.cat((one.index, others.index), 1), whole.index)
    assert torch.equal(torch.cat((one.slots, others.slots), 1), whole.slots)
    expected = reference.select(level_scores(scores, shape), shape, config, None, 4)
    assert torch.equal(whole.index, expected.index)


@pytest.mark.parametrize("selection", BLIND)
@settings(max_examples=2, deadline=None, derandomize=True)
@given(**SCORES)
def test_ties_and_nan_are_ranked_like_the_reference(selection, **case):
    assert_selected_alike(selection, **case)


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("selection", BLIND)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(**SCORES)
def test_many_ties_and_nan_are_ranked_like_the_reference(selection, **case):
    assert_selected_alike(selection, **case, heads=(2, 1))


@pytest.mark.parametrize("kind", [pytest.param("tied", marks=pytest.mark.slow), "q and k alike"])
def test_every_tile_follows_the_one_before(kind):
    config = LighthouseConfig(3, 2, 28, selection="causal")
    with small_tiles(7):
        shape = config.pyramid(383)
        assert (shape.num_tiles, shape.tile_entries, shape.winners) == (4, 24, (0, 7, 7))
        scores = random_scores(1, 1, shape, kind == "tied", 6)
        if kind != "tied":
            # what wins by s_q moves the threshold of s_k
            scores[1] = scores[0]
        assert_same_selection(scores, shape, config)
        first, second = kernels.select(scores, shape, config), kernels.select(scores, shape, config)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("selection", BLIND)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "distinct"])
def test_a_tile_longer_than_one_chunk(selection, tied, monkeypatch):
    monkeypatch.setattr(TILES_MODULE, "MAX_CHUNK", 32)
    config = LighthouseConfig(2, 2, 81, selection=selection)
    with small_tiles(40):
        shape = config.pyramid(509)
        assert shape.tile_entries > 3 * 32
        assert_same_selection(random_scores(1, 1, shape, tied, 5), shape, config)


@pytest.mark.parametrize(("selection", "last"), [("causal", 17), ("causal", 40), ("strided", 29), ("random", 29)])
def test_no_output_sees_a_later_token(selection, last):
    assert not moved(selection, 53, 2, 2, 9, 3, (2, 1), 1, last, last, backend="triton")


@pytest.mark.slow
@pytest.mark.parametrize("selection", BLIND)
# windows of many tokens take the interpreter long
@settings(max_examples=6, deadline=None, derandomize=True)
@given(**{**CASES, "tokens": st.integers(40, 131), "levels": st.integers(2, 3), "p": st.integers(2, 3)})
def test_no_output_sees_a_later_token_in_many_cases(selection, **case):
    assert not moved(selection, **case, backend="triton")


def test_the_published_selection_shows_later_tokens():
    assert any(moved("published", 53, 2, 2, 9, 3, (2, 1), 1, last, last, backend="triton") for last in (17, 40))


@pytest.mark.parametrize("arrange", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_memory_layout_changes_no_causal_score(arrange):
    config = LighthouseConfig(4, 3, 3, selection="causal")
    shape = config.pyramid(113)
    qkv = [x.detach() for x in draw(2, 1, 2, 113, 5)]
    scores = kernels.score(*(arrange(x) for x in qkv), shape, config)
    assert torch.equal(scores, kernels.score(*qkv, shape, config))
    torch.testing.assert_close(scores, flat_scores(reference.score(*qkv, shape, config)))


def test_a_causal_score_is_that_of_the_first_token():
    config = LighthouseConfig(3, 2, 2, selection="causal")
    shape = config.pyramid(23)
    q, k, v = (x.detach() for x in draw(1, 1, 2, 23, 5))
    q[0, 1, 6, 2] = torch.nan
    q[0, 0, 7, 0] = torch.nan
    k[0, 0, 20, 0] = torch.inf
    scores = kernels.score(q, k, v, shape, config)[:, 0, 0]
    # 12 entries of level 1, then 6 of level 2: token 6 opens entry 3, and token 7 none
    assert scores[0].isnan().nonzero().flatten().tolist() == [3]
    assert scores[1].isinf().nonzero().flatten().tolist() == [10, 12 + 5]


@pytest.mark.parametrize("selection", ["published", "causal"])
def test_pooled_scores_equal_their_twin(selection):
    config = LighthouseConfig(3, 3, 3, selection=selection)
    shape = config.pyramid(71)
    s_q, s_k = torch.randn(2, 2, 3, 71, device=DEVICE)
    expected = flat_scores(reference.pool_scores(s_q, s_k, shape, config))
    pooled = kernels.pool_scores(s_q, s_k, shape, config)
    assert pooled.is_contiguous()
    assert torch.equal(pooled, expected)
    assert kernels.pool_scores(s_q.double(), s_k.double(), shape, config).dtype == torch.float32


@pytest.mark.parametrize("selection", ["causal", pytest.param("random", marks=pytest.mark.slow)])
def test_the_whole_layer_equals_the_reference(selection):
    q, k, v = draw(1, 1, 2, 43, 5)
    dout = torch.randn(1, 2, 43, 5, device=DEVICE)
    results = []
    with small_tiles(2):
        for backend in ("triton", "reference"):
            config = LighthouseConfig(3, 2, 4, selection=selection, backend=backend, sdpa="math")
            out = lighthouse_attention(q, k, v, config)
            results.append((select_entries(q, k, v, config), out, *torch.autograd.grad(out, (q, k, v), dout)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    ("selection", "backend"),
    [
        ("causal", "triton"),
        pytest.param("strided", "triton", marks=pytest.mark.slow),
        pytest.param("causal", "reference", marks=pytest.mark.slow),
        pytest.param("strided", "reference", marks=pytest.mark.slow),
    ],
)
def test_compiled_in_one_graph_equals_eager(selection, backend):
    config = LighthouseConfig(3, 2, 4, selection=selection, backend=backend)
    qkv = draw(1, 1, 2, 43, 3)

    def layer(q, k, v):
        return lighthouse_attention(q, k, v, config)

    torch.compiler.reset()
    with small_tiles(2):
        results = []
        for run in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
            out = run(*qkv)
            results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
