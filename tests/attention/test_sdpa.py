"""One door to SDPA: which backend runs, for a run and for a call, and that nothing stays behind."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from lightning_lighthouse import notices
from lightning_lighthouse.attention import sdpa
from lightning_lighthouse.attention.sdpa import BACKENDS, causal_sdpa, sdpa_priority

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDNN, FLASH, EFFICIENT, MATH = (BACKENDS[name].value for name in ("cudnn", "flash", "efficient", "math"))


@pytest.fixture(autouse=True)
def torch_is_left_as_found():
    def state():
        flags = (torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled())
        return torch._C._get_sdp_priority_order(), flags

    before = state()
    yield
    assert state() == before


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(heads=(4, 2), tokens=37, dim=8, dtype=torch.float32, device="cpu"):
    generator = torch.Generator(device).manual_seed(42)
    return [
        torch.randn(2, count, tokens, dim, device=device, generator=generator).to(dtype).requires_grad_()
        for count in (heads[0], heads[1], heads[1])
    ]


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_on_the_cpu_every_choice_is_causal_attention(backend):
    q, k, v = draw()
    logits = q @ k.repeat_interleave(2, 1).mT * 0.3
    logits = logits.masked_fill(torch.ones(37, 37, dtype=torch.bool).triu(1), -torch.inf)
    expected = logits.softmax(-1) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(causal_sdpa(q, k, v, scale=0.3, backend=backend), expected)


def test_a_patched_function_is_not_called(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    assert causal_sdpa(*draw(), scale=None, backend="auto").shape == (2, 4, 37, 8)


@pytest.mark.parametrize("choice", BACKENDS)
def test_a_named_backend_goes_first_and_the_others_stay(choice):
    before = torch._C._get_sdp_priority_order()
    with sdpa_priority(choice):
        inside = torch._C._get_sdp_priority_order()
        assert inside[0] == BACKENDS[choice].value
        assert sorted(inside) == sorted(before)
        with sdpa_priority("math"):
            assert torch._C._get_sdp_priority_order()[0] == MATH
        assert torch._C._get_sdp_priority_order() == inside


def test_the_order_returns_after_a_crash():
    before = torch._C._get_sdp_priority_order()
    with pytest.raises(RuntimeError, match="overnight"), sdpa_priority("math"):
        raise RuntimeError("overnight")
    assert torch._C._get_sdp_priority_order() == before


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((9, 0), [CUDNN, FLASH, EFFICIENT, MATH]), ((8, 0), None), ((10, 0), None), (None, None)],
    ids=["Hopper", "Ampere", "Blackwell", "no GPU"],
)
def test_auto_prefers_cudnn_on_hopper_only(capability, expected, monkeypatch):
    monkeypatch.setattr(sdpa, "_capability", lambda device=None: capability)
    before = torch._C._get_sdp_priority_order()
    with sdpa_priority("auto"):
        assert torch._C._get_sdp_priority_order()[:4] == (expected or before[:4])


def test_auto_is_repeatable_where_torch_shall_be(monkeypatch, deterministic):
    monkeypatch.setattr(sdpa, "_capability", lambda device=None: (9, 0))
    with sdpa_priority("auto"):
        assert torch._C._get_sdp_priority_order()[:3] == [FLASH, EFFICIENT, MATH]


@pytest.mark.parametrize("choice", ["auto", "math"])
def test_compiles_in_one_graph(choice):
    torch.compiler.reset()
    qkv = draw()
    expected = causal_sdpa(*qkv, scale=None, backend=choice)
    compiled = torch.compile(
        lambda q, k, v: causal_sdpa(q, k, v, scale=None, backend=choice), backend="aot_eager", fullgraph=True
    )
    with sdpa_priority(choice):
        assert torch.equal(compiled(*qkv), expected)


# what torch's kernels take, as seen on an H200: grouped heads in 16 bits only, and never in the memory-efficient kernel
def takes(name, dtype, heads, kv_heads):
    if name == "math":
        return True
    if name == "efficient":
        return heads == kv_heads and dtype != torch.float64
    return dtype in (torch.bfloat16, torch.float16)


def plan(backend, dtype, heads, kv_heads, monkeypatch, enabled=(True, True, True, True), deterministic=False):
    def ask(names, device, dtype, heads, kv_heads, head_dim, grad, is_masked):
        return next((name for name in names if takes(name, dtype, heads, kv_heads)), None)

    monkeypatch.setattr(sdpa, "ask_torch", ask)
    monkeypatch.setattr(sdpa, "_capability", lambda device=None: (9, 0))
    call = (torch.device("cuda"), dtype, heads, kv_heads, 64, True, False)
    torch_order = (FLASH, EFFICIENT, MATH, CUDNN)
    return sdpa._plan_once.__wrapped__(backend, torch_order, enabled, deterministic, call)[:3]


@pytest.mark.parametrize("backend", ["auto", "efficient"])
def test_fp32_with_grouped_heads_takes_a_fused_kernel_with_repeated_keys(backend, monkeypatch):
    names, repeats, message = plan(backend, torch.float32, 8, 2, monkeypatch)
    assert repeats
    assert "efficient" in names
    assert "math" not in names
    assert message == (
        f"sdpa={backend!r} runs 'efficient' for torch.float32 on cuda with 8 and 2 heads of 64, k and v repeated"
    )


def test_keys_are_repeated_in_the_deterministic_plan_too(monkeypatch, deterministic):
    names, repeats, message = plan("auto", torch.float32, 8, 2, monkeypatch, deterministic=True)
    assert (names[:2], repeats) == (("flash", "efficient"), True)
    assert "math" not in names
    assert message.endswith("k and v repeated, deterministic")


@pytest.mark.parametrize(
    ("backend", "dtype", "heads", "enabled", "chosen"),
    [
        ("auto", torch.bfloat16, (8, 2), (True, True, True, True), "cudnn"),
        ("auto", torch.float32, (8, 8), (True, True, True, True), "efficient"),
        ("auto", torch.float64, (8, 2), (True, True, True, True), "math"),
        # turned off by the user
        ("auto", torch.float32, (8, 2), (True, True, False, True), "math"),
        ("math", torch.float32, (8, 2), (True, True, True, True), "math"),
    ],
    ids=["grouped bf16", "equal fp32", "fp64", "efficient is off", "math by name"],
)
def test_keys_are_not_repeated_without_need(backend, dtype, heads, enabled, chosen, monkeypatch):
    _, repeats, message = plan(backend, dtype, *heads, monkeypatch, enabled)
    assert not repeats
    assert f"runs {chosen!r} for" in message
    assert "repeated" not in message


def test_a_named_backend_that_takes_no_form_of_the_call_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match=r"sdpa=.flash. cannot run attention in torch\.float32"):
        plan("flash", torch.float32, 8, 2, monkeypatch)


def test_repeated_keys_give_the_grouped_result_and_gradients():
    results = []
    for repeats in (False, True):
        qkv = draw((6, 2))
        out = sdpa._attend(*qkv, None, None, ("math",), repeats)
        results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
    for grouped, repeated in zip(*results, strict=True):
        assert grouped.shape == repeated.shape
        torch.testing.assert_close(repeated, grouped)


def test_sizes_that_change_are_planned_as_plain_numbers():
    """Where Dynamo traces heads and head dim as symbols; the plan is made in Python, while it traces."""
    torch.compiler.reset()
    planned = []

    @torch.compiler.assume_constant_result
    def plan(*sizes):
        planned.append(sizes)
        return sum(sizes)

    def call(q, k):
        return q * plan(*sdpa._plain_sizes(q, k))

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True, dynamic=True)
    for heads, groups, dim in ((4, 2, 8), (6, 2, 8), (6, 3, 16)):
        q, k, _ = draw((heads, groups), dim=dim)
        assert torch.equal(compiled(q, k), q * (heads + groups + dim))
    assert planned == [(4, 2, 8), (6, 2, 8), (6, 3, 16)]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_more_batch_elements_than_cuda_launches_are_cut(compiled, monkeypatch):
    torch.compiler.reset()
    q, k, v = (torch.cat([x] * 3)[:5].detach().requires_grad_() for x in draw())
    call = lambda q, k, v: causal_sdpa(q, k, v, scale=None, backend="auto")  # noqa: E731
    results, batches = [], []
    stock = sdpa.stock_sdpa
    for most in (65_535, 2):
        monkeypatch.setattr(sdpa, "MAX_BATCH", most)
        if not compiled:
            monkeypatch.setattr(sdpa, "stock_sdpa", lambda q, *x, **kw: batches.append(len(q)) or stock(q, *x, **kw))
        torch.compiler.reset()
        out = (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)(q, k, v)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for cut, whole in zip(*results, strict=True):
        torch.testing.assert_close(cut, whole)
    assert compiled or batches == [5, 2, 2, 1]


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_gradient_is_handed_back_in_the_memory_order_of_the_output(order, compiled):
    torch.compiler.reset()
    # of the gradient; that of the output is [batch, tokens, heads, dim]
    gradient = torch.randn([(2, 3, 5, 4)[dim] for dim in order]).permute(*torch.tensor(order).argsort().tolist())
    out = torch.randn(2, 5, 3, 4).transpose(1, 2).requires_grad_()
    hand_on = sdpa.with_ordered_gradient
    if compiled:
        hand_on = torch.compile(sdpa.with_ordered_gradient, backend="aot_eager", fullgraph=True)
    before = out * 1
    seen = []
    before.register_hook(seen.append)
    after = hand_on(before + 0)
    assert torch.equal(after, out)
    after.backward(gradient)
    assert torch.equal(seen[0], gradient)
    assert seen[0].stride() == before.stride()


def test_an_output_whose_gradient_is_ordered_may_be_changed_in_place():
    x = torch.randn(2, 3, 5, requires_grad=True)
    out = sdpa.with_ordered_gradient(x * 3)
    out *= 2
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(dx, torch.full_like(x, 6))


class TestOnAGPU:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
    def test_a_gradient_in_another_memory_order_gives_the_same(self, is_compiled):
        """Called once with each, in turn: what torch remembers of the first must not serve the second."""
        torch.compiler.reset()
        qkv = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in
               draw((8, 8), 512, 64, torch.bfloat16, "cuda")]  # fmt: skip
        call = lambda q, k, v: causal_sdpa(q, k, v, scale=None, backend="cudnn")  # noqa: E731
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        weight = torch.randn_like(qkv[0])
        first = torch.autograd.grad(call(*qkv), qkv, weight)
        second = torch.autograd.grad((compiled if is_compiled else call)(*qkv), qkv, weight.contiguous())
        for one, other in zip(first, second, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)

    @pytest.mark.parametrize("backend", ["auto", *BACKENDS])
    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    def test_every_backend_runs_forward_and_backward(self, backend, compiled):
        torch.compiler.reset()
        # the memory-efficient kernel knows no grouped heads: k and v are repeated there
        qkv = draw((4, 2), 256, 64, torch.bfloat16, "cuda")
        call = lambda q, k, v: causal_sdpa(q, k, v, scale=None, backend=backend)  # noqa: E731
        out = (torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call)(*qkv)
        out.sum().backward()
        exact = F.scaled_dot_product_attention(*(x.double() for x in qkv), is_causal=True, enable_gqa=True)
        torch.testing.assert_close(out.double(), exact, rtol=2e-2, atol=2e-2)
        assert all(x.grad.isfinite().all() for x in qkv)

    @pytest.mark.filterwarnings("ignore:.*(kernel not used|runtime disabled|Expected query).*:UserWarning")
    @pytest.mark.parametrize("backend", ["flash", "cudnn"])
    def test_a_named_backend_that_cannot_run_is_an_error(self, backend):
        with pytest.raises(ValueError, match=f"sdpa='{backend}' cannot run attention in torch.float32 on cuda"):
            causal_sdpa(*draw(device="cuda"), scale=None, backend=backend)

    @pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize("is_deterministic", [False, True], ids=["default", "deterministic"])
    def test_fp32_with_grouped_heads_needs_no_logits(self, compiled, is_deterministic, request):
        """Equal to float64 within fp32's rounding, in a small part of the memory of S x S logits."""
        if is_deterministic:
            request.getfixturevalue("deterministic")
        torch.compiler.reset()
        heads, tokens = 8, 4096
        q, k, v = (x[:1].detach().requires_grad_() for x in draw((heads, 2), tokens, 64, torch.float32, "cuda"))
        call = lambda q, k, v: causal_sdpa(q, k, v, scale=None, backend="auto")  # noqa: E731
        call = torch.compile(call, backend="aot_eager", fullgraph=True) if compiled else call
        weight = torch.randn_like(q)
        torch.autograd.grad(call(q, k, v), (q, k, v), weight)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = call(q, k, v)
        ours = (out, *torch.autograd.grad(out, (q, k, v), weight))
        assert torch.cuda.max_memory_allocated() - before < tokens * tokens * 4 * heads / 4
        double = [x.detach().double().requires_grad_() for x in (q, k, v)]
        exact = F.scaled_dot_product_attention(*double, is_causal=True, enable_gqa=True)
        exact = (exact, *torch.autograd.grad(exact, double, weight.double()))
        for actual, expected in zip(ours, exact, strict=True):
            assert (actual - expected).abs().max() <= 5e-5 * expected.abs().max()

    def test_what_cudnn_refuses_takes_the_next_and_says_so_once(self, caplog, monkeypatch):
        monkeypatch.setattr(notices, "_given", set())
        with caplog.at_level(logging.INFO, logger="lightning_lighthouse"):
            for _ in range(2):
                causal_sdpa(*draw((4, 4), device="cuda"), scale=None, backend="auto")
        assert [record.message for record in caplog.records] == [
            "sdpa='auto' runs 'efficient' for torch.float32 on cuda with 4 and 4 heads of 8"
        ]

    def test_deterministic_attention_repeats_bit_for_bit(self, caplog, monkeypatch, deterministic):
        monkeypatch.setattr(notices, "_given", set())
        runs = []
        with caplog.at_level(logging.INFO, logger="lightning_lighthouse"):
            for _ in range(4):
                qkv = draw((8, 8), 4096, 128, torch.bfloat16, "cuda")
                out = causal_sdpa(*qkv, scale=None, backend="auto")
                runs.append((out, *torch.autograd.grad(out.float().square().sum(), qkv)))
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))
        assert [record.message for record in caplog.records] == [
            "sdpa='auto' runs 'flash' for torch.bfloat16 on cuda with 8 and 8 heads of 128, deterministic"
        ]
