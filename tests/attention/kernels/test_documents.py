"""The kernels with tables of documents against the reference, which goes through documents one by one."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed import CASES, documents_of, packed_case, run
from places import ROOT
from selecting import small_tiles
from tiers import with_few_quick
from torch import library
from twins import DEVICE

from lightning_lighthouse import Documents, LighthouseConfig
from lightning_lighthouse.attention import documents_lighthouse, kernels, reference
from lightning_lighthouse.attention.document_tables import Packing, make_tables
from lightning_lighthouse.attention.documents_sdpa import documents_sdpa
from lightning_lighthouse.attention.operators import OPERATORS

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::lightning_lighthouse.LighthouseWarning"),
]
SELECTIONS = ["causal", "strided", "published", "random"]


@pytest.fixture(autouse=True)
def lighthouse_however_short(monkeypatch):
    monkeypatch.setattr(documents_lighthouse, "_is_crowded", lambda *_: False)


def drawn(batch, heads, groups, tokens, dim, seed):
    """fp32, with norms that differ."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(tokens, 1, generator=generator).exp() ** 2
    return [
        (torch.randn(batch, count, tokens, dim, generator=generator) * scale).to(DEVICE)
        for count in (heads, groups, groups)
    ]


def with_gradients(qkv, config, documents, **more):
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = run(leaves, config, documents, **more)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, *torch.autograd.grad((out * weights).sum(), leaves)


def assert_as_the_reference(
    batch, heads, groups, tokens, levels, p, top_k, winners, lengths, selection, seed=0, **more
):
    documents = Documents(lengths)
    options = {"selection": selection, "max_documents": 1 + documents.num_documents // batch, **more}
    qkv = drawn(batch, heads, groups, tokens, 4, seed)
    with small_tiles(winners):
        found, expected = (
            with_gradients(qkv, LighthouseConfig(levels, p, top_k, backend=backend, **options), documents)
            for backend in ("triton", "reference")
        )
        assert LighthouseConfig(levels, p, top_k, **options).pyramid(tokens).compresses
    for name, x, y in zip(("out", "q", "k", "v"), found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


# lengths: not a multiple of a window, one token, exact windows, exact tiles; one document of everything
@pytest.mark.parametrize(
    "selection",
    ["causal", *(pytest.param(rule, marks=pytest.mark.slow) for rule in ("strided", "published", "random"))],
)
def test_all_documents_at_once_are_each_by_itself(selection):
    more = {"combine": "mean"} if selection in ("strided", "random") else {}
    lengths = [[21, 1, 8, 3, 30], [63]]
    assert_as_the_reference(2, 2, 1, 63, 3, 2, 6, 2, lengths, selection, **more)


@pytest.mark.slow
# what wins is compared below, for every rule
@pytest.mark.parametrize("selection", ["causal", "published"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_many_lengths(case, selection):
    *sizes, mean = case
    tokens = min(sizes[3], 90 if mean < 5 else 160)
    # as many winners for each token
    sizes[6] = sizes[6] * tokens // sizes[3]
    sizes[3] = tokens
    documents = documents_of(sizes[0], sizes[3], mean, seed=5)
    assert_as_the_reference(*sizes, documents.lengths, selection, seed=3)


def assert_slots_of_the_reference(lengths, levels, p, top_k, winners, selection, seed, **more):
    """Slots of drawn scores, many of them equal and some NaN, entry by entry."""
    tokens, groups = sum(lengths), 2
    config = LighthouseConfig(levels, p, top_k, selection=selection, seed=seed, **more)
    with small_tiles(winners):
        shape = config.pyramid(tokens)
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(1, heads, tokens, 1, generator=generator).mul(2).round() for heads in (4, groups))
    q[torch.rand(q.shape, generator=generator) < 0.05] = torch.nan
    packing = Packing.of(shape, 1, len(lengths), selection)
    host, step = Documents([lengths]).host, torch.tensor(seed)
    found = kernels.select_documents_fwd(
        q.to(DEVICE), k.to(DEVICE), host, *packing, config.cover_prefix, seed, step, 3
    ).cpu()[0]
    tables = make_tables(np.array(lengths), shape, selection)
    num_windows = tables.windows.shape[1]
    w = shape.window(levels - 1)
    first_token, first_window = 0, 0
    for n, base in zip(lengths, tables.boundaries, strict=False):
        own = shape.of_document(n)
        qd, kd = (x[:, :, first_token : first_token + n] for x in (q, k))
        expected = reference.select_document(reference.score(qd, kd, kd, own, config), own, config, step, 3).slots[0]
        filled = -(-n // w)
        start = 0
        for level in range(levels):
            # of tokens the first of each window of level 1
            stride = p if level == 0 else 1
            count = w // p ** max(level, 1)
            theirs = expected[:, own.start(level) : own.start(level) + filled * count * stride : stride]
            ours = found[:, start + first_window * count :][:, : filled * count]
            assert torch.equal(ours, torch.where(theirs < 0, -1, theirs + base))
            # the empty window
            assert (found[:, start + (first_window + filled) * count :][:, :count] == -1).all()
            start += num_windows * count
        first_token, first_window = first_token + n, first_window + filled + 1


@pytest.mark.parametrize("selection", with_few_quick({name: name for name in SELECTIONS}, ["causal", "random"]))
def test_entries_are_those_of_the_reference(selection):
    assert_slots_of_the_reference([13, 1, 40, 8, 29], 3, 2, 8, 2, selection, 5)


@pytest.mark.slow
@pytest.mark.parametrize("selection", SELECTIONS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    levels=st.integers(2, 4),
    p=st.integers(2, 4),
    top_k=st.integers(1, 20),
    winners=st.integers(1, 5),
    cover_prefix=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_entries_are_those_of_the_reference_for_drawn_lengths(selection, **case):
    assert_slots_of_the_reference(selection=selection, **case)


def test_no_document_reads_another_one():
    with packed_case((1, 1, 1, 40, 3, 2, 4, 1, 20)) as (qkv, config, _):
        settings = {"backend": "triton", "max_documents": 3}
        config = LighthouseConfig(config.num_levels, config.pooling_factor, config.top_k, **settings)
        documents = Documents([[9, 22, 9]])
        qkv = [x.float().to(DEVICE) for x in qkv]
        found = with_gradients(qkv, config, documents)
        for x in qkv:
            x[:, :, :9] = x[:, :, 31:] = torch.nan
        leaves = [x.requires_grad_() for x in qkv]
        out = run(leaves, config, documents)
        assert torch.equal(out[:, :, 9:31], found[0][:, :, 9:31])
        for x in torch.autograd.grad(out[:, :, 9:31].sum(), leaves):
            assert x[:, :, 9:31].isfinite().all()


# the interpreter takes its time
@pytest.mark.slow
def test_one_frame_serves_all_documents():
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    with small_tiles(2):
        config = LighthouseConfig(2, 2, 4, backend="triton", max_documents=3)
        qkv = drawn(2, 2, 1, 40, 2, 0)
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(run, backend=counter, fullgraph=True, dynamic=False)
        for lengths in ([[11, 29], [40]], [[1, 12, 27], [13, 14, 13]], [[40], [40]]):
            documents = Documents(lengths)
            leaves = [x.detach().requires_grad_() for x in qkv]
            out = compiled(leaves, config, documents)
            torch.testing.assert_close(out, run(qkv, config, documents))
            found = torch.autograd.grad(out.sum(), leaves)
            expected = torch.autograd.grad(run(leaves, config, documents).sum(), leaves)
            torch.testing.assert_close(found, expected)
            assert counter.frame_count == 1
    torch._dynamo.reset()


def test_compiled_frames_heed_what_was_settled(monkeypatch):
    """More documents than there is memory for are dense there too, or an error: never a wrong number."""
    monkeypatch.undo()
    torch._dynamo.reset()
    with small_tiles(2):
        config = LighthouseConfig(2, 2, 4, backend="triton", max_documents=1)
        qkv = drawn(1, 1, 1, 40, 2, 0)
        compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=False)
        documents = Documents([[11, 29]])
        with pytest.raises(RuntimeError, match=r"exceed max_documents x batch = 1 in compiled code; call settle_"):
            compiled(qkv, config, documents)
        assert torch.is_grad_enabled()
        assert documents_lighthouse.settle_documents(documents, config)
        torch.testing.assert_close(compiled(qkv, config, documents), documents_sdpa(*qkv, documents))
    torch._dynamo.reset()


def test_operators_are_well_formed():
    with small_tiles(2):
        packing = Packing.of(LighthouseConfig(2, 2, 4).pyramid(30), 1, 4, "causal")
    documents = Documents([[7, 23]])
    q, k, _ = drawn(1, 2, 1, 30, 2, 0)
    arguments = (q, k, documents.host, *packing, True, 0, None, 0)
    utils = ("test_schema", "test_faketensor")
    library.opcheck(OPERATORS.select_documents.default, arguments, test_utils=utils)
    slots = OPERATORS.select_documents(*arguments)
    x = k.requires_grad_()
    rest = (slots, documents.host, *packing)
    library.opcheck(
        OPERATORS.gather_documents.default, (x, *rest, None, 0), test_utils=(*utils, "test_autograd_registration")
    )
    xs = OPERATORS.gather_documents(x, *rest, None, 0)
    library.opcheck(OPERATORS.scatter_documents.default, (xs.detach(), *rest, True), test_utils=utils)


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter lets pass what the compiler refuses; this needs no GPU."""
    script = ROOT / "tests" / "helpers" / "compiled_kernels.py"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.split()) == 18
