"""The kernels on a GPU at real sizes: published output, precision, memory, one graph, bit for bit."""

from __future__ import annotations

import pytest
import torch
from places import GOLDEN
from twins import assert_same_selection, assert_twins, draw_cuda, full_slots, random_scores

from lightning_lighthouse import LighthouseConfig, lighthouse_attention, select_entries
from lightning_lighthouse.attention import kernels, reference
from lightning_lighthouse.attention.dilated_scorer import dilated_scores

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

PUBLISHED = sorted(GOLDEN.glob("*.pt"))


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_published_output_is_reproduced(path):
    case = torch.load(path, weights_only=True, map_location="cuda")
    config = LighthouseConfig(
        case["num_levels"],
        case["pooling_factor"],
        case["top_k"],
        cover_prefix=False,
        backend="triton",
        sdpa="math",
        selection="published",
    )
    q, k, v = (case[name].requires_grad_() for name in "qkv")
    assert torch.equal(select_entries(q, k, v, config), case["index"])
    out = lighthouse_attention(q, k, v, config)
    out.backward(case["grad_out"])
    for ours, published in ((out, "out"), (q.grad, "grad_q"), (k.grad, "grad_k"), (v.grad, "grad_v")):
        expected = case[published]
        assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("heads", "tokens", "dim", "config"),
    [
        ((1, 8, 1), 32_768, 128, LighthouseConfig(3, 4, 1024, selection="published")),
        ((2, 2, 4), 20_011, 64, LighthouseConfig(4, 4, 300, selection="published")),
        ((3, 2, 1), 10_007, 96, LighthouseConfig(3, 3, 131, combine="mean", selection="published")),
        ((1, 1, 5), 70_001, 40, LighthouseConfig(2, 4, 64, cover_prefix=False, selection="published")),
        ((1, 2, 1), 30_011, 256, LighthouseConfig(5, 5, 37, selection="published")),
    ],
    ids=["published", "grouped, D 64", "factor 3, D 96", "one large tile, D 40", "windows of 625, D 256"],
)
def test_kernels_equal_their_twins(heads, tokens, dim, config):
    assert_twins(*heads, tokens, dim, config)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "distinct"])
def test_large_tiles_are_selected_like_the_reference(tied):
    config = LighthouseConfig(3, 4, 100, selection="published")
    shape = config.pyramid(1_000_003)
    assert shape.tile_entries > 60_000
    assert_same_selection(random_scores(1, 2, shape, tied, 3), shape, config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("dim", [64, 128])
def test_the_layer_errs_no_more_than_the_reference(dtype, dim):
    """Same selection, same attention backend; distance to float64 at most twice the reference's own."""
    config = LighthouseConfig(3, 4, 128, selection="published")
    tokens = 8_209
    qkv = draw_cuda(2, 4, 2, tokens, dim, dtype)
    dout = torch.randn(2, 4, tokens, dim, device="cuda", dtype=dtype)
    shape = config.pyramid(tokens)
    selection = kernels.select(kernels.score(*qkv, shape, config), shape, config)
    twin = reference.Selection(selection.index, full_slots(selection.slots, shape))

    def run(stages, choice, dtype):
        leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
        gathered = stages.gather(*leaves, choice, shape)
        o = torch.nn.functional.scaled_dot_product_attention(*gathered, is_causal=True, enable_gqa=True)
        out = stages.scatter(o, choice, shape, config)
        return (out, *torch.autograd.grad(out, leaves, dout.to(dtype)))

    exact = run(reference, twin, torch.float64)
    for ours, theirs, expected in zip(run(kernels, selection, dtype), run(reference, twin, dtype), exact, strict=True):
        error, allowed = ((x.double() - expected).norm() / expected.norm() for x in (ours, theirs))
        assert error <= 2 * allowed + torch.finfo(dtype).eps


@pytest.mark.parametrize("combine", ["sum", "mean"])
def test_tokens_in_front_are_left_out_of_scatter_alone(combine):
    config = LighthouseConfig(combine=combine)
    shape = config.pyramid(65_536)
    q, k, v = draw_cuda(1, 4, 2, 65_536, 128)
    with torch.no_grad():
        selection = kernels.select(kernels.score(q, k, v, shape, config), shape, config)
    o = torch.randn(1, 4, shape.num_gathered, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dout = torch.randn(1, 4, 65_536, 128, device="cuda", dtype=torch.bfloat16)
    left_out = shape.window(2)
    dout[:, :, :left_out] = 0
    whole, behind = (kernels.scatter(o, selection, shape, config, front=front) for front in (0, 1))
    assert torch.equal(behind, whole[:, :, left_out:])
    (exact,), (found,) = (
        torch.autograd.grad(out, o, gradient) for out, gradient in ((whole, dout), (behind, dout[:, :, left_out:]))
    )
    assert torch.equal(found, exact)


@pytest.mark.parametrize("selection", ["published", "causal", "strided"])
def test_the_kernels_repeat_bit_for_bit_in_any_mode(selection):
    """The layer without attention, whose backend may not repeat."""
    config = LighthouseConfig(selection=selection)
    tokens = 98_304
    shape = config.pyramid(tokens)
    q, k, v = draw_cuda(1, 8, 8, tokens, 128)
    dout = torch.randn_like(q)
    runs = []
    for _ in range(3):
        with torch.no_grad():
            chosen = kernels.select(kernels.score(q, k, v, shape, config), shape, config)
        gathered = kernels.gather(q, k, v, chosen, shape)
        out = kernels.scatter(gathered[0] + gathered[1] + gathered[2], chosen, shape, config)
        runs.append((chosen.index, out, *torch.autograd.grad(out, (q, k, v), dout)))
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("selection", ["published", "causal"])
@pytest.mark.parametrize(("heads", "tokens"), [((1, 8, 8), 32_768), ((2, 8, 2), 20_011)], ids=["equal", "grouped, odd"])
def test_dilated_scores_select_the_same_entries_in_both_backends(selection, heads, tokens):
    qkv = draw_cuda(*heads, tokens, 64)
    index = [
        select_entries(*qkv, LighthouseConfig(scorer="dilated", selection=selection, backend=backend))
        for backend in ("reference", "triton")
    ]
    assert torch.equal(*index)
    assert not torch.equal(index[1], select_entries(*qkv, LighthouseConfig(selection=selection)))


def test_dilated_scores_are_those_of_float64():
    q, k, v = draw_cuda(1, 4, 2, 8_209, 64)
    config = LighthouseConfig(scorer="dilated", selection="published")
    ours = dilated_scores(q, k, v, config, scale=None)
    exact = dilated_scores(
        *(x.double() for x in (q, k, v)),
        LighthouseConfig(scorer="dilated", sdpa="math", selection="published"),
        scale=None,
    )
    for actual, expected in zip(ours, exact, strict=True):
        assert actual.dtype == torch.float32
        torch.testing.assert_close(actual.double(), expected, rtol=2e-2, atol=1e-3)


def test_the_deterministic_layer_repeats_bit_for_bit():
    torch.use_deterministic_algorithms(True)
    try:
        q, k, v = draw_cuda(1, 8, 8, 32_768, 128)
        dout = torch.randn_like(q)
        runs = []
        for _ in range(3):
            out = lighthouse_attention(q, k, v, LighthouseConfig())
            runs.append((out, *torch.autograd.grad(out, (q, k, v), dout)))
        for other in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph_equals_eager(backend):
    torch.compiler.reset()
    qkv = draw_cuda(1, 4, 2, 16_411, 64)
    config = LighthouseConfig()
    layer = lambda q, k, v: lighthouse_attention(q, k, v, config)  # noqa: E731
    out, compiled = layer(*qkv), torch.compile(layer, backend=backend, fullgraph=True)(*qkv)
    assert torch.equal(out, compiled)
    dout = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, qkv, dout), torch.autograd.grad(compiled, qkv, dout), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(("tokens", "top_k", "published"), [(98_304, 1536, 1_784), (524_288, 1024, 8_405)])
def test_the_layer_needs_half_the_memory_of_the_published_one(tokens, top_k, published):
    q, k, v = draw_cuda(1, 8, 8, tokens, 128)
    dout = torch.randn_like(q)
    config = LighthouseConfig(3, 4, top_k, selection="published")
    for _ in range(2):
        q.grad = k.grad = v.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        lighthouse_attention(q, k, v, config).backward(dout)
    assert torch.cuda.max_memory_allocated() - before <= published / 2 * 2**20


def test_more_values_than_32_bits_can_number():
    """3 x 1,048,576 tokens of 8 heads of 128: offsets beyond 2^31 in q, k, v, the output and all gradients."""
    config = LighthouseConfig(4, 4, 4096, selection="published")
    q, k, v = draw_cuda(3, 8, 8, 1_048_576, 128)
    shape = config.pyramid(1_048_576)
    last = [x[2:].detach().requires_grad_() for x in (q, k, v)]
    results = []
    for qkv in ((q, k, v), last):
        selection = kernels.select(kernels.score(*qkv, shape, config), shape, config)
        gathered = kernels.gather(*qkv, selection, shape)
        out = kernels.scatter(gathered[0] + gathered[1] * gathered[2], selection, shape, config)
        results.append((out, *torch.autograd.grad(out, qkv, out.detach())))
    for whole, alone in zip(*results, strict=True):
        assert torch.equal(whole[2:], alone)
        assert alone.isfinite().all()


def test_channels_farther_apart_than_32_bits_can_number():
    """Five channels 2^29 values apart, as in memory ordered [B, D, H, N]: the same as side by side."""
    config = LighthouseConfig(3, 4, 8, selection="published")
    shape = config.pyramid(521)
    near = draw_cuda(1, 1, 1, 521, 5)
    far = [torch.empty_strided(x.shape, (0, 0, 1, 2**29), dtype=x.dtype, device=x.device) for x in near]
    results = []
    with torch.no_grad():
        for x, values in zip(far, near, strict=True):
            x.copy_(values)
        for qkv in (near, far):
            selection = kernels.select(kernels.score(*qkv, shape, config), shape, config)
            results.append((selection.index, *kernels.gather(*qkv, selection, shape)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
