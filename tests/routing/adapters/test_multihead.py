"""nn.MultiheadAttention: routed by its adapter alike in eager and compiled code, or dense in both with the reason."""

from __future__ import annotations

import pytest
import torch
from families import CONFIG, MultiheadByHand
from torch import nn

from lightning_lighthouse import Documents, patch_attention

TOKENS, WIDTH, HEADS = 67, 12, 3
MASK = nn.Transformer.generate_square_subsequent_mask(TOKENS)

modes = pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


class Layer(nn.Module):
    """An attention module called as a test wants it; the compiler sees it from outside, as in a model."""

    def __init__(self, kind=nn.MultiheadAttention, call=None, **arguments):
        super().__init__()
        torch.manual_seed(0)
        self.attn = kind(WIDTH, HEADS, **{"batch_first": True} | arguments)
        self.call = {"attn_mask": MASK, "is_causal": True, "need_weights": False} | (call or {})

    def forward(self, query, key=None):
        key = query if key is None else key
        return self.attn(query, key, key, **self.call)


def sequence(batch=2, seed=0):
    return torch.randn(batch, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def audited(layer, *inputs, compiled=False):
    """Output of the patched layer and what the audit names."""
    run = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    with patch_attention(layer, CONFIG, dense_layers=[]) as patch:
        torch.manual_seed(1)
        out = run(*inputs)
        return out, patch.unrouted()


@modes
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "tokens first"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_values_and_gradients_equal_lighthouse_written_by_hand(compiled, batch_first, bias):
    layer = Layer(batch_first=batch_first, bias=bias)
    by_hand = Layer(MultiheadByHand, batch_first=batch_first, bias=bias)
    x = sequence() if batch_first else sequence().transpose(0, 1)
    (out, weights), missing = audited(layer, x, compiled=compiled)
    expected, _ = by_hand(x)
    assert (weights, missing) == (None, {})
    torch.testing.assert_close(out, expected)
    for o in (out, expected):
        o.square().sum().backward()
    for parameter, by_hands in zip(layer.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, by_hands.grad, rtol=1e-4, atol=1e-4)


@modes
def test_off_and_restored_are_stock(compiled):
    layer = Layer()
    x = sequence()
    stock = layer(x)[0]
    run = torch.compile(layer, backend="eager", fullgraph=True) if compiled else layer
    patch = patch_attention(layer, CONFIG, dense_layers=[])
    assert torch.equal(run(x)[0], stock)
    patch.on()
    assert not torch.allclose(run(x)[0], stock, atol=1e-3)
    patch.off()
    assert torch.equal(run(x)[0], stock)
    patch.restore()
    assert torch.equal(run(x)[0], stock)
    assert "forward" not in vars(layer.attn)


@modes
@pytest.mark.parametrize(
    ("arguments", "call", "inputs", "reason"),
    [
        ({}, {"need_weights": True}, 1, "need_weights is True"),
        ({}, {"is_causal": False}, 1, "is_causal is False"),
        ({}, {"key_padding_mask": torch.arange(TOKENS).expand(2, -1) > 60}, 1, "key_padding_mask was given"),
        ({"dropout": 0.5}, {}, 1, "dropout_p is not 0"),
        ({"add_zero_attn": True}, {}, 1, "add_bias_kv or add_zero_attn is set"),
        ({"add_bias_kv": True}, {}, 1, "add_bias_kv or add_zero_attn is set"),
        ({}, {}, 2, "query, key and value are not the same tensor"),
    ],
    ids=["weights", "not causal", "padding", "dropout", "zero", "bias_kv", "cross"],
)
def test_other_calls_are_stock_and_say_why(compiled, arguments, call, inputs, reason):
    layer = Layer(call=call, **arguments)
    given = [sequence(seed=seed) for seed in range(inputs)]
    # the mask of padding and its kind must agree
    if "key_padding_mask" in call:
        layer.call["attn_mask"] = MASK < 0
    torch.manual_seed(1)
    expected = layer(*given)[0]
    (out, _), missing = audited(layer, *given, compiled=compiled)
    assert torch.equal(out, expected)
    assert list(missing) == ["attn"]
    # and what to do about it
    assert missing["attn"].startswith(f"{reason} (")


def test_one_sequence_without_a_batch_is_stock_and_says_why():
    layer = Layer()
    x = sequence()[0]
    expected = layer(x)[0]
    (out, _), missing = audited(layer, x)
    assert torch.equal(out, expected)
    assert missing["attn"].startswith("the input is not a plain tensor of 3 dimensions (pass [batch, tokens, dim]")


def test_the_causal_hint_without_a_mask_fails_as_in_stock():
    layer = Layer(call={"attn_mask": None})
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        layer(sequence())
    with pytest.raises(RuntimeError, match="Need attn_mask"):
        audited(layer, sequence())


def test_a_subclass_with_its_own_forward_runs_it():
    class Doubled(nn.MultiheadAttention):
        def forward(self, query, key, value, **settings):
            out, weights = super().forward(query, key, value, **settings)
            return 2 * out, weights

    (out, _), _ = audited(Layer(Doubled), sequence())
    (routed, _), missing = audited(Layer(), sequence())
    assert missing == {}
    torch.testing.assert_close(out, 2 * routed)


@modes
def test_a_stack_of_encoder_layers(compiled):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    run = torch.compile(stack, backend="eager", fullgraph=True) if compiled else stack
    x = sequence()
    dense = stack(x, mask=MASK, is_causal=True)
    with patch_attention(stack, CONFIG, dense_layers=[]) as patch:
        routed = run(x, mask=MASK, is_causal=True)
        assert list(patch.targets) == [f"layers.{number}.self_attn" for number in range(3)]
        assert patch.unrouted() == {}
    assert not torch.allclose(routed, dense, atol=1e-3)
    for module in stack.layers:
        module.self_attn.__class__ = MultiheadByHand
    torch.testing.assert_close(routed, stack(x, mask=MASK, is_causal=True))


def test_autocast_is_honoured():
    layer, by_hand = Layer(), Layer(MultiheadByHand)
    with torch.autocast("cpu", torch.bfloat16):
        (out, _), missing = audited(layer, sequence())
        expected, _ = by_hand(sequence())
    assert missing == {}
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected)


class Encoder(nn.Module):
    """Layers for which torch has a kernel in eval mode, of the attention and all else: an even number of heads."""

    def __init__(self, whole=False):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, WIDTH, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False) if whole else layer
        self.mask = "mask" if whole else "src_mask"

    def forward(self, x):
        return self.encoder(x, is_causal=True, **{self.mask: MASK})


@pytest.mark.parametrize("whole", [False, True], ids=["layer", "encoder"])
def test_an_encoder_in_eval_mode_stays_inside_documents(whole):
    network, x, lengths = Encoder(whole).eval(), sequence(), [40, TOKENS - 40]
    y = torch.cat([torch.randn_like(x[:, :40]), x[:, 40:]], 1)
    patch = patch_attention(network, CONFIG, documents=True)
    try:
        patch.set_documents(Documents([lengths, lengths]))
        with torch.no_grad():
            assert torch.equal(network(x)[:, 40:], network(y)[:, 40:])
        patch.check()
    finally:
        patch.restore()
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_encoder_in_eval_mode_is_routed_where_that_is_asked():
    network, x = Encoder().eval(), sequence()
    expected = network(x)
    patch = patch_attention(network, CONFIG)
    try:
        with torch.no_grad():
            torch.testing.assert_close(network(x), expected)
            patch.on(inference=True)
            assert not torch.allclose(network(x), expected, atol=1e-3)
        assert patch.count_calls()["routed"] == 1
    finally:
        patch.restore()
