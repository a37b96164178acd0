"""The promises of the kernels as operators: one graph, integers alone kept for the backward, registered, refusals."""

from __future__ import annotations

import weakref
from importlib import import_module

import pytest
import torch
from torch import library
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from twins import DEVICE, draw, through

from lightning_lighthouse import LighthouseConfig, lighthouse_attention
from lightning_lighthouse.attention import kernels
from lightning_lighthouse.attention.kernels import ops, rows
from lightning_lighthouse.attention.operators import OPERATORS
from lightning_lighthouse.attention.rotation import Rotation

# the package shows the functions of these names
SCORE_MODULE, GATHER_MODULE, SCATTER_MODULE = (
    import_module(f"lightning_lighthouse.attention.kernels.{name}") for name in ("score", "gather", "scatter")
)


def test_results_may_be_changed_in_place():
    config = LighthouseConfig(2, 2, 3, selection="published")
    shape = config.pyramid(23)
    qkv = draw(1, 1, 1, 23, 5)
    selection = kernels.select(kernels.score(*qkv, shape, config), shape, config)
    qs, _ks, _vs = kernels.gather(*qkv, selection, shape)
    out = kernels.scatter(qs.mul_(3), selection, shape, config).mul_(2)
    (changed,) = torch.autograd.grad(out.sum(), qkv[0])
    qs, _ks, _vs = kernels.gather(*qkv, selection, shape)
    out = kernels.scatter(qs, selection, shape, config)
    (plain,) = torch.autograd.grad(out.sum(), qkv[0])
    torch.testing.assert_close(changed, 6 * plain)


@pytest.mark.parametrize("way", ["direct", "op"])
def test_a_second_derivative_is_an_error_and_not_nothing(way):
    config = LighthouseConfig(2, 2, 3, selection="published")
    shape = config.pyramid(23)
    q, k, v = draw(1, 1, 1, 23, 5)
    slots = kernels.select(kernels.score(q, k, v, shape, config), shape, config).slots
    sizes = ops.pack(shape)
    o = kernels.gather(q, k, v, kernels.Selection(slots, slots), shape)[0].detach().requires_grad_()
    for x, y in (
        (q, getattr(GATHER_MODULE.gather_fwd, way)(q, slots, sizes, None, 0)),
        (o, getattr(SCATTER_MODULE.scatter_fwd, way)(o, slots, sizes, False)),
        (o, kernels.scatter(o, kernels.Selection(slots, slots), shape, config, front=1)),
    ):
        # of a square: the incoming gradient depends on x
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"differentiate twice|no autograd formula was registered"):
            # where dx counted as a constant, x alone would get a gradient
            (dx + x).sum().backward()


def test_backward_keeps_integers_only():
    config = LighthouseConfig(3, 2, 3, selection="published")
    shape = config.pyramid(43)
    qkv = draw(1, 1, 2, 43, 5)
    selection = kernels.select(kernels.score(*qkv, shape, config), shape, config)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        qs, _ks, _vs = kernels.gather(*qkv, selection, shape)
        kernels.scatter(qs, selection, shape, config)
    assert [x.dtype for x in saved] == 4 * [torch.int32]
    assert all(x.numel() <= rows.num_slots(shape) for x in saved)


def test_inputs_die_while_results_live():
    config = LighthouseConfig(3, 2, 3, selection="published")
    shape = config.pyramid(43)
    leaves = draw(1, 1, 2, 43, 5)
    # no leaves: the graph holds those itself
    q, k, v = (x.clone() for x in leaves)
    selection = kernels.select(kernels.score(q, k, v, shape, config), shape, config)
    qs, ks, vs = kernels.gather(q, k, v, selection, shape)
    o = qs + ks + vs
    out = kernels.scatter(o, selection, shape, config)
    inputs = {name: weakref.ref(x) for name, x in {"q": q, "k": k, "v": v, "o": o}.items()}
    del q, k, v, o
    assert [name for name, alive in inputs.items() if alive() is not None] == []
    assert all(x.abs().sum() > 0 for x in torch.autograd.grad(out.square().sum(), leaves))


COMPILED = LighthouseConfig(3, 2, 4, backend="triton", selection="published")


def layer(q, k, v):
    return lighthouse_attention(q, k, v, COMPILED)


def checkpointed(q, k, v):
    return checkpoint(layer, q, k, v, use_reentrant=False)


@pytest.mark.parametrize("call", [layer, pytest.param(checkpointed, marks=pytest.mark.slow)])
@pytest.mark.parametrize("autocast", [pytest.param(False, marks=pytest.mark.slow), True], ids=["fp32", "autocast"])
def test_compiled_in_one_graph_equals_eager(call, autocast):
    qkv = draw(1, 1, 2, 83, 5)
    dout = torch.randn(1, 2, 83, 5, device=DEVICE)
    results = []
    torch.compiler.reset()
    for run in (layer, torch.compile(call, backend="aot_eager", fullgraph=True)):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
            out = run(*qkv)
        results.append((out, *torch.autograd.grad(out, qkv, dout.to(out.dtype))))
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("backend", "dynamic", "graphs"),
    [
        ("triton", None, 2),
        ("triton", True, 1),
        ("reference", None, 2),
        ("reference", True, 1),
    ],
)
@pytest.mark.slow
def test_compiled_for_several_lengths_equals_eager(backend, dynamic, graphs):
    config = LighthouseConfig(2, 2, 4, backend=backend, selection="published")
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True, dynamic=dynamic)
    def compiled(q, k, v):
        return lighthouse_attention(q, k, v, config)

    for tokens in (83, 97, 101):
        qkv = draw(1, 1, 2, tokens, 3)
        results = []
        for out in (compiled(*qkv), lighthouse_attention(*qkv, config)):
            results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), tokens
    assert counter.frame_count == graphs


@pytest.mark.slow
def test_operators_are_registered_as_torch_demands():
    config = LighthouseConfig(3, 2, 3, selection="published")
    shape = config.pyramid(37)
    qkv = draw(2, 1, 2, 37, 3)
    sizes = ops.pack(shape)
    with torch.no_grad():
        scores = kernels.score(*qkv, shape, config)
        slots = kernels.select(scores, shape, config).slots
        qs, ks, _vs = kernels.gather(*qkv, kernels.Selection(slots, slots), shape)
        dout = kernels.scatter(qs, kernels.Selection(slots, slots), shape, config)
    # of two of the three channels
    rotation = Rotation(torch.tensor([0.3]))
    turns = rotation.steps(2, 2, qkv[0])
    calls = [
        (OPERATORS.score, (qkv[0].detach(), qkv[1].detach(), sizes, False)),
        (OPERATORS.select, (scores, sizes, "published", True, 0, None, 0)),
        (OPERATORS.select, (scores, sizes, "random", True, 3, torch.tensor(5), 2)),
        (OPERATORS.select_causal, (scores, sizes)),
        (OPERATORS.gather, (qkv[0], slots, sizes, None, 0)),
        (OPERATORS.gather, (qkv[0], slots, sizes, turns, rotation.distance)),
        (OPERATORS.gather_backward, (ks, slots, sizes, False, None, 0)),
        (OPERATORS.gather_backward, (ks, slots, sizes, False, turns, rotation.distance)),
        (OPERATORS.scatter, (qs.clone().requires_grad_(), slots, sizes, True)),
        (OPERATORS.scatter_backward, (dout, slots, sizes, False)),
        (OPERATORS.scatter_behind, (qs.clone().requires_grad_(), slots, sizes, True, 2)),
    ]
    for op, args in calls:
        library.opcheck(op.default, args)


def test_a_device_without_triton_is_refused(monkeypatch):
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(ValueError, match="q is on mps; use backend='auto' or backend='reference'"):
        kernels.check_device(torch.device("mps"))
    with pytest.raises(ValueError, match="needs a CUDA device, q is on cpu"):
        kernels.check_device(torch.device("cpu"))
    monkeypatch.setattr(kernels, "_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"needs compute capability 8\.0, cuda:0 has 7\.5; use backend='reference'"):
        kernels.check_device(torch.device("cuda", 0))


FAR = 2**31 - 1


@pytest.mark.parametrize(
    ("dim", "stride_dim", "copied"),
    [(2, FAR, False), (2, FAR + 1, True), (5, 2**29 - 1, False), (5, 2**29, True), (1, 2**40, False), (7, 1, False)],
)
def test_only_channels_beyond_int32_are_copied(dim, stride_dim, copied):
    # on meta nothing is allocated
    x = torch.empty_strided((2, 3, 11, dim), (2**43, 11, 1, stride_dim), device="meta")
    reached = ops.within_reach(x)
    assert (reached is not x) == copied
    assert reached.shape == x.shape
    assert (dim - 1) * reached.stride(-1) <= FAR


def test_every_launch_reads_what_is_within_reach(monkeypatch):
    config = LighthouseConfig(3, 2, 3, selection="published")
    shape = config.pyramid(43)
    qkv = draw(1, 1, 2, 43, 5)
    selection = kernels.select(kernels.score(*qkv, shape, config), shape, config)
    # zeros in place of the inputs show in everything that is computed from them
    for module in (SCORE_MODULE, rows):
        monkeypatch.setattr(module, "within_reach", torch.zeros_like)
    assert not kernels.score(*qkv, shape, config).any()
    for name, value in through(kernels, qkv, selection, shape, config).items():
        assert not value.any(), name


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_sizes_survive_the_way_through_an_operator(levels):
    shape = LighthouseConfig(levels, 3, 7, selection="published").pyramid(1013)
    assert ops.unpack(ops.pack(shape)) == shape
