"""Windows and chunks against their one-line references: equal, causal, in one graph, never N x N.

A window runs on one of two paths. "blocks" is stock SDPA; "kernels" are those of a GPU, here in Triton's interpreter.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from warned import own_warnings

from lightning_lighthouse import notices
from lightning_lighthouse.attention import fused_window, windows
from lightning_lighthouse.attention.operators import OPERATORS
from lightning_lighthouse.attention.reference import window_mask, window_reference
from lightning_lighthouse.attention.windows import chunk_attention, window_attention

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the kernels do not run on the CPU")

# a prime, more than the windows below, and four blocks of the kernels
TOKENS = 211
WINDOWS = [1, 2, 63, 128, TOKENS - 1, TOKENS, TOKENS + 7]


@pytest.fixture(params=["blocks", "kernels"])
def path(request, monkeypatch):
    """Run windows on one of the two paths."""
    if request.param == "kernels":
        use_kernels(monkeypatch)
    return request.param


@pytest.fixture
def kernels(monkeypatch):
    use_kernels(monkeypatch)


def use_kernels(monkeypatch):
    monkeypatch.setattr(windows, "_takes_kernel", lambda *call: True)


def draw(batch=2, heads=2, groups=1, tokens=TOKENS, dim=5, dtype=torch.float32, seed=42):
    """q, k and v as a model hands them over, and a gradient of the output."""
    generator = torch.Generator().manual_seed(seed)
    *qkv, dout = (
        torch.randn(batch, tokens, count, dim, generator=generator).to(dtype).transpose(1, 2)
        for count in (heads, groups, groups, heads)
    )
    return [x.requires_grad_() for x in qkv], dout


def results(attend, qkv, dout):
    out = attend(*qkv)
    return out, *torch.autograd.grad(out, qkv, dout.to(out.dtype))


def assert_exact(attend, reference, qkv, dout):
    """Output and gradients are those of float64, but for rounding of fp32."""
    exact = results(reference, [x.detach().double().requires_grad_() for x in qkv], dout)
    # dq is a difference of products of dout and v, and may itself be nothing
    floor = dout.norm(dim=-1).max() * qkv[2].detach().norm(dim=-1).max()
    for actual, truth in zip(results(attend, qkv, dout), exact, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - truth).abs().max() <= 3e-6 * max(truth.abs().max(), floor)


def windowed(attend, window, sink_tokens, scale=None):
    return lambda q, k, v: attend(q, k, v, window, sink_tokens=sink_tokens, scale=scale)


def assert_window(window, sink_tokens, qkv, dout, scale=None):
    ours, reference = (windowed(attend, window, sink_tokens, scale) for attend in (window_attention, window_reference))
    assert_exact(ours, reference, qkv, dout)


def chunk_reference(q, k, v, window):
    parts = [(x.split(window, 2)) for x in (q, k, v)]
    return torch.cat([window_reference(*part, window) for part in zip(*parts, strict=True)], 2)


def test_the_mask_of_the_reference_is_the_definition():
    mask = window_mask(7, 2, 1)
    seen = [[key for key in range(7) if mask[query, key]] for query in range(7)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 5], [0, 5, 6]]


@pytest.mark.parametrize("sink_tokens", [0, 4])
@pytest.mark.parametrize("window", WINDOWS)
def test_a_window_is_its_reference(window, sink_tokens, path):
    assert_window(window, sink_tokens, *draw())


SIZES = {
    "batch": st.integers(1, 2),
    "groups": st.integers(1, 2),
    "ratio": st.integers(1, 3),
    "tokens": st.integers(1, 150),
    "window": st.integers(1, 90),
    "sink_tokens": st.integers(0, 7),
    "dim": st.integers(1, 9),
    "scale": st.sampled_from([None, 0.7]),
}


def assert_sizes(batch, groups, ratio, tokens, window, sink_tokens, dim, scale):
    assert_window(window, sink_tokens, *draw(batch, groups * ratio, groups, tokens, dim), scale)


@settings(max_examples=25, deadline=None)
@given(sizes=st.fixed_dictionaries(SIZES))
def test_any_sizes_in_blocks(sizes):
    assert_sizes(**sizes)


# the interpreter is slow
@settings(max_examples=7, deadline=None)
@given(sizes=st.fixed_dictionaries(SIZES))
def test_any_sizes_in_the_operator(sizes):
    with pytest.MonkeyPatch.context() as monkeypatch:
        use_kernels(monkeypatch)
        assert_sizes(**sizes)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_a_scale_that_is_not_positive(scale):
    assert_window(29, 7, *draw(1, tokens=131), scale)


@pytest.mark.usefixtures("poison", "kernels")
@pytest.mark.parametrize("dim", [16, 96])
def test_no_slot_is_left_unwritten(dim):
    assert_window(29, 7, *draw(1, 2, 1, tokens=131, dim=dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_as_exact_as_naive_attention(dtype, path):
    """The distance to float64 is at most twice that of the reference in the same dtype, and one rounding."""
    qkv, dout = draw(dim=16, dtype=dtype)
    ours, reference = (windowed(attend, 63, 4) for attend in (window_attention, window_reference))
    exact = results(reference, [x.detach().double().requires_grad_() for x in qkv], dout)
    for actual, naive, truth in zip(results(ours, qkv, dout), results(reference, qkv, dout), exact, strict=True):
        assert actual.dtype == dtype
        error, allowed = ((x.detach().double() - truth).norm() / truth.norm() for x in (actual, naive))
        assert error <= 2 * allowed + torch.finfo(dtype).eps


def test_float64_stays_float64():
    qkv, dout = draw(dim=16, dtype=torch.float64)
    expected = results(lambda *x: window_reference(*x, 63, sink_tokens=4), qkv, dout)
    for actual, truth in zip(results(attend_window, qkv, dout), expected, strict=True):
        torch.testing.assert_close(actual, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [3, 63, 200, TOKENS])
def test_a_chunk_is_its_reference(window):
    # 211 is a prime: the last chunk is shorter
    attend, reference = (lambda q, k, v, f=f: f(q, k, v, window) for f in (chunk_attention, chunk_reference))
    assert_exact(attend, reference, *draw())


def test_whole_chunks_are_neither_padded_nor_copied():
    qkv, dout = draw(1, tokens=512, dim=16)
    assert_exact(lambda *x: chunk_attention(*x, 64), lambda *x: chunk_reference(*x, 64), qkv, dout)
    folded = windows._fold(qkv[0], 64)
    assert folded.shape == (8, 2, 64, 16)
    assert folded.data_ptr() == qkv[0].data_ptr()


@pytest.mark.parametrize("at", [0, 62, 63, 200, 209])
@pytest.mark.parametrize("attend", [window_attention, chunk_attention])
def test_no_output_depends_on_a_later_token(attend, at, path):
    # in the same memory: matrix products on CPUs may round by how their operands lie
    qkv, others = ([x.detach() for x in draw(seed=seed)[0]] for seed in (42, 7))
    options = {"sink_tokens": 4} if attend is window_attention else {}
    before = attend(*qkv, 63, **options).clone()
    for x, y in zip(qkv, others, strict=True):
        x[:, :, at + 1 :] = y[:, :, at + 1 :]
    after = attend(*qkv, 63, **options)
    assert torch.equal(before[:, :, : at + 1], after[:, :, : at + 1])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("sink_tokens", [0, 4])
def test_what_left_the_window_is_not_seen(sink_tokens, path):
    (q, k, v), _ = draw()
    k_changed, v_changed = (x.clone() for x in (k, v))
    for x in (k_changed, v_changed):
        x[:, :, 4] += 100
    before, after = (window_attention(q, *kv, 63, sink_tokens=sink_tokens) for kv in ((k, v), (k_changed, v_changed)))
    same = (before == after).all(3).all(0).all(0)
    assert same.tolist() == [not 4 <= token < 4 + 63 for token in range(TOKENS)]


def attend_window(q, k, v):
    return window_attention(q, k, v, 63, sink_tokens=4)


def attend_chunk(q, k, v):
    return chunk_attention(q, k, v, 63)


@pytest.mark.slow
@pytest.mark.parametrize("attend", [attend_window, attend_chunk])
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_compiled_in_one_graph_equals_eager(attend, is_checkpointed, autocast, path):
    if attend is attend_chunk and path == "kernels":
        pytest.skip("chunks have one path")
    qkv, dout = draw(1, tokens=211, dim=16)
    call = (lambda *qkv: checkpoint(attend, *qkv, use_reentrant=False)) if is_checkpointed else attend
    torch.compiler.reset()
    found = []
    for run in (attend, torch.compile(call, backend="aot_eager", fullgraph=True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = run(*qkv)
        found.append((out, *torch.autograd.grad(out, qkv, dout.to(out.dtype))))
    assert found[0][0].dtype == (torch.bfloat16 if autocast else torch.float32)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(*found, strict=True))


@pytest.mark.slow
def test_compiled_for_several_lengths_equals_eager(path):
    torch.compiler.reset()
    compiled = torch.compile(attend_window, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (211, 307):
        qkv, dout = draw(1, tokens=tokens, dim=16)
        for actual, expected in zip(results(compiled, qkv, dout), results(attend_window, qkv, dout), strict=True):
            assert torch.equal(actual, expected), tokens


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers that an operation returned in one tensor."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [
            x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if isinstance(x, torch.Tensor)
        ]
        self.numel = max(self.numel, *sizes, 0)
        return out


@pytest.mark.parametrize("attend", [attend_window, attend_chunk])
def test_nothing_is_n_times_n(attend):
    """The most that one tensor holds, forward and backward, is linear in N; N x N would be 4 and 16 times as much."""
    peaks = []
    for tokens in (1024, 2048, 4096):
        qkv, dout = draw(1, 2, 1, tokens, 16)
        with LargestTensor() as largest:
            results(attend, qkv, dout)
        peaks.append(largest.numel)
        # k and v of two windows a block
        assert largest.numel <= 2.5 * 2 * tokens * 16
    assert peaks[2] < 2.1 * peaks[1] < 4.3 * peaks[0]


@pytest.mark.usefixtures("kernels")
def test_the_operators_are_registered_as_torch_demands():
    (q, k, v), dout = draw(tokens=71, dim=8)
    out, lse = OPERATORS.attend_window(q, k, v, 13, 4, 0.3)
    library.opcheck(OPERATORS.attend_window.default, (q, k, v, 13, 4, 0.3), test_utils=CHECKS)
    saved = (x.detach() for x in (dout, q, k, v, out, lse))
    library.opcheck(OPERATORS.attend_window_backward.default, (*saved, 13, 4, 0.3))


# autograd is compared with float64 above; the log-sum-exp has no gradient, which opcheck would ask for
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor")


def layouts():
    """q, k and v in the memory orders that models have."""
    heads_inner = torch.randn(3, 2, 67, 4, 8).transpose(2, 3)
    fused = torch.randn(2, 67, 3, 4, 8).permute(2, 0, 3, 1, 4)
    channels_outer = torch.randn(3, 2, 4, 8, 67).transpose(3, 4)
    shifted = torch.randn(3, 2, 67, 4, 9)[..., 1:].transpose(2, 3)
    return {
        "heads inner": heads_inner,
        "heads outer": heads_inner.contiguous(),
        "fused": fused,
        "channels outer": channels_outer,
        "rows begin anywhere": shifted,
        "expanded heads": heads_inner[:, :, :1].expand(-1, -1, 4, -1, -1),
    }


@pytest.mark.slow
@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("layout", layouts())
def test_any_memory_order_and_the_promised_strides(layout):
    """What is traced without data has the strides of what runs."""
    qkv = [x.requires_grad_() for x in layouts()[layout].detach().unbind(0)]
    assert_window(13, 4, qkv, torch.randn(2, 4, 67, 8))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in qkv]
        traced = results(lambda *x: fused_window.attend_window_fwd(*x, 13, 4, 0.3)[0], fakes, torch.randn(2, 4, 67, 8))
    ran = results(lambda *x: fused_window.attend_window_fwd(*x, 13, 4, 0.3)[0], qkv, torch.randn(2, 4, 67, 8))
    assert [x.stride() for x in traced[:1]] == [x.stride() for x in ran[:1]]


@pytest.mark.usefixtures("kernels")
def test_a_second_derivative_is_an_error_and_not_nothing():
    (q, k, v), _ = draw(tokens=131)
    (dq,) = torch.autograd.grad(attend_window(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (dq + q).sum().backward()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_a_gradient_of_one_input_alone(wanted):
    qkv, dout = draw(tokens=131)
    (expected,) = torch.autograd.grad(attend_window(*qkv), qkv[wanted], dout)
    (alone,) = torch.autograd.grad(
        attend_window(*(x if i == wanted else x.detach() for i, x in enumerate(qkv))), qkv[wanted], dout
    )
    assert torch.equal(alone, expected)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"window": 0}, ValueError, "window must be at least 1, got 0"),
        ({"window": 7, "sink_tokens": -1}, ValueError, "sink_tokens must be at least 0, got -1"),
        ({"window": 7.0}, TypeError, r"window must be int, got 7\.0"),
        ({"window": True}, TypeError, "window must be int, got True"),
        ({"window": 7, "sink_tokens": None}, TypeError, "sink_tokens must be int, got None"),
        ({"window": 7, "sdpa": "fast"}, ValueError, "sdpa must be one of 'auto', 'cudnn', .*, got 'fast'"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(settings, error, message):
    with pytest.raises(error, match=message):
        window_attention(*draw()[0], **settings)
    if "sink_tokens" not in settings:
        with pytest.raises(error, match=message):
            chunk_attention(*draw()[0], **settings)


@pytest.mark.parametrize("attend", [window_attention, chunk_attention])
def test_wrong_tensors_are_named(attend):
    (q, k, v), _ = draw()
    with pytest.raises(ValueError, match=r"k and v must have one shape"):
        attend(q, k, v[:, :, 1:], 7)
    with pytest.raises(ValueError, match=r"one floating dtype"):
        attend(q.long(), k.long(), v.long(), 7)


@pytest.mark.parametrize(
    ("device", "dtype", "dim", "sdpa", "expected"),
    [
        ("cuda", torch.bfloat16, 128, "auto", True),
        ("cuda", torch.float16, 100, "flash", True),
        ("cuda", torch.bfloat16, 256, "auto", True),
        # asked for by name
        ("cuda", torch.bfloat16, 128, "cudnn", False),
        ("cuda", torch.float32, 128, "auto", False),
        ("cpu", torch.bfloat16, 128, "auto", False),
    ],
)
def test_the_kernel_runs_where_it_can_and_no_notice_is_given(device, dtype, dim, sdpa, expected, monkeypatch):
    on_a_gpu(monkeypatch)
    q = SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(2, 4, 521, dim))
    with own_warnings() as lines:
        assert windows._takes_kernel(q, sdpa) == expected
    assert lines == []


@pytest.mark.parametrize(
    ("dim", "changes", "reason"),
    [
        (320, {}, "the kernels take head dims up to 256"),
        (128, {"capability": (7, 5)}, "the kernels need compute capability 8.0, cuda:0 has 7.5"),
        (128, {"triton": None}, "the package triton is not installed"),
    ],
    ids=["head dim", "capability", "triton"],
)
def test_a_kernel_that_cannot_run_is_told_once(dim, changes, reason, monkeypatch):
    on_a_gpu(monkeypatch, **changes)
    q = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(2, 4, 521, dim))
    with own_warnings() as lines:
        assert not any(windows._takes_kernel(q, "auto") for _ in range(2))
    assert lines == [f"windows run on blocks under a mask, which is slow: {reason}"]


def on_a_gpu(monkeypatch, capability=(9, 0), triton="a module"):
    monkeypatch.setattr(notices, "_given", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(windows, "find_spec", lambda name: triton)
