"""Entering a context and leaving it: SDPA replaced, counted with patches, and never over somebody else's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from foreign import GPT, GroupedAttention

from lightning_lighthouse import patch_attention
from lightning_lighthouse.attention.sdpa import stock_sdpa
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.context.group import Context, current, whole_sequences
from lightning_lighthouse.context.heard import heard, running
from lightning_lighthouse.routing.calls import causal_attention
from lightning_lighthouse.routing.context_parallel import shared_sequences

CONTEXT = Context(1, 2, "no group")


def test_sdpa_is_replaced_until_the_last_user_goes():
    model = GPT()
    with shared_sequences(CONTEXT, ()):
        assert not torch.backends.mha.get_fastpath_enabled()
        assert F.scaled_dot_product_attention is causal_attention
        patch = patch_attention(model)
        with whole_sequences(), torch.no_grad():
            model(torch.zeros(1, 8, dtype=torch.int64))
        assert current() is CONTEXT
    assert F.scaled_dot_product_attention is causal_attention
    patch.restore()
    assert F.scaled_dot_product_attention is stock_sdpa
    with patch_attention(model):
        with shared_sequences(CONTEXT, ()):
            pass
        assert F.scaled_dot_product_attention is causal_attention
        assert current() is None
        with torch.no_grad():
            model.train()(torch.zeros(1, 8, dtype=torch.int64))
    assert F.scaled_dot_product_attention is stock_sdpa


def test_copies_that_layers_keep_are_replaced_and_given_back():
    layer = GroupedAttention(24, 6, 2)
    layer.kept = stock_sdpa
    with shared_sequences(CONTEXT, [layer]):
        assert layer.kept is causal_attention
    assert layer.kept is stock_sdpa


def test_nobodys_replacement_of_sdpa_is_covered_up(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *args: None)
    with pytest.raises(
        SettingError, match=r"was replaced by .*test_context_parallel.* as torch's own context_parallel"
    ):
        shared_sequences(CONTEXT, ()).__enter__()
    assert current() is None


def test_a_context_ends_with_an_error():
    query, mask = torch.zeros(1, 2, 4, 4), torch.ones(4, 4, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="attn_mask was given"), shared_sequences(CONTEXT, ()):
        F.scaled_dot_product_attention(query, query, query, mask)
    assert current() is None
    assert torch.backends.mha.get_fastpath_enabled()
    assert F.scaled_dot_product_attention is stock_sdpa


def test_the_layer_is_named_while_somebody_listens():
    model = GPT()
    layers = {f"blocks.{number}.attn": block.attn for number, block in enumerate(model.blocks)}
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    with torch.no_grad(), shared_sequences(Context(1, 4, "no group", 7), layers.values()):
        with heard(layers, 2, 3) as listener, pytest.raises(RuntimeError, match=r"blocks\.0\.attn sees 8 tokens, this"):
            model(tokens)
        with whole_sequences(), heard(layers, 2, 3) as listener:
            model(tokens)
    assert set(listener.calls) == listener.ran == set(layers)
    assert listener.calls["blocks.1.attn"][0][0].shape == (1, 2, 3, 8)
    assert running() == ""


def test_tensors_of_several_dtypes_are_refused_before_anything_is_sent():
    q = torch.zeros(1, 2, 4, 8, dtype=torch.bfloat16)
    with shared_sequences(CONTEXT, ()), pytest.raises(ValueError, match="one floating dtype"):
        F.scaled_dot_product_attention(q, q, q.float(), is_causal=True)
