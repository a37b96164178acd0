"""The layer as one operator on a GPU: bits, memory, CUDA graphs, and addresses that Triton specialises for."""

from __future__ import annotations

import pytest
import torch
from twins import draw_cuda

from lightning_lighthouse import LighthouseConfig, lighthouse_attention
from lightning_lighthouse.attention import lighthouse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOKENS = 16_411


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(qkv, dout, config):
    out = lighthouse_attention(*qkv, config)
    return out, *torch.autograd.grad(out, qkv, dout)


def run_one_by_one(qkv, dout, config):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lighthouse, "_fused_kernel", lambda *_: None)
        return run(qkv, dout, config)


def kernel(qkv, config):
    from lightning_lighthouse.attention import kernels

    return lighthouse._fused_kernel(kernels, *qkv, config)


@pytest.mark.parametrize("backend", ["cudnn", "flash", "efficient"])
@pytest.mark.parametrize("heads", [(1, 8, 8), (2, 8, 2)], ids=["equal", "grouped"])
def test_the_bits_are_those_of_the_stages(backend, heads):
    qkv = draw_cuda(*heads, TOKENS, 64)
    config = LighthouseConfig(sdpa=backend)
    # keys are repeated for it
    assert kernel(qkv, config) == (None if backend == "efficient" and heads[1] != heads[2] else backend)
    dout = torch.randn_like(qkv[0])
    found, expected = run(qkv, dout, config), run_one_by_one(qkv, dout, config)
    assert torch.equal(found[0], expected[0])
    for x, y in zip(found, expected, strict=True):
        assert x.stride() == y.stride()
        # these backwards do not repeat bit for bit themselves
        torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-3)


def test_the_gradients_too_where_they_repeat(deterministic):
    qkv = draw_cuda(2, 8, 2, TOKENS, 64)
    dout = torch.randn_like(qkv[0])
    config = LighthouseConfig()
    assert kernel(qkv, config) == "flash"
    found, expected = run(qkv, dout, config), run_one_by_one(qkv, dout, config)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_fp32_takes_the_operator_too():
    qkv = draw_cuda(1, 4, 4, TOKENS, 64, torch.float32)
    config = LighthouseConfig()
    assert kernel(qkv, config) == "efficient"
    dout = torch.randn_like(qkv[0])
    for x, y in zip(run(qkv, dout, config), run_one_by_one(qkv, dout, config), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_a_gradient_in_another_memory_order_gives_the_same():
    """In turn: what torch remembers of cuDNN for the first must not serve the second."""
    qkv = draw_cuda(1, 8, 8, TOKENS, 64)
    dout = torch.randn_like(qkv[0])
    config = LighthouseConfig(sdpa="cudnn")
    for x, y in zip(run(qkv, dout, config), run(qkv, dout.contiguous(), config), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("top_k", [512, 1536])
def test_memory_is_no_more_than_that_of_the_stages(top_k):
    qkv = draw_cuda(1, 8, 8, 98_304, 128)
    dout = torch.randn_like(qkv[0])
    peaks = {}
    for call in (run_one_by_one, run):
        for _ in range(2):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            call(qkv, dout, LighthouseConfig(top_k=top_k))
            peaks[call] = torch.cuda.max_memory_allocated() - before
    assert peaks[run] <= peaks[run_one_by_one]


def test_a_graph_gives_the_bits_of_eager_calls_on_new_inputs(deterministic):
    qkv, dout = draw_cuda(1, 8, 8, TOKENS, 64), torch.randn(1, 8, TOKENS, 64, device="cuda", dtype=torch.bfloat16)
    config = LighthouseConfig()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(qkv, dout, config)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(qkv, dout, config)
    for seed in (7, 8):
        with torch.no_grad():
            for x, drawn in zip(qkv, draw_cuda(1, 8, 8, TOKENS, 64, seed=seed), strict=True):
                x.copy_(drawn)
        graph.replay()
        assert all(torch.equal(x, y) for x, y in zip(captured, run(qkv, dout, config), strict=True))


def test_addresses_that_are_no_multiples_of_16(deterministic):
    """After a call with the same sizes and strides whose addresses are: the compiled kernels of that must not serve."""
    config = LighthouseConfig(sdpa="flash")
    aligned = draw_cuda(1, 2, 2, TOKENS, 64)
    shifted = []
    for x in aligned:
        memory = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:]
        shifted.append(memory.as_strided(x.shape, x.stride(), memory.storage_offset()).copy_(x.detach()))
        shifted[-1].requires_grad_()
    assert all(x.data_ptr() % 16 for x in shifted)
    dout = torch.randn_like(aligned[0])
    for x, y in zip(run(aligned, dout, config), run(shifted, dout, config), strict=True):
        assert torch.equal(x, y)
