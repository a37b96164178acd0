"""The last queries of a sequence attend as they do among all of them; which kernel does it."""

from __future__ import annotations

import pytest
import torch

from lightning_lighthouse.attention import lower_right
from lightning_lighthouse.attention.lower_right import lower_right_sdpa

TOKENS = 37


def draw(dtype=torch.float64, device="cpu", dim=5, tokens=TOKENS):
    generator = torch.Generator(device).manual_seed(42)
    return [
        torch.randn(2, heads, tokens, dim, device=device, generator=generator).to(dtype).requires_grad_()
        for heads in (6, 2, 2)
    ]


def whole(q, k, v, scale=0.3):
    """Causal attention of all queries, written out."""
    logits = q @ k.repeat_interleave(3, 1).mT * scale
    masked = logits.masked_fill(torch.ones_like(logits[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    return masked.softmax(-1) @ v.repeat_interleave(3, 1)


@pytest.mark.parametrize("first", [0, 1, 19, 36])
def test_the_last_queries_see_what_they_see_among_all(first):
    q, k, v = draw()
    out = lower_right_sdpa(q[:, :, first:], k, v, scale=0.3, backend="auto")
    expected = whole(q, k, v)[:, :, first:]
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    for one, other in zip(*(torch.autograd.grad(x, (q, k, v), weight) for x in (out, expected)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("backend", "able", "chosen"),
    [
        ("auto", {"flash", "efficient"}, "flash"),
        ("auto", {"efficient"}, "efficient"),
        ("auto", set(), "math"),
        ("math", {"flash"}, "math"),
        ("efficient", {"flash", "efficient"}, "efficient"),
        ("flash", {"efficient"}, None),
        ("cudnn", {"flash", "cudnn"}, None),
    ],
)
def test_the_kernel_is_one_that_knows_the_mask(backend, able, chosen, monkeypatch):
    def ask(names, device, dtype, heads, kv_heads, *rest):
        # as torch: grouped heads are flash's alone
        return next((name for name in names if name in able and (name == "flash" or heads == kv_heads)), None)

    monkeypatch.setattr(lower_right, "ask_torch", ask)
    lower_right._choose_once.cache_clear()
    call = backend, torch.device("cuda"), torch.float16, 6, 2, 64
    if chosen is None:
        with pytest.raises(
            ValueError, match=f"sdpa='{backend}' cannot run attention in .* fewer queries than keys; use"
        ):
            lower_right._choose(*call)
    else:
        assert lower_right._choose(*call) == chosen
    lower_right._choose_once.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("backend", "dtype", "dim", "error"),
    [
        ("auto", torch.bfloat16, 64, 2e-2),
        ("auto", torch.bfloat16, 36, 2e-2),
        ("flash", torch.float16, 64, 4e-3),
        ("flash", torch.float16, 36, 4e-3),
        # in eights of channels only
        ("efficient", torch.bfloat16, 64, 2e-2),
        ("auto", torch.float32, 64, 5e-5),
        ("auto", torch.float32, 36, 5e-5),
        ("auto", torch.float64, 64, 1e-12),
    ],
)
def test_every_kernel_on_a_gpu_is_that_of_float64(backend, dtype, dim, error, is_compiled):
    torch.compiler.reset()
    q, k, v = draw(dtype, "cuda", dim, 517)
    call = lambda q, k, v: lower_right_sdpa(q[:, :, 300:], k, v, scale=0.1, backend=backend)  # noqa: E731
    out = (torch.compile(call, backend="aot_eager", fullgraph=True) if is_compiled else call)(q, k, v)
    weight = torch.randn_like(out)
    found = (out, *torch.autograd.grad(out, (q, k, v), weight))
    double = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = whole(*double, scale=0.1)[:, :, 300:]
    exact = (exact, *torch.autograd.grad(exact, double, weight.double()))
    for one, other in zip(found, exact, strict=True):
        assert (one - other).abs().max() <= error * other.abs().max()
