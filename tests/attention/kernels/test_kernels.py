"""Every Triton kernel against its twin in the reference, forward and backward.

On a machine without a GPU the kernels run in Triton's interpreter, so sizes are tiny: distinct primes where it matters.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiers import with_few_quick
from twins import (
    DEVICE,
    LAYOUTS,
    TILES_MODULE,
    assert_same_selection,
    assert_twins,
    draw,
    flat_scores,
    full_slots,
    random_scores,
    through,
)

from lightning_lighthouse import LighthouseConfig, lighthouse_attention, select_entries
from lightning_lighthouse.attention import kernels, reference

TWINS = {
    "defaults of the paper": (1, 2, 1, 257, 16, LighthouseConfig(3, 4, 8, selection="published")),
    "batch and grouped heads": (2, 3, 2, 67, 5, LighthouseConfig(3, 2, 3, selection="published")),
    "odd pooling factor": (2, 1, 3, 97, 16, LighthouseConfig(2, 3, 6, selection="published")),
    "factor beyond the unrolling": (1, 1, 2, 131, 7, LighthouseConfig(3, 7, 2, selection="published")),
    "four levels, one winner": (1, 1, 1, 103, 3, LighthouseConfig(4, 2, 1, selection="published")),
    "two tiles of 150": (1, 2, 1, 331, 2, LighthouseConfig(2, 2, 300, selection="published")),
    "one token": (1, 1, 1, 1, 3, LighthouseConfig(2, 2, 1, selection="published")),
    "shorter than one coarsest entry": (1, 1, 2, 5, 3, LighthouseConfig(3, 4, 2, selection="published")),
    "nothing to pad, blocks full": (1, 1, 1, 64, 256, LighthouseConfig(3, 4, 2, selection="published")),
    "mean of the levels": (1, 1, 2, 61, 8, LighthouseConfig(3, 3, 4, combine="mean", selection="published")),
    "prefix left uncovered": (
        1,
        2,
        1,
        61,
        8,
        LighthouseConfig(3, 4, 1, combine="mean", cover_prefix=False, selection="published"),
    ),
}

QUICK_TWINS = [
    "odd pooling factor",
    "one token",
    "shorter than one coarsest entry",
    "mean of the levels",
    "prefix left uncovered",
]


@pytest.mark.parametrize("case", with_few_quick(TWINS, QUICK_TWINS))
def test_kernels_equal_their_twins(case, poison):
    assert_twins(*case)


@pytest.mark.parametrize("dim", [1, 16, 24, pytest.param(96, marks=pytest.mark.slow), 256])
def test_any_head_dim(dim, poison):
    assert_twins(1, 1, 1, 29, dim, LighthouseConfig(2, 3, 2, selection="published"))


SHAPES = [(levels, p) for levels in (2, 3, 4) for p in (2, 3, 4, 5)]


# batch, key/value heads, query heads of each; the interpreter's time grows with their product
HEADS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2)]


# by a generator of our own: hypothesis varies a case a little, and the interpreter takes twice as long within it
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(48))
def test_random_configurations(seed, poison):
    rng = random.Random(seed)
    levels, factor = rng.choice([(levels, p) for levels, p in SHAPES if p ** (levels - 1) <= 64])
    config = LighthouseConfig(
        levels,
        factor,
        rng.randint(1, 9),
        cover_prefix=rng.random() < 0.5,
        combine=rng.choice(["sum", "mean"]),
        selection="published",
    )
    assert_twins(*rng.choice(HEADS), rng.randint(1, 90), rng.randint(1, 17), config)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 300),
    levels=st.integers(2, 4),
    factor=st.integers(2, 5),
    top_k=st.integers(1, 40),
    cover_prefix=st.booleans(),
    tied=st.booleans(),
    seed=st.integers(0, 99),
)
def test_ties_and_nan_are_ranked_like_the_reference(tokens, levels, factor, top_k, cover_prefix, tied, seed):
    config = LighthouseConfig(levels, factor, top_k, cover_prefix=cover_prefix, selection="published")
    shape = config.pyramid(tokens)
    assert_same_selection(random_scores(2, 1, shape, tied, seed), shape, config)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "distinct"])
def test_a_tile_longer_than_one_chunk(tied, monkeypatch, poison):
    monkeypatch.setattr(TILES_MODULE, "MAX_CHUNK", 32)
    config = LighthouseConfig(3, 2, 41, selection="published")
    shape = config.pyramid(541)
    assert shape.tile_entries > 4 * 32
    assert_same_selection(random_scores(1, 2, shape, tied, 5), shape, config)


def test_a_nan_in_q_or_k_reaches_the_score_of_its_window():
    config = LighthouseConfig(3, 2, 2, selection="published")
    shape = config.pyramid(23)
    q, k, v = (x.detach() for x in draw(1, 1, 2, 23, 5))
    q[0, 1, 6, 2] = torch.nan
    k[0, 0, 22, 0] = torch.nan
    expected = flat_scores(reference.score(q, k, v, shape, config))
    assert expected.isnan().any(-1).all()
    torch.testing.assert_close(kernels.score(q, k, v, shape, config), expected, equal_nan=True)


@pytest.mark.parametrize("arrange", with_few_quick(LAYOUTS, ["slice of a fused projection"]))
def test_memory_layout_changes_no_value(arrange, poison):
    config = LighthouseConfig(3, 2, 3, selection="published")
    shape = config.pyramid(43)
    qkv = draw(2, 1, 2, 43, 5)
    arranged = [arrange(x.detach()).requires_grad_() for x in qkv]
    selection = kernels.select(kernels.score(*qkv, shape, config), shape, config)
    assert torch.equal(kernels.select(kernels.score(*arranged, shape, config), shape, config).index, selection.index)
    expected = through(kernels, qkv, selection, shape, config)
    for name, value in through(kernels, arranged, selection, shape, config).items():
        assert torch.equal(value, expected[name]), name


def test_gradients_that_are_expanded_or_strided():
    config = LighthouseConfig(3, 2, 3, selection="published")
    shape = config.pyramid(43)
    qkv = draw(2, 1, 2, 43, 5)
    selection = kernels.select(kernels.score(*qkv, shape, config), shape, config)
    gathered = kernels.gather(*qkv, selection, shape)
    # the gradient of a sum is one number, expanded
    sums = torch.autograd.grad(sum(x.sum() for x in gathered), qkv, retain_graph=True)
    ones = torch.autograd.grad(gathered, qkv, [torch.ones_like(x) for x in gathered])
    assert all(torch.equal(a, b) for a, b in zip(sums, ones, strict=True))

    o = gathered[0].detach().requires_grad_()
    out = kernels.scatter(o, selection, shape, config)
    dout = torch.randn(*out.shape[:3], 2 * out.shape[3], device=DEVICE)[..., ::2]
    (strided,) = torch.autograd.grad(out, o, dout, retain_graph=True)
    (contiguous,) = torch.autograd.grad(out, o, dout.contiguous())
    assert torch.equal(strided, contiguous)


def test_results_lie_in_memory_as_a_model_wants_them():
    config = LighthouseConfig(3, 2, 3, selection="published")
    shape = config.pyramid(43)
    q, k, v = draw(1, 2, 2, 43, 5)
    k = k.detach().contiguous().requires_grad_()
    selection = kernels.select(kernels.score(q, k, v, shape, config), shape, config)
    qs, ks, vs = kernels.gather(q, k, v, selection, shape)
    out = kernels.scatter(qs, selection, shape, config)
    assert out.transpose(1, 2).is_contiguous()
    dq, dk, dv = torch.autograd.grad((qs.sum(), ks.sum(), vs.sum()), (q, k, v))
    assert dq.stride() == q.stride()
    assert dk.stride() == k.stride()
    assert dv.stride() == v.stride()


@pytest.mark.parametrize("dtype", with_few_quick({"bf16": torch.bfloat16, "fp16": torch.float16}, ["bf16"]))
def test_narrow_types_err_no_more_than_the_reference(dtype, poison):
    config = LighthouseConfig(3, 3, 3, selection="published")
    shape = config.pyramid(71)
    qkv = draw(1, 2, 2, 71, 8, dtype, integers=False)
    exact_qkv = [x.detach().double().requires_grad_() for x in qkv]
    selection = kernels.select(kernels.score(*qkv, shape, config), shape, config)
    reference_selection = reference.Selection(selection.index, full_slots(selection.slots, shape))
    exact = through(reference, exact_qkv, reference_selection, shape, config)
    theirs = through(reference, qkv, reference_selection, shape, config)
    for name, value in through(kernels, qkv, selection, shape, config).items():
        assert value.dtype == dtype
        error, allowed = ((x.double() - exact[name]).norm() / exact[name].norm() for x in (value, theirs[name]))
        assert error <= 2 * allowed + torch.finfo(dtype).eps, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_scores_have_the_precision_of_fp32(dtype):
    config = LighthouseConfig(3, 3, 3, selection="published")
    shape = config.pyramid(71)
    qkv = [x.detach() for x in draw(2, 2, 2, 71, 37, dtype, integers=False)]
    exact = flat_scores(reference.score(*(x.double() for x in qkv), shape, config))
    scores = kernels.score(*qkv, shape, config)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact, rtol=8 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize(("levels", "factor"), [(2, 16), (3, 4), (5, 2)])
def test_narrow_types_are_summed_in_fp32(levels, factor):
    """Ones between 256 and -256: bf16 cannot hold 257, and a sum in bf16 would lose the ones."""
    config = LighthouseConfig(levels, factor, 7, selection="published")
    shape = config.pyramid(509)
    selection = kernels.select(random_scores(1, 1, shape, False, 3), shape, config)
    twin = reference.Selection(selection.index, full_slots(selection.slots, shape))
    entry = selection.index[0, 0].long()
    level = sum((entry >= shape.start(n)).long() for n in range(1, levels))

    # at the two ends of every coarsest window, and of every chain of entries
    window = shape.window(levels - 1)
    token = torch.arange(shape.num_tokens + 1, device=DEVICE) % window
    x = 1 + 255 * (token == 0) - 257 * (token == window - 1)
    o = 1 + 255 * (level == levels - 1) - 257 * (level == 0)
    # gather divides by the window of an entry, and scatter counts token j as j + 1
    values = [x[:-1], o, o * factor**level, x[1:]]

    def run(stages, choice, dtype):
        x, o, d_xs, d_out = (value.to(dtype).view(1, 1, -1, 1).requires_grad_() for value in values)
        xs = stages.gather(x, x, x, choice, shape)[0]
        out = stages.scatter(o, choice, shape, config)
        (dx,), (d_o,) = torch.autograd.grad(xs, x, d_xs), torch.autograd.grad(out, o, d_out)
        return {"xs": xs, "out": out, "dx": dx, "do": d_o}

    exact = run(reference, twin, torch.float64)
    for name, value in run(kernels, selection, torch.bfloat16).items():
        # one rounding, which the interpreter does towards zero
        torch.testing.assert_close(value.double(), exact[name], rtol=torch.finfo(torch.bfloat16).eps, atol=0)


@pytest.mark.parametrize("num_tokens", [509, pytest.param(512, marks=pytest.mark.slow)])
@pytest.mark.parametrize("combine", ["sum", pytest.param("mean", marks=pytest.mark.slow)])
def test_tokens_in_front_are_left_out_of_scatter_alone(combine, num_tokens):
    config = LighthouseConfig(3, 4, 24, combine=combine)
    shape = config.pyramid(num_tokens)
    selection = kernels.select(random_scores(1, 2, shape, True, 5), shape, config)
    twin = reference.Selection(selection.index, full_slots(selection.slots, shape))
    o = torch.randn(1, 4, shape.num_gathered, 5, device=DEVICE, requires_grad=True)
    dout = torch.randn(1, 4, num_tokens, 5, device=DEVICE)
    for front in (1, 3):
        left_out = front * shape.window(2)
        dout[:, :, :left_out] = 0
        for stages, choice in ((kernels, selection), (reference, twin)):
            whole = stages.scatter(o, choice, shape, config)
            behind = stages.scatter(o, choice, shape, config, front=front)
            assert torch.equal(behind, whole[:, :, left_out:])
            (exact,) = torch.autograd.grad(whole, o, dout)
            (found,) = torch.autograd.grad(behind, o, dout[:, :, left_out:])
            assert torch.equal(found, exact)


def test_float64_is_refused():
    config = LighthouseConfig(3, 2, 2, backend="triton", selection="published")
    q, k, v = draw(1, 1, 1, 40, 4, torch.float64)
    with pytest.raises(ValueError, match="float64; use backend='reference'"):
        lighthouse_attention(q, k, v, config)


def test_the_whole_layer_equals_the_reference():
    q, k, v = draw(1, 2, 2, 83, 5)
    dout = torch.randn(1, 4, 83, 5, device=DEVICE)
    results = {}
    for backend in ("triton", "reference"):
        config = LighthouseConfig(3, 2, 4, backend=backend, sdpa="math", selection="published")
        out = lighthouse_attention(q, k, v, config)
        results[backend] = (select_entries(q, k, v, config), out, *torch.autograd.grad(out, (q, k, v), dout))
    torch.testing.assert_close(results["triton"], results["reference"])


def test_two_runs_agree_bit_for_bit():
    config = LighthouseConfig(3, 2, 4, selection="published")
    shape = config.pyramid(97)
    qkv = draw(2, 1, 1, 97, 6, integers=False)
    runs = []
    for _ in range(2):
        selection = kernels.select(kernels.score(*qkv, shape, config), shape, config)
        runs.append((*selection, *through(kernels, qkv, selection, shape, config).values()))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_no_output_moves_when_later_tokens_change(combine):
    config = LighthouseConfig(3, 3, 3, combine=combine, selection="published")
    shape = config.pyramid(61)
    qkv = [x.detach() for x in draw(1, 1, 1, 61, 4, integers=False)]
    selection = kernels.select(kernels.score(*qkv, shape, config), shape, config)

    def attend(q, k, v):
        gathered = kernels.gather(q, k, v, selection, shape)
        o = torch.nn.functional.scaled_dot_product_attention(*gathered, is_causal=True)
        return kernels.scatter(o, selection, shape, config)

    out = attend(*qkv)
    for last in (0, 8, 9, 26, 35, 51):
        changed = attend(*(torch.cat((x[:, :, : last + 1], x[:, :, last + 1 :] + 1), 2) for x in qkv))
        assert torch.equal(changed[:, :, : last + 1], out[:, :, : last + 1]), last
        assert not torch.equal(changed[:, :, last + 1 :], out[:, :, last + 1 :]), last
