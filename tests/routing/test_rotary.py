"""How a model rotates q and k, found in the model or given, for rotate="after"."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from all_lighthouse import all_lighthouse
from families import GROUPED, TRANSFORMERS, build_transformers
from fitting import fit
from foreign import GPT
from jsonargparse import ArgumentParser
from patching import run, same, tokens
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_lighthouse import LighthouseCallback, LighthouseConfig, lighthouse_attention, patch_attention
from lightning_lighthouse.attention.rotation import Rotation
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.model.decoder import Decoder
from lightning_lighthouse.routing.rotary import find_rotary
from lightning_lighthouse.routing.targets import choose_routed, find_targets

SIZES = {"num_levels": 2, "pooling_factor": 2, "top_k": 8}
BEFORE, AFTER = LighthouseConfig(**SIZES), LighthouseConfig(**SIZES, rotate="after")
WINDOW = 8


def scaled(kind, **more):
    return "LlamaConfig", GROUPED | {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, **more}}


ORIGINAL = {"original_max_position_embeddings": 40}
# config, settings, tokens, what is given
FOUND = {
    "Llama": (*TRANSFORMERS["Llama"], 24, None),
    "GPT-NeoX, a quarter of the channels": (*TRANSFORMERS["GPT-NeoX"], 24, None),
    "Phi, a part too": (*TRANSFORMERS["Phi"], 24, None),
    "Phi-3": (*TRANSFORMERS["Phi-3"], 24, None),
    "GLM, a half, interleaved": ("GlmConfig", GROUPED | {"head_dim": 8}, 24, None),
    "Cohere, interleaved": ("CohereConfig", GROUPED, 24, None),
    "Gemma 3, by type of layer": (
        "Gemma3TextConfig", GROUPED | {"head_dim": 8, "sliding_window": 16, "num_hidden_layers": 6}, 24, None,
    ),
    "linear": (*scaled("linear"), 24, None),
    "yarn, which scales too": (*scaled("yarn", **ORIGINAL), 24, None),
    "llama3": (*scaled("llama3", low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL), 24, None),
    "dynamic, longer than it was made for": (*scaled("dynamic"), 200, None),
    "GPT-J, given": (
        "GPTJConfig", {"n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 160, "rotary_dim": 4}, 24,
        {"rope_theta": 10_000, "pairing": "interleaved", "partial_rotary_factor": 0.5},
    ),
}  # fmt: skip


def seen(model, layer, x, positions, monkeypatch):
    """q and k of a layer as attention gets them."""
    calls = []
    stock = F.scaled_dot_product_attention
    with monkeypatch.context() as patch:
        patch.setattr(
            F, "scaled_dot_product_attention", lambda q, k, *a, **s: calls.append((q, k)) or stock(q, k, *a, **s)
        )
        with torch.no_grad():
            model.model(input_ids=x, position_ids=positions.expand(len(x), -1), use_cache=False)
    return calls[layer]


@pytest.mark.parametrize("name", FOUND)
def test_a_rotation_inside_the_window_is_what_the_model_does_at_its_last_token(name, monkeypatch):
    kind, settings, length, given = FOUND[name]
    model = build_transformers(kind, **settings)
    layers = choose_routed(find_targets(model), None)
    rotary = find_rotary(model, layers, given)
    routed = list(find_targets(model)).index(next(iter(layers)))
    # the same token everywhere: attention says the same everywhere too, so that positions alone tell inputs apart
    x = torch.randint(31, (1, 1)).expand(2, length)
    q, k = seen(model, routed, x, torch.arange(length), monkeypatch)
    window = rotary.rotation(q).within(WINDOW, q)
    # all at the last position of the window; the last one of all as it was, for dynamic looks at it
    still = torch.full((length,), WINDOW - 1)
    still[-1] = length - 1
    for turned, at_last in zip((q, k), seen(model, routed, x, still, monkeypatch), strict=True):
        # of one head: some calls repeat the keys
        turned, at_last = (each[:, 0, :WINDOW] for each in (turned, at_last))
        assert not torch.allclose(turned, at_last, atol=1e-4)
        torch.testing.assert_close(rotary.rotation(q).turn(turned, window), at_last, rtol=1e-4, atol=1e-5)


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return Decoder("toy", num_layers=2, dim=16, num_heads=2, ffn_dim=16, rope_theta=500.0)


def by_hand(model, x, monkeypatch):
    """With Lighthouse in the place of SDPA, and frequencies from the definition."""
    rotation = Rotation(500.0 ** (-torch.arange(0, 8, 2, dtype=torch.float64) / 8).float())

    def attend(q, k, v, is_causal, enable_gqa):
        return lighthouse_attention(q, k, v, AFTER, rotation=rotation)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        return run(model, x)


def test_a_decoder_is_routed_by_its_theta(decoder, monkeypatch):
    x = tokens()
    expected = by_hand(decoder, x, monkeypatch)
    with patch_attention(decoder, AFTER):
        after = run(decoder, x)
    assert same(after, expected, exact=False)
    with patch_attention(decoder, BEFORE) as patch:
        before = run(decoder, x)
        assert not same(before, expected, exact=False)
        # a later phase asks for it
        patch.attend(["lighthouse"], config=AFTER)
        assert same(run(decoder, x), after)
        patch.off()
        dense = run(decoder, x)
    assert same(run(decoder, x), dense)
    assert not any("rotary" in name for name in decoder.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Decoder", "Llama"])
def test_compiled_blocks_equal_eager_ones_in_as_many_frames_as_before(name, decoder):
    kind, settings = TRANSFORMERS["Llama"]
    model = decoder if name == "Decoder" else build_transformers(kind, **settings | {"num_hidden_layers": 2})
    blocks = model.blocks if name == "Decoder" else model.model.model.layers
    x, frames = tokens(), []
    with patch_attention(model, AFTER):
        expected = run(model, x)
    for config in (BEFORE, AFTER):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        for block in blocks:
            block.compile(backend=counter, fullgraph=True)
        with patch_attention(model, config) as patch:
            assert same(run(model, x), expected, exact=False) == (config is AFTER)
            patch.off()
            run(model, x)
        frames.append(counter.frame_count)
    torch._dynamo.reset()
    assert frames[0] == frames[1]


REFUSED = {
    "learned positions": (*TRANSFORMERS["GPT-2"], "found no rotary frequencies for 'model.transformer.h.0.attn', as"),
    "some layers do not rotate": ("SmolLM3Config", GROUPED, "cannot see whether and where 'model.model.layers.0.self_"),
    "a table of its own": (
        "GPTJConfig", {"n_embd": 24, "n_layer": 2, "n_head": 3, "rotary_dim": 4}, "found no rotary frequencies",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_show_how_it_rotates_is_refused_in_one_line(name):
    kind, settings, message = REFUSED[name]
    model = build_transformers(kind, **settings)
    with pytest.raises(SettingError, match=f"{message}.*rotary={{'rope_theta'") as refused:
        patch_attention(model, AFTER)
    assert "\n" not in str(refused.value)
    # nothing is left behind, and before asks for nothing
    patch_attention(model, BEFORE).restore()


def test_functions_that_do_not_rotate_so_are_not_believed(monkeypatch):
    model = build_transformers(*TRANSFORMERS["Llama"][:1], **TRANSFORMERS["Llama"][1])
    module = __import__(type(model.model).__module__, fromlist=["apply_rotary_pos_emb"])
    stock = module.apply_rotary_pos_emb
    # the other way round
    monkeypatch.setattr(module, "apply_rotary_pos_emb", lambda q, k, cos, sin: stock(q, k, cos, -sin))
    with pytest.raises(SettingError, match="but not how they are applied: give the frequencies by rotary="):
        patch_attention(model, AFTER)
    monkeypatch.undo()
    model.model.model.other = nn.Module()
    model.model.model.other.register_buffer("inv_freq", torch.ones(4))
    with pytest.raises(SettingError, match=r"found several rotary frequencies for 'model.model.layers.0.self_attn'"):
        patch_attention(model, AFTER)


def test_layers_that_differ_are_refused():
    model = GPT()
    for theta, block in enumerate(model.blocks, 10):
        block.rotary = {"rope_theta": float(max(11, theta))}
    with pytest.raises(SettingError, match=r"'blocks.2.attn' rotates by others than 'blocks.0.attn'"):
        patch_attention(model, AFTER)
    patch_attention(model, AFTER, dense_layers=[2, 3]).restore()


@pytest.mark.parametrize(
    ("rotary", "error", "message"),
    [
        (1e4, TypeError, r"rotary must be a mapping such as {'rope_theta': 10000.0}, or None, got 10000.0"),
        ({}, ValueError, "rotary must have rope_theta"),
        ({"rope_theta": 1e4, "theta": 3}, ValueError, "rotary must have rope_theta, and may have pairing and partial"),
        ({"rope_theta": "1e4"}, ValueError, "rope_theta must be a number above 0, got '1e4'"),
        ({"rope_theta": 1e4, "partial_rotary_factor": 2}, ValueError, "above 0 and at most 1, got 2"),
        ({"rope_theta": 1e4, "pairing": "pairs"}, ValueError, "pairing must be one of half, interleaved, got 'pairs'"),
    ],
)
def test_a_wrong_argument_says_what_is_allowed(rotary, error, message):
    with pytest.raises(error, match=message):
        patch_attention(GPT(), AFTER, rotary=rotary)
    with pytest.raises(error, match=message):
        all_lighthouse(rotary=rotary)


def test_yaml_can_hold_it():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LighthouseCallback, "lighthouse")
    text = "lighthouse: {attention: {rotate: after}, rotary: {rope_theta: 10000, pairing: interleaved}}"
    callback = parser.instantiate_classes(parser.parse_string(text)).lighthouse
    assert callback.attention.rotate == "after"
    assert callback.rotary == {"rope_theta": 10000.0, "pairing": "interleaved"}


def test_a_training_takes_what_is_given(tmp_path):
    with pytest.raises(SettingError, match="found no rotary frequencies"):
        fit(tmp_path, [all_lighthouse(0.5, AFTER)], max_steps=2)
    callback = all_lighthouse(0.5, AFTER, rotary={"rope_theta": 100.0})
    given, _ = fit(tmp_path, [callback], max_steps=2)
    plain, _ = fit(tmp_path, [all_lighthouse(0.5, BEFORE)], max_steps=2)
    assert not torch.equal(given.model.head.weight, plain.model.head.weight)
