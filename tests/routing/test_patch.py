"""Patching a model: which modules are found, what is routed, and that nothing is left behind."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import types
from weakref import ref

import pytest
import torch
import torch.nn.functional as F
from foreign import GPT, SelfAttention
from patching import CONFIG, CheckpointedBlocks, run, same, tokens
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lightning_lighthouse import LighthouseConfig, lighthouse_attention, patch_attention
from lightning_lighthouse.attention.sdpa import stock_sdpa
from lightning_lighthouse.routing import calls
from lightning_lighthouse.routing.audit import explain
from lightning_lighthouse.routing.scope import scopes
from lightning_lighthouse.routing.targets import find_targets


class ByHand(SelfAttention):
    """SelfAttention with Lighthouse written into it."""

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(lighthouse_attention(q, k, v, CONFIG).transpose(1, 2).flatten(2))


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    yield
    leaked = bool(scopes) or F.scaled_dot_product_attention is not stock_sdpa
    scopes.clear()
    calls.unswap()
    torch._dynamo.reset()
    assert not leaked


def test_a_routed_model_equals_one_written_by_hand():
    torch.manual_seed(0)
    model = GPT()
    by_hand = copy.deepcopy(model)
    for block in by_hand.blocks[1:-1]:
        block.attn.__class__ = ByHand
    dense, x = run(model, tokens()), tokens()
    with patch_attention(model, CONFIG, dense_layers="published"):
        routed = run(model, x)
    assert same(routed, run(by_hand, x))
    assert not same(routed, dense)
    assert same(run(model, x), dense)


def test_on_off_restore_and_the_state_dict():
    model = GPT()
    keys, x = list(model.state_dict()), tokens()
    before = set(vars(model.blocks[1].attn))
    dense = model(x)
    patch = patch_attention(model, CONFIG)
    assert torch.equal(model(x), dense)
    patch.on()
    assert not torch.equal(model(x), dense)
    assert list(model.state_dict()) == keys
    patch.off()
    assert torch.equal(model(x), dense)
    patch.restore()
    patch.restore()
    assert set(vars(model.blocks[1].attn)) == before
    assert list(model.state_dict()) == keys
    with pytest.raises(RuntimeError, match="was restored"):
        patch.on()


@pytest.mark.parametrize(
    ("layers", "dense_layers", "routed"),
    [
        (4, None, [0, 1, 2, 3]),
        (4, [], [0, 1, 2, 3]),
        (4, "published", [1, 2]),
        (15, "published", list(range(1, 14))),
        (16, "published", list(range(2, 14))),
        (4, [0, -2], [1, 3]),
        (3, [1, 1], [0, 2]),
    ],
)
def test_dense_layers(layers, dense_layers, routed):
    patch = patch_attention(GPT(layers), CONFIG, dense_layers=dense_layers)
    assert list(patch.targets) == [f"blocks.{layer}.attn" for layer in routed]
    patch.restore()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"dense_layers": [4]}, ValueError, "from -4 to 3 for 4 layers, got 4"),
        ({"dense_layers": [0, 1, 2, 3]}, ValueError, "nothing is left to route"),
        ({"dense_layers": [0.5]}, TypeError, "list of integers"),
        ({"select": "nothing.*"}, ValueError, "select must match the name of a module of GPT, got 'nothing.*'"),
    ],
)
def test_wrong_arguments_are_refused_and_leave_nothing(arguments, error, words):
    with pytest.raises(error) as caught:
        patch_attention(GPT(), CONFIG, **arguments)
    assert words in str(caught.value)


def test_a_model_without_attention_is_refused_with_candidates():
    class FakeAttention(nn.Module):
        def forward(self, x):
            return x

    with pytest.raises(ValueError, match=r"no module calls SDPA .* 0 \(FakeAttention\)"):
        patch_attention(nn.Sequential(FakeAttention()), CONFIG)


def test_select_narrows_the_modules():
    patch = patch_attention(GPT(6), CONFIG, select="blocks.[1-3].*", dense_layers=[])
    assert list(patch.targets) == ["blocks.1.attn", "blocks.2.attn", "blocks.3.attn"]
    patch.restore()


def test_the_same_model_twice_raises_two_models_do_not():
    first, second = GPT(), GPT()
    x = tokens()
    patch = patch_attention(first, CONFIG)
    with pytest.raises(ValueError, match="patched already"):
        patch_attention(first, CONFIG)
    dense = second(x)
    other = patch_attention(second, LighthouseConfig(num_levels=2, pooling_factor=4, top_k=4))
    patch.on()
    assert torch.equal(second(x), dense)
    patch.restore()
    other.on()
    assert not torch.equal(second(x), dense)
    other.restore()


class Call(nn.Module):
    """One SDPA call with whatever arguments a test wants."""

    def forward(self, q, k, v, **arguments):
        return F.scaled_dot_product_attention(q, k, v, **arguments)


def heads(count, length=64, dim=8, seed=0):
    return torch.randn(2, count, length, dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"attn_mask": torch.ones(64, 64, dtype=torch.bool).tril()}, "attn_mask was given"),
        ({}, "is_causal is False"),
        ({"is_causal": True, "dropout_p": 0.1}, "dropout_p is not 0"),
    ],
)
def test_calls_that_are_not_plain_causal_stay_dense_and_say_why(arguments, reason):
    model = Call()
    q, k, v = (heads(2, seed=i) for i in range(3))
    torch.manual_seed(1)
    expected = model(q, k, v, **arguments)
    with patch_attention(model, CONFIG, dense_layers=[]) as patch:
        torch.manual_seed(1)
        assert torch.equal(model(q, k, v, **arguments), expected)
        assert patch.unrouted()[""].startswith(f"{reason} (")
        assert f"the module itself: {reason}" in explain(patch.unrouted(), 1)


def test_cross_attention_stays_dense():
    model = Call()
    q, k, v = heads(2), heads(2, 80, seed=1), heads(2, 80, seed=2)
    expected = model(q, k, v, is_causal=True)
    with patch_attention(model, CONFIG, dense_layers=[]) as patch:
        assert torch.equal(model(q, k, v, is_causal=True), expected)
        assert patch.unrouted()[""].startswith("query and key lengths differ (cross-attention or a cache")


def test_scale_grouped_heads_and_autocast_are_honoured():
    model = Call()
    q, k, v = heads(4), heads(2, seed=1), heads(2, seed=2)
    with patch_attention(model, CONFIG, dense_layers=[]):
        out = model(q, k, v, is_causal=True, enable_gqa=True, scale=0.7)
        with torch.autocast("cpu", torch.bfloat16):
            low = model(q, k, v.bfloat16(), is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, lighthouse_attention(q, k, v, CONFIG, scale=0.7))
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, lighthouse_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), CONFIG))


class CheckpointInside(SelfAttention):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def test_checkpoint_inside_attention_stays_dense_with_right_gradients():
    model = GPT()
    expected = run(model, tokens())
    for block in model.blocks:
        block.attn.__class__ = CheckpointInside
    with patch_attention(model, CONFIG) as patch:
        assert same(run(model, tokens()), expected, exact=False)
        (line,) = set(patch.unrouted().values())
        assert line.startswith("checkpoint() inside the attention module (call checkpoint() around the block")


def test_a_reentrant_checkpoint_around_such_attention_is_refused():
    model = GPT()
    model.__class__ = CheckpointedBlocks
    model.use_reentrant = True
    for block in model.blocks:
        block.attn.__class__ = CheckpointInside
    with patch_attention(model, CONFIG, dense_layers="published") as patch:
        run(model, tokens())
        with pytest.raises(RuntimeError, match=r"blocks\.1\.attn, blocks\.2\.attn: checkpoint\(\) inside"):
            patch.check()


class TwoCalls(SelfAttention):
    """Attention that contains another."""

    def __init__(self, dim, heads):
        super().__init__(dim, heads)
        self.inner = SelfAttention(dim, heads)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.inner(x)).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def test_attention_that_contains_attention_is_routed_too():
    model = nn.Sequential(TwoCalls(16, 2))
    patch = patch_attention(model, CONFIG, dense_layers=[])
    assert list(patch.targets) == ["0", "0.inner"]
    patch.on()
    model(torch.randn(2, 96, 16))
    assert patch.unrouted() == {}
    patch.restore()


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_have_the_gradients_of_plain_ones(use_reentrant):
    model = GPT()
    with patch_attention(model, CONFIG):
        expected = run(model, tokens())
    model.__class__ = CheckpointedBlocks
    model.use_reentrant = use_reentrant
    with patch_attention(model, CONFIG):
        assert same(run(model, tokens()), expected, exact=False)


@pytest.mark.parametrize(
    "checkpointed", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["plain", "checkpointed"]
)
@pytest.mark.parametrize(
    ("what", "dense_layers", "frames"),
    # first dense, routed, restored: each new phase costs one compile a frame, whatever the depth
    [
        pytest.param("model", None, [1, 2, 2, 3], marks=pytest.mark.slow),
        ("block", None, [1, 2, 2, 3]),
        # dense layers are bare modules; the others carry the instance forward
        ("block", "published", [2, 3, 3, 4]),
        pytest.param("attention", "published", [2, 3, 3, 4], marks=pytest.mark.slow),
    ],
)
def test_compiled_models_follow_the_phase(what, dense_layers, frames, checkpointed):
    torch.manual_seed(0)
    model = GPT(6)
    if checkpointed:
        model.__class__ = CheckpointedBlocks
    x = tokens()
    dense = run(model, x)
    with patch_attention(model, CONFIG, dense_layers=dense_layers):
        routed = run(model, x)

    counter = CompileCounterWithBackend("aot_eager")
    parts = {"model": [model], "block": model.blocks, "attention": [block.attn for block in model.blocks]}[what]
    for part in parts:
        part.compile(backend=counter, fullgraph=True)
    patch = patch_attention(model, CONFIG, dense_layers=dense_layers)
    seen = []
    assert same(run(model, x), dense, exact=False)
    seen.append(counter.frame_count)
    patch.on()
    assert same(run(model, x), routed, exact=False)
    assert patch.unrouted() == {}
    seen.append(counter.frame_count)
    patch.off()
    assert same(run(model, x), dense, exact=False)
    seen.append(counter.frame_count)
    patch.restore()
    assert same(run(model, x), dense, exact=False)
    seen.append(counter.frame_count)
    assert seen == frames


def test_forwards_compiled_before_share_a_frame_and_its_note():
    model = GPT(6)
    x = tokens()
    with patch_attention(model, CONFIG, dense_layers="published"):
        routed = run(model, x)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.attn.forward = torch.compile(block.attn.forward, backend=counter, fullgraph=True)
    dense = run(model, x)
    patch = patch_attention(model, CONFIG, dense_layers="published")
    patch.on()
    assert same(run(model, x), routed, exact=False)
    patch.check()
    patch.restore()
    assert same(run(model, x), dense)
    # dense in all, then dense in bare modules and routed in the others: of one code
    assert counter.frame_count == 3

    # a frame of their own that does not call SDPA is no routed one
    model = GPT(6)
    for block in model.blocks[1:3]:
        block.attn.forward = torch.compile(types.MethodType(lambda self, x: x, block.attn), backend="eager")
    patch = patch_attention(model, CONFIG)
    patch.on()
    run(model, x)
    assert list(patch.unrouted()) == ["blocks.1.attn", "blocks.2.attn"]
    patch.restore()


class PartlyWrittenOut(SelfAttention):
    """SelfAttention that calls SDPA or not."""

    calls_sdpa = True

    def forward(self, x):
        if self.calls_sdpa:
            return super().forward(x)
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return (x @ x.mT).masked_fill(later, -torch.inf).softmax(-1) @ x


@pytest.mark.parametrize("what", ["nothing", "model", "block", "attention"])
def test_one_layer_that_calls_no_sdpa_is_noticed_among_others(what):
    model = GPT(3)
    for block in model.blocks:
        block.attn.__class__ = PartlyWrittenOut
    model.blocks[2].attn.calls_sdpa = False
    parts = {"nothing": [], "model": [model], "block": model.blocks, "attention": [b.attn for b in model.blocks]}
    for part in parts[what]:
        part.compile(backend="eager", fullgraph=True)
    reason = r"blocks\.2\.attn.*: no call of scaled_dot_product_attention was seen"
    with pytest.raises(RuntimeError, match=reason), patch_attention(model, CONFIG):
        model(tokens())


class BreaksTheGraph(SelfAttention):
    """SelfAttention that no single graph holds."""

    def forward(self, x):
        torch._dynamo.graph_break()
        return super().forward(x)


class CallsACompiledHelper(SelfAttention):
    """SelfAttention whose call of SDPA alone is compiled."""

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(compiled_helper(q, k, v).transpose(1, 2).flatten(2))


@torch.compile(backend="eager")
def compiled_helper(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("kind", [BreaksTheGraph, CallsACompiledHelper])
@pytest.mark.parametrize(
    "what", ["nothing", "model", *(pytest.param(x, marks=pytest.mark.slow) for x in ("block", "attention"))]
)
def test_layers_of_several_or_inner_graphs_are_seen_to_be_routed(what, kind):
    torch._dynamo.reset()
    model = GPT(2)
    x = tokens()
    with patch_attention(model, CONFIG):
        routed = run(model, x)
    for block in model.blocks:
        block.attn.__class__ = kind
    parts = {"nothing": [], "model": [model], "block": model.blocks, "attention": [b.attn for b in model.blocks]}
    for part in parts[what]:
        part.compile(backend="eager")
    patch = patch_attention(model, CONFIG)
    patch.on()
    assert same(run(model, x), routed, exact=False)
    patch.check()
    patch.restore()


def test_a_second_audit_of_a_compiled_model_remembers_the_first():
    model = GPT(2)
    model.compile(backend="eager", fullgraph=True)
    # the second time the graph is cached: nothing is traced, no note is left
    for _ in range(2):
        patch = patch_attention(model, CONFIG)
        patch.on()
        model(tokens())
        patch.check()
        patch.restore()


def test_a_layer_that_never_calls_sdpa_is_named():
    model = GPT()
    with patch_attention(model, CONFIG, dense_layers="published") as patch:
        model.blocks[0](torch.randn(2, 64, 16))
        model.blocks[1](torch.randn(2, 64, 16))
        missing = patch.unrouted()
    assert list(missing) == ["blocks.2.attn"]
    assert missing["blocks.2.attn"].startswith("its forward did not run")
    assert "blocks.2.attn" in explain(missing, 2)


def test_a_deep_copy_follows_and_then_runs_dense():
    model = GPT()
    x = tokens()
    dense = model(x)
    patch = patch_attention(model, CONFIG)
    patch.on()
    average = copy.deepcopy(model)
    assert torch.equal(average(x), model(x))
    with torch.no_grad():
        average.head.bias += 1
    assert not torch.equal(average(x), model(x))
    patch.restore()
    torch.testing.assert_close(average(x), dense + 1)


def test_a_copy_of_a_patched_model_is_patched_anew_once_the_first_patch_is_gone():
    model = GPT()
    x = tokens()
    dense = run(model, x)
    with patch_attention(model, CONFIG):
        routed = run(model, x)
        average = copy.deepcopy(model)
    with patch_attention(average, CONFIG):
        assert same(run(average, x), routed)
    assert same(run(average, x), dense)
    assert not any("lighthouse" in name or name == "forward" for module in average.modules() for name in vars(module))


def test_a_pickled_module_comes_back_unpatched():
    model = GPT()
    x = tokens()
    dense = model(x)
    with patch_attention(model, CONFIG):
        pickled = pickle.dumps(model)
        saved = io.BytesIO()
        torch.save(model, saved)
    assert torch.equal(pickle.loads(pickled)(x), dense)
    saved.seek(0)
    assert torch.equal(torch.load(saved, weights_only=False)(x), dense)


def test_an_instance_forward_of_the_users_is_kept():
    model = GPT()
    attention = model.blocks[1].attn
    attention.forward = types.MethodType(lambda self, x: SelfAttention.forward(self, x) * 2, attention)
    theirs = attention.forward
    x = tokens()
    dense = model(x)
    patch = patch_attention(model, CONFIG)
    assert torch.equal(model(x), dense)
    patch.restore()
    assert attention.forward is theirs


def test_multi_head_attention_is_routed_in_eager():
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 96, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(96)

    def call():
        return attention(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]

    dense = call()
    with patch_attention(attention, CONFIG, dense_layers=[]) as patch:
        assert not torch.allclose(call(), dense, atol=1e-4)
        assert patch.unrouted() == {}
    assert torch.equal(call(), dense)


def test_scope_is_left_after_an_exception():
    class Failing(SelfAttention):
        def forward(self, x):
            super().forward(x)
            raise FloatingPointError

    model = GPT()
    model.blocks[1].attn.__class__ = Failing
    with patch_attention(model, CONFIG) as patch:
        with pytest.raises(FloatingPointError):
            model(tokens())
        assert not patch.scope.layer_type
        patch.unrouted()
        q = heads(2)
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, is_causal=True), stock_sdpa(q, q, q, is_causal=True))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["model", "block", "core"])
def test_a_second_model_uses_the_compiled_frames_of_the_first(part):
    class Split(SelfAttention):
        """Its attention is compiled by itself, inside a forward that is not."""

        def forward(self, x):
            q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            return self.out(compiled_core(q, k, v).transpose(1, 2).flatten(2))

    torch.compiler.reset()
    compiled_core = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    tokens = torch.randint(0, 16, (2, 64), generator=torch.Generator().manual_seed(0))
    counter = CompileCounterWithBackend("eager")
    compiled = []
    for _ in range(2):
        model = GPT(4)
        called = model
        if part == "model":
            called = torch.compile(model, backend=counter)
        for block in model.blocks if part == "block" else []:
            block.compile(backend=counter)
        for block in model.blocks if part == "core" else []:
            block.attn.__class__ = Split
        patch = patch_attention(model, CONFIG, dense_layers=[])
        patch.on()
        out = called(tokens)
        out.sum().backward()
        patch.check()
        compiled.append(counter.frame_count)
        patch.off()
        torch.testing.assert_close(model(tokens).shape, out.shape)
        assert (model(tokens) - out).abs().max() > 1e-3, "the first was routed"
        patch.restore()
    assert part != "model" or compiled[0] == compiled[1], "nothing was traced again"


class Plain(nn.Module):
    """Whose own functions never attend; a wrapper's might."""

    def __init__(self):
        super().__init__()
        plain = self.forward
        self.forward = lambda x: plain(x)

    def forward(self, x):
        return x


def test_a_model_that_is_gone_is_not_kept():
    """Nor one whose instance keeps a forward of its own, as wrappers and libraries of hooks make them."""
    model = GPT()
    model.plain = Plain()
    assert find_targets(model)
    gone = ref(model.plain)
    del model
    gc.collect()
    assert gone() is None
