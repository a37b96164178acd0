"""What cannot be routed is named, layer for layer, with the setting to change: shown with real models."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from families import CONFIG, GPT_2, GROUPED, LAYERS, LLAMA_LIKE, TRANSFORMERS, build_transformers
from families import FAMILIES as ALL_FAMILIES
from foreign import GPT, VOCABULARY, ForeignModule, GroupedGPT, ResumableLoader
from lightning.pytorch import Trainer
from places import DOCS, PACKAGE
from torch import nn

from lightning_lighthouse import LighthouseCallback, patch_attention

DOCUMENT = DOCS / "use" / "models.md"
TOKENS = 97


@pytest.fixture(autouse=True)
def _fresh_compiler():
    yield
    torch._dynamo.reset()


def tokens(length=TOKENS, seed=0):
    return torch.randint(VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def llama(attention="sdpa"):
    kind, settings = TRANSFORMERS["Llama"]
    return build_transformers(kind, attention, **settings)


def unrouted(model, *args, select=None, **settings):
    """What the model gave in one call while on, and the line of the check; "" where every layer was routed."""
    patch = patch_attention(model, CONFIG, dense_layers=[], select=select)
    try:
        patch.on()
        torch.manual_seed(0)
        out = model(*args, **settings)
        try:
            patch.check()
        except RuntimeError as error:
            return out, str(error)
    finally:
        patch.restore()
    return out, ""


def test_a_padding_mask_keeps_the_layers_dense_and_is_named():
    model = llama().model
    x, mask = tokens(), torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, 80:] = 0
    dense = model(x, attention_mask=mask).logits
    out, line = unrouted(model, x, attention_mask=mask)
    assert torch.equal(out.logits, dense)
    assert f"{LAYERS} of {LAYERS} attention layers" in line
    assert "model.layers.1.self_attn, model.layers.2.self_attn" in line
    assert "attn_mask was given (call the model without attention_mask: padding cannot be routed" in line
    assert unrouted(model, x, attention_mask=torch.ones_like(mask))[1] == ""


def test_packed_documents_are_named():
    model = llama().model
    positions = torch.cat([torch.arange(40), torch.arange(TOKENS - 40)]).expand(2, -1)
    with pytest.raises(ValueError, match=r"packs documents \(position_ids restart\).* set documents=True"):
        unrouted(model, tokens(), position_ids=positions, use_cache=False)


@pytest.mark.slow
def test_a_compiled_model_that_transformers_gives_a_mask_is_told_of_both_ways_out():
    # without a cache object it looks for packed documents, which it cannot do while a graph is traced
    model = llama()
    model.model.config.use_cache = False
    model.compile(backend="eager")
    _, line = unrouted(model, tokens())
    assert "compile the blocks instead, or set hf_assume_causal=True" in line


def test_a_sliding_window_is_named_with_its_size():
    model = build_transformers("MistralConfig", **GROUPED, sliding_window=16)
    _, line = unrouted(model, tokens())
    assert "attn_mask was given (sequences longer than sliding_window=16 cannot be routed: leave it dense" in line
    wide = build_transformers("MistralConfig", **GROUPED, sliding_window=200)
    assert unrouted(wide, tokens())[1] == ""


def test_layers_with_windows_beside_others_are_no_fault_and_stay_as_they_are():
    kinds = ["sliding_attention", "full_attention"] * 2
    model = build_transformers("Qwen2Config", **GROUPED, use_sliding_window=True, sliding_window=16, layer_types=kinds)
    patch = patch_attention(model, CONFIG)
    assert [name.split(".")[3] for name in patch.targets] == ["1", "3"]
    patch.restore()
    assert unrouted(model, tokens())[1] == ""


def test_dropout_is_named_with_the_setting_and_its_value():
    model = build_transformers("GPT2Config", **GPT_2 | {"attn_pdrop": 0.1})
    _, line = unrouted(model, tokens())
    assert "dropout_p is not 0 (set attn_pdrop=0 (now 0.1) in the model's config)" in line
    model = build_transformers("LlamaConfig", **GROUPED, attention_dropout=0.2)
    assert "set attention_dropout=0 (now 0.2)" in unrouted(model, tokens())[1]
    assert unrouted(model.eval(), tokens())[1] == ""


def test_dropout_in_a_model_of_ones_own_is_named():
    model = GroupedGPT()
    for block in model.blocks:
        block.attn.dropout = 0.1
    _, line = unrouted(model, tokens())
    assert "dropout_p is not 0 (set the dropout of the attention weights to 0" in line


def test_another_attention_implementation_is_named_with_the_one_to_set(tmp_path):
    trainer = Trainer(
        max_steps=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[LighthouseCallback(2, CONFIG)],
    )
    with pytest.raises(RuntimeError) as caught:
        trainer.fit(ForeignModule(model=llama("eager")), ResumableLoader(count=8))
    words = "the model was made with attn_implementation='eager': make it with attn_implementation='sdpa'"
    assert f"no call of scaled_dot_product_attention was seen ({words})" in str(caught.value)


@pytest.mark.parametrize("name", ["flash_attention_2", "my_kernel"])
def test_a_kernel_that_never_calls_sdpa_is_named(name):
    # the kernels themselves need a GPU or packages; what the model then does without SDPA is the same
    modeling = pytest.importorskip("transformers.modeling_utils", reason="needs the extra hf")

    def kernel(module, query, key, value, attention_mask, **settings):
        return query.transpose(1, 2), None

    table = modeling.ALL_ATTENTION_FUNCTIONS
    model = llama()
    former = table.get(name)
    table[name] = kernel
    try:
        model.model.config._attn_implementation_internal = name
        _, line = unrouted(model, tokens())
    finally:
        del table[name]
        if former is not None:
            table.register(name, former)
    assert f"made with attn_implementation='{name}': make it with attn_implementation='sdpa'" in line


def test_softcapped_scores_are_named_as_beyond_routing():
    _, settings = TRANSFORMERS["Qwen3"]
    model = build_transformers("Gemma2Config", None, **settings)
    _, line = unrouted(model, tokens())
    assert "attn_logit_softcapping=50.0 is beyond SDPA, and so beyond Lighthouse: such a model" in line


def test_attention_sinks_are_named_as_beyond_routing():
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
    model = build_transformers("GptOssConfig", None, **GROUPED | experts)
    _, line = unrouted(model, tokens())
    assert "was seen (transformers has no attn_implementation='sdpa' for this family: it cannot be routed)" in line


def test_latent_attention_is_named():
    latent = {"kv_lora_rank": 16, "q_lora_rank": None, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    model = build_transformers("DeepseekV3Config", **LLAMA_LIKE, **latent, first_k_dense_replace=LAYERS)
    _, line = unrouted(model, tokens())
    assert "batch sizes or head dims of q, k and v differ (q, k and v must have one batch size and one head dim" in line


def test_a_bidirectional_model_is_named():
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=24,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.BertModel(config)
    _, line = unrouted(model, tokens())
    assert "2 of 2 attention layers" in line
    assert "is_causal is False (pass is_causal=True if the layer is causal; else it cannot be routed" in line


def test_cross_attention_is_named_and_only_it():
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=24,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=160,
        dropout=0.0,
    )
    torch.manual_seed(0)
    model = transformers.BartModel(config).train()
    _, line = unrouted(model, input_ids=tokens(80), decoder_input_ids=tokens())
    assert "3 of 5 attention layers" in line
    named = re.findall(r"[\w.]+_attn|[\w.]+encoder_attn", line)
    assert sorted(set(named)) == [
        "decoder.layers.0.encoder_attn",
        "decoder.layers.1.encoder_attn",
        "encoder.layers.0.self_attn",
    ]
    assert unrouted(model, input_ids=tokens(80), decoder_input_ids=tokens(), select="decoder*.self_attn")[1] == ""


def test_attention_written_out_is_named():
    package = pytest.importorskip("x_transformers", reason="needs the extra models")
    torch.manual_seed(0)
    layers = package.Decoder(dim=24, depth=3, heads=3, attn_dim_head=8)
    model = package.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=160, attn_layers=layers)
    _, line = unrouted(model, tokens())
    assert "attention is written out, or runs another kernel: call" in line
    assert "lightning_lighthouse.causal_attention in its forward" in line


def test_litgpt_with_a_window_or_a_softcap_is_named():
    model = ALL_FAMILIES["litgpt"].build()
    windowed = copy.deepcopy(model)
    for block in windowed.transformer.h:
        block.attn.apply_sliding_window_attention = True
        block.attn.config.sliding_window_size = 16
    _, line = unrouted(windowed, tokens())
    assert "attn_mask was given (a mask is never ignored" in line
    capped = ALL_FAMILIES["litgpt"].build()
    capped.config.attention_logit_softcapping = 30.0
    _, line = unrouted(capped, tokens())
    assert "no call of scaled_dot_product_attention was seen (attention is written out" in line


def test_a_layer_that_does_not_run_is_named():
    class EarlyExit(GPT):
        def forward(self, x):
            x = self.embed(x) + self.position(torch.arange(x.shape[1]))
            for block in self.blocks[:2]:
                x = block(x)
            return self.head(x)

    _, line = unrouted(EarlyExit(), tokens())
    assert "2 of 4 attention layers" in line
    assert "blocks.2.attn, blocks.3.attn: its forward did not run (the model did not call this module" in line


def test_a_frozen_part_without_gradients_is_named():
    class HalfFrozen(GPT):
        def forward(self, x):
            x = self.embed(x) + self.position(torch.arange(x.shape[1]))
            with torch.no_grad():
                for block in self.blocks[:2].eval():
                    x = block(x)
            for block in self.blocks[2:]:
                x = block(x)
            return self.head(x)

    _, line = unrouted(HalfFrozen(), tokens())
    assert "2 of 4 attention layers" in line
    assert "blocks.0.attn, blocks.1.attn: it ran without gradients in eval mode (a frozen part of the model" in line


def test_a_model_that_never_calls_sdpa_is_refused_with_what_was_found():
    class WrittenOutAttention(nn.Module):
        def forward(self, x):
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            return (x @ x.mT).masked_fill(later, -torch.inf).softmax(-1) @ x

    model = nn.Sequential(nn.Linear(24, 24), WrittenOutAttention())
    with pytest.raises(ValueError, match="no module calls SDPA in Sequential") as caught:
        patch_attention(model, CONFIG)
    assert "that look like attention: 1 (WrittenOutAttention); call it, or" in str(caught.value)
    with pytest.raises(ValueError, match=r"no module calls SDPA in Sequential: .* that look like attention: none"):
        patch_attention(nn.Sequential(nn.Linear(2, 2)), CONFIG)


def test_warn_goes_on_with_the_layers_dense():
    model = llama("eager")
    expected = model(tokens())
    patch = patch_attention(model, CONFIG)
    patch.on()
    assert torch.equal(model(tokens()), expected)
    with pytest.warns(UserWarning, match=r"4 of 4 attention layers .* attn_implementation='eager'"):
        patch.check("warn")
    # said once
    patch.check()
    patch.restore()


def test_leaving_the_context_unchecked_checks():
    with pytest.raises(RuntimeError, match="attn_implementation='eager'"), patch_attention(llama("eager"), CONFIG) as p:
        p.model(tokens())
    with patch_attention(llama("eager"), CONFIG):
        pass
    # an error on the way is not hidden by another
    with pytest.raises(IndexError), patch_attention(llama("eager"), CONFIG) as p:
        p.model(tokens() + VOCABULARY)


def test_the_reasons_of_the_document_are_those_of_the_code():
    section = DOCUMENT.read_text().split("## Reading the error")[1].split("## ")[0]
    reasons = re.findall(r"^\| `(.*?)` \|", section, flags=re.MULTILINE)
    code = (PACKAGE / "routing" / "reasons.py").read_text()
    assert len(reasons) > 8
    assert [reason for reason in reasons if f'= "{reason}"\n' not in code] == []
