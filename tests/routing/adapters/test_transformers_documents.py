"""Packed batches of transformers: documents are read from what the model is called with, and no mask is built."""

from __future__ import annotations

import pytest
import torch
from families import CONFIG, GROUPED, LAYERS, build_transformers
from foreign import VOCABULARY

from lightning_lighthouse import Documents, lighthouse_attention, patch_attention
from lightning_lighthouse.attention.sdpa import stock_sdpa
from lightning_lighthouse.checks import SettingError
from lightning_lighthouse.routing.adapters import transformers_mask
from lightning_lighthouse.routing.reasons import CrossingError
from lightning_lighthouse.routing.scope import scopes

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

LENGTHS = [40, 1, 56]
TOKENS = sum(LENGTHS)
PACKED = Documents([LENGTHS])


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    yield
    assert scopes == []
    assert transformers_mask._statements == []


@pytest.fixture
def llama():
    model = build_transformers("LlamaConfig", **GROUPED).model.double()
    model.config.use_cache = False
    return model


def features():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(VOCABULARY, (n,), generator=generator).tolist()} for n in LENGTHS]


def flattened(**settings):
    """A batch as transformers' collator makes it."""
    return transformers.DataCollatorWithFlattening(return_tensors="pt", **settings)(features())


def axolotl():
    """The same with segments for a mask, and padding behind."""
    batch = flattened()
    segments = PACKED.document_ids("cpu") + 1
    return {**batch, "attention_mask": segments}


FORMS = {
    "positions": flattened,
    "boundaries": lambda: flattened(return_position_ids=False, return_flash_attn_kwargs=True),
    "both": lambda: flattened(return_flash_attn_kwargs=True),
    "indices too": lambda: flattened(return_seq_idx=True),
    "segments": axolotl,
    "mask of ones": lambda: {**flattened(), "attention_mask": torch.ones(1, TOKENS, dtype=torch.long)},
}


def step(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_close(first, second):
    for a, b in zip(first, second, strict=True):
        # rotations are float32: at other positions they are rounded otherwise
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def one_by_one(model):
    """The loss of a packed batch by stock transformers, each document by itself."""
    model.zero_grad()
    losses, count = [], 0
    for feature in features():
        tokens = torch.tensor([feature["input_ids"]])
        if tokens.shape[1] > 1:
            losses.append(model(input_ids=tokens, labels=tokens).loss * (tokens.shape[1] - 1))
            count += tokens.shape[1] - 1
    loss = torch.stack(losses).sum() / count
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("use_cache", [False, True], ids=["", "cache"])
@pytest.mark.parametrize("form", FORMS)
def test_a_dense_step_equals_the_documents_one_by_one(llama, form, use_cache):
    expected = one_by_one(llama)
    llama.config.use_cache = use_cache
    patch = patch_attention(llama, CONFIG, documents=True)
    try:
        patch.dense()
        assert_close(step(llama, FORMS[form]()), expected)
        patch.check()
        # told beats read
        patch.set_documents(PACKED)
        assert_close(step(llama, FORMS[form]()), expected)
        patch.off()
        patch.set_documents(None)
        llama.eval()
        with torch.no_grad():
            torch.testing.assert_close(llama(**FORMS[form]()).loss, expected[0])
    finally:
        patch.restore()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
def test_a_routed_step_equals_lighthouse_in_each_document(llama, checkpointing):
    if checkpointing:
        llama.gradient_checkpointing_enable()
    batch = flattened()
    with patch_attention(llama, CONFIG, documents=True, dense_layers=[0]) as patch:
        found = step(llama, batch)
        assert patch.count_calls()["routed"] >= LAYERS - 1

    def by_hand(module, query, key, value, attention_mask, scaling=None, **others):
        key, value = (
            (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
            if not module.layer_idx
            else (key, value)
        )
        if module.layer_idx:
            out = lighthouse_attention(query, key, value, CONFIG, scale=scaling, documents=PACKED)
        else:
            parts = [
                stock_sdpa(*part, is_causal=True, scale=scaling)
                for part in zip(*(x.split(LENGTHS, 2) for x in (query, key, value)), strict=True)
            ]
            out = torch.cat(parts, 2)
        return out.transpose(1, 2), None

    transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS.register("documents_by_hand", by_hand)
    llama.set_attn_implementation("documents_by_hand")
    assert_close(found, step(llama, batch))


@pytest.mark.parametrize("phase", ["on", "dense"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
def test_what_is_computed_again_sees_the_documents_of_its_own_forward(llama, reentrant, phase):
    positions = (torch.arange(TOKENS)[None] % 70, torch.arange(TOKENS)[None] % 30)
    batches = [{**flattened(), "position_ids": x} for x in positions]
    llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
    patch = patch_attention(llama, CONFIG, documents=True)
    try:
        getattr(patch, phase)()
        llama.zero_grad()
        for batch in batches:
            llama(**batch).loss.backward()
        expected = [p.grad.clone() for p in llama.parameters()]
        llama.zero_grad()
        losses = [llama(**batch).loss for batch in batches]
        with torch.no_grad():
            llama(**flattened())
        sum(losses).backward()
        assert_close([p.grad for p in llama.parameters()], expected)
    finally:
        patch.restore()


def test_no_mask_is_built_and_the_config_is_as_it_was(llama, monkeypatch):
    masking = transformers.masking_utils
    made = []
    monkeypatch.setattr(masking, "sdpa_mask", lambda *args, **settings: made.append(args))
    before = llama.config._attn_implementation
    with patch_attention(llama, CONFIG, documents=True):
        llama(**flattened())
    assert made == []
    assert llama.config._attn_implementation == before == "sdpa"


def padded(how):
    """Eight tokens of padding behind the documents, with positions as somebody may have them."""
    batch = flattened()
    mask = torch.nn.functional.pad(torch.ones(1, TOKENS, dtype=torch.long), (0, 8))
    padding = {"zeros": torch.zeros(8), "ones": torch.ones(8), "on": torch.arange(56, 64)}[how].long()[None]
    return {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 8)),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 8), value=-100),
        "position_ids": torch.cat([batch["position_ids"], padding], 1),
        "attention_mask": mask,
    }


@pytest.mark.parametrize("how", ["zeros", "ones", "on"])
def test_padding_behind_the_documents_changes_nothing(llama, how):
    expected = one_by_one(llama)
    with patch_attention(llama, CONFIG, documents=True) as patch:
        patch.dense()
        assert_close(step(llama, padded(how)), expected)


WRONG = {
    "positions": (lambda: flattened(), [[41, 56]], "keeps other tokens apart than the documents do"),
    "a mask inside a document": (lambda: padded("on"), [[40, 1, 64]], "masks tokens of a document and not others"),
}


@pytest.mark.parametrize(("batch", "lengths", "words"), WRONG.values(), ids=WRONG)
def test_documents_that_contradict_what_the_model_is_called_with_are_an_error(llama, batch, lengths, words):
    patch = patch_attention(llama, CONFIG, documents=True)
    try:
        patch.on()
        patch.set_documents(Documents(lengths))
        with pytest.raises(ValueError, match=words):
            llama(**batch())
    finally:
        patch.restore()


SECOND = {
    "positions": lambda: {"position_ids": torch.arange(TOKENS)[None] % 50},
    "one row of positions": lambda: {"position_ids": torch.arange(TOKENS) % 50},
    "under a mask of ones": lambda: {
        "position_ids": torch.arange(TOKENS)[None] % 50,
        "attention_mask": torch.ones(1, TOKENS, dtype=torch.long),
    },
    "segments": lambda: {"attention_mask": 1 + torch.arange(TOKENS)[None] // 50},
    "boundaries": lambda: {"cu_seq_lens_q": torch.tensor([0, 50, TOKENS], dtype=torch.int32)},
}


@pytest.mark.parametrize("use_cache", [False, True], ids=["", "cache"])
@pytest.mark.parametrize("is_training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("second", SECOND)
def test_a_second_call_with_other_documents_than_those_told_is_an_error(llama, second, is_training, use_cache):
    llama.config.use_cache = use_cache
    tokens = flattened()["input_ids"]
    patch = patch_attention(llama, CONFIG, documents=True)
    try:
        patch.dense() if is_training else patch.off()
        llama.train(is_training)
        patch.set_documents(PACKED)
        with torch.set_grad_enabled(is_training):
            llama(input_ids=tokens, position_ids=PACKED.position_ids("cpu"))
            with pytest.raises(
                ValueError, match=r"called with \w+ that keeps other tokens apart than the documents do"
            ):
                llama(input_ids=tokens, **SECOND[second]())
    finally:
        patch.restore()


def test_ids_may_be_finer_than_what_a_model_is_called_with_and_padding_has_any_positions(llama):
    batch = padded("ones")
    finer = Documents([[*LENGTHS, 3, 5]])
    patch = patch_attention(llama, CONFIG, documents=True)
    try:
        patch.dense()
        patch.set_documents(finer)
        llama(**batch)
        del batch["position_ids"]
        llama(**batch)
        patch.set_documents(PACKED)
        llama(input_ids=flattened()["input_ids"], cu_seq_lens_q=torch.tensor([0, 41, TOKENS, TOKENS]))
    finally:
        patch.restore()


def test_a_training_batch_that_says_nothing_is_an_error_and_an_evaluation_is_not(llama):
    tokens = {"input_ids": torch.zeros(2, 20, dtype=torch.long)}
    patch = patch_attention(llama, CONFIG, documents=True)
    try:
        patch.on()
        with pytest.raises(SettingError, match="called without position_ids or cu_seq_lens_q"):
            llama(**tokens)
        patch.off()
        llama.eval()
        padding = torch.ones(2, 20, dtype=torch.long)
        padding[0, :7] = 0
        with torch.no_grad():
            found = llama(**tokens, attention_mask=padding).logits
    finally:
        patch.restore()
    with torch.no_grad():
        assert torch.equal(found, llama(**tokens, attention_mask=padding).logits)


def test_generation_and_steps_with_a_cache_are_those_of_the_model(llama):
    llama.eval()
    prompt = torch.arange(20)[None] % VOCABULARY
    settings = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}

    def by_hand():
        with torch.no_grad():
            out = llama(prompt, use_cache=True)
            cache = out.past_key_values if hasattr(out, "past_key_values") else out.cache
            name = "cache" if "cache" in llama.forward.__code__.co_varnames else "past_key_values"
            return llama(prompt[:, :1], position_ids=torch.tensor([[20]]), use_cache=True, **{name: cache}).logits

    expected, stepped = llama.generate(prompt, **settings), by_hand()
    patch = patch_attention(llama, CONFIG, documents=True)
    try:
        patch.on()
        patch.set_documents(PACKED)
        assert torch.equal(llama.generate(prompt, **settings), expected)
        patch.off()
        patch.set_documents(None)
        assert torch.equal(by_hand(), stepped)
    finally:
        patch.restore()


def test_a_layer_with_a_window_cannot_stay_inside_and_says_so(llama):
    llama.config.sliding_window = 16
    mistral = build_transformers("MistralConfig", **GROUPED, sliding_window=16).model.double()
    mistral.config.use_cache = False
    patch = patch_attention(mistral, CONFIG, documents=True)
    try:
        patch.dense()
        with pytest.raises(
            CrossingError, match=r"model\.layers\.0\.self_attn would attend across documents: attn_mask"
        ):
            mistral(**flattened())
    finally:
        patch.restore()


@pytest.mark.slow
def test_compiled_blocks_serve_batches_with_other_documents(llama):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    expected = one_by_one(llama)
    for block in llama.model.layers:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    patch = patch_attention(llama, CONFIG, documents=True)
    try:
        patch.dense()
        step(llama, {**flattened(), "position_ids": torch.arange(TOKENS)[None] % 50})
        assert_close(step(llama, flattened()), expected)
        patch.check()
    finally:
        patch.restore()
        torch._dynamo.reset()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_a_model_compiled_as_a_whole_is_refused_unless_documents_are_told(llama):
    expected = one_by_one(llama)
    compiled = torch.compile(llama, backend="aot_eager", dynamic=False)
    patch = patch_attention(llama, CONFIG, documents=True)
    try:
        patch.dense()
        with pytest.raises(Exception, match=r"compile its blocks, or call patch\.set_documents"):
            step(compiled, flattened())
        patch.set_documents(PACKED)
        assert_close(step(compiled, flattened()), expected)
    finally:
        patch.restore()
        torch._dynamo.reset()
