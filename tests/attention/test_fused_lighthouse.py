"""The layer as one operator: the bits of its stages one by one, and no more memory."""

from __future__ import annotations

import weakref
from dataclasses import replace

import pytest
import torch
from tiers import with_few_quick
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode
from twins import LAYOUTS, draw

from lightning_lighthouse import LighthouseConfig, lighthouse_attention
from lightning_lighthouse.attention import fused_lighthouse, kernels, lighthouse, reference, sdpa
from lightning_lighthouse.attention.kernels import ops, rows
from lightning_lighthouse.attention.operators import NAMESPACE, OPERATORS
from lightning_lighthouse.attention.rotation import Rotation
from lightning_lighthouse.attention.sdpa_kernels import Kernel

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/attention/test_fused_lighthouse_gpu.py")

BASE = LighthouseConfig(3, 2, 2, backend="triton")
# batch, key/value heads, query heads a key/value head, tokens, head dim
GROUPED = (1, 1, 2, 23, 5)
# the settings, the sizes, and what else the call gets
CASES = {
    "causal": (BASE, (2, 1, 1, 29, 5), {}),
    "published, grouped, scaled": (replace(BASE, selection="published"), GROUPED, {"scale": 0.7}),
    "strided, mean": (replace(BASE, selection="strided", combine="mean"), GROUPED, {}),
    "random": (replace(BASE, selection="random", seed=5), GROUPED, {"step": torch.tensor(7), "first_head": 3}),
    "dilated": (replace(BASE, scorer="dilated", selection="published"), GROUPED, {"scale": 0.7}),
    "rotated": (replace(BASE, rotate="after"), GROUPED, {"rotation": Rotation(torch.tensor([0.3, 0.1]))}),
}


def one_by_one(monkeypatch):
    monkeypatch.setattr(lighthouse, "_fused_kernel", lambda *_: None)


def run(qkv, config, leaves=(0, 1, 2), **more):
    """The output, and the gradients of the tensors with these numbers; of values that no order of summation spares."""
    qkv = [x.detach().requires_grad_(number in leaves) for number, x in enumerate(qkv)]
    out = lighthouse_attention(*qkv, config, **more)
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
    return out, *torch.autograd.grad(out, [qkv[number] for number in leaves], dout)


def assert_same(found, expected):
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
        assert x.stride() == y.stride()


@pytest.mark.parametrize("case", with_few_quick(CASES, ["causal", "random", "rotated"]))
def test_the_bits_are_those_of_the_stages(case, monkeypatch, poison):
    config, sizes, more = case
    qkv = draw(*sizes, integers=False)
    found = run(qkv, config, **more)
    assert found[0].grad_fn.name() == "DirectBackward"
    one_by_one(monkeypatch)
    expected = run(qkv, config, **more)
    assert all(x.abs().sum() > 0 for x in expected)
    assert_same(found, expected)


@pytest.mark.parametrize("arrange", [LAYOUTS["[B, H, N, D]"], lambda x: x.bfloat16()], ids=["[B, H, N, D]", "bf16"])
def test_in_any_memory_order_and_in_16_bits(arrange, monkeypatch):
    qkv = [arrange(x.detach()) for x in draw(*GROUPED, integers=False)]
    found = run(qkv, BASE)
    one_by_one(monkeypatch)
    assert_same(found, run(qkv, BASE))


@pytest.mark.parametrize("leaves", [(0,), (1, 2)], ids=["q", "k and v"])
def test_gradients_that_nobody_wants_are_not_made(leaves, monkeypatch):
    qkv = draw(*GROUPED, integers=False)
    made = []
    stock = fused_lighthouse.gather_bwd
    monkeypatch.setattr(fused_lighthouse, "gather_bwd", lambda *x: made.append(None) or stock(*x))
    found = run(qkv, BASE, leaves)
    assert len(made) == len(leaves)
    one_by_one(monkeypatch)
    assert_same(found, run(qkv, BASE, leaves))


def test_what_is_saved_is_the_short_sequence():
    q, k, v = draw(*GROUPED)
    shape = BASE.pyramid(q.shape[2])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        lighthouse_attention(q, k, v, BASE)
    batch, heads, _, dim = q.shape
    groups, short = k.shape[1], shape.num_gathered
    assert [x.shape for x in saved] == [
        (batch, heads, short, dim),
        (batch, groups, short, dim),
        (batch, groups, short, dim),
        (batch, heads, short, dim),
        (batch, heads, short),
        (batch, groups, rows.num_slots(shape)),
    ]


@pytest.mark.parametrize("keeps", [False, True], ids=["freed", "graph kept"])
def test_backward_frees_what_it_has_read(keeps, monkeypatch):
    """Before each long gradient: what attention saved, and how many of its three gradients are alive."""
    read, gradients, alive = {}, [], []
    forward, backward = fused_lighthouse.KERNELS["cpu"]

    def attend_backward(do, qs, ks, vs, o, lse, scale):
        read.update({name: weakref.ref(x) for name, x in {"do": do, "qs": qs, "ks": ks, "o": o, "lse": lse}.items()})
        made = backward(do, qs, ks, vs, o, lse, scale)
        gradients[:] = [weakref.ref(x) for x in made]
        return made

    def gather_backward(*arguments):
        unread = sorted(name for name, one in read.items() if one() is not None)
        alive.append((unread, sum(one() is not None for one in gradients)))
        return stock(*arguments)

    stock = fused_lighthouse.gather_bwd
    monkeypatch.setitem(fused_lighthouse.KERNELS, "cpu", Kernel(forward, attend_backward))
    monkeypatch.setattr(fused_lighthouse, "gather_bwd", gather_backward)
    qkv = draw(*GROUPED, integers=False)
    out = lighthouse_attention(*qkv, BASE)
    dout = torch.ones_like(out)
    first = torch.autograd.grad(out, qkv, dout, retain_graph=keeps)
    unread = ["ks", "lse", "o", "qs"] if keeps else []
    assert alive == [(unread, 3), (unread, 2), (unread, 1)]
    if keeps:
        assert_same(torch.autograd.grad(out, qkv, dout), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out, qkv, dout)


def test_a_second_derivative_is_an_error():
    q, k, v = draw(*GROUPED)
    (dq,) = torch.autograd.grad(lighthouse_attention(q, k, v, BASE).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        (dq + q).sum().backward()


def test_where_the_stages_run_one_by_one(monkeypatch):
    q, k, v = draw(*GROUPED)
    fused = lambda stages=kernels: lighthouse._fused_kernel(stages, q, k, v, BASE)  # noqa: E731
    assert fused() == "cpu"
    assert fused(reference) is None
    with torch.no_grad():
        assert fused() is None
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert fused() is None
    assert lighthouse._fused_kernel(kernels, q.detach(), k.detach(), v.detach(), BASE) is None


class OnCUDA:
    """What `kernel_of` reads of a tensor."""

    def __init__(self, batch, dim):
        self.shape = (batch, 4, 64, dim)
        self.is_cpu, self.is_cuda = False, True


@pytest.mark.parametrize(
    ("chosen", "repeats", "batch", "dim", "expected"),
    [
        ("cudnn", False, 2, 64, "cudnn"),
        ("flash", False, 2, 64, "flash"),
        ("efficient", False, 2, 5, "efficient"),
        ("flash", False, 2, 5, None),
        ("efficient", True, 2, 64, None),
        ("math", False, 2, 64, None),
        ("cudnn", False, 65_536, 64, None),
    ],
    ids=["cudnn", "flash", "efficient", "padded for flash", "repeated keys", "math", "more than one launch"],
)
def test_which_kernel_attends_on_cuda(chosen, repeats, batch, dim, expected, monkeypatch):
    monkeypatch.setattr(sdpa, "backend_of", lambda q, k, backend: (chosen, repeats))
    assert sdpa.kernel_of(OnCUDA(batch, dim), OnCUDA(batch, dim), "auto") == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["random", "rotated"])
def test_the_operators_are_as_torch_wants_them(name):
    config, _, more = CASES[name]
    q, k, v = draw(1, 1, 2, 23, 5)
    shape = config.pyramid(q.shape[2])
    scores = None if config.reads_scores else kernels.score(q, k, v, shape, config)
    rotation = more.get("rotation")
    turns = rotation and rotation.steps(shape.pooling_factor, shape.num_levels - 1, q)
    arguments = (
        q, k, v, scores, more.get("step"), turns, ops.pack(shape), config.selection, config.cover_prefix, config.seed,
        more.get("first_head", 0), rotation.distance if rotation else 0, config.combine == "mean", more.get("scale"),
        "cpu",
    )  # fmt: skip
    library.opcheck(fused_lighthouse.lighthouse_fwd.op, arguments)
    out, *kept = fused_lighthouse.lighthouse_fwd.op(*(x.detach() if isinstance(x, Tensor) else x for x in arguments))
    sizes, distance, mean, scale, kernel = arguments[6], *arguments[-4:]
    more = (turns, sizes, [False, True, False], [True, True, False], distance, mean, scale, kernel)
    library.opcheck(fused_lighthouse.lighthouse_bwd.op, (torch.ones_like(out), *kept, *more))


def test_watched_the_layer_is_one_operator_each_way():
    called = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            called.append(op)
            return op(*args, **(kwargs or {}))

    qkv = draw(*GROUPED)
    with Watch():
        lighthouse_attention(*qkv, BASE).sum().backward()
    own = [op for op in called if op.namespace == NAMESPACE]
    assert own == [OPERATORS.lighthouse.default, OPERATORS.lighthouse_backward.default]
