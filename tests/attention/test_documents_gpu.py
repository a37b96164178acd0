"""Documents on a GPU at real sizes: every kernel against SDPA on each document, the tables against the reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from packed import cut, documents_of, run, spans

from lightning_lighthouse import Documents, LighthouseConfig
from lightning_lighthouse.attention.documents_sdpa import documents_sdpa
from lightning_lighthouse.attention.reference import window_reference
from lightning_lighthouse.attention.windows import chunk_attention, window_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore::lightning_lighthouse.LighthouseWarning"),
]

LENGTHS = {
    "web, 2 sequences": documents_of(2, 8192, 700),
    "long ones and short ones": Documents([[3001, 17, 5, 4097, 200, 1, 6000, 3063]]),
    "1,000 of 100": Documents([[100] * 1000]),
    "one of N": Documents([[16_384]]),
    "windows and tiles divide": Documents([[2048, 4096, 16, 32, 10_192]]),
}


def drawn(documents, heads=4, groups=2, dim=64, dtype=torch.bfloat16, seed=42):
    generator = torch.Generator("cuda").manual_seed(seed)
    shape = documents.batch_size, documents.num_tokens
    scale = torch.rand(*shape, 1, 1, device="cuda", generator=generator).exp()
    q, k, v, dout = (
        torch.randn(*shape, count, dim, device="cuda", generator=generator) for count in (heads, groups, groups, heads)
    )
    return [x.to(dtype).transpose(1, 2) for x in (q * scale, k * scale, v)], dout.to(dtype).transpose(1, 2)


def results(attend, qkv, dout):
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attend(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype))


def one_by_one(q, k, v, documents):
    rows = [[] for _ in range(documents.batch_size)]
    for row, here in spans(documents):
        part = [x[row : row + 1, :, here] for x in (q, k, v)]
        rows[row].append(torch.nn.functional.scaled_dot_product_attention(*part, is_causal=True, enable_gqa=True))
    return torch.cat([torch.cat(parts, 2) for parts in rows])


def assert_as_exact(found, naive, exact):
    """The distance to float64 is at most twice that of the same in the dtype by SDPA, and one rounding."""
    for name, x, y, z in zip(("out", "q", "k", "v"), found, naive, exact, strict=True):
        bound = 2 * (y - z).abs().max() + torch.finfo(x.dtype).eps * z.abs().max()
        assert x.isfinite().all(), name
        assert (x - z).abs().max() <= bound, name


@pytest.mark.parametrize("backend", ["auto", "cudnn", "flash", "efficient"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("documents", LENGTHS.values(), ids=LENGTHS)
def test_dense_attention_of_each_document(documents, dtype, backend):
    if dtype == torch.float32 and backend in ("cudnn", "flash"):
        pytest.skip("16 bits alone")
    qkv, dout = drawn(documents, dtype=dtype)
    found = results(lambda *x: documents_sdpa(*x, documents, backend=backend), qkv, dout)
    naive = results(lambda *x: one_by_one(*x, documents), qkv, dout)
    exact = results(lambda *x: one_by_one(*x, documents), [x.double() for x in qkv], dout)
    assert_as_exact(found, naive, exact)


@pytest.mark.parametrize("dim", [20, 96, 256])
def test_head_dims_of_dense_attention(dim):
    documents = LENGTHS["long ones and short ones"]
    qkv, dout = drawn(documents, dim=dim)
    found = results(lambda *x: documents_sdpa(*x, documents), qkv, dout)
    naive = results(lambda *x: one_by_one(*x, documents), qkv, dout)
    exact = results(lambda *x: one_by_one(*x, documents), [x.double() for x in qkv], dout)
    assert_as_exact(found, naive, exact)


@pytest.mark.parametrize("selection", ["causal", "strided", "published", "random"])
@pytest.mark.parametrize("name", [name for name in LENGTHS if name != "1,000 of 100"])
def test_kernels_equal_the_reference(name, selection, monkeypatch):
    monkeypatch.setattr("lightning_lighthouse.attention.documents_lighthouse._is_crowded", lambda *_: False)
    documents = LENGTHS[name]
    most = max(16, documents.num_documents)
    # float32: both rank the same scores
    qkv, dout = drawn(documents, dtype=torch.float32)
    found, expected = (
        results(
            lambda *x, backend=backend: run(
                x, LighthouseConfig(3, 4, 256, selection=selection, backend=backend, max_documents=most), documents
            ),
            qkv,
            dout,
        )
        for backend in ("triton", "reference")
    )
    for x, y in zip(found, expected, strict=True):
        assert (x - y).abs().max() <= 1e-3 * y.abs().max()


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "lighthouse"])
def test_no_document_reads_another_one_nor_memory_from_before(dense):
    documents = Documents([[700, 9000, 2000, 4684]])
    config = LighthouseConfig(top_k=256, backend="triton")
    qkv, dout = drawn(documents)

    def attend(q, k, v):
        return documents_sdpa(q, k, v, documents) if dense else run((q, k, v), config, documents)

    found = results(attend, qkv, dout)
    here = slice(700, 9700)
    for x in (*qkv, dout):
        x[:, :, :700] = x[:, :, 9700:] = torch.nan
    # what is allocated next was NaN
    del_me = [torch.full((64, 1024, 1024), torch.nan, device="cuda") for _ in range(4)]
    del del_me
    out, *gradients = (x[:, :, here] for x in results(attend, qkv, dout))
    assert torch.equal(out, found[0][:, :, here])
    # these sum in no fixed order
    for x, y in zip(gradients, found[1:], strict=True):
        torch.testing.assert_close(x, y[:, :, here], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "lighthouse"])
def test_nobody_waits_for_the_gpu(dense):
    config = LighthouseConfig(top_k=256, backend="triton")

    def step(documents):
        def attend(q, k, v):
            return documents_sdpa(q, k, v, documents) if dense else run((q, k, v), config, documents)

        results(attend, qkv, dout)

    first = documents_of(1, 16_384, 1500)
    qkv, dout = drawn(first)
    # what is compiled and asked once may wait
    step(first)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in range(3):
            step(documents_of(1, 16_384, 1500, seed=seed + 1))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_graph_for_all_documents():
    from torch._dynamo.testing import CompileCounterWithBackend

    config = LighthouseConfig(top_k=256, backend="triton")
    counter = CompileCounterWithBackend("inductor")

    def layer(q, k, v, documents):
        return 2 * run((q, k, v), config, documents) + documents_sdpa(q, k, v, documents)

    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=False)
    for seed in range(4):
        documents = documents_of(2, 8192, 1500, seed=seed)
        qkv, dout = drawn(documents, seed=seed)
        found = results(lambda *x, d=documents: compiled(*x, d), qkv, dout)
        expected = results(lambda *x, d=documents: layer(*x, d), qkv, dout)
        for x, y in zip(found, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["window", "chunk"])
def test_windows_of_each_document(kind):
    # shorter and longer ones than the window
    documents = Documents([cut(6000, 500, 1)])
    assert min(documents.lengths[0]) <= 256 < documents.longest
    qkv, dout = drawn(documents)
    attend = window_attention if kind == "window" else chunk_attention

    def each(one, *x):
        return torch.cat([one(*(y[:, :, here] for y in x), 256) for _, here in spans(documents)], 2)

    found = results(lambda *x: attend(*x, 256, documents=documents), qkv, dout)
    naive = results(partial(each, attend), qkv, dout)
    one = window_reference if kind == "window" else chunk_attention
    assert_as_exact(found, naive, results(partial(each, one), [x.double() for x in qkv], dout))
    for _, here in spans(documents):
        # the others beside each other, so with other roundings
        if kind == "window" and here.stop - here.start > 256:
            assert torch.equal(found[0][:, :, here], naive[0][:, :, here])


def test_runs_repeat_bit_for_bit_where_asked():
    documents = LENGTHS["long ones and short ones"]
    qkv, dout = drawn(documents)
    torch.use_deterministic_algorithms(True)
    try:
        one, two = (results(lambda *x: documents_sdpa(*x, documents), qkv, dout) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(x, y) for x, y in zip(one, two, strict=True))
