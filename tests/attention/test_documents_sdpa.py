"""Dense attention inside documents against stock SDPA on each of them, and what compiled frames see of it."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from drawn import draw
from packed import documents_of, spans
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

from lightning_lighthouse import Documents
from lightning_lighthouse.attention import documents_backends, host_tables
from lightning_lighthouse.attention import documents_sdpa as room
from lightning_lighthouse.attention.documents_sdpa import attend_rows, documents_sdpa
from lightning_lighthouse.attention.operators import OPERATORS
from lightning_lighthouse.attention.sdpa import stock_sdpa

CPU = torch.device("cpu")


def one_by_one(q, k, v, documents, scale=None):
    rows = []
    for row in range(documents.batch_size):
        parts = [
            stock_sdpa(*(x[row : row + 1, :, here] for x in (q, k, v)), is_causal=True, scale=scale, enable_gqa=True)
            for at, here in spans(documents)
            if at == row
        ]
        rows.append(torch.cat(parts, 2))
    return torch.cat(rows)


def with_gradients(attend, qkv):
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = attend(*leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, *torch.autograd.grad((out * weights).sum(), leaves)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads_inner", [True, False])
def test_each_document_by_itself(heads, dtype, heads_inner):
    documents = documents_of(2, 97, 20)
    qkv = draw(2, *heads, 97, dim=8, dtype=dtype)
    if heads_inner:
        qkv = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv]
    found = with_gradients(lambda *x: documents_sdpa(*x, documents, scale=0.4), qkv)
    expected = with_gradients(lambda *x: one_by_one(*x, documents, scale=0.4), qkv)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y) or dtype != torch.bfloat16 or (x - y).abs().max() < 2e-2
        if dtype != torch.bfloat16:
            torch.testing.assert_close(x, y)


@pytest.fixture
def by_math(monkeypatch):
    """What runs on devices that have nothing else."""
    monkeypatch.setattr(room, "KERNELS", {"cpu": documents_backends.KERNELS["math"]})
    monkeypatch.setattr(room, "WITH_EQUAL_HEADS", ("cpu",))
    monkeypatch.setattr(host_tables, "_made", OrderedDict())


def assert_exact_gradients():
    documents = Documents([[4, 1, 6], [11]])
    qkv = [x.requires_grad_() for x in draw(2, 4, 2, 11, dim=3)]
    assert gradcheck(lambda *x: documents_sdpa(*x, documents), qkv, fast_mode=True)
    torch.testing.assert_close(documents_sdpa(*qkv, documents), one_by_one(*qkv, documents))


def test_gradients_are_exact_in_float64():
    assert_exact_gradients()


def test_gradients_of_plain_tensors_are_exact_in_float64(by_math):
    assert_exact_gradients()


@pytest.mark.parametrize(
    ("kernel", "dim", "rows"),
    [("flash", 64, 100), ("flash", 20, 100), ("cudnn", 64, 3001), ("efficient", 64, 100)],
)
def test_calls_of_one_document_are_those_that_torch_declares(kernel, dim, rows):
    assert_declared(dim, rows, lambda _: documents_backends.Part(0, rows, *documents_backends.KERNELS[kernel]))


@pytest.mark.parametrize("kernel", ["flash", "efficient"])
def test_calls_of_a_run_are_those_that_torch_declares(kernel):
    part = room._run([0, 40, 41, 103], CPU, kernel)

    def on_gpu(device):
        cu, places = (
            x if x is None else torch.empty(x.shape, dtype=x.dtype, device=device) for x in (part.cu, part.places)
        )
        return part._replace(cu=cu, places=places)

    # torch declares the backward of its efficient kernel without the output that it takes
    assert_declared(64, 103, on_gpu, has_backward=kernel == "flash")


def assert_declared(dim, rows, make_part, has_backward=True):
    """Without a GPU: the arguments fit, and the shapes that come back."""
    with FakeTensorMode():
        q, k, v, o, do = (torch.empty(rows, 4, dim, device="cuda", dtype=torch.bfloat16) for _ in range(5))
        part = make_part(torch.device("cuda"))
        out, lse = part.forward(q, k, v, part, 0.3)
        assert (out.shape, lse.shape, lse.dtype) == (q.shape, (4, rows), torch.float32)
        if has_backward:
            assert [x.shape for x in part.backward(do, q, k, v, o, lse, part, 0.3)] == [q.shape] * 3


def test_places_of_the_efficient_kernel():
    """Of rows in a logsumexp that has 64 for each document."""
    part = room._run([5, 45, 46, 108], torch.device("cpu"), "efficient")
    assert (part.first, part.end, part.longest, part.cu.tolist()) == (5, 108, 62, [0, 40, 41, 103])
    assert part.places.tolist() == [*range(40), 64, *range(128, 190)]


def test_runs_of_short_documents_between_long_ones(monkeypatch):
    monkeypatch.setattr(room, "LONG", 10)
    host = Documents([[3, 4, 11, 10, 12, 13, 1]]).host
    made = [(part.first, part.end, part.longest) for part in room._make_plan(host, CPU, "cudnn", False, True, 10).parts]
    assert made == [(0, 7, 4), (7, 18, 0), (18, 28, 10), (28, 40, 0), (40, 53, 0), (53, 54, 1)]
    assert len(room._make_plan(host, CPU, "flash", False, True, None).parts) == 1
    assert len(room._make_plan(host, CPU, "flash", False, False, None).parts) == 7


def test_nothing_passes_between_documents():
    documents = Documents([[5, 9, 3]])
    q, k, v = draw(1, 2, 1, 17)
    out = documents_sdpa(q, k, v, documents)
    noise = [x.clone() for x in (q, k, v)]
    for x in noise:
        x[:, :, :5] = torch.nan
        x[:, :, 14:] = torch.inf
    leaves = [x.requires_grad_() for x in noise]
    mixed = documents_sdpa(*leaves, documents)
    assert torch.equal(mixed[:, :, 5:14], out[:, :, 5:14])
    for x in torch.autograd.grad(mixed[:, :, 5:14].sum(), leaves):
        assert x[:, :, 5:14].isfinite().all()


def test_rows_behind_the_last_document_get_zeros(poison):
    q, k, v = (x.requires_grad_() for x in draw(1, 2, 1, 12))
    host = Documents([[3, 6]]).host
    out = attend_rows(q, k, v, host, None, "auto")
    assert (out[:, :, 9:] == 0).all()
    for x in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (x[:, :, 9:] == 0).all()
        assert x.isfinite().all()


def test_gradients_that_are_expanded():
    documents = Documents([[5, 7]])
    q, k, v = draw(1, 2, 1, 12)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    found = torch.autograd.grad(documents_sdpa(*leaves, documents).sum(), leaves)
    expected = torch.autograd.grad(one_by_one(*leaves, documents).sum(), leaves)
    torch.testing.assert_close(found, expected)


def test_documents_made_while_validating_serve_training():
    with torch.inference_mode():
        documents = Documents([[5, 7]])
        documents_sdpa(*draw(1, 2, 1, 12), documents)
    leaves = [x.requires_grad_() for x in draw(1, 2, 1, 12)]
    documents_sdpa(*leaves, documents).sum().backward()
    assert leaves[1].grad.isfinite().all()


def test_autocast_is_heeded():
    q, k, v = draw(1, 2, 1, 12, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert documents_sdpa(q, k, v, Documents([[5, 7]])).dtype == torch.bfloat16


def test_the_operator_is_well_formed():
    q, k, v = (x.requires_grad_() for x in draw(2, 2, 1, 9))
    operator = OPERATORS.attend_documents.default
    library.opcheck(operator, (q, k, v, Documents([[4, 5], [9]]).host, 0.5, "auto", [], ""))


@pytest.mark.slow
def test_one_frame_serves_all_documents():
    """As one block of a model: fullgraph, with inductor, checkpointed too."""
    from torch._dynamo.testing import CompileCounterWithBackend
    from torch.utils.checkpoint import checkpoint

    class Block(torch.nn.Module):
        documents: Documents

        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(16, 48)

        def forward(self, x):
            q, k, v = (y.transpose(1, 2) for y in self.linear(x).unflatten(-1, (3, 2, 8)).unbind(2))
            return x + documents_sdpa(q, k, v, self.documents).transpose(1, 2).flatten(2)

    torch.manual_seed(0)
    block = Block()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=False)
    for seed, mean in enumerate((20, 3, 200, 50)):
        block.documents = documents_of(2, 64, mean, seed)
        x = torch.randn(2, 64, 16)
        found = with_gradients(compiled, [x])
        expected = with_gradients(block, [x])
        torch.testing.assert_close(found, expected)
        assert counter.frame_count == 1
    torch.testing.assert_close(with_gradients(lambda x: checkpoint(compiled, x, use_reentrant=False), [x]), expected)
    assert counter.frame_count == 1


def test_frames_do_not_know_the_documents():
    """The same without inductor, which takes seconds."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    options = {"backend": counter, "fullgraph": True, "dynamic": False}
    compiled = torch.compile(lambda x, d: documents_sdpa(x, x, x, d) + 1, **options)
    q, _, _ = draw(2, 2, 2, 31)
    for seed in range(3):
        documents = documents_of(2, 31, 8, seed)
        torch.testing.assert_close(compiled(q, documents), one_by_one(q, q, q, documents) + 1)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(("rows", "rounded"), [(1, 2), (15, 15), (2049, 2304), (4096, 4096), (98_303, 98_304)])
def test_few_sizes_for_cudnn(rows, rounded):
    assert documents_backends._rounded(rows) == rounded
    assert rows <= rounded < max(rows, 2) * 1.126
