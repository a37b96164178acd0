"""The promises of the kernels as operators: one graph, integers alone kept for the backward, registered, refusals."""

from __future__ import annotations

import pytest
import torch
from test_kernels import DEVICE, draw
from torch.utils.checkpoint import checkpoint

from lightning_lighthouse import LighthouseConfig, kernels, lighthouse_attention
from lightning_lighthouse.kernels import ops, rows


def test_results_may_be_changed_in_place_and_are_differentiable_once():
    config = LighthouseConfig(2, 2, 3)
    shape = config.pyramid(23)
    qkv = draw(1, 1, 1, 23, 5)
    selection = kernels.select(kernels.score(*qkv, shape, config), shape, config)
    qs, _ks, _vs = kernels.gather(*qkv, selection, shape)
    out = kernels.scatter(qs.mul_(3), selection, shape, config).mul_(2)
    (changed,) = torch.autograd.grad(out.sum(), qkv[0])
    qs, _ks, _vs = kernels.gather(*qkv, selection, shape)
    out = kernels.scatter(qs, selection, shape, config)
    (plain,) = torch.autograd.grad(out.sum(), qkv[0], create_graph=True)
    torch.testing.assert_close(changed, 6 * plain)
    with pytest.raises(RuntimeError, match=r"does not require grad|differentiate twice"):
        plain.sum().backward()


def test_backward_keeps_integers_only():
    config = LighthouseConfig(3, 2, 3)
    shape = config.pyramid(43)
    qkv = draw(1, 1, 2, 43, 5)
    selection = kernels.select(kernels.score(*qkv, shape, config), shape, config)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        qs, _ks, _vs = kernels.gather(*qkv, selection, shape)
        kernels.scatter(qs, selection, shape, config)
    assert [x.dtype for x in saved] == 4 * [torch.int32]
    assert all(x.numel() <= rows.num_slots(shape) for x in saved)


COMPILED = LighthouseConfig(3, 2, 4, backend="triton")


def layer(q, k, v):
    return lighthouse_attention(q, k, v, COMPILED)


def checkpointed(q, k, v):
    return checkpoint(layer, q, k, v, use_reentrant=False)


@pytest.mark.parametrize("call", [layer, checkpointed])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
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


def test_operators_are_registered_as_torch_demands():
    config = LighthouseConfig(3, 2, 3)
    shape = config.pyramid(37)
    qkv = draw(2, 1, 2, 37, 3)
    sizes = ops.pack(shape)
    with torch.no_grad():
        scores = kernels.score(*qkv, shape, config)
        slots = kernels.select(scores, shape, config).slots
        qs, ks, _vs = kernels.gather(*qkv, kernels.Selection(slots, slots), shape)
        dout = kernels.scatter(qs, kernels.Selection(slots, slots), shape, config)
    registered = torch.ops.lightning_lighthouse
    calls = [
        (registered.score, (qkv[0].detach(), qkv[1].detach(), sizes)),
        (registered.select, (scores, sizes, True)),
        (registered.gather, (qkv[0], slots, sizes)),
        (registered.gather_backward, (ks, slots, sizes, False)),
        (registered.scatter, (qs.clone().requires_grad_(), slots, sizes, True)),
        (registered.scatter_backward, (dout, slots, sizes, False)),
    ]
    for op, args in calls:
        torch.library.opcheck(op.default, args)


def test_a_device_without_triton_is_refused(monkeypatch):
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(ValueError, match="q is on mps; use backend='auto' or backend='reference'"):
        kernels.check_device(torch.device("mps"))
    with pytest.raises(ValueError, match="needs a CUDA device, q is on cpu"):
        kernels.check_device(torch.device("cpu"))
    monkeypatch.setattr(kernels, "_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"needs compute capability 8\.0, cuda:0 has 7\.5; use backend='reference'"):
        kernels.check_device(torch.device("cuda", 0))


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_sizes_survive_the_way_through_an_operator(levels):
    shape = LighthouseConfig(levels, 3, 7).pyramid(1013)
    assert ops.unpack(ops.pack(shape)) == shape
