"""The statement that a transformers model's masks are plain causal: what it saves, and that a wrong one is caught."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from all_lighthouse import all_lighthouse
from families import CONFIG, GROUPED, Logits, build_transformers, transformers_by_hand
from foreign import VOCABULARY, ForeignModule, ResumableLoader
from lightning.pytorch import Trainer as LightningTrainer
from torch._dynamo.testing import CompileCounterWithBackend

from lightning_lighthouse import patch_attention, register_lighthouse_sdpa
from lightning_lighthouse.attention.sdpa import stock_sdpa
from lightning_lighthouse.checks import SettingError

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

TOKENS = 97
# a graph of the whole model takes as long as it has layers
LAYERS = 2


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    yield
    assert F.scaled_dot_product_attention is stock_sdpa
    torch._dynamo.reset()


def llama():
    return build_transformers("LlamaConfig", **GROUPED | {"num_hidden_layers": LAYERS}).model


def tokens(seed=0):
    return torch.randint(VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(seed))


RESTARTING = torch.cat([torch.arange(40), torch.arange(TOKENS - 40)]).expand(2, -1)
PADDING = (torch.arange(TOKENS) < 90).long().expand(2, -1)


def outputs(model, **settings):
    model.zero_grad()
    out = model(input_ids=tokens(), **settings).logits
    out.square().mean().backward()
    return out.detach(), model.lm_head.weight.grad.clone()


def close(first, second):
    return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(first, second, strict=True))


def stated(model, how):
    """Patched, with the statement made by the argument or by the model's own name of its attention."""
    if how == "name":
        model.set_attn_implementation(register_lighthouse_sdpa())
    return patch_attention(model, CONFIG, hf_assume_causal=how == "argument")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["argument", "name"])
@pytest.mark.parametrize(
    "call",
    [
        pytest.param({"use_cache": False}, id="no cache"),
        pytest.param({"attention_mask": torch.ones(2, TOKENS, dtype=torch.long)}, id="mask of ones"),
    ],
)
def test_a_whole_model_is_compiled_without_a_mask_once_it_is_stated_causal(call, how):
    # while a graph is traced transformers cannot look into masks and positions, and makes a mask
    model = llama()
    dense = outputs(model, **call)
    wrapped = Logits(model)
    with transformers_by_hand(wrapped, list(range(LAYERS))):
        routed = outputs(model, **call)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(model, backend=counter, fullgraph=True)
    run.zero_grad = model.zero_grad
    run.lm_head = model.lm_head

    without = patch_attention(model, CONFIG)
    without.on()
    assert close(outputs(run, **call), dense)
    assert "set hf_assume_causal=True" in str(without.unrouted())
    without.restore()

    patch = stated(model, how)
    seen = []
    for phase, expected in ((patch.on, routed), (patch.dense, dense), (patch.off, dense), (patch.on, routed)):
        phase()
        assert close(outputs(run, **call), expected)
        seen.append(counter.frame_count)
    assert patch.unrouted() == {}
    # Lighthouse, dense training without a mask, dense with one; nothing is compiled twice
    assert [count - seen[0] for count in seen] == [0, 1, 2, 2]
    patch.restore()
    assert model.config._attn_implementation == ("lighthouse_sdpa" if how == "name" else "sdpa")
    assert close(outputs(run, **call), dense)


@pytest.mark.parametrize("phase", ["on", pytest.param("dense", marks=pytest.mark.slow)])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"attention_mask": PADDING}, "masks tokens"),
        ({"position_ids": RESTARTING, "use_cache": False}, "restarting position_ids|position_ids restart"),
        (
            {"position_ids": RESTARTING, "use_cache": False, "attention_mask": PADDING},
            "masks tokens|position_ids restart",
        ),
    ],
    ids=["padding", "packed", "both"],
)
def test_a_wrong_statement_is_caught(call, words, compiled, phase):
    model = llama()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    patch = stated(model, "argument")
    getattr(patch, phase)()
    # batches that are as stated pass, before and after
    fine = {
        "attention_mask": torch.ones_like(PADDING) if "attention_mask" in call else None,
        "position_ids": torch.arange(TOKENS).expand(2, -1),
        "use_cache": False,
    }
    run(input_ids=tokens(), **fine)
    with pytest.raises(RuntimeError if compiled else ValueError, match=words):
        run(input_ids=tokens(), **call)
    run(input_ids=tokens(), **fine)
    patch.off()
    # outside of training every mask counts
    assert torch.equal(model(input_ids=tokens(), **call).logits, llama()(input_ids=tokens(), **call).logits)
    patch.restore()


def test_bidirectional_blocks_are_caught():
    masking = transformers.masking_utils
    model = llama()
    patch = stated(model, "argument")
    patch.on()
    blocks = torch.full((2, TOKENS), -1)
    blocks[0, 10:14] = 0
    with pytest.raises(ValueError, match="or blocks"):
        masking.create_causal_mask(model.config, torch.zeros(2, TOKENS, 8), None, None, block_sequence_ids=blocks)
    patch.restore()


def test_sliding_windows_custom_masks_and_four_dimensions_are_never_dropped():
    masking = transformers.masking_utils
    model = llama()
    model.config.sliding_window = 16
    patch = stated(model, "argument")
    patch.on()
    given = (model.config, torch.zeros(2, TOKENS, 8), None, None)
    assert masking.create_causal_mask(*given) is None
    assert masking.create_sliding_window_causal_mask(*given).shape == (2, 1, TOKENS, TOKENS)
    odd = masking.create_causal_mask(*given, and_mask_function=lambda b, h, q, kv: (q + kv) % 2 == 0)
    assert odd.shape == (2, 1, TOKENS, TOKENS)
    # a model that builds on the mask itself
    assert masking.create_causal_mask(*given, allow_is_causal_skip=False).shape == (2, 1, TOKENS, TOKENS)
    assert masking.create_bidirectional_mask(*given[:3]) is None
    four = torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).tril()
    model(input_ids=tokens(), attention_mask=four)
    assert "attn_mask was given" in str(patch.unrouted())
    patch.restore()


def test_the_statement_needs_a_transformers_model():
    with pytest.raises(SettingError, match=r"made with attn_implementation='sdpa' in GPT, found none"):
        patch_attention(ForeignModule().model, CONFIG, hf_assume_causal=True)
    eager = build_transformers("LlamaConfig", "eager", **GROUPED).model
    with pytest.raises(SettingError, match="found attn_implementation=eager"):
        patch_attention(eager, CONFIG, hf_assume_causal=True)
    with pytest.raises(TypeError, match="hf_assume_causal must be a bool, got 'yes'"):
        patch_attention(llama(), CONFIG, hf_assume_causal="yes")


def test_a_model_of_that_name_generates_with_padding_as_any_other():
    plain, named = llama().eval(), llama().eval()
    named.set_attn_implementation(register_lighthouse_sdpa())
    prompt = tokens()[:, :20]
    mask = torch.ones_like(prompt)
    mask[0, :7] = 0
    settings = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = plain.generate(prompt, **settings)
    assert torch.equal(named.generate(prompt, **settings), expected)
    with patch_attention(named, CONFIG) as patch:
        assert torch.equal(named.generate(prompt, **settings), expected)
        assert patch.is_on


@pytest.mark.slow
def test_the_callback_of_lightning_makes_the_statement_too(tmp_path):
    module = ForeignModule(model=Logits(llama()))
    module.model.model.config.use_cache = False
    module.model.compile(backend="aot_eager")
    callback = all_lighthouse(2, CONFIG, hf_assume_causal=True)
    trainer = LightningTrainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[callback],
    )
    trainer.fit(module, ResumableLoader(count=8))
    assert trainer.global_step == 4
    assert module.model.model.config._attn_implementation == "sdpa"
