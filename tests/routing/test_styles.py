"""The ways in which a model may call SDPA, or keep it: each is found, routed and put back."""

from __future__ import annotations

import sys
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from foreign import GPT, SelfAttention
from patching import CONFIG, run, same, tokens

import lightning_lighthouse
from lightning_lighthouse import causal_attention, patch_attention
from lightning_lighthouse.attention.sdpa import stock_sdpa
from lightning_lighthouse.routing import calls


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    yield
    assert F.scaled_dot_product_attention is stock_sdpa
    torch._dynamo.reset()


def free_attention(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class Indirect(SelfAttention):
    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(free_attention(q, k, v).transpose(1, 2).flatten(2))


class Positional(SelfAttention):
    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, None, 0.0, True).transpose(1, 2).flatten(2))


def bare_import():
    """A module of a user's, with `from torch.nn.functional import scaled_dot_product_attention as attend`."""
    source = """
from foreign import SelfAttention
from torch.nn.functional import scaled_dot_product_attention as attend
class Bare(SelfAttention):
    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
"""
    module = types.ModuleType("users_bare_module")
    sys.modules[module.__name__] = module
    exec(source, module.__dict__)
    return module.Bare


class Kept(SelfAttention):
    """Keeps the function on the instance."""

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(self.attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class OptIn(SelfAttention):
    """Calls our function by itself."""

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(causal_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class OptInByAttribute(SelfAttention):
    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        y = lightning_lighthouse.causal_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


STYLES = {
    "indirect": Indirect,
    "positional": Positional,
    "kept": Kept,
    "kept partial": Kept,
    "opt-in": OptIn,
    "opt-in by attribute": OptInByAttribute,
}


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize("style", [*STYLES, "bare"])
def test_styles_of_calling_sdpa(style, compiled):
    kind = STYLES.get(style) or bare_import()
    torch.manual_seed(0)
    model = GPT()
    dense = run(model, tokens())
    with patch_attention(model, CONFIG, dense_layers=[]):
        expected = run(model, tokens())
    for block in model.blocks:
        block.attn.__class__ = kind
        if kind is Kept:
            block.attn.attend = partial(stock_sdpa, dropout_p=0.0) if "partial" in style else stock_sdpa
    kept = [vars(block.attn).get("attend") for block in model.blocks]
    if compiled:
        model.compile(backend="eager", fullgraph=True)
    with patch_attention(model, CONFIG, dense_layers=[]):
        assert same(run(model, tokens()), expected, exact=not compiled)
    assert [vars(block.attn).get("attend") for block in model.blocks] == kept
    assert same(run(model, tokens()), dense, exact=not compiled)
    swapped = [name for name, value in vars(sys.modules[kind.__module__]).items() if value is calls.causal_attention]
    assert swapped in ([], ["causal_attention"])
