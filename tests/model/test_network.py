"""The decoder: what it computes, what it keeps in memory, and what compilation and patching leave as it was."""

from __future__ import annotations

import math
from functools import partialmethod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_lighthouse import LighthouseConfig, patch_attention
from lightning_lighthouse.model import Decoder
from lightning_lighthouse.model.network import (
    NUM_LOGITS,
    SMALLEST_CHUNK,
    Head,
    chunk_for,
    chunks_of,
    rotary_tables,
    rotate,
    total_of_chunks,
)

VOCAB = 61
SIZES = {"num_layers": 2, "dim": 24, "num_heads": 6, "num_kv_heads": 2, "ffn_dim": 29, "vocab_size": VOCAB}
CPU = torch.device("cpu")


def make_decoder(**settings: Any) -> Decoder:
    torch.manual_seed(42)
    return Decoder(**{**SIZES, **settings})


def make_tokens(batch: int, length: int) -> Tensor:
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(7))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(model: nn.Module, expected: dict[str, Tensor], **tolerance: float) -> None:
    actual = gradients(model)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("position", [0, 13, 35])
def test_no_score_depends_on_a_later_token(position: int) -> None:
    model = make_decoder().double()
    tokens = make_tokens(2, 37)
    changed = tokens.clone()
    changed[:, position + 1 :] = (changed[:, position + 1 :] + 1) % VOCAB
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, : position + 1], after[:, : position + 1])
    assert not torch.allclose(before[:, position + 1 :], after[:, position + 1 :])


def test_every_earlier_token_matters() -> None:
    model = make_decoder().double()
    x = torch.randn(1, 19, SIZES["dim"], dtype=torch.float64, requires_grad=True)
    tables = rotary_tables(19, model.shape.head_dim, 1e4, CPU)
    model.blocks[0](x, *tables)[0, -1].sum().backward()
    assert (x.grad[0].norm(dim=-1) > 0).all()


def test_grouped_heads_equal_repeated_heads() -> None:
    grouped = make_decoder().double()
    full = make_decoder(num_kv_heads=SIZES["num_heads"]).double()
    weights = grouped.state_dict()
    heads, kv_heads, head_dim = SIZES["num_heads"], SIZES["num_kv_heads"], SIZES["dim"] // SIZES["num_heads"]
    for name in [name for name in weights if name.endswith("qkv.weight")]:
        q, k, v = weights[name].unflatten(0, (-1, head_dim)).split([heads, kv_heads, kv_heads])
        repeated = [x.repeat_interleave(heads // kv_heads, dim=0) for x in (k, v)]
        weights[name] = torch.cat([q, *repeated]).flatten(0, 1)
    full.load_state_dict(weights)
    tokens = make_tokens(3, 31)
    torch.testing.assert_close(full(tokens), grouped(tokens), rtol=1e-12, atol=1e-12)


def test_rotation_makes_products_depend_on_the_distance_only() -> None:
    head_dim, offset = 10, 23
    cos, sin = (table.double() for table in rotary_tables(64, head_dim, 1e4, CPU))
    q, k = torch.randn(2, 1, 1, 1, head_dim, dtype=torch.float64).expand(2, 1, 64, 1, head_dim)
    q, k = rotate(q, cos, sin)[0, :, 0], rotate(k, cos, sin)[0, :, 0]
    products = q @ k.T
    torch.testing.assert_close(products[:-offset, :-offset], products[offset:, offset:], rtol=1e-6, atol=1e-6)
    assert products[0, 1:].std() > 1e-3
    # a rotation keeps norms, and position 0 is not rotated
    torch.testing.assert_close(q.norm(dim=-1), q[0].norm().expand(64), rtol=1e-6, atol=1e-6)
    assert cos[0].eq(1).all()
    assert sin[0].eq(0).all()


def test_rotation_is_that_of_complex_numbers() -> None:
    x = torch.randn(2, 17, 3, 8, dtype=torch.float64)
    cos, sin = (table.double() for table in rotary_tables(17, 8, 1e4, CPU))
    frequencies = 1e4 ** (-torch.arange(4, dtype=torch.float64) / 4)
    angles = torch.outer(torch.arange(17, dtype=torch.float64), frequencies)[:, None]
    turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(angles), angles)
    expected = torch.cat((turned.real, turned.imag), dim=-1)
    torch.testing.assert_close(rotate(x, cos, sin), expected, rtol=1e-6, atol=1e-6)


def test_rotary_tables_are_exact_at_a_million_tokens() -> None:
    position = 2**20 - 1
    cos, sin = rotary_tables(position + 1, 6, 1e4, CPU)
    for i in range(3):
        angle = position * 1e4 ** (-2 * i / 6)
        assert cos[-1, 0, 0, i].item() == pytest.approx(math.cos(angle), abs=1e-7)
        assert sin[-1, 0, 0, i].item() == pytest.approx(math.sin(angle), abs=1e-7)


def test_attention_gets_views_of_the_projections() -> None:
    """No copy around attention: each of q, k and v is `[B, N, H, D]` in memory, with whole rows."""
    model = make_decoder()
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        stock = F.scaled_dot_product_attention
        patch.setattr(F, "scaled_dot_product_attention", lambda *x, **kw: seen.append((x, kw)) or stock(*x, **kw))
        model(make_tokens(2, 11))
    assert len(seen) == SIZES["num_layers"]
    for tensors, settings in seen:
        assert [tuple(x.shape) for x in tensors] == [(2, 6, 11, 4), (2, 2, 11, 4), (2, 2, 11, 4)]
        assert all(x.stride(3) == 1 and x.stride(1) == 4 for x in tensors)
        assert settings == {"is_causal": True, "enable_gqa": True}


def test_paper_preset_has_the_parameters_of_the_papers_model() -> None:
    with torch.device("meta"):
        model = Decoder(preset="paper")
    width, ffn, layers = 1024, 1536, 30
    block = 4 * width * width + 3 * width * ffn + 2 * width
    expected = layers * block + 2 * 257 * width + width
    assert sum(parameter.numel() for parameter in model.parameters()) == expected == 267_975_680
    assert model.shape.head_dim == 128


def test_initialization_follows_the_seed_and_the_depth() -> None:
    first, second = make_decoder().state_dict(), make_decoder().state_dict()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    model = make_decoder(dim=192, num_layers=8, ffn_dim=512)
    assert model.blocks[3].attention.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[3].attention.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.blocks[3].feed_forward.down.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)


def naive_loss(head: Head, x: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(head.norm(x), head.projection.weight).flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("vocab_size", [1, 31, 257, 512, 513, 32000, 50257, 2**26, 2**28])
def test_a_chunk_is_as_long_as_its_logits_allow(vocab_size: int) -> None:
    chunk = chunk_for(vocab_size)
    assert chunk & (chunk - 1) == 0
    if chunk == SMALLEST_CHUNK:
        assert 2 * chunk * vocab_size > NUM_LOGITS
    else:
        assert chunk > SMALLEST_CHUNK
        assert chunk * vocab_size <= NUM_LOGITS < 2 * chunk * vocab_size


def chunked_loss(head: Head, x: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """As the decoders compute it of a batch whose targets all count."""
    return total_of_chunks(head, chunks_of(x, targets, chunk)) / targets.numel()


@pytest.mark.parametrize("chunk", [1, 5, 46, 1000])
@pytest.mark.parametrize("vocab_size", [VOCAB, 64, 67])
def test_chunked_loss_equals_the_naive_loss(chunk: int, vocab_size: int) -> None:
    torch.manual_seed(42)
    head = Head(13, vocab_size).double()
    x = torch.randn(2, 23, 13, dtype=torch.float64, requires_grad=True)
    targets = make_tokens(2, 23)

    expected = naive_loss(head, x, targets)
    (3 * expected).backward()
    expected_gradients, expected_x = gradients(head), x.grad.clone()
    head.zero_grad()
    x.grad = None

    actual = chunked_loss(head, x, targets, chunk)
    (3 * actual).backward()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(x.grad, expected_x, rtol=1e-10, atol=1e-14)
    assert_same_gradients(head, expected_gradients, rtol=1e-10, atol=1e-14)


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that any operation returned, backward included."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_logits_are_never_whole() -> None:
    head = Head(8, 320)
    x = torch.randn(1, 4001, 8, requires_grad=True)
    targets = torch.randint(0, 320, (1, 4001))
    with LargestTensor() as naive:
        naive_loss(head, x, targets).backward()
    assert naive.elements == 4001 * 320
    with LargestTensor() as chunked:
        chunked_loss(head, x, targets, 101).backward()
    assert chunked.elements <= max(101 * 320, x.numel())


def test_logits_are_not_kept_for_the_backward_pass() -> None:
    head = Head(8, 640)
    x = torch.randn(1, 701, 8, requires_grad=True)
    targets = torch.randint(0, 640, (1, 701))
    saved: list[int] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        chunked_loss(head, x, targets, 53)
    assert sum(saved) < 701 * 640 / 4
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        naive_loss(head, x, targets)
    assert sum(saved) > 701 * 640


def test_logits_are_computed_again_but_for_the_last_chunk() -> None:
    head, calls = Head(8, 64), []
    head.register_forward_pre_hook(lambda _, args: calls.append(len(args[0])))
    x = torch.randn(1, 23, 8, requires_grad=True)
    loss = chunked_loss(head, x, torch.randint(0, 64, (1, 23)), 10)
    assert calls == [10, 10, 3]
    loss.backward()
    assert sorted(calls[3:]) == [10, 10]


def test_loss_is_float32_under_autocast_and_the_stream_is_not() -> None:
    model = make_decoder()
    tokens = make_tokens(2, 30)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.hidden(tokens).dtype == torch.bfloat16
        loss = model.loss(tokens)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model.loss(tokens), rtol=3e-3, atol=0)


def test_recomputed_blocks_give_the_same_gradients() -> None:
    tokens = make_tokens(2, 48)
    plain, thrifty = make_decoder(), make_decoder(checkpoint="block")
    losses = [model.loss(tokens) for model in (plain, thrifty)]
    for loss in losses:
        loss.backward()
    assert torch.equal(*losses)
    assert_same_gradients(thrifty, gradients(plain), rtol=0, atol=0)


@pytest.mark.parametrize("checkpoint", ["none", "block"])
def test_compiled_model_has_the_same_keys_and_values(monkeypatch: pytest.MonkeyPatch, checkpoint: Any) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=counter))
    plain, compiled = make_decoder(), make_decoder(compile=True, checkpoint=checkpoint)
    compiled.configure_model()
    assert list(compiled.state_dict()) == list(plain.state_dict())
    tokens = make_tokens(2, 42)
    expected, actual = plain.loss(tokens), compiled.loss(tokens)
    # the blocks share one graph, the head has another
    assert counter.frame_count == 2
    for loss in (expected, actual):
        loss.backward()
    torch.testing.assert_close(actual, expected)
    assert_same_gradients(compiled, gradients(plain), rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_compiled_by_inductor() -> None:
    plain, compiled = make_decoder(), make_decoder(compile=True)
    compiled.configure_model()
    tokens = make_tokens(2, 42)
    for model in (plain, compiled):
        model.loss(tokens).backward()
    assert_same_gradients(compiled, gradients(plain), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compiled", [False, True])
def test_lighthouse_reaches_the_attention(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="aot_eager"))
    model = make_decoder(num_layers=3, compile=compiled)
    model.configure_model()
    tokens = make_tokens(1, 298)
    dense = model.loss(tokens)
    with patch_attention(model, LighthouseConfig(top_k=7), dense_layers=[]) as patch:
        assert list(patch.targets) == [f"blocks.{layer}.attention" for layer in range(3)]
        routed = model.loss(tokens)
        routed.backward()
        patch.off()
        assert torch.equal(model.loss(tokens), dense)
    assert not torch.allclose(routed, dense, rtol=1e-6)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
