"""The reference is the specification: against the published output, an independent oracle, and its own properties."""

from __future__ import annotations

import oracle
import pytest
import torch
import torch.nn.functional as F
from drawn import draw
from hypothesis import given, settings
from hypothesis import strategies as st
from places import GOLDEN

from lightning_lighthouse import LighthouseConfig, lighthouse_attention, select_entries
from lightning_lighthouse.attention import reference

PUBLISHED = sorted(GOLDEN.glob("*.pt"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_output_is_reproduced(path):
    case = torch.load(path, weights_only=True)
    config = LighthouseConfig(
        case["num_levels"], case["pooling_factor"], case["top_k"], cover_prefix=False, selection="published"
    )
    q, k, v = (case[name].requires_grad_() for name in "qkv")

    assert torch.equal(select_entries(q, k, v, config), case["index"])
    out = lighthouse_attention(q, k, v, config)
    out.backward(case["grad_out"])
    for ours, published in ((out, "out"), (q.grad, "grad_q"), (k.grad, "grad_k"), (v.grad, "grad_v")):
        expected = case[published]
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_golden_data_is_there():
    assert len(PUBLISHED) == 3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.integers(5, 90),
    levels=st.integers(2, 4),
    p=st.integers(2, 5),
    top_k=st.integers(1, 9),
    heads=st.sampled_from([(1, 1), (3, 1), (4, 2)]),
    cover_prefix=st.booleans(),
    combine=st.sampled_from(["sum", "mean"]),
    coarse=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_reference_equals_the_oracle(tokens, levels, p, top_k, heads, cover_prefix, combine, coarse, seed):
    config = LighthouseConfig(levels, p, top_k, cover_prefix=cover_prefix, combine=combine, selection="published")
    shape = config.pyramid(tokens)
    q, k, v = draw(2, *heads, tokens, dim=3, seed=seed)
    if coarse:
        # many equal norms: ties must go to the lower entry
        q, k = q.round(), k.round()
    expected, chosen = oracle.attention(q, k, v, levels, p, top_k, cover_prefix, combine)

    selection = reference.select(reference.score(q, k, v, shape, config), shape, config)
    starts = torch.tensor([shape.start(level) for level in range(levels)])
    for b in range(2):
        for g in range(heads[1]):
            pairs = torch.tensor(chosen[b][g])
            assert torch.equal(selection.index[b, g].long(), starts[pairs[:, 0]] + pairs[:, 1])
    qs, ks, vs = reference.gather(q, k, v, selection, shape)
    o = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(reference.scatter(o, selection, shape, config), expected)


def test_many_tiles_equal_the_oracle():
    config = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=384, selection="published")
    q, k, v = draw(1, 1, 1, 2003, dim=2)
    index = select_entries(q, k, v, config)
    _, chosen = oracle.attention(q, k, v, 2, 2, 384)
    starts = [config.pyramid(2003).start(level) for level in range(2)]
    assert index[0, 0].tolist() == [starts[level] + entry for level, entry in chosen[0][0]]


def test_nan_ranks_below_everything_and_counts_stay_exact():
    config = LighthouseConfig(num_levels=2, pooling_factor=2, top_k=4, cover_prefix=False, selection="published")
    q, k, v = draw(1, 1, 1, 40)
    q[0, 0, 6:20] = torch.nan
    shape = config.pyramid(40)
    index = select_entries(q, k, v, config)
    assert index.shape[-1] == shape.num_gathered
    tokens = index[index < shape.start(1)]
    won_by_nan = [j for j in tokens.tolist() if 6 <= j < 20]
    # such an entry can still win by its key, never by its query
    assert len(won_by_nan) <= 2 * 2
    k[0, 0, 6:20] = torch.nan
    tokens = select_entries(q, k, v, config)
    assert not any(6 <= j < 20 for j in tokens[tokens < shape.start(1)].tolist())


def test_only_nan_left_still_fills_every_place():
    config = LighthouseConfig(num_levels=3, pooling_factor=3, top_k=5, selection="published")
    q, k, v = (torch.full_like(x, torch.nan) for x in draw(1, 1, 1, 101))
    assert select_entries(q, k, v, config).unique().numel() == config.pyramid(101).num_gathered


@pytest.mark.parametrize("combine", ["sum", "mean"])
@pytest.mark.parametrize(
    ("q_heads", "kv_heads"), [*(pytest.param(*heads, marks=pytest.mark.slow) for heads in ((2, 2), (4, 2))), (3, 1)]
)
def test_gradients_are_exact_in_float64(q_heads, kv_heads, combine):
    config = LighthouseConfig(num_levels=3, pooling_factor=2, top_k=3, combine=combine, selection="published")
    inputs = [x.requires_grad_() for x in draw(1, q_heads, kv_heads, 37, dim=3)]
    assert config.pyramid(37).compresses
    assert torch.autograd.gradcheck(lambda *qkv: lighthouse_attention(*qkv, config), inputs)


@pytest.mark.parametrize("tokens", [97, 128])
def test_causal_for_a_fixed_selection(tokens):
    config = LighthouseConfig(num_levels=3, pooling_factor=2, top_k=6, selection="published")
    shape = config.pyramid(tokens)
    q, k, v = draw(1, 2, 1, tokens)
    selection = reference.select(reference.score(q, k, v, shape, config), shape, config)

    def run(q, k, v):
        gathered = reference.gather(q, k, v, selection, shape)
        o = F.scaled_dot_product_attention(*gathered, is_causal=True, enable_gqa=True)
        return reference.scatter(o, selection, shape, config)

    out = run(q, k, v)
    for j in range(0, tokens - 1, 5):
        changed = [x.clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, j + 1 :] = torch.randn_like(x[:, :, j + 1 :])
        assert torch.equal(run(*changed)[:, :, : j + 1], out[:, :, : j + 1])


@pytest.mark.parametrize("tokens", [61, 200])
def test_every_token_gets_an_output_with_a_covered_prefix(tokens):
    config = LighthouseConfig(num_levels=4, pooling_factor=2, top_k=4, selection="published")
    q, k, _ = draw(2, 4, 2, tokens)
    # attention over ones is one: a token's output counts the entries that write to it
    fan_in = lighthouse_attention(q, k, torch.ones(2, 2, tokens, 8, dtype=torch.float64), config)
    assert fan_in.round().min() >= 1
    assert fan_in.round().max() <= 4
    mean = lighthouse_attention(
        q,
        k,
        torch.ones(2, 2, tokens, 8, dtype=torch.float64),
        LighthouseConfig(4, 2, 4, combine="mean", selection="published"),
    )
    torch.testing.assert_close(mean, torch.ones_like(mean))


def test_grouped_heads_equal_repeated_ones_where_the_group_agrees():
    config = LighthouseConfig(num_levels=2, pooling_factor=4, top_k=5, selection="published")
    q, k, v = draw(2, 2, 2, 131)
    pairs = q.repeat_interleave(3, dim=1)
    torch.testing.assert_close(
        lighthouse_attention(pairs, k, v, config), lighthouse_attention(q, k, v, config).repeat_interleave(3, dim=1)
    )


def test_padding_never_reaches_an_output():
    config = LighthouseConfig(num_levels=3, pooling_factor=4, top_k=4, selection="published")
    q, k, v = draw(1, 1, 1, 161)
    shape = config.pyramid(161)
    assert shape.padded_tokens > 161
    selection = reference.select(reference.score(q, k, v, shape, config), shape, config)
    longer = [F.pad(x, (0, 0, 0, shape.padded_tokens - 161), value=1e6) for x in (q, k, v)]
    full = config.pyramid(shape.padded_tokens)

    def run(qkv, shape):
        o = F.scaled_dot_product_attention(*reference.gather(*qkv, selection, shape), is_causal=True)
        return reference.scatter(o, selection, shape, config)

    torch.testing.assert_close(run((q, k, v), shape), run(longer, full)[:, :, :161])


def test_low_precision_sums_in_fp32():
    config = LighthouseConfig(num_levels=2, pooling_factor=16, top_k=2, selection="published")
    q, k, v = draw(1, 1, 1, 512, dtype=torch.float32)
    # bf16 cannot hold 256 + 1: a bf16 sum over the window would lose the ones
    v = torch.ones_like(v).to(torch.bfloat16)
    v[:, :, ::16] = 256
    out = reference.gather(q.bfloat16(), k.bfloat16(), v, *_selection(q, k, v, config))[2]
    means = out[out.float() < 100].float()
    assert (means[means > 1] == torch.tensor((256 + 15) / 16).bfloat16().float()).all()


def _selection(q, k, v, config):
    shape = config.pyramid(q.shape[2])
    return reference.select(reference.score(q, k, v, shape, config), shape, config), shape
