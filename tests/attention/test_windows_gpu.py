"""Windows and chunks on a GPU at real sizes: precision, memory, one graph, bit for bit, no waiting."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from warned import own_warnings

from lightning_lighthouse import notices
from lightning_lighthouse.attention.reference import window_reference
from lightning_lighthouse.attention.windows import chunk_attention, lower_right_window, window_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def draw(batch, heads, groups, tokens, dim, dtype=torch.bfloat16, seed=42):
    generator = torch.Generator("cuda").manual_seed(seed)
    *qkv, dout = (
        torch.randn(batch, tokens, count, dim, device="cuda", dtype=dtype, generator=generator).transpose(1, 2)
        for count in (heads, groups, groups, heads)
    )
    return [x.requires_grad_() for x in qkv], dout


def results(attend, qkv, dout):
    out = attend(*qkv)
    return out, *torch.autograd.grad(out, qkv, dout.to(out.dtype))


def windowed(attend, window, sink_tokens=0, **options):
    return lambda q, k, v: attend(q, k, v, window, sink_tokens=sink_tokens, **options)


def chunk_reference(q, k, v, window):
    parts = zip(*(x.split(window, 2) for x in (q, k, v)), strict=True)
    return torch.cat([window_reference(*part, window) for part in parts], 2)


def assert_as_exact_as_naive(attend, reference, qkv, dout):
    """The distance to float64 is at most twice that of the reference in the same dtype, and one rounding.

    In fp32 four roundings: the memory-efficient kernel of torch is that far off where the logits of a row are few.
    """
    dtype = qkv[0].dtype
    roundings = 4 if dtype == torch.float32 else 1
    exact = results(reference, [x.detach().double().requires_grad_() for x in qkv], dout)
    dout_norm = dout.double().norm()
    for actual, naive, truth in zip(results(attend, qkv, dout), results(reference, qkv, dout), exact, strict=True):
        assert actual.dtype == dtype
        error, allowed = ((x.detach().double() - truth).norm() for x in (actual, naive))
        # where the truth is nothing, as dq of a window of one token, products of dout and v cancel out
        size = truth.norm() if truth.norm() > 1e-9 * dout_norm else dout_norm
        assert error <= 2 * allowed + roundings * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("sink_tokens", [0, 4, 37])
@pytest.mark.parametrize("window", [1, 2, 63, 512, 1962, 2002, 2003, 5000])
def test_a_window_is_its_reference(window, sink_tokens):
    # 2003 is a prime, 1962 + 37 and 4 are less
    qkv, dout = draw(2, 8, 2, 2003, 64)
    assert_as_exact_as_naive(
        windowed(window_attention, window, sink_tokens), windowed(window_reference, window, sink_tokens), qkv, dout
    )


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize(
    ("window", "sink_tokens", "front"), [(512, 4, 515), (63, 0, 62), (2048, 37, 2084), (1, 3, 3)], ids=str
)
def test_queries_of_the_last_tokens_give_what_they_give_among_all(window, sink_tokens, front, dim):
    qkv, dout = draw(1, 4, 2, 5003, dim)

    def attend(q, k, v):
        return lower_right_window(q[:, :, front:], k, v, window, sink_tokens=sink_tokens, scale=None, sdpa="auto")

    def whole(q, k, v):
        return window_reference(q, k, v, window, sink_tokens=sink_tokens)[:, :, front:]

    assert_as_exact_as_naive(attend, whole, qkv, dout[:, :, front:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(("heads", "dim"), [((8, 8), 128), ((4, 1), 96), ((3, 3), 100), ((2, 1), 256)], ids=str)
def test_any_heads_and_dtype(heads, dim, dtype):
    qkv, dout = draw(2, *heads, 1031, dim, dtype)
    assert_as_exact_as_naive(windowed(window_attention, 63, 4), windowed(window_reference, 63, 4), qkv, dout)


def test_head_dims_beyond_the_kernel_run_on_blocks_and_say_so(monkeypatch):
    monkeypatch.setattr(notices, "_given", set())
    qkv, dout = draw(1, 2, 1, 1031, 320)
    with own_warnings() as lines:
        assert_as_exact_as_naive(windowed(window_attention, 63, 4), windowed(window_reference, 63, 4), qkv, dout)
    assert lines == ["windows run on blocks under a mask, which is slow: the kernels take head dims up to 256"]


@pytest.mark.parametrize("sdpa", ["flash", "cudnn", "efficient", "math"])
def test_a_backend_by_name(sdpa):
    qkv, dout = draw(2, 8, 2, 1031, 64)
    assert_as_exact_as_naive(windowed(window_attention, 63, 4, sdpa=sdpa), windowed(window_reference, 63, 4), qkv, dout)


@pytest.mark.filterwarnings("ignore:.*(kernel not used|runtime disabled|Expected query|attn_mask).*:UserWarning")
def test_a_named_backend_that_cannot_run_is_an_error():
    with pytest.raises(ValueError, match=r"sdpa='flash' cannot run attention in torch\.float32 on cuda"):
        window_attention(*draw(1, 2, 2, 1031, 64, torch.float32)[0], 63, sdpa="flash")


@pytest.mark.parametrize(("tokens", "window"), [(4096, 512), (4099, 512), (301, 4)])
def test_a_chunk_is_its_reference(tokens, window):
    qkv, dout = draw(2, 8, 2, tokens, 64)
    assert_as_exact_as_naive(lambda *x: chunk_attention(*x, window), lambda *x: chunk_reference(*x, window), qkv, dout)


def attend_window(q, k, v):
    return window_attention(q, k, v, 512, sink_tokens=4)


def attend_chunk(q, k, v):
    return chunk_attention(q, k, v, 512)


@pytest.mark.parametrize("attend", [attend_window, attend_chunk])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_no_output_depends_on_a_later_token(attend, dtype):
    original, changed = (draw(2, 8, 2, 4099, 64, dtype, seed)[0] for seed in (42, 7))
    for at in (0, 511, 512, 515, 2500, 4097):
        mixed = [torch.cat((x[:, :, : at + 1], y[:, :, at + 1 :]), 2) for x, y in zip(original, changed, strict=True)]
        before, after = attend(*original), attend(*mixed)
        assert torch.equal(before[:, :, : at + 1], after[:, :, : at + 1])
        assert not torch.equal(before, after)


@pytest.mark.parametrize("attend", [attend_window, attend_chunk])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_it_repeats_bit_for_bit_where_torch_is_asked_to(attend, dtype):
    torch.use_deterministic_algorithms(True)
    try:
        runs = [results(attend, *draw(2, 8, 2, 8_209, 64, dtype)) for _ in range(4)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("window", [512, 2048])
def test_the_kernels_of_windows_repeat_bit_for_bit_unasked(window):
    attend = windowed(window_attention, window, 4)
    runs = [results(attend, *draw(2, 8, 2, 8_209, 128)) for _ in range(4)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("tokens", "window"), [(524_288, 4), (262_147, 1)])
def test_more_chunks_than_cuda_launches_at_once(tokens, window, dtype):
    qkv, dout = draw(1, 2, 1, tokens, 64, dtype)
    whole = results(lambda *x: chunk_attention(*x, window), qkv, dout)
    # chunks do not see each other
    for at in (slice(4096), slice(tokens - tokens % 4 - 4096, None)):
        alone = [x[:, :, at].detach().requires_grad_() for x in qkv]
        expected = results(lambda *x: chunk_attention(*x, window), alone, dout[:, :, at])
        for actual, truth in zip(whole, expected, strict=True):
            torch.testing.assert_close(actual[:, :, at], truth, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("attend", [attend_window, attend_chunk])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_compiled_for_sizes_that_change(attend, dtype):
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, dynamic=True)
    for heads, groups, tokens, dim in ((8, 2, 1031, 64), (6, 2, 2053, 64), (6, 3, 1031, 96)):
        qkv, dout = draw(1, heads, groups, tokens, dim, dtype)
        for actual, expected in zip(results(compiled, qkv, dout), results(attend, qkv, dout), strict=True):
            torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("attend", [attend_window, attend_chunk])
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_compiled_in_one_graph(attend, is_checkpointed):
    torch.compiler.reset()
    qkv, dout = draw(1, 8, 2, 4099, 64)
    call = (lambda *qkv: checkpoint(attend, *qkv, use_reentrant=False)) if is_checkpointed else attend
    compiled, eager = (results(run, qkv, dout) for run in (torch.compile(call, fullgraph=True), attend))
    assert torch.equal(compiled[0], eager[0])
    for actual, expected in zip(compiled[1:], eager[1:], strict=True):
        # torch's kernels sum dq in any order
        near = 0 if attend is attend_window else 2e-2
        torch.testing.assert_close(actual, expected, rtol=near, atol=near)


@pytest.mark.parametrize(
    ("attend", "dtype", "rows"),
    # rows of D, of q, k or v, that a forward + backward needs at its peak, beyond q, k, v and the gradient it is given
    [
        (attend_window, torch.bfloat16, 5),
        (attend_chunk, torch.bfloat16, 9),
        (attend_window, torch.float32, 25),
        (attend_chunk, torch.float32, 9),
    ],
    ids=["window, bf16", "chunk, bf16", "window, fp32", "chunk, fp32"],
)
def test_memory_is_linear_in_the_tokens(attend, dtype, rows):
    peaks = []
    for tokens in (16_384, 32_768, 65_536):
        qkv, dout = draw(1, 4, 4, tokens, 64, dtype)
        results(attend, qkv, dout)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        found = results(attend, qkv, dout)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del found
    assert peaks[2] < 2.1 * peaks[1] < 4.3 * peaks[0]
    assert peaks[2] <= rows * dout.numel() * dtype.itemsize


@pytest.mark.parametrize("attend", [attend_window, attend_chunk])
def test_the_host_waits_for_nothing(attend):
    qkv, dout = draw(2, 8, 2, 4099, 64)
    results(attend, qkv, dout)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(attend, qkv, dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_windows_are_those_of_varlen_attn():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    qkv, dout = draw(1, 8, 8, 32_768, 128)
    bounds = torch.tensor([0, 32_768], dtype=torch.int32, device="cuda")

    def attend(*qkv):
        rows = (x[0].transpose(0, 1) for x in qkv)
        out = varlen.varlen_attn(*rows, bounds, bounds, 32_768, 32_768, window_size=(511, 0))
        return out.transpose(0, 1).unsqueeze(0)

    for actual, expected in zip(
        results(windowed(window_attention, 512), qkv, dout), results(attend, qkv, dout), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
