"""The kernels under rotate="after", against the reference: what they gather, its gradients, documents, the operator."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from packed import CASES, packed_case, run
from selecting import small_tiles
from torch import library
from twins import DEVICE, LAYOUTS, draw, full_slots

from lightning_lighthouse import LighthouseConfig, lighthouse_attention
from lightning_lighthouse.attention import documents_lighthouse, kernels, reference
from lightning_lighthouse.attention.kernels import ops
from lightning_lighthouse.attention.rotation import Rotation

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::lightning_lighthouse.LighthouseWarning"),
]
GATHER = import_module("lightning_lighthouse.attention.kernels.gather")

# tokens, levels, pooling factor, head dim, channels that are rotated, pairing
SHAPES = {
    "prime, padded": (53, 3, 4, 8, 8, "half"),
    "odd factor, neighbours": (31, 3, 3, 6, 6, "interleaved"),
    "four levels": (43, 4, 2, 12, 12, "half"),
    "part of the channels": (37, 2, 4, 24, 16, "half"),
    "part, of odd halves": (29, 2, 4, 13, 6, "half"),
    "part, neighbours": (29, 3, 2, 10, 6, "interleaved"),
}


def rotation_of(channels, pairing):
    return Rotation((50.0 ** (-torch.arange(0, channels, 2) / channels)).to(DEVICE), pairing)


def gathered(stages, qkv, selection, shape, rotation):
    rows = stages.gather(*qkv, selection, shape, rotation)
    weights = [torch.randn(x.shape, generator=torch.Generator().manual_seed(3)).to(x) for x in rows]
    return *rows, *torch.autograd.grad(rows, qkv, weights)


@pytest.mark.parametrize("name", SHAPES)
def test_they_gather_as_the_reference(name):
    tokens, levels, p, dim, channels, pairing = SHAPES[name]
    config = LighthouseConfig(levels, p, 4, selection="published", rotate="after")
    shape = config.pyramid(tokens)
    layout = list(LAYOUTS.values())[tokens % len(LAYOUTS)]
    qkv = [layout(x) for x in draw(1, 1, 2, tokens, dim, integers=False)]
    with torch.no_grad():
        ours = kernels.select(kernels.score(*qkv, shape, config), shape, config)
    theirs = reference.Selection(ours.index, full_slots(ours.slots, shape))
    rotation = rotation_of(channels, pairing)
    found = gathered(kernels, qkv, ours, shape, rotation)
    expected = gathered(reference, qkv, theirs, shape, rotation)
    for label, x, y in zip(("qs", "ks", "vs", "dq", "dk", "dv"), found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=4e-6, msg=lambda text, label=label: f"{label}: {text}")
    # v is not rotated, to the bit
    assert torch.equal(found[2], kernels.gather(*qkv, ours, shape)[2])


def with_gradients(attend, qkv):
    leaves = [x.detach().clone().requires_grad_() for x in qkv]
    out = attend(leaves)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out, *torch.autograd.grad((out * weights).sum(), leaves)


@pytest.mark.parametrize(
    "selection", ["causal", *(pytest.param(name, marks=pytest.mark.slow) for name in ("strided", "random"))]
)
def test_a_layer_is_as_the_reference(selection):
    qkv = draw(1, 2, 1, 47, 8, integers=False)
    rotation = rotation_of(8, "half")
    with small_tiles(3):
        found, expected = (
            with_gradients(
                lambda leaves, backend=backend: lighthouse_attention(
                    *leaves,
                    LighthouseConfig(3, 2, 6, selection=selection, rotate="after", backend=backend),
                    rotation=rotation,
                ),
                qkv,
            )
            for backend in ("triton", "reference")
        )
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


# batch, query heads, key/value heads, tokens, levels, pooling factor, top_k, winners of a tile, mean length
@pytest.mark.parametrize(
    ("case", "pairing"),
    [
        ((1, 2, 1, 59, 2, 3, 6, 2, 17), "half"),
        pytest.param(CASES["four levels"], "interleaved", marks=pytest.mark.slow),
        pytest.param(CASES["grouped heads, two sequences"], "half", marks=pytest.mark.slow),
    ],
)
def test_documents_are_as_the_reference(case, pairing, monkeypatch):
    monkeypatch.setattr(documents_lighthouse, "_is_crowded", lambda *_: False)
    rotation = rotation_of(4, pairing)
    found = []
    for backend in ("triton", "reference"):
        more = {"rotate": "after", "backend": backend, "max_documents": 40}
        with packed_case(case, **more) as (qkv, config, documents):
            qkv = [x.float().to(DEVICE) for x in qkv]
            attend = lambda leaves: run(leaves, config, documents, rotation=rotation)  # noqa: E731
            found.append(with_gradients(attend, qkv))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)


def test_the_operator_is_as_torch_wants_it():
    config = LighthouseConfig(2, 2, 3, selection="strided")
    shape = config.pyramid(23)
    q, k, v = draw(1, 1, 1, 23, 4)
    slots = kernels.select(kernels.score(q, k, v, shape, config), shape, config).slots
    rotation = rotation_of(4, "half")
    arguments = (slots, ops.pack(shape), rotation.steps(2, 1, q), rotation.distance)
    library.opcheck(GATHER.gather_fwd.op, (q, *arguments), test_utils=("test_schema", "test_faketensor"))
    # the dispatched operator and the direct way have one backward
    ways = [
        torch.autograd.grad(getattr(GATHER.gather_fwd, way)(q, *arguments).square().sum(), q)[0]
        for way in ("direct", "op")
    ]
    assert torch.equal(*ways)
