"""Batches of nothing, and batches that `torch.func.vmap` makes: attention takes them, as the builtin does."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from lightning_lighthouse import LighthouseConfig, lighthouse_attention
from lightning_lighthouse.attention.windows import chunk_attention, window_attention

TOKENS = 1009


def lighthouse(selection):
    # several tiles under "causal"
    config = LighthouseConfig(num_levels=3, pooling_factor=2, top_k=64, selection=selection)
    assert config.pyramid(TOKENS).compresses
    return partial(lighthouse_attention, config=config)


KINDS = {rule: lighthouse(rule) for rule in ("published", "causal", "strided", "random")} | {
    "window": partial(window_attention, window=5),
    "window with sinks": partial(window_attention, window=70, sink_tokens=3),
    "chunk": partial(chunk_attention, window=7),
}


def draw(*batch):
    """q and k, which is v too, with grouped heads."""
    generator = torch.Generator().manual_seed(42)
    return (torch.randn(*batch, heads, TOKENS, 5, generator=generator) for heads in (4, 2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_nothing_has_an_output_of_nothing(kind):
    q, k = draw(0)
    q.requires_grad_()
    out = KINDS[kind](q, k, k)
    assert out.shape == q.shape
    out.sum().backward()
    assert q.grad.shape == q.shape


# torch has no rule for the builtin on the CPU, and says so
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", KINDS)
def test_under_vmap_each_is_what_it_is_alone(kind):
    q, k = draw(3, 1)

    def loss(q, k):
        return KINDS[kind](q, k, k).square().sum()

    found = torch.func.vmap(torch.func.grad_and_value(loss))(q, k)
    alone = zip(*(torch.func.grad_and_value(loss)(*pair) for pair in zip(q, k, strict=True)), strict=True)
    for actual, expected in zip(found, map(torch.stack, alone), strict=True):
        torch.testing.assert_close(actual, expected)
