"""Triton kernels beside their twins in the reference: inputs, layouts and comparisons."""

from __future__ import annotations

from importlib import import_module

import torch

from lightning_lighthouse.attention import kernels, reference

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TILES_MODULE = import_module("lightning_lighthouse.attention.kernels.tiles")


def draw(batch, groups, ratio, tokens, dim, dtype=torch.float32, seed=42, integers=True):
    """q, k and v as a model hands them over: `[B, N, H, D]` seen as `[B, H, N, D]`.

    Small integers have exact squares and sums, so that no order of summation moves a score.
    """
    generator = torch.Generator().manual_seed(seed)

    def one(heads):
        size = (batch, tokens, heads, dim)
        values = torch.randint(-3, 4, size, generator=generator) if integers else torch.randn(size, generator=generator)
        return values.to(dtype).to(DEVICE).transpose(1, 2).requires_grad_()

    return one(groups * ratio), one(groups), one(groups)


def flat_scores(levels):
    """The reference's scores in the layout of the kernels: levels 1, 2, ... behind one another."""
    return torch.stack([torch.cat(scores[1:], -1) for scores in zip(*levels, strict=True)])


def level_scores(scores, shape):
    """The inverse of `flat_scores`; nobody reads the scores of the tokens."""
    tokens = torch.zeros(*scores.shape[1:3], shape.entries(0), device=scores.device)
    sizes = [shape.entries(level) for level in range(1, shape.num_levels)]
    return [(tokens, tokens), *zip(scores[0].split(sizes, -1), scores[1].split(sizes, -1), strict=True)]


def full_slots(slots, shape):
    """The kernels' slot map with one number for every token, as the reference has it."""
    windows, above = slots[..., : shape.entries(1)], slots[..., shape.entries(1) :]
    first = windows.repeat_interleave(shape.pooling_factor, -1)
    child = torch.arange(shape.entries(0), device=slots.device) % shape.pooling_factor
    return torch.cat((torch.where(first >= 0, first + child, -1).int(), above), -1)


def through(stages, qkv, selection, shape, config, seed=7):
    """What a backend's gather and scatter return, and their gradients, on fixed values and a fixed selection."""
    generator = torch.Generator().manual_seed(seed)

    def values(like):
        return torch.randn(like.shape, generator=generator).to(like)

    gathered = stages.gather(*qkv, selection, shape)
    gradients = torch.autograd.grad(gathered, qkv, [values(x) for x in gathered])
    o = values(gathered[0]).requires_grad_()
    out = stages.scatter(o, selection, shape, config)
    (d_o,) = torch.autograd.grad(out, o, values(out))
    names = ("qs", "ks", "vs", "dq", "dk", "dv", "out", "do")
    return dict(zip(names, (*gathered, *gradients, out, d_o), strict=True))


def assert_twins(batch, groups, ratio, tokens, dim, config):
    qkv = draw(batch, groups, ratio, tokens, dim)
    shape = config.pyramid(tokens)
    with torch.no_grad():
        scores = kernels.score(*qkv, shape, config)
        expected_scores = reference.score(*qkv, shape, config)
        if config.reads_scores:
            torch.testing.assert_close(scores, flat_scores(expected_scores))
        ours, expected = kernels.select(scores, shape, config), reference.select(expected_scores, shape, config)
    assert torch.equal(ours.index, expected.index)
    assert torch.equal(full_slots(ours.slots, shape), expected.slots)

    actual = through(kernels, qkv, ours, shape, config)
    for name, value in through(reference, qkv, expected, shape, config).items():
        # another order of summation
        atol = 2e-6 * max(1.0, float(value.detach().abs().max()))
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


def assert_same_selection(scores, shape, config, step=None):
    ours = kernels.select(scores, shape, config, step)
    expected = reference.select(level_scores(scores, shape), shape, config, step)
    assert torch.equal(ours.index, expected.index)
    assert torch.equal(full_slots(ours.slots, shape), expected.slots)


def random_scores(batch, groups, shape, tied, seed):
    generator = torch.Generator().manual_seed(seed)
    size = (2, batch, groups, shape.num_entries - shape.entries(0))
    if tied:
        return torch.tensor(TIED)[torch.randint(len(TIED), size, generator=generator)].to(DEVICE)
    return torch.randn(size, generator=generator).to(DEVICE)


LAYOUTS = {
    "[B, H, N, D]": lambda x: x.contiguous(),
    "slice of a fused projection": lambda x: torch.cat((x, x, x), -1)[..., x.shape[-1] : 2 * x.shape[-1]],
    "every second value": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "[B, D, H, N]": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
}


# few distinct values, so that most places are decided by ties
TIED = [0.0, 1.0, 2.0, float("inf"), float("nan"), float("-inf"), -1.0]


def draw_cuda(batch, heads, kv_heads, tokens, dim, dtype=torch.bfloat16, seed=42):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [
        torch.randn(batch, tokens, count, dim, device="cuda", dtype=dtype, generator=generator)
        .transpose(1, 2)
        .requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]
