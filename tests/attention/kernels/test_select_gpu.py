"""The selections beside the published one on a GPU at real sizes: the reference's index, and no later token."""

from __future__ import annotations

import pytest
import torch
from selecting import BLIND
from twins import assert_same_selection, assert_twins, draw_cuda, level_scores, random_scores

from lightning_lighthouse import LighthouseConfig, lighthouse_attention
from lightning_lighthouse.attention import kernels, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def salient(*size, **options):
    """q, k and v whose norms differ by token, in bursts."""
    qkv = draw_cuda(*size, **options)
    tokens = qkv[0].shape[2]
    generator = torch.Generator("cuda").manual_seed(7)
    loudness = torch.randn(tokens, 1, device="cuda", generator=generator).cumsum(0)
    loudness = (loudness - loudness.mean()) / loudness.std()
    return [(x.detach() * (0.7 * loudness).exp()).to(x.dtype).requires_grad_() for x in qkv]


@pytest.mark.parametrize("selection", BLIND)
@pytest.mark.parametrize(
    ("heads", "tokens", "levels", "top_k"), [((1, 8, 8), 98_304, 3, 1536), ((2, 8, 2), 100_003, 4, 333)]
)
def test_the_index_is_that_of_the_reference(selection, heads, tokens, levels, top_k):
    config = LighthouseConfig(levels, 4, top_k, selection=selection, seed=5)
    shape = config.pyramid(tokens)
    step = torch.tensor(1234)
    with torch.no_grad():
        qkv = salient(*heads, tokens, 128)
        scores = kernels.score(*qkv, shape, config)
        expected_scores = level_scores(scores, shape) if config.reads_scores else reference.score(*qkv, shape, config)
        ours = kernels.select(scores, shape, config, step)
        again = kernels.select(scores, shape, config, step)
        expected = reference.select(expected_scores, shape, config, step)
    assert torch.equal(ours.index, expected.index)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "distinct"])
def test_large_causal_tiles_are_selected_like_the_reference(tied):
    config = LighthouseConfig(3, 4, 100, selection="causal")
    shape = config.pyramid(1_000_003)
    assert shape.num_tiles == 3
    assert shape.tile_entries > 20_000
    assert_same_selection(random_scores(1, 2, shape, tied, 3), shape, config)


@pytest.mark.parametrize("selection", BLIND)
@pytest.mark.parametrize(
    ("heads", "tokens", "config"),
    [((1, 2, 2), 10_007, (3, 3, 131)), ((2, 2, 1), 8_209, (4, 2, 300))],
    ids=["grouped", "four levels"],
)
def test_kernels_equal_their_twins(selection, heads, tokens, config):
    assert_twins(*heads, tokens, 64, LighthouseConfig(*config, selection=selection))


@pytest.mark.parametrize("selection", BLIND)
@pytest.mark.parametrize(
    ("heads", "tokens", "levels", "top_k"), [((1, 8, 8), 98_304, 3, 1536), ((2, 8, 2), 20_011, 4, 300)]
)
def test_no_output_sees_a_later_token(selection, heads, tokens, levels, top_k):
    config = LighthouseConfig(levels, 4, top_k, selection=selection)
    q, k, v = (x.detach() for x in salient(*heads, tokens, 128))
    assert config.pyramid(tokens).compresses
    out = lighthouse_attention(q, k, v, config)
    for last in (0, 4_095, 9_998, tokens // 2, tokens - 300):
        changed = [torch.cat((x[:, :, : last + 1], -3 * x[:, :, last + 1 :].flip(2)), 2) for x in (q, k, v)]
        new = lighthouse_attention(*changed, config)
        assert torch.equal(new[:, :, : last + 1], out[:, :, : last + 1]), last
        assert not torch.equal(new[:, :, last + 1 :], out[:, :, last + 1 :]), last


def test_the_published_selection_shows_later_tokens():
    config = LighthouseConfig(3, 4, 1536, selection="published")
    q, k, v = (x.detach() for x in salient(1, 8, 8, 98_304, 128))
    last = 50_001
    changed = [torch.cat((x[:, :, : last + 1], -3 * x[:, :, last + 1 :].flip(2)), 2) for x in (q, k, v)]
    outputs = [lighthouse_attention(*inputs, config)[:, :, : last + 1] for inputs in ((q, k, v), changed)]
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("selection", BLIND)
def test_compiled_in_one_graph_equals_eager(selection):
    torch.compiler.reset()
    qkv = draw_cuda(1, 4, 2, 16_411, 64)
    config = LighthouseConfig(selection=selection)
    step = torch.tensor(0)

    def layer(q, k, v):
        return lighthouse_attention(q, k, v, config, step=step)

    compiled = torch.compile(layer, fullgraph=True)
    outputs = []
    for number in (0, 7):
        step.fill_(number)
        outputs.append(compiled(*qkv))
        assert torch.equal(outputs[-1], layer(*qkv))
    assert torch.equal(*outputs) == (selection != "random")
