"""Layers of several types in one patched model: each attends as it is told, compiled and recomputed too."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from foreign import GPT, SelfAttention
from patching import CONFIG, CheckpointedBlocks, run, same, tokens
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_lighthouse import LighthouseConfig, lighthouse_attention, patch_attention
from lightning_lighthouse.attention.sdpa import causal_sdpa
from lightning_lighthouse.attention.windows import chunk_attention, window_attention
from lightning_lighthouse.checks import SettingError

PATTERN = ["window", "chunk", "lighthouse", "dense"]
WINDOW, SINKS = 7, 2
ATTENTIONS = {
    "window": lambda q, k, v: window_attention(q, k, v, WINDOW, sink_tokens=SINKS),
    "chunk": lambda q, k, v: chunk_attention(q, k, v, WINDOW),
    "lighthouse": lambda q, k, v: lighthouse_attention(q, k, v, CONFIG),
    "dense": lambda q, k, v: causal_sdpa(q, k, v, scale=None, backend="auto"),
}


class ByHand(SelfAttention):
    """SelfAttention with its type written into it."""

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(ATTENTIONS[self.layer_type](q, k, v).transpose(1, 2).flatten(2))


def by_hand(model, types):
    model = copy.deepcopy(model)
    for block, layer_type in zip(model.blocks, types, strict=True):
        block.attn.__class__, block.attn.layer_type = ByHand, layer_type
    return model


def made(cls=GPT, layers=6):
    torch.manual_seed(0)
    return cls(layers)


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("layer_types", [[kind] for kind in ATTENTIONS if kind != "dense"] + [PATTERN])
def test_a_model_equals_one_with_its_types_written_into_it(layer_types):
    model, sinks = made(), SINKS if "window" in layer_types else 0
    window = None if layer_types == ["lighthouse"] else WINDOW
    types = [layer_types[layer % len(layer_types)] for layer in range(6)]
    expected = run(by_hand(model, types), tokens())
    with patch_attention(model, CONFIG, layer_types=layer_types, window=window, sink_tokens=sinks):
        assert same(run(model, tokens()), expected)


def test_dense_layers_override_the_pattern_which_counts_on_under_them():
    model = made()
    expected = run(by_hand(model, ["dense", "window", "window", "lighthouse", "window", "dense"]), tokens())
    pattern = ["window", "window", "window", "lighthouse"]
    with patch_attention(
        model, CONFIG, dense_layers=[0, -1], layer_types=pattern, window=WINDOW, sink_tokens=SINKS
    ) as patch:
        assert patch.routed == [f"blocks.{layer}.attn" for layer in range(1, 5)]
        assert same(run(model, tokens()), expected)


def test_a_type_that_no_layer_is_left_for_is_said():
    told = {"layer_types": ["window", "window", "lighthouse"], "window": WINDOW}
    with pytest.warns(
        UserWarning, match="no layer attends by 'lighthouse': those that layer_types gives it stay dense"
    ):
        patch_attention(made(), CONFIG, dense_layers=[2, -1], **told).restore()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch_attention(made(), CONFIG, dense_layers=[-1], **told).restore()


def test_another_way_to_attend_holds_from_the_next_call_on():
    model = made()
    dense = run(model, tokens())
    patch = patch_attention(model, CONFIG, layer_types=["window"], window=WINDOW, sink_tokens=SINKS)
    patch.on()
    assert same(run(model, tokens()), run(by_hand(model_of(model), ["window"] * 6), tokens()))
    patch.attend(["dense"])
    assert same(run(model, tokens()), dense)
    patch.attend(["lighthouse"], config=LighthouseConfig(num_levels=2, pooling_factor=2, top_k=4))
    assert not same(run(model, tokens()), run(by_hand(model_of(model), ["lighthouse"] * 6), tokens()))
    patch.attend(["lighthouse"], config=CONFIG)
    assert same(run(model, tokens()), run(by_hand(model_of(model), ["lighthouse"] * 6), tokens()))
    patch.restore()


def model_of(patched, cls=GPT):
    plain = made(cls, len(patched.blocks))
    plain.load_state_dict(patched.state_dict())
    return plain


@pytest.mark.parametrize(
    "cls", [GPT, pytest.param(CheckpointedBlocks, marks=pytest.mark.slow)], ids=["plain", "recomputed"]
)
def test_compiled_models_follow_each_way_with_one_frame_a_type(cls):
    model = made(cls, 4)
    counter = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(backend=counter, fullgraph=True)
    frames = []
    with patch_attention(model, CONFIG, layer_types=["chunk"], window=16) as patch:
        chunks, mixed, wide = (["chunk"], 16, 0), (["window", "lighthouse"], WINDOW, SINKS), (["window"], 2 * WINDOW, 0)
        for layer_types, window, sinks in (chunks, mixed, wide, chunks):
            patch.attend(layer_types, window=window, sink_tokens=sinks)
            routed = run(model, tokens())
            frames.append(counter.frame_count)
            eager = model_of(model, cls)
            with patch_attention(eager, CONFIG, layer_types=layer_types, window=window, sink_tokens=sinks):
                assert same(routed, run(eager, tokens()), exact=False)
    # one for the first, two for two types, one for another window, none for what was compiled before
    assert frames == [1, 3, 4, 4]


def test_no_layer_sees_later_tokens_under_any_type():
    model = made()
    x, y = tokens(), tokens()
    y[:, 61:] = tokens(seed=1)[:, 61:]
    with patch_attention(model, CONFIG, layer_types=PATTERN, window=WINDOW, sink_tokens=SINKS):
        assert torch.equal(model(x)[:, :61], model(y)[:, :61])


def test_too_many_types_and_nothing_to_route_leave_the_model_alone():
    model = made()
    with pytest.raises(ValueError, match="layer_types names 7 layers, the model has 6 attention layers"):
        patch_attention(model, CONFIG, layer_types=["lighthouse"] * 7)
    with pytest.raises(SettingError, match="nothing is left to route"):
        patch_attention(model, CONFIG, dense_layers=list(range(6)), layer_types=["window"], window=4)
    assert not any("forward" in vars(part) for part in model.modules())


def test_calls_are_counted_by_what_became_of_them():
    model = made()
    patch = patch_attention(model, CONFIG, layer_types=["window", "dense"], window=WINDOW)
    patch.on()
    run(model, tokens())
    assert dict(patch.count_calls()) == {"routed": 3}
    assert not patch.count_calls()
    patch.restore()
