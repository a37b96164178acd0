"""The dilated scorer: what its definition says, blind to padding and to the future, the same for both backends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lighthouse import LighthouseConfig, lighthouse_attention, select_entries
from lightning_lighthouse.attention import reference
from lightning_lighthouse.attention.dilated_scorer import dilated_scores


def draw(batch, heads, kv_heads, tokens, dim, dtype=torch.float32, seed=42):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, tokens, count, dim, generator=generator).to(dtype).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads)
    ]


def naive_scores(q, k, v, dilation, scale=None):
    """The definition, a token at a time."""
    batch, heads, tokens, dim = q.shape
    groups = k.shape[1]
    ratio = heads // groups
    scale = dim**-0.5 if scale is None else scale
    s_q, s_k = torch.zeros(2, batch, groups, tokens, dtype=q.dtype)
    for b in range(batch):
        for head in range(heads):
            group = head // ratio
            for token in range(tokens):
                seen = list(range(token % dilation, token + 1, dilation))
                values = v[b, group, seen]
                for scores, of, by in ((s_q, q[b, head], k[b, group]), (s_k, k[b, group], q[b, head])):
                    weights = (by[seen] @ of[token] * scale).softmax(0)
                    norm = (weights @ values).norm()
                    scores[b, group, token] = max(scores[b, group, token], norm)
    return s_q, s_k


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    ratio=st.integers(1, 3),
    tokens=st.integers(1, 23),
    dilation=st.integers(1, 7),
    scale=st.sampled_from([None, 0.7]),
)
def test_scores_are_those_of_the_definition(batch, groups, ratio, tokens, dilation, scale):
    """Any length: dilation need not divide it, and may be longer."""
    q, k, v = draw(batch, groups * ratio, groups, tokens, 5, torch.float64)
    ours = dilated_scores(
        q, k, v, LighthouseConfig(scorer="dilated", dilation=dilation, selection="published"), scale=scale
    )
    for actual, expected in zip(ours, naive_scores(q, k, v, dilation, scale), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_norms_are_fp32_sums(dtype):
    q, k, v = draw(2, 4, 2, 31, 16, dtype)
    # a sum of squares beyond the largest number of fp16
    v = v.abs() + 200
    config = LighthouseConfig(scorer="dilated", dilation=3, selection="published")
    expected = naive_scores(*(x.double() for x in (q, k, v)), 3)
    for actual, exact in zip(dilated_scores(q, k, v, config, scale=None), expected, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=0)


@given(tokens=st.integers(2, 40), dilation=st.integers(1, 6), data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_score_knows_no_later_token(tokens, dilation, data):
    at = data.draw(st.integers(0, tokens - 2))
    config = LighthouseConfig(scorer="dilated", dilation=dilation, selection="published")
    original = draw(1, 2, 1, tokens, 8)
    changed = draw(1, 2, 1, tokens, 8, seed=7)
    for x, y in zip(original, changed, strict=True):
        y[:, :, : at + 1] = x[:, :, : at + 1]
    for before, after in zip(
        dilated_scores(*original, config, scale=None), dilated_scores(*changed, config, scale=None), strict=True
    ):
        assert torch.equal(before[..., : at + 1], after[..., : at + 1])
        assert not torch.equal(before, after)


@pytest.mark.parametrize("at", [0, 17, 130, 260, 505])
def test_causal_selection_stays_causal(at):
    config = LighthouseConfig(3, 2, 64, scorer="dilated", dilation=5, selection="causal")
    tokens = 521
    assert config.pyramid(tokens).compresses
    original, changed = draw(1, 4, 2, tokens, 8), draw(1, 4, 2, tokens, 8, seed=7)
    for x, y in zip(original, changed, strict=True):
        y[:, :, : at + 1] = x[:, :, : at + 1]
    before, after = (lighthouse_attention(*qkv, config) for qkv in (original, changed))
    assert torch.equal(before[:, :, : at + 1], after[:, :, : at + 1])
    assert not torch.equal(before, after)


def test_it_selects_other_entries_than_the_norms_do():
    qkv = draw(1, 2, 2, 521, 8)
    config = LighthouseConfig(3, 2, 16, selection="published")
    dilated = LighthouseConfig(3, 2, 16, scorer="dilated", selection="published")
    assert not torch.equal(select_entries(*qkv, config), select_entries(*qkv, dilated))
    shape = config.pyramid(521)
    scores = reference.pool_scores(*dilated_scores(*qkv, dilated, scale=None), shape, dilated)
    assert torch.equal(select_entries(*qkv, dilated), reference.select(scores, shape, dilated).index)


def test_normalised_q_and_k_still_have_scores_to_rank():
    """All norms are equal, so that the norm scorer ranks rounding errors; what attention returns still differs."""
    q, k, v = draw(1, 2, 2, 512, 16)
    q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    config = LighthouseConfig(3, 4, 16, scorer="dilated", selection="published")
    shape = config.pyramid(512)
    by_norm = reference.score(q, k, v, shape, config)[1]
    dilated = reference.pool_scores(*dilated_scores(q, k, v, config, scale=None), shape, config)[1]
    for flat, spread in zip(by_norm, dilated, strict=True):
        assert (flat.std(-1) / flat.mean(-1)).max() < 1e-6
        assert (spread.std(-1) / spread.mean(-1)).min() > 0.1


def test_no_gradient_passes_through_the_scores():
    config = LighthouseConfig(3, 2, 16, scorer="dilated", backend="reference", selection="published")
    gradients = []
    for frozen in (False, True):
        q, k, v = (x.requires_grad_() for x in draw(1, 2, 1, 211, 8))
        if frozen:
            shape = config.pyramid(211)
            with torch.no_grad():
                scores = reference.pool_scores(*dilated_scores(q, k, v, config, scale=None), shape, config)
            selection = reference.select(scores, shape, config)
            o = torch.nn.functional.scaled_dot_product_attention(
                *reference.gather(q, k, v, selection, shape), is_causal=True, enable_gqa=True
            )
            out = reference.scatter(o, selection, shape, config)
        else:
            out = lighthouse_attention(q, k, v, config)
        gradients.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is used on machines without a GPU only")
@pytest.mark.parametrize("selection", ["published", "causal"])
@pytest.mark.parametrize(
    ("heads", "tokens", "settings"),
    [((2, 2, 1), 131, (3, 2, 7)), ((1, 2, 2), 127, (2, 4, 5))],
    ids=["grouped, prime", "padded"],
)
def test_both_backends_select_the_same_entries(selection, heads, tokens, settings):
    batch, groups, ratio = heads
    qkv = draw(batch, groups * ratio, groups, tokens, 8)
    index = [
        select_entries(
            *qkv, LighthouseConfig(*settings, scorer="dilated", dilation=3, selection=selection, backend=backend)
        )
        for backend in ("reference", "triton")
    ]
    assert torch.equal(*index)


@pytest.mark.parametrize("backend", [pytest.param("reference", marks=pytest.mark.slow), "triton"])
def test_compiles_in_one_graph(backend):
    if backend == "triton" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter is used on machines without a GPU only")
    torch.compiler.reset()
    # 131 tokens are no multiple of 4
    config = LighthouseConfig(3, 2, 7, scorer="dilated", backend=backend, selection="published")
    qkv = [x.requires_grad_() for x in draw(1, 2, 1, 131, 8)]
    layer = lambda q, k, v: lighthouse_attention(q, k, v, config)  # noqa: E731
    out, compiled = layer(*qkv), torch.compile(layer, backend="aot_eager", fullgraph=True)(*qkv)
    torch.testing.assert_close(compiled, out)
    weight = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, qkv, weight), torch.autograd.grad(compiled, qkv, weight), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("selection", ["strided", "random"])
def test_selections_without_scores_do_not_pay_for_them(selection, monkeypatch):
    def refuse(*args, **settings):
        raise AssertionError("scored")

    monkeypatch.setattr("lightning_lighthouse.attention.lighthouse.dilated_scores", refuse)
    qkv = draw(1, 1, 1, 131, 8)
    lighthouse_attention(*qkv, LighthouseConfig(3, 2, 7, scorer="dilated", selection=selection))
    with pytest.raises(AssertionError, match="scored"):
        lighthouse_attention(*qkv, LighthouseConfig(3, 2, 7, scorer="dilated", selection="published"))
